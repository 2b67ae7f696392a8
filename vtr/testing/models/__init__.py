"""Tiny random models of the real classes. Each module needs the library whose classes it builds."""
