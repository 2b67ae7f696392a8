"""What is known of other libraries' private names, in one module per library.

Features are told by signatures and attributes, never by version numbers: a development build or a fork
has the number of one release and the names of another.
"""
