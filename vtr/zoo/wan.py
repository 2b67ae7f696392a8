"""The built-in video generator: diffusers' ``WanTransformer3DModel`` in diffusers' ``WanPipeline``.

The transformer and the pipeline's denoising loop (scheduler, guidance in two calls, cache contexts,
callbacks, progress bar) are those of diffusers. Two parts of a Wan checkpoint are replaced, because
they would be a hundred times the size of the transformer here:

- the autoencoder, by :class:`Pixels`, which has nothing to learn: latents are the grey pixels;
- UMT5, by :class:`WordTable`, a fixed vector for each of fifteen words, with :class:`Words` as its
  tokenizer. :class:`DigitsPipeline` overrides the one method of ``WanPipeline`` that pads prompts
  to the length of UMT5.

This module imports diffusers; :func:`vtr.zoo.load_pipeline` imports it when it is asked to.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vtr.errors import missing

try:
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
except ImportError as error:
    raise missing("diffusers", "diffusion", "the built-in video generator") from error

from vtr.zoo.videos import DIRECTIONS

PATCH = 2  # pixels, side of a patch; a patch is one frame deep
FRAMES, HEIGHT, WIDTH = 5, 16, 32
STEPS = 12
GUIDANCE = 4.5
SHIFT = 3.5  # of the noise levels in sampling
TEXT = 32  # dimension of a word

WORDS = tuple(str(d) for d in range(10)) + DIRECTIONS
NOTHING = len(WORDS)  # the token of an empty prompt, and of what a prompt leaves out
FILLERS = frozenset({"a", "the", "digit", "moving"})  # read over


def build() -> WanTransformer3DModel:
    """A randomly initialised transformer: patches of 2 x 2 pixels, 5 blocks of dimension 128 with 4
    heads of 32, rotary positions in time, height and width; 1.3 M parameters."""
    return WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        text_dim=TEXT,
        freq_dim=128,
        ffn_dim=384,
        num_layers=5,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def words() -> Tensor:
    """The vector of every word and of :data:`NOTHING`, ``(15, 32)`` float32: fixed, not learned."""
    return torch.randn(len(WORDS) + 1, TEXT, generator=torch.Generator().manual_seed(7))


class Words:
    """Tokenizer of prompts such as ``"a 7 moving right"``: one digit and one direction, each of
    which may be left out."""

    def __call__(self, prompts: list[str]) -> Tensor:
        """Tokens, ``(n, 2)`` int64: the digit, then the direction.

        Raises:
            ValueError: a word is unknown, or there are two digits or two directions.
        """
        return torch.tensor([self._tokens(prompt) for prompt in prompts])

    def offsets(self, prompt: str) -> list[tuple[int, int]]:
        """The characters (start, end) of the digit and of the direction; (0, 0) for one that is left out.

        Raises:
            ValueError: as a call.
        """
        tokens, spans = self._tokens(prompt), [(0, 0), (0, 0)]
        for match in re.finditer(r"[^\s,.]+", prompt.lower()):
            if match.group() in WORDS:
                spans[tokens.index(WORDS.index(match.group()))] = match.span()
        return spans

    def _tokens(self, prompt: str) -> list[int]:
        tokens = [NOTHING, NOTHING]
        for word in prompt.lower().replace(",", " ").replace(".", " ").split():
            if word in FILLERS:
                continue
            if word not in WORDS:
                raise ValueError(
                    f"the built-in generator does not know {word!r} in {prompt!r}: say a digit and "
                    f"one of {', '.join(DIRECTIONS)}, as in 'a 7 moving right'"
                )
            index = WORDS.index(word)
            place = int(index >= 10)
            if tokens[place] != NOTHING:
                what = "directions" if place else "digits"
                raise ValueError(f"{prompt!r} names two {what}: the built-in generator takes one")
            tokens[place] = index
        return tokens


class WordTable(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Text encoder: looks every token up in :func:`words`."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(words(), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(n, 2)`` int64 to ``(n, 2, 32)``."""
        return self.table[tokens]


