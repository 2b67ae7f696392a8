"""The parts that all others use: tokens, budgets, sites, methods, and the life of a wrapped model."""
