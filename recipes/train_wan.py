"""Recipe of the built-in video generator: moving digits, in about 45 minutes of a CPU core.

Flow matching in pixels: the network sees ``(1 - t) x + t noise`` and predicts ``noise - x``. What
makes it fit in that time:

- Stages from small to large: single pictures, short clips, then mixes with the full size. Rotary
  positions are relative, so what is learned on a small picture carries over at once.
- In three of five steps every frame has another noise level (Wan 2.2 takes a time for every
  token), and in most of those clips one frame is clean: the network must read the motion off it.
  With it, the network moved a given frame the right way in every case after 6800 steps.
- That does not make it choose the right way from noise alone: half of such videos still went wrong
  after 7200 steps. The way is decided at noise levels above .85, which were in a tenth of the clips.
  The last stage draws them four times as often, and after its 1800 steps 19 of 20 were right.
- One token of motion per frame, so that the content of a patch moves as a whole.
- Plain attention in training: the backward pass of torch's fused kernel is slow on CPUs. A third of
  the time was spent on giving memory back to the system; ``MALLOC_MMAP_THRESHOLD_=4000000000
  MALLOC_TRIM_THRESHOLD_=8000000000`` in the environment stops glibc from doing so.

Everything follows the step number, never the clock: a run can be stopped and resumed.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from recipes.state import Resumable
from vtr.compat.torch import blend
from vtr.zoo import wan
from vtr.zoo.videos import videos

Size = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class Stage:
    """A stage of the training run.

    Attributes:
        steps: optimiser steps.
        sizes: frames, height and width of the clips; one of them is drawn for every step.
        rates: learning rate at the start and at the end, a half cosine between them.
        own_levels: share of the steps on clips whose frames have different noise levels.
        shift: of the noise levels towards noise.
    """

    steps: int
    sizes: tuple[Size, ...]
    rates: tuple[float, float]
    own_levels: float = 0.6
    shift: float = 2.5


STAGES = (
    Stage(1600, ((1, 16, 16),), (2e-3, 1.8e-3)),
    Stage(1600, ((1, 16, 16), (2, 16, 16), (4, 16, 16)), (1.8e-3, 1.5e-3)),
    Stage(2400, ((1, 16, 16), (4, 16, 16), (1, 16, 32), (5, 16, 32)), (1.5e-3, 3e-5)),
    Stage(1600, ((4, 16, 16), (1, 16, 32), (5, 16, 32), (5, 16, 32)), (1.2e-3, 2e-5)),
    # Motion was read off a clean frame without fault by now, but half of the videos made from noise
    # alone went the wrong way: that is decided early, at noise levels that were rare so far.
    Stage(
        1800,
        ((4, 16, 16), (1, 16, 32), (5, 16, 32), (5, 16, 32)),
        (1.2e-3, 2e-5),
        own_levels=0.2,
        shift=5.0,
    ),
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    Attributes:
        stages: one after the other.
        tokens: about how many a step has; the batch follows from it and the size.
        seed: of the weights and the videos.
        clean: share of these clips that have one clean frame, which is the first one in half of
            them; it has no loss.
        drop: share of the prompts that are emptied, for guidance.
        spread: standard deviation of the logit of the noise level before the shift.
        ema: decay of the averaged weights, which are the ones kept.
    """

    stages: tuple[Stage, ...] = STAGES
    tokens: int = 3072
    seed: int = 5
    clean: float = 0.6
    drop: float = 0.1
    spread: float = 1.3
    weight_decay: float = 0.01
    ema: float = 0.995

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def batch(self) -> float:
        """Clips per step, mean over the run, for the progress bar."""
        clips = sum(
            stage.steps * sum(self.clips(size) for size in stage.sizes) / len(stage.sizes)
            for stage in self.stages
        )
        return clips / self.steps

    def clips(self, size: Size) -> int:
        """Clips of a size in one step."""
        return max(5, round(self.tokens * wan.PATCH**2 / math.prod(size)))

    def at(self, step: int) -> tuple[Stage, float]:
        """Stage and learning rate of a step, counted from 0."""
        start = 0
        for stage in self.stages:
            if step < start + stage.steps:
                break
            start += stage.steps
        first, last = stage.rates
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - start) / stage.steps)))
        return stage, (last + (first - last) * cosine) * min(1.0, (step + 1) / 50)


