"""Training of ToFe's prediction and approximate modules (arXiv 2507.16260).

The paper trains backbone, predictor and approximator jointly with a loss that includes the
computation budget, and does not give its terms. This is our reading of it: cross-entropy +
0.5 KL to the dense teacher's logits + 0.5 mean squared error to the teacher's tokens on the tokens
active at the end (DynamicViT's terms, arXiv 2106.02034, section 3.4) + a budget term
``weight * (mean over the batch of the expected cost ratio - target)^2``. The term uses the mean over
the batch, so that each image may have its own number of tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtr.api import apply
from vtr.methods.tofe import ToFe, ToFeModules
from vtr.vision.encoders.blocks import BlockRunner, linear_flops
from vtr.vision.encoders.session import EncoderSession


@dataclass(frozen=True)
class ToFeLoss:
    """Weights of the loss terms.

    Attributes:
        target: wanted cost of the blocks, modules included, as a share of the dense blocks'.
        budget: weight of the squared distance to the target.
        logits: weight of the KL divergence to the teacher's classes.
        tokens: weight of the squared error to the teacher's tokens, on active tokens.
    """

    target: float = 1 / 3
    budget: float = 20.0
    logits: float = 0.5
    tokens: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.target <= 1.0:
            raise ValueError(f"target must be in (0, 1], got {self.target!r}")


def expected_cost(
    masks: Sequence[Tensor],
    layers: Sequence[int],
    runners: Sequence[BlockRunner],
    modules: ToFeModules,
    prefix: int,
) -> Tensor:
    """Cost of each sample, differentiable in the masks, as a share of the dense cost: (B,).

    A block with n tokens costs a n + b n^2, with a and b from its own shapes; the modules' costs are
    their linear layers'.

    Args:
        masks: per stage, (B, N) in [0, 1], 1 for active tokens.
        layers: the block before which each stage begins.
        runners: of all blocks.
        prefix: protected tokens.
    """
    tokens = masks[0].shape[1]
    cost = torch.zeros(masks[0].shape[0], device=masks[0].device)
    dense = 0.0
    for layer, runner in enumerate(runners):
        one, two = runner.flops(1, 1), runner.flops(2, 2)
        square = (two - 2 * one) / 2
        linear = one - square
        full = tokens + prefix
        dense += linear * full + square * full**2
        stage = sum(layer >= start for start in layers) - 1
        n = masks[stage].sum(1) + prefix if stage >= 0 else torch.full_like(cost, full)
        cost = cost + linear * n + square * n**2
    for mask, predictor, approximator in zip(
        masks, modules.predictors, modules.approximators, strict=True
    ):
        cost = cost + linear_flops(predictor) * tokens
        cost = cost + linear_flops(approximator) * (1 - mask).sum(1)
    return cost / dense


class ToFeTrainer:
    """Trains ToFe's modules on a timm classifier, one :meth:`step` at a time.

    The model's own parameters are trained with ``backbone_lr`` if it is given (DynamicViT: 0.01 of
    the modules' rate), else frozen, and then the modules fit the model as it was.

    Args:
        model: a timm classifier; it stays wrapped until :meth:`close`.
        method: ``ToFe(trained=True, ...)``.
        loss: weights of the terms.
        lr: of the modules (AdamW).
    """

    def __init__(
        self,
        model: nn.Module,
        method: ToFe,
        loss: ToFeLoss | None = None,
        *,
        lr: float = 1e-3,
        backbone_lr: float | None = None,
        weight_decay: float = 0.01,
    ) -> None:
        if not method.trained:
            raise ValueError(
                "method must be ToFe(trained=True): there is nothing to train otherwise"
            )
        if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
            raise TypeError(
                "model must be a timm classifier (its forward_features and forward_head are trained "
                f"through), got {type(model).__name__}: for another one write the loop from ToFeLoss, "
                "expected_cost and handle.trace.notes['tofe_masks']"
            )
        self.loss = loss or ToFeLoss()
        self.teacher: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self.model: Any = model
        self.handle = apply(model, method)
        modules = self.handle.modules[0]
        assert isinstance(modules, ToFeModules)
        self.modules = modules.to(next(model.parameters()).device)
        wrapping: Any = self.handle._wrapping
        self.session: EncoderSession = wrapping.session
        self.layers = [s.layer + 1 for s in method.stages(wrapping.info)[:-1]]
        self._backbone = [(p, p.requires_grad) for p in model.parameters()]
        groups: list[dict[str, Any]] = [{"params": list(self.modules.parameters()), "lr": lr}]
        if backbone_lr is None:
            model.requires_grad_(False)
        else:
            groups.append({"params": list(model.parameters()), "lr": backbone_lr})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, betas=(0.9, 0.98))
        self._rates = [g["lr"] for g in groups]

    def step(self, images: Tensor, labels: Tensor, rate: float = 1.0) -> dict[str, float]:
        """One optimiser step; ``rate`` scales the learning rates (a schedule).

        Returns:
            ``loss``, ``accuracy``, ``cost`` (expected share of the dense cost) and ``active`` (share
            of the tokens per stage, averaged).
        """
        for group, lr in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = lr * rate
        self.model.train()
        self.modules.train()
        features = self.model.forward_features(images)
        logits = self.model.forward_head(features).float()
        masks = self.handle.trace.notes["tofe_masks"]
        with torch.no_grad():
            wanted = self.teacher.forward_features(images)
            target = self.teacher.forward_head(wanted).float()
        cost = expected_cost(
            masks, self.layers, self.session.runners, self.modules, self.session.prefix
        )
        loss = F.cross_entropy(logits, labels)
        loss = loss + self.loss.budget * (cost.mean() - self.loss.target).square()
        loss = loss + self.loss.logits * F.kl_div(
            logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        p = self.session.prefix
        error = (features[:, p:].float() - wanted[:, p:].float()).square().mean(-1)
        weight = masks[-1].detach()
        loss = loss + self.loss.tokens * (error * weight).sum() / weight.sum().clamp_min(1)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        facts = {
            "loss": loss.detach(),
            "accuracy": (logits.argmax(1) == labels).float().mean(),
            "cost": cost.detach().mean(),
            "active": torch.stack([m.detach().mean() for m in masks]).mean(),
        }
        # One look at the device per step.
        return dict(zip(facts, torch.stack(list(facts.values())).tolist(), strict=True))

    def close(self) -> ToFeModules:
        """Take the method off the model, give its parameters their flags back; the trained modules."""
        self.handle.remove()
        for parameter, flag in self._backbone:
            parameter.requires_grad_(flag)
        self.model.eval()
        return self.modules.eval()
