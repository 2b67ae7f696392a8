"""Expectations of each library, in one module per library: read by :mod:`vtr.compat.contract`."""
