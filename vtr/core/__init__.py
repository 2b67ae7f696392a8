"""What everything else builds on: tokens, budgets, sites, methods, and the life of a wrapped model."""
