"""Losses and loops for the methods that learn."""
