"""What trains and evaluates the built-in models. Not installed: run it from the repository."""
