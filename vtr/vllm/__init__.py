"""A plug-in of vLLM: prompt-site methods on LLaVA and Qwen2.5-VL behind its server.

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``). It adds two
architectures; a served model takes one of them and its method from its configuration::

    vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides '{
        "architectures": ["VTRLlavaForConditionalGeneration"], "vtr": "divprune:keep=64"}'

Nothing changes for a model that names neither. docs/serving-vllm.md says what works and what cannot.
"""

from __future__ import annotations

ARCHITECTURES = {
    "VTRLlavaForConditionalGeneration": "vtr.vllm.llava:VTRLlava",
    "VTRQwen2_5_VLForConditionalGeneration": "vtr.vllm.qwen:VTRQwen2_5_VL",
}
"""Architecture, as a configuration names it, to the class that vLLM imports for it."""


def register() -> None:
    """Tell vLLM of the architectures. Calling it again changes nothing."""
    from vllm import ModelRegistry

    for name, where in ARCHITECTURES.items():
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, where)
