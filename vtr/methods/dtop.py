"""DToP: tokens whose class is certain leave a segmenter early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtr.core.budget import check_count, check_number
from vtr.core.trace import Trace
from vtr.methods.base import (
    Examples,
    ModelInfo,
    Reduction,
    Site,
    Stage,
    TokenMap,
    TokenMethod,
    check_layers,
    fit_layers,
    register,
    take,
    top_indices,
)
from vtr.methods.common.predictor import load_modules


@register
@dataclass(frozen=True)
class DToP(TokenMethod):
    r"""Dynamic Token Pruning (ICCV 2023, arXiv 2308.01045), for semantic segmentation with a plain ViT.

    At the end of each of ``layers`` an auxiliary head names the class of every token that is left. Tokens whose
    class has a probability above ``confidence`` are finished and leave, except the ``context`` most certain ones
    of each class, which are kept for the others to see (section 3.2). Each image keeps its own number.

    .. math::

        p_i = \operatorname{softmax}(\mathrm{head}(x_i)), \qquad \text{token } i \text{ is finished if }
        \max_c p_{ic} > \mathrm{confidence}

    A finished token's class is that which its head has found: :meth:`finish` puts it in the place of the final
    prediction. Apply the method with ``output="restored"``, so that the model's own head gets all tokens.

    Ours is the head: layer norm and a linear layer, like the paper's FCN; its best numbers are with heads of SegViT,
    which are decoders. A subclass that overrides :meth:`build` has others: any modules that map (B, N, C)
    to (B, N, classes), one per layer. They are trained with :meth:`token_loss`; before that they are certain of
    nothing, and nothing leaves.

    Args:
        confidence: probability above which a token is finished (0.9 in the authors' settings).
        classes: of the segmentation.
        context: tokens of each class that stay (5 in the paper).
        layers: 0-based; None is L/2 - 1 and 2L/3 - 1 (5 and 7 of 12, the authors' for ViT-B).
        weights: a safetensors file with trained heads, or the name of a built-in one.
    """

    name: ClassVar[str] = "dtop"
    paper: ClassVar[str] = (
        "DToP: Dynamic Token Pruning in Plain ViTs for Segmentation, ICCV 2023, arXiv 2308.01045"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder",)
    needs: ClassVar = {"encoder": frozenset({"hidden"})}
    training: ClassVar[str] = "required"
    learned: ClassVar[bool] = True
    data_dependent: ClassVar[bool] = True
    carries_gradients: ClassVar[bool] = True

    confidence: float = 0.9
    classes: int = 150
    context: int = 5
    layers: tuple[int, ...] | None = None
    weights: str | None = None

    @classmethod
    def examples(cls) -> Examples:
        # Without training all tokens have the first class, with a chance of one half.
        some = cls(classes=2, confidence=0.4)
        return {"some": (some,), "everything": (cls(classes=2, confidence=1.0),), "counted": ()}

    def validate(self) -> None:
        check_count(self.classes, "classes", low=2)
        check_count(self.context, "context", low=1)
        check_number(self.confidence, "confidence", 0, 1)
        if self.layers is not None:
            self._set("layers", check_layers(self.layers))

    def _layers(self, info: ModelInfo) -> tuple[int, ...]:
        depth = info.depth["encoder"]
        if self.layers is None:
            return tuple(sorted({max(0, depth // 2 - 1), max(0, 2 * depth // 3 - 1)}))
        return fit_layers(self.layers, depth)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("encoder", layer, "end") for layer in self._layers(info))

    def build(self, info: ModelInfo) -> nn.Module:
        if info.dim is None:
            raise ValueError(f"the width of {info.family} is not known")
        heads = nn.ModuleList(ClassHead(info.dim, self.classes) for _ in self._layers(info))
        if self.weights is not None:
            load_modules(heads, self.weights)
        return heads

    def overhead(self, modules: nn.Module, tokens: int) -> int:
        """Every head is counted for all tokens (at most that)."""
        linear = [m for m in modules.modules() if isinstance(m, nn.Linear)]
        return tokens * sum(2 * m.in_features * m.out_features for m in linear)

    def reduce(self, site: Site) -> Reduction | None:
        assert isinstance(site.modules, nn.ModuleList)
        stage = self._layers(site.info).index(site.layer)
        logits = site.modules[stage](site.hidden)
        if site.training:
            site.notes.setdefault("dtop_logits", []).append(logits)
            return None
        chance, label = logits.float().softmax(-1).max(-1)
        gone = finished(chance, label, self.confidence, self.context, site.valid_mask)
        found: Tensor = site.memory.setdefault(
            "finished", torch.full((site.batch, site.map.n_in), -1, device=site.device)
        )
        site.notes["dtop_finished"] = found
        source, here = site.map.source, site.map.source >= 0
        left = here & take(gone, source.clamp(min=0))
        found[left] = take(label, source.clamp(min=0))[left]
        stay = site.valid_mask & ~gone
        kept, has_padding = top_indices(stay.float(), stay.sum(1), stay)
        if kept.shape[1] == site.n and not has_padding:
            return None
        return Reduction(TokenMap.keep(kept, site.n, has_padding))

    @staticmethod
    def finish(trace: Trace, final: Tensor) -> Tensor:
        """Put the classes of tokens that left early in the place of the final ones.

        Args:
            trace: of the call (``handle.trace``).
            final: (B, N) int64, the model's own classes of all tokens, in raster order.

        Returns:
            (B, N) int64.
        """
        found: Tensor | None = trace.notes.get("dtop_finished")
        return final if found is None else torch.where(found < 0, final, found.to(final.device))

    @staticmethod
    def token_loss(trace: Trace, labels: Tensor, ignore: int = -100) -> Tensor:
        """Return the mean cross-entropy of all heads in the last training call.

        Args:
            trace: of the call (``handle.trace``).
            labels: (B, N) int64, the class of each token; ``ignore`` for tokens that have none.
        """
        logits: list[Tensor] = trace.notes["dtop_logits"]
        losses = [
            F.cross_entropy(x.float().flatten(0, 1), labels.flatten(), ignore_index=ignore)
            for x in logits
        ]
        return torch.stack(losses).mean()


class ClassHead(nn.Module):
    """Layer norm and a linear layer; all classes are alike before training."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, classes)."""
        out: Tensor = self.linear(self.norm(x.to(self.linear.weight.dtype)))
        return out


def finished(
    chance: Tensor, label: Tensor, confidence: float, context: int, valid: Tensor
) -> Tensor:
    """Find the tokens that leave: those above ``confidence`` but the ``context`` most certain of each class.

    Args:
        chance, label: (B, N), the probability and the number of each token's class.
        valid: (B, N) bool.

    Returns:
        (B, N) bool. Ties stay in the order of the tokens.
    """
    above = valid & (chance > confidence)
    order = torch.sort(chance, dim=1, descending=True, stable=True).indices
    group = torch.where(above, label, label.amax() + 1)  # those that are not above come last
    by_class = torch.sort(group.gather(1, order), dim=1, stable=True)
    order, sorted_group = order.gather(1, by_class.indices), by_class.values
    place = torch.arange(label.shape[1], device=label.device).expand_as(label)
    begins = torch.ones_like(above)
    begins[:, 1:] = sorted_group[:, 1:] != sorted_group[:, :-1]
    first = torch.where(begins, place, 0).cummax(1).values
    rank = torch.empty_like(place).scatter(1, order, place - first)
    return above & (rank >= context)
