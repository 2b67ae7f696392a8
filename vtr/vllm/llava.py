"""LLaVA in vLLM with fewer tokens of each picture."""

from __future__ import annotations

import math
from typing import Any

from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtr.errors import UnsupportedMethodError
from vtr.vllm.cut import cut_of
from vtr.vllm.processing import Shortening


class LlavaProcessor(Shortening, LlavaMultiModalProcessor):
    family = "llava"


@MULTIMODAL_REGISTRY.register_processor(
    LlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VTRLlava(LlavaForConditionalGeneration):
    """vLLM's LLaVA, whose pictures are cut by the method of its configuration.

    Positions are numbered one after the other, as vLLM numbers every token of this model.

    Raises:
        UnsupportedMethodError: the method does not work here, or looks into a tower that is spread over
            several devices.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        self_cut = cut_of(vllm_config.model_config.hf_config, "llava")
        if self_cut.looks and vllm_config.parallel_config.tensor_parallel_size > 1:
            raise UnsupportedMethodError(
                f"{self_cut.method.name} needs the attention of all heads of the vision tower, which tensor "
                "parallelism spreads over devices: use tensor_parallel_size=1, or divprune"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.cut = self_cut

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Compute the tokens of pictures: (pictures, K, C), K of :meth:`vtr.vllm.cut.Cut.number`."""
        tower = self.vision_tower.vision_model.encoder.layers if self.cut.looks else ()
        with self.cut.looking(tower, self.config.vision_config.num_attention_heads) as memory:
            tokens = super().embed_multimodal(**kwargs)
        if len(tokens) == 0:
            return tokens
        side = math.isqrt(tokens.shape[1])
        kept = self.cut.choose(tokens, (side, side), memory)
        return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
