"""Adapters for image models. Each module is imported only when a model of its library is wrapped."""
