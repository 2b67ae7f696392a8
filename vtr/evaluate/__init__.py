"""Measuring what a method costs in accuracy: the built-in benchmarks."""
