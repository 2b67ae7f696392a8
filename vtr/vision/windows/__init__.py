"""Encoders whose blocks work in windows: Swin and Swin V2 (whole windows skip blocks), and SAM (the tokens of
every window are merged). Tokens come back behind the blocks, so that all that follows sees the full grid."""