class Pixels(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Autoencoder without compression: the one latent channel is grey in [-1, 1], and decoding
    repeats it for red, green and blue."""

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        z_dim: int = 1,
        scale_factor_temporal: int = 1,
        scale_factor_spatial: int = 1,
        latents_mean: tuple[float, ...] = (0.0,),
        latents_std: tuple[float, ...] = (1.0,),
    ) -> None:
        super().__init__()
        # The pipeline asks for the dtype and the device of a module's parameters.
        self.unit = nn.Parameter(torch.ones(1), requires_grad=False)

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """``(n, 1, F, H, W)`` to ``((n, 3, F, H, W),)``, clipped to [-1, 1]."""
        if return_dict:
            raise ValueError(
                "this autoencoder returns a tuple: call decode(..., return_dict=False)"
            )
        return (latents.clamp(-1, 1).expand(-1, 3, -1, -1, -1),)


class DigitsPipeline(WanPipeline):  # type: ignore[misc]
    """``WanPipeline`` with the defaults and the prompts of the built-in generator.

    >>> pipe = vtr.zoo.load_pipeline("digits-wan")  # doctest: +SKIP
    >>> frames = pipe("a 7 moving right").frames  # doctest: +SKIP

    ``frames`` is ``(n, 5, 16, 32, 3)`` in [0, 1]; ``output_type="latent"`` gives
    ``(n, 1, 5, 16, 32)`` in about [-1, 1], ``"pil"`` lists of pictures. All other arguments of
    ``WanPipeline`` work as there.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        scheduler: Any,
        transformer: Any = None,
        transformer_2: Any = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        # All by name: DiffusionPipeline checks this signature against its components.
        super().__init__(
            tokenizer,
            text_encoder,
            vae,
            scheduler,
            transformer,
            transformer_2,
            boundary_ratio,
            expand_timesteps,
        )
        # WanPipeline rounds the number of frames to one more than a multiple of the autoencoder's
        # step in time, and with a step of one it would always add a frame. So it counts in half
        # frames: __call__ asks it for 2 n - 1 of them, which are n latent frames.
        self.vae_scale_factor_temporal = 2

    def _get_t5_prompt_embeds(
        self,
        prompt: str | list[str] | None = None,
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = 2,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [""])
        device = device or self._execution_device
        found = self.text_encoder(self.tokenizer(prompts).to(self.text_encoder.device))
        found = found.to(device=device, dtype=dtype or self.text_encoder.dtype)
        return found.repeat_interleave(num_videos_per_prompt, 0)

    def __call__(self, prompt: str | list[str] | None = None, **options: Any) -> Any:
        """``WanPipeline.__call__``, at 5 frames of 16 x 32, 12 steps and guidance 4.5 by default."""
        options.setdefault("height", HEIGHT)
        options.setdefault("width", WIDTH)
        options["num_frames"] = 2 * options.get("num_frames", FRAMES) - 1
        options.setdefault("num_inference_steps", STEPS)
        options.setdefault("guidance_scale", GUIDANCE)
        return super().__call__(prompt, **options)


def pipeline(transformer: WanTransformer3DModel) -> DigitsPipeline:
    """The pipeline around a transformer of :func:`build`."""
    return DigitsPipeline(
        tokenizer=cast(Any, Words()),
        text_encoder=cast(Any, WordTable()),
        vae=cast(Any, Pixels()),
        scheduler=UniPCMultistepScheduler(  # Wan's own
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        ),
        transformer=transformer,
    )


def load(folder: Path, dtype: torch.dtype | None = None) -> DigitsPipeline:
    """The pipeline around the transformer saved in ``folder``, in eval mode, on the CPU.

    Args:
        folder: written by ``save_pretrained`` or by a training run.
        dtype: of the transformer; None for float32.
    """
    with torch.random.fork_rng(devices=[]):
        model = WanTransformer3DModel.from_pretrained(
            folder, torch_dtype=dtype or torch.float32, local_files_only=True
        )
    return pipeline(model.eval())
