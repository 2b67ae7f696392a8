"""What is known of other libraries' private and unstable names, in one module per library.

``vtr.compat.LIBRARY`` has names, and functions that use a private one; ``vtr.compat.contracts.LIBRARY``
says what is expected of each name, and :mod:`vtr.compat.contract` holds that against what is installed.
:mod:`vtr.compat.tested` has the versions that the tests have run on. Nothing here imports a library (other
than torch) before it is used.

Features are told by signatures and attributes, never by version numbers: a development build or a fork
has the number of one release and the names of another.
"""
