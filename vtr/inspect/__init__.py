"""Cost and pictures of a wrapped model: measured profiles, FLOPs, memory and pictures."""
