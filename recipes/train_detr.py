"""Recipe of the built-in detector: digits on photographs, on one CPU core.

What makes it fit in that time:

- The first stage is trained densely: about three tokens per digit learn to score it and to give its box,
  and class heads that are thrown away read the digit off the tokens before and behind the encoder. The
  decoder starts from boxes that are good after a few hundred steps.
- Scores learn the IoU of their boxes (varifocal loss), which ranks boxes as mAP wants them.
- Batch normalisation is alive in training. Its statistics are frozen in the last steps, and the model that
  ships has transformers' frozen layers with the same numbers.
- bfloat16 autocast, except in the heads, whose boxes need more digits.
- Most batches refresh only some of the tokens in the encoder; the others pass all its layers
  unchanged. It saves time, and whoever compares methods of token reduction on the model should know:
  even steps keep tokens in boxes first, chosen with the generator's own knowledge, odd steps a uniformly
  random set. Random choices are nothing new to the model.

The learning rate is constant, then falls linearly in the last steps: all before them is the same for
any length of the run. A batch is a function of the seed and the step number: a run can be stopped and
resumed without a trace.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recipes import detr_losses as losses
from recipes.state import load_moments, moments, part
from vtr.zoo import detection, detr

if TYPE_CHECKING:
    from transformers import DeformableDetrForObjectDetection


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    Attributes:
        steps: optimiser steps.
        final: the last of them: the learning rate falls to 1 %, batch normalisation is frozen, and
            every second one refreshes all tokens.
        batch: pictures per step.
        seed: of the weights, the pictures and the choice of tokens.
        learning_rate: after ``warmup`` steps; a tenth of it for sampling offsets.
        keep: smallest and largest share of the tokens that the encoder refreshes, drawn per step,
            log-uniformly.
        auxiliary: weight of the class heads on tokens.
        ema: decay of the averaged weights, which are the ones kept.
    """

    steps: int = 2500
    final: int = 700
    batch: int = 16
    seed: int = 11
    learning_rate: float = 8e-4
    warmup: int = 100
    weight_decay: float = 1e-3
    keep: tuple[float, float] = (0.15, 1.0)
    auxiliary: float = 0.5
    clip: float = 1.0
    ema: float = 0.996

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        left = (self.steps - step) / self.final
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, 0.01 + 0.99 * left)


def choose_tokens(
    recipe: Recipe, step: int, inside: Tensor, generator: torch.Generator
) -> Tensor | None:
    """The tokens that the encoder refreshes: ``(n, k)`` int64, or None for all of them.

    Args:
        recipe: the run's settings.
        step: number of the step, from 0.
        inside: ``(n, 534)`` bool, tokens in boxes.
        generator: source of all randomness.
    """
    order = torch.rand(inside.shape, generator=generator)
    low, high = recipe.keep
    share = low * (high / low) ** torch.rand((), generator=generator).item()
    if step >= recipe.steps - recipe.final and step // 2 % 2:
        return None
    if step % 2 == 0:
        order = order + inside
    return order.topk(max(1, round(share * inside.shape[1])), 1).indices


def _refresh(
    layer: Any,
    whole: Any,
    choice: dict[str, Tensor | None],
    tokens: Tensor,
    mask: Any,
    spatial_position_embeddings: Any,
    reference_points: Any,
    **shapes: Any,
) -> Tensor:
    """An encoder layer that changes only the chosen tokens; the others are there to be read."""
    kept = choice["kept"]
    named = {
        "spatial_position_embeddings": spatial_position_embeddings,
        "reference_points": reference_points,
    }
    if kept is None:
        return whole(tokens, mask, **named, **shapes)
    index = kept[..., None].expand(-1, -1, tokens.shape[-1])
    at = kept[..., None, None].expand(-1, -1, *reference_points.shape[2:])
    x = tokens.gather(1, index)
    read, _ = layer.self_attn(
        hidden_states=x,
        attention_mask=mask,
        encoder_hidden_states=tokens,
        position_embeddings=spatial_position_embeddings.gather(1, index),
        reference_points=reference_points.expand(len(tokens), -1, -1, -1).gather(1, at),
        **shapes,
    )
    x = layer.self_attn_layer_norm(x + read)
    x = layer.final_layer_norm(x + layer.mlp(x))
    return tokens.scatter(1, index, x.to(tokens.dtype))


