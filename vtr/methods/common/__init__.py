"""Code that several methods share, by subject. An author imports :mod:`vtr.methods.base` first."""
