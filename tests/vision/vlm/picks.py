"""A method that keeps given tokens, and the full-length run that its results must equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.vision.vlm.models import visual
from vtr.compat.transformers import cache_of, given_cache
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap, top_indices
from vtr.vision.vlm.wrapping import language_of

STEPS = 4
ALL = 10**6
CLOSE = 3e-5  # float32, two orders of the same sums


@dataclass(frozen=True)
class Pick(TokenMethod):
    """Keep so many of each sample's tokens: the ones with the largest norm, at given stages.

    Args:
        at: (site, layer, place) of each stage.
        keep: per stage, one number per sample (the last one for all further samples).
    """

    name: ClassVar[str] = "pick"
    paper: ClassVar[str] = "none"
    sites: ClassVar[tuple[str, ...]] = ("prompt", "decoder")

    at: tuple[tuple[str, int, str], ...] = (("prompt", 0, "entry"),)
    keep: tuple[tuple[int, ...], ...] = ((5, 3),)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage(*a) for a in self.at)

    def reduce(self, site: Site) -> Reduction:
        stage = next(i for i, a in enumerate(self.at) if a[:2] == (site.site, site.layer))
        wanted = self.keep[stage]
        valid = site.valid
        if valid is None:
            valid = torch.ones(site.batch, site.n, dtype=torch.bool, device=site.device)
        number = torch.tensor([wanted[min(b, len(wanted) - 1)] for b in range(site.batch)])
        number = number.to(site.device)
        score = site.hidden.float().norm(dim=-1)
        kept, padded = top_indices(score, torch.minimum(number, valid.sum(1)), valid)
        return Reduction(TokenMap.keep(kept, site.n, padded))


PROMPT = Pick()
DECODER = Pick((("decoder", 1, "end"), ("decoder", 3, "start")), ((7, 6), (3, 2)))
BOTH = Pick((("prompt", 0, "entry"), ("decoder", 2, "start")), ((8, 7), (3, 4)))
MIDDLE = Pick((("decoder", 1, "middle"), ("decoder", 2, "middle")), ((7, 6), (3, 2)))
KEEP_ALL = Pick(
    (("prompt", 0, "entry"), ("decoder", 1, "end"), ("decoder", 2, "middle")),
    ((ALL,), (ALL,), (ALL,)),
)


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    given = {"max_new_tokens": STEPS, "do_sample": False, **options}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **given)


def same(a: Any, b: Any, tolerance: float = 0.0) -> None:
    """Equal tokens, equal logits at every step."""
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.logits, b.logits, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


def lengths(output: Any) -> list[int]:
    return [layer.keys.shape[2] for layer in cache_of(output).layers]


class Masked:
    """Hides tokens from a layer on, in a model that runs at full length.

    Args:
        model: the unwrapped model.
        gone: first layer -> (B, L) bool, tokens that no later query may see from there on.
    """

    def __init__(self, model: Any, gone: dict[int, Tensor]) -> None:
        self.gone = gone
        self.layers = language_of(model.model).layers
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        for i, layer in enumerate(self.layers):
            if any(k <= i for k in self.gone):
                self.hooks.append(layer.register_forward_pre_hook(self.hide(i), with_kwargs=True))

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def hide(self, i: int) -> Any:
        gone = torch.stack([g for k, g in self.gone.items() if k <= i]).any(0)

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache, hidden = given_cache(kwargs), args[0]
            batch, queries = hidden.shape[:2]
            past = 0 if cache is None else cache.layers[0].get_seq_length() - (queries if i else 0)
            keys = past + queries
            mask = kwargs.get("attention_mask")
            if mask is None:
                row = torch.arange(past, keys, device=hidden.device)[:, None]
                mask = (torch.arange(keys, device=hidden.device)[None] <= row).expand(
                    batch, 1, queries, keys
                )
            hidden_keys = torch.nn.functional.pad(gone, (0, keys - gone.shape[1]))[:, None, None]
            fill = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            return args, {**kwargs, "attention_mask": mask.masked_fill(hidden_keys, fill)}

        return hook


def gone_of(handle: Any, ids: Tensor) -> dict[int, Tensor]:
    """What the stages of the last call dropped, by the first layer that lacks it, as (B, L) masks."""
    out: dict[int, Tensor] = {}
    for stage in handle.trace.stages:
        first = {"prompt": 0}.get(stage.site, stage.layer)
        place = next(a[2] for a in handle.methods[0].at if a[:2] == (stage.site, stage.layer))
        first += stage.site == "decoder" and place != "start"
        drop = torch.zeros_like(ids, dtype=torch.bool)
        for b in range(ids.shape[0]):
            where = visual(ids[b]).nonzero().flatten()
            kept = stage.total.kept[b]
            drop[b, where] = True
            drop[b, where[kept[kept >= 0].to(where.device)]] = False
        out[first] = drop
    return out
