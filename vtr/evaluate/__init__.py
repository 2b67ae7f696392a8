"""Evaluation of methods: accuracy and cost on benchmarks, and the built-in benchmarks."""
