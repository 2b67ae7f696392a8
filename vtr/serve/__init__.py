"""An OpenAI-compatible server for vision-language models whose visual tokens are reduced.

:mod:`vtr.serve.running` starts it; ``vtr serve`` is its command. Nothing here is imported by ``import vtr``.
"""
