"""The ``vtr`` command."""
