"""Image encoders: timm, open_clip, and the vision towers of transformers."""
