"""What a wrapped model did: reports, measured profiles, FLOPs, memory and pictures."""
