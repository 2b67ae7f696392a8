"""Loss terms for methods that learn which tokens an encoder computes with.

A training call keeps every token and records its decisions as policies (``handle.trace.policies``, weights in
[0, 1] with gradients). :class:`EncoderCost` computes from them the FLOPs that the encoder would have had, for any
method. :class:`TokenLoss` has the weights of all terms:

cross-entropy + ``budget`` * budget term + ``logits`` * KL to the teacher's classes + ``tokens`` * distance to the
teacher's tokens + the method's own terms (:meth:`vtr.Method.training_losses`), which have their weights already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.api import Handle
from vtr.core.trace import PolicyRecord, Trace
from vtr.errors import UnsupportedMethodError, UnsupportedModelError

BUDGETS = ("square", "absolute")
TOKENS = ("mse", "kl")


# ---- what a call costs --------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockCost:
    """FLOPs of one block for n tokens in its attention and m in its MLP: ``linear n + pairs n^2 + mlp m``.

    Two FLOPs are one multiply-add.
    """

    linear: float
    pairs: float
    mlp: float

    @classmethod
    def of(cls, runner: Any) -> BlockCost:
        """Find the three numbers of a block (:class:`vtr.vision.encoders.blocks.BlockRunner`)."""
        one, two = runner.flops(1, 0), runner.flops(2, 0)
        pairs = (two - 2 * one) / 2
        return cls(one - pairs, pairs, runner.flops(0, 1))


@dataclass(frozen=True)
class EncoderCost:
    """FLOPs of an encoder's blocks and of the methods' modules, differentiable in the policies.

    Embeddings and the head are left out, as in :meth:`vtr.Handle.report`.

    Attributes:
        blocks: of each block.
        prefix: protected tokens, which every block computes.
        methods: the methods with modules, whose :meth:`vtr.Method.overhead` counts.
    """

    blocks: tuple[BlockCost, ...]
    prefix: int
    methods: tuple[tuple[Any, Any], ...] = ()

    @classmethod
    def of(cls, handle: Handle) -> EncoderCost:
        """Read the costs of a wrapped encoder.

        Raises:
            UnsupportedModelError: the model is no encoder.
        """
        session = encoder_session(handle)
        methods = [(e.method, e.modules) for e in handle._entries if e.modules is not None]
        blocks = [BlockCost.of(runner) for runner in session.runners]
        return cls(tuple(blocks), session.prefix, tuple(methods))

    def dense(self, tokens: int) -> float:
        """Return the FLOPs of one sample without a method, for its number of visual tokens."""
        n = tokens + self.prefix
        return float(sum(b.linear * n + b.pairs * n**2 + b.mlp * n for b in self.blocks))

    def expected(self, policies: Sequence[PolicyRecord]) -> Tensor:
        """Return the FLOPs of each sample if masked tokens were gone, (B,) float32.

        A sample with n tokens of which the policy keeps m costs what one with m tokens costs. A policy
        holds from its place on: at ``middle`` in the block's MLP already, at ``end`` from the next block on.

        Raises:
            ValueError: there are no policies.
        """
        weights = [r.policy for r in policies if r.policy is not None]
        if not weights:
            raise ValueError("the call has no policies: call the model in training mode first")
        full = weights[0].new_full((len(weights[0]),), weights[0].shape[1], dtype=torch.float32)
        at = {(r.layer, r.place): r.policy for r in policies}
        now, cost = full, torch.zeros_like(full)
        for layer, block in enumerate(self.blocks):
            n = now + self.prefix
            cost = cost + block.linear * n + block.pairs * n**2
            for place in ("middle", "end"):
                if place == "end":
                    cost = cost + block.mlp * (now + self.prefix)
                if (layer, place) in at:
                    policy = at[layer, place]
                    now = full if policy is None else policy.float().sum(1)
        tokens = weights[0].shape[1]
        return cost + float(sum(m.overhead(modules, tokens) for m, modules in self.methods))


def encoder_session(handle: Handle) -> Any:
    """Return what runs the methods inside the blocks of a wrapped encoder.

    Raises:
        UnsupportedModelError: the model is no encoder.
    """
    session = getattr(handle._wrapping, "session", None)
    if session is None or not hasattr(session, "runners"):
        raise UnsupportedModelError(
            f"{handle._wrapping.info.family} is no vision encoder: give a timm or transformers classifier"
        )
    return session


# ---- terms --------------------------------------------------------------------------------------


def budget_loss(cost: Tensor, dense: float, target: float, form: str = "square") -> Tensor:
    """Return the distance of the mean cost of a batch from its budget, a scalar.

    The mean over the batch may differ from that of each image, so that images may have their own numbers.

    Args:
        cost: (B,) FLOPs of each sample, differentiable.
        dense: FLOPs of a sample without reduction.
        target: wanted share of ``dense``, rho.
        form: ``"square"``, (mean cost / dense - rho)^2, as DynamicViT has it for shares of tokens
            (arXiv 2106.02034, section 3.3), here for the cost; or ``"absolute"``, |mean G - rho G_dense| in
            10^9 multiply-adds (AS-ViT, arXiv 2209.13802; its authors' code counts patch embedding too, 1.3 % of
            DeiT-S). The absolute form depends on the size of the model: it is tiny on tiny models.
    """
    if form == "absolute":
        return (cost.mean() - target * dense).abs() / 2e9
    return (cost.mean() / dense - target).square()


def ratio_loss(policies: Sequence[PolicyRecord], ratios: Sequence[float]) -> Tensor:
    """Return DynamicViT's ratio loss (arXiv 2106.02034, equation 13), a scalar without weight.

    The mean over stages and images of (mean over tokens of the policy - ratio of the stage)^2.

    Args:
        policies: of a training call, in order; those of None are skipped.
        ratios: share of the tokens of the input that each stage is to keep.

    Raises:
        ValueError: their numbers differ.
    """
    found = [r.policy for r in policies if r.policy is not None]
    if len(found) != len(ratios):
        raise ValueError(f"there are {len(found)} policies for {len(ratios)} ratios")
    terms = [(p.float().mean(1) - r).square().mean() for p, r in zip(found, ratios, strict=True)]
    return torch.stack(terms).mean()


def distil_logits(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(teacher || student) of the classes at temperature T, mean over the batch.

    Args:
        logits, teacher: (B, K).
    """
    own = (logits.float() / temperature).log_softmax(-1)
    other = (teacher.float() / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(own, other, log_target=True, reduction="batchmean")


def distil_tokens(
    tokens: Tensor, teacher: Tensor, weight: Tensor | None = None, form: str = "mse"
) -> Tensor:
    """Return the distance of the student's tokens from the teacher's, mean over the tokens that survive.

    Args:
        tokens, teacher: (B, N, C).
        weight: (B, N), 1 for tokens that survive, without gradients; None for all.
        form: ``"mse"``, mean square over channels (DynamicViT on DeiT), or ``"kl"``, KL(teacher || student) of
            the softmax over channels (DynamicViT on LV-ViT, AS-ViT).
    """
    a, b = tokens.float(), teacher.float()
    if form == "mse":
        error = (a - b).square().mean(-1)
    else:
        p, q = b.log_softmax(-1), a.log_softmax(-1)
        error = (p.exp() * (p - q)).sum(-1)
    if weight is None:
        return error.mean()
    weight = weight.detach().float()
    return (error * weight).sum() / weight.sum().clamp_min(1)


# ---- all together -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenLoss:
    """Weights of the terms of a classifier's loss.

    Attributes:
        target: wanted cost of blocks and modules, as a share of the dense blocks'; None has no budget term.
        budget: weight of :func:`budget_loss`.
        form: of it, ``"square"`` or ``"absolute"``.
        logits: weight of :func:`distil_logits`.
        temperature: of it.
        tokens: weight of :func:`distil_tokens`.
        token_form: of it, ``"mse"`` or ``"kl"``.
        smoothing: label smoothing of the cross-entropy.

    Raises:
        ValueError: a value that cannot be; the message names it.
    """

    target: float | None = None
    budget: float = 20.0
    form: str = "square"
    logits: float = 0.5
    temperature: float = 1.0
    tokens: float = 0.5
    token_form: str = "mse"
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.target is not None and not 0.0 < self.target <= 1.0:
            raise ValueError(f"target must be in (0, 1], or None, got {self.target!r}")
        for name in ("budget", "logits", "tokens"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be a weight >= 0, got {getattr(self, name)!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature!r}")
        if not 0.0 <= self.smoothing < 1.0:
            raise ValueError(f"smoothing must be in [0, 1), got {self.smoothing!r}")
        for name, known in (("form", BUDGETS), ("token_form", TOKENS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )

    @property
    def distils(self) -> bool:
        """Tell whether a teacher is needed."""
        return self.logits > 0 or self.tokens > 0

    def check(self, handle: Handle) -> None:
        """Raise ``UnsupportedMethodError`` if a training call had no policies and the budget needs them."""
        if self.target is not None and not handle.trace.policies:
            raise UnsupportedMethodError(
                f"target= needs a method that records policies in training, and {handle.methods[0]} cuts by its "
                "options alone: set its budget there (keep=), and target=None"
            )

    def classes(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy.

        Args:
            logits: (B, K).
            labels: (B,) classes, or (B, K) probabilities, as mixup gives them.
        """
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)


def surviving(trace: Trace, teacher: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what the student's tokens are compared with, and which of them survive.

    Args:
        trace: of the student's call.
        teacher: (B, N, C), tokens of the dense model.

    Returns:
        The teacher's tokens (B, N', C), one for each token of the student, and weights (B, N') or None. After
        policies all N, weighted by the last policy. After cuts those that are left; a merged token is compared
        with the mean of its tokens.
    """
    policies = [r.policy for r in trace.policies if r.policy is not None]
    if policies:
        return teacher, policies[-1].detach()
    if not trace.stages:
        return teacher, None
    total = trace.stages[-1].total
    return total.merge(teacher), total.valid.float() if total.has_padding else None
