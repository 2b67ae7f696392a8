"""Private and unstable names of other libraries, in one module per library.

``vtr.compat.LIBRARY`` has names, and functions that use a private one. ``vtr.compat.contracts.LIBRARY``
lists the expectations of each name, and :mod:`vtr.compat.contract` checks them on the installed library.
:mod:`vtr.compat.tested` has the versions that the tests have run on. Nothing here imports a library (other
than torch) before it is used.

Features are detected by signatures and attributes, never by version numbers: a development build or a fork
has the number of one release and the names of another.
"""
