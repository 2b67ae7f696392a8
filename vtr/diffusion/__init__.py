"""Image and video generators: what sparse attention and token merging see of a diffusion transformer.

``site`` is the contract with methods (no dependency); ``adapter`` and what it uses need diffusers and
are imported when ``vtr.apply`` meets one of its objects.
"""