def _precise(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return type(module).forward(module, x.float())


def _live_norms(module: nn.Module) -> None:
    """Put a ``BatchNorm2d`` with the same numbers in place of every frozen one."""
    for name, child in module.named_children():
        if "FrozenBatchNorm" in type(child).__name__:
            numbers = child.state_dict()
            live = nn.BatchNorm2d(len(numbers["weight"]), momentum=0.05)
            live.load_state_dict(numbers, strict=False)
            setattr(module, name, live)
        else:
            _live_norms(child)


def build_live() -> DeformableDetrForObjectDetection:
    """The model as it is trained: every parameter learns, batch normalisation is alive."""
    model = detr.build()
    model.model.unfreeze_backbone()
    _live_norms(model.model.backbone)
    return model


class Trainer:
    """A run of a :class:`Recipe`, one :meth:`step` at a time; its state is a flat dictionary of tensors."""

    save_every = 100  # steps

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.position = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = build_live()
            self.heads = nn.ModuleList(
                nn.Linear(detr.WIDTH, losses.BACKGROUND + 1) for _ in range(2)
            )
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self._choice: dict[str, Tensor | None] = {"kept": None}
        for layer in self.model.model.encoder.layers:
            layer.forward = partial(_refresh, layer, layer.forward, self._choice)
        for head in (*self.model.bbox_embed, *self.model.class_embed):
            head.forward = partial(_precise, head)
        self._entry: list[Tensor] = []
        self.model.model.encoder.register_forward_pre_hook(
            lambda _, args, kwargs: self._entry.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        named = [*self.model.named_parameters(), *self.heads.named_parameters()]
        self.parameters = [parameter for _, parameter in named]
        offsets = [p for name, p in named if "sampling_offsets" in name]
        rest = [p for name, p in named if "sampling_offsets" not in name]
        self.optimizer = torch.optim.AdamW(
            [{"params": rest, "share": 1.0}, {"params": offsets, "share": 0.1}],
            lr=recipe.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    def step(self) -> dict[str, float]:
        """One optimiser step on a fresh batch.

        Returns:
            ``loss`` of the last decoder layer, ``first`` of the decoder layer before, ``proposals`` of
            the first stage, ``tokens_before`` and ``tokens_behind`` of the class heads.
        """
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.position)
        images, labels, boxes = detection.pictures(recipe.batch, generator)
        column, inside = losses.assign(labels, boxes)
        self._choice["kept"] = choose_tokens(recipe, self.position, inside, generator)
        targets = losses.relative(boxes)

        self.model.train()
        if self.position >= recipe.steps - recipe.final:
            self.model.model.backbone.eval()
        self._entry.clear()
        with torch.autocast("cpu", torch.bfloat16):
            out = self.model.model(images)
        seen = {}
        references = [out.init_reference_points, out.intermediate_reference_points[:, 0]]
        for depth, (name, reference) in enumerate(zip(("first", "loss"), references, strict=True)):
            hidden = out.intermediate_hidden_states[:, depth].float()
            predicted = (self.model.bbox_embed[depth](hidden) + reference.logit(1e-5)).sigmoid()
            logits = self.model.class_embed[depth](hidden)
            seen[name] = losses.decoder_loss(logits, predicted, labels, targets)
        seen["proposals"] = losses.proposal_loss(
            out.enc_outputs_class, out.enc_outputs_coord_logits.sigmoid(), column, targets
        )
        tokens = self._entry[0], out.encoder_last_hidden_state
        for name, head, x in zip(("before", "behind"), self.heads, tokens, strict=True):
            seen[f"tokens_{name}"] = losses.token_loss(head(x.float()), column, inside, labels)
        total = seen["loss"] + seen["first"] + seen["proposals"]
        total = total + recipe.auxiliary * (seen["tokens_before"] + seen["tokens_behind"])

        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(self.position) * group["share"]
        self.optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
        self.optimizer.step()
        self.position += 1
        self._average_weights()
        return {name: value.item() for name, value in seen.items()}

    @torch.no_grad()
    def _average_weights(self) -> None:
        # The ramp lets the average forget the random start.
        decay = min(self.recipe.ema, self.position / (self.position + 10))
        new = self.model.state_dict()
        for name, kept in self.average.state_dict().items():
            if kept.is_floating_point():
                kept.lerp_(new[name], 1 - decay)

    def result(self) -> DeformableDetrForObjectDetection:
        """The averaged model in eval mode, as transformers builds it: with frozen normalisation."""
        with torch.random.fork_rng(devices=[]):
            model = detr.build()
        weights = self.average.state_dict()
        model.load_state_dict({k: v for k, v in weights.items() if "num_batches" not in k})
        return model.eval()

    def export(self, folder: Path) -> None:
        """Write model, configuration and image processor, in float16."""
        self.result().half().save_pretrained(folder)
        detr.processor().save_pretrained(folder)

    def state(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on, by name, plus ``position``."""
        tensors = {"position": torch.tensor(self.position)}
        for prefix, module in self._modules().items():
            held = module.state_dict()
            tensors |= {f"{prefix}.{key}": value.clone() for key, value in held.items()}
        return tensors | moments(self.optimizer)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what :meth:`state` returned; the recipe must be the same one."""
        self.position = int(tensors["position"])
        for prefix, module in self._modules().items():
            module.load_state_dict(part(tensors, prefix))
        load_moments(self.optimizer, tensors)

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "average": self.average, "heads": self.heads}
