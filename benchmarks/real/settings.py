"""Settings to measure: every encoder method that needs no training, at a share of the tokens, and random beside it."""

from __future__ import annotations

from collections.abc import Callable

import vtr

SEEDS = (0, 1, 2)
UNTRAINED = "its modules are trained with their backbone, and none are published for this one"
# Methods of encoders that are left out, and why.
LEFT_OUT = {
    "adaptive-sparse-vit": UNTRAINED,
    "avit": UNTRAINED,
    "dynamicvit": UNTRAINED,
    "sparsifiner": UNTRAINED,
    "dtop": "it needs an auxiliary segmentation head",
}


def staged(share: float, stages: int) -> float:
    """The share that each of several cuts leaves, so that ``share`` is left after the last."""
    return share ** (1 / stages)


def settings(depth: int, tokens: int, share: float) -> dict[str, Callable[[], vtr.Method]]:
    """Methods by name, each leaving about ``share`` of the tokens at the end.

    Cuts are where the paper has them in 12 blocks (after blocks 3, 6 and 9), and as far along
    in encoders of another depth. The first entries are random: in the first block, so that it costs least of all, and
    along ToMe's schedule, so that it costs the same as ToMe.
    """
    cuts = tuple(sorted({max(0, depth * i // 4 - 1) if depth > 4 else i - 1 for i in (1, 2, 3)}))
    each = staged(share, len(cuts))
    merged = -(-round(tokens * (1 - share)) // depth)
    kept = tuple(tokens - merged * (i + 1) for i in range(depth))
    found: dict[str, Callable[[], vtr.Method]] = {}
    for seed in SEEDS:
        found[f"random, first block #{seed}"] = lambda s=seed: vtr.Random(keep=share, seed=s)
        found[f"random, as ToMe #{seed}"] = lambda s=seed: vtr.Random(
            keep=tuple(kept), layers=tuple(range(depth)), seed=s
        )
    if share == 0.5:  # it decides itself how many are left
        found["algm"] = lambda: vtr.ALGM()
    return found | {
        "downsample": lambda: vtr.Downsample(keep=share),
        "tome": lambda: vtr.ToMe(r=merged),
        "tofu": lambda: vtr.ToFu(r=merged),
        "ppt": lambda: vtr.PPT(r=merged, layers=tuple(range(depth))),
        "diffrate": lambda: vtr.DiffRate(keep=share),
        "flowcut": lambda: vtr.FlowCut(keep=share),
        "evit": lambda: vtr.EViT(keep=each, layers=cuts),
        "tps": lambda: vtr.TPS(keep=each, layers=cuts),
        "evo-vit": lambda: vtr.EvoViT(keep=share),
        "ats": lambda: vtr.ATS(keep=each, layers=cuts),
        "cls-attention": lambda: vtr.CLSAttention(keep=share, layers=cuts),
        "spatten": lambda: vtr.SpAtten(keep=share),
        "tofe, untrained": lambda: vtr.ToFe(keep=share),
    }
