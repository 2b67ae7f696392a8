"""Training and evaluation of the built-in models. Not installed: run it from the repository."""