class PlainAttention:
    """Wan's attention as matrix products and a softmax, all in the autocast dtype.

    Same mathematics as diffusers' ``WanAttnProcessor`` without added keys of images.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        value = attn.to_v(source).unflatten(2, (attn.heads, -1))
        query = rms_norm(attn.to_q(hidden_states), attn.norm_q).unflatten(2, (attn.heads, -1))
        key = rms_norm(attn.to_k(source), attn.norm_k).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            cos, sin = (t.to(value.dtype) for t in rotary_emb)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):  # the softmax would be in float32
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
            out = scores.softmax(-1) @ value
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    """``norm`` in the dtype of ``x``, which lets torch fuse it."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; ``x`` is ``(n, tokens, heads, d)``, neighbouring channels are pairs."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


def levels(
    recipe: Recipe, stage: Stage, n: int, frames: int, own: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Noise levels in [0, 1] and weights of the loss, each ``(n, frames)`` if ``own``, else
    ``(n, 1)``."""
    shape = (n, frames if own else 1)
    level = torch.sigmoid(torch.randn(shape, generator=generator) * recipe.spread)
    level = stage.shift * level / (1 + (stage.shift - 1) * level)
    if not own:
        return level, torch.ones(shape)
    anchored = torch.rand(n, 1, generator=generator) < recipe.clean
    anywhere = torch.randint(frames, (n, 1), generator=generator)
    first = torch.rand(n, 1, generator=generator) < 0.5
    clean = anchored & (torch.arange(frames) == torch.where(first, 0, anywhere))
    return level.masked_fill(clean, 0.0), (~clean).float()


def flow_loss(
    model: Any, recipe: Recipe, stage: Stage, size: Size, generator: torch.Generator
) -> Tensor:
    """Loss of one batch of clips of a size, under bfloat16 autocast on the CPU.

    Args:
        model: a ``WanTransformer3DModel``, wrapped or not.
    """
    frames, height, width = size
    batch = videos(recipe.clips(size), generator, frames, height, width)
    n = len(batch.digits)
    own = frames > 1 and torch.rand((), generator=generator).item() < stage.own_levels
    level, weight = levels(recipe, stage, n, frames, own, generator)
    noise = torch.randn(batch.pixels.shape, generator=generator)
    at = level[:, None, :, None, None]
    tokens_per_frame = height * width // wan.PATCH**2
    time = level.repeat_interleave(tokens_per_frame, 1) if own else level[:, 0]

    prompt = torch.stack([batch.digits, 10 + batch.directions], 1)
    if frames == 1:  # a picture does not move: half of the prompts say nothing of it
        silent = torch.rand(n, generator=generator) < 0.5
        prompt[silent, 1] = wan.NOTHING
    prompt[torch.rand(n, generator=generator) < recipe.drop] = wan.NOTHING
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model(
            hidden_states=(1 - at) * batch.pixels + at * noise,
            timestep=time * 1000,
            encoder_hidden_states=wan.words()[prompt],
            return_dict=False,
        )[0]
    error = F.mse_loss(predicted.float(), noise - batch.pixels, reduction="none")
    return (error.mean((1, 3, 4)) * weight).sum() / weight.sum()


class Trainer(Resumable):
    """A run of a :class:`Recipe`, one :meth:`step` at a time."""

    PARTS = ("model", "averaged")

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.position = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model: Any = wan.build()
        for block in self.model.blocks:
            block.attn1.processor = block.attn2.processor = PlainAttention()
        self.averaged: Any = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=1e-3,
            weight_decay=recipe.weight_decay,
            betas=(0.9, 0.98),
            fused=True,
        )

    def step(self) -> dict[str, float]:
        """One optimiser step; its ``loss``."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.position)
        stage, rate = recipe.at(self.position)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        size = stage.sizes[int(torch.randint(len(stage.sizes), (), generator=generator))]
        loss = flow_loss(self.model, recipe, stage, size, generator)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.position += 1
        self._average()
        return {"loss": loss.item()}

    @torch.no_grad()
    def _average(self) -> None:
        # The average of few steps must not remember the random start.
        decay = min(self.recipe.ema, self.position / (self.position + 9))
        kept, new = list(self.averaged.parameters()), list(self.model.parameters())
        blend(kept, new, 1 - decay)

    # ---- what is left -----------------------------------------------------------------------

    def result(self) -> nn.Module:
        """The averaged model, as it is now."""
        return self.averaged

    def export(self, directory: Path) -> None:
        """Write the averaged model as ``from_pretrained`` reads it, weights in bfloat16."""
        directory.mkdir(parents=True, exist_ok=True)
        self.averaged.save_config(directory)
        tensors = {k: v.bfloat16().contiguous() for k, v in self.averaged.state_dict().items()}
        save_file(tensors, directory / "diffusion_pytorch_model.safetensors")
