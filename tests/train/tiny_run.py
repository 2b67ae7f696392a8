"""A tiny run that several tests start: as a process of its own (``python -m tests.train.tiny_run OUT``) or here."""

from __future__ import annotations

import dataclasses
import sys
import time

import torch
from timm.models.vision_transformer import VisionTransformer

import vtr
from vtr.train.losses import TokenLoss
from vtr.train.tokens import TokenSettings, TokenTuner

METHOD = vtr.ToFe(layers=(1, 2), trained=True)
FAST = TokenSettings(
    steps=12, rate=1e-2, backbone_factor=0.1, warmup=2, ema=0.9, seed=3, log_every=1, save_every=4,
    loss=TokenLoss(target=0.5),
)  # fmt: skip


def classifier(drop=0.1, **options):
    """A random classifier with dropout, so that resuming has something random to repeat."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    return VisionTransformer(
        **{**sizes, "num_classes": 5, "proj_drop_rate": drop, "drop_path_rate": drop, **options}
    )


def batch(number):
    g = torch.Generator().manual_seed(number)
    return torch.randn(4, 3, 32, 32, generator=g), torch.randint(0, 5, (4,), generator=g)


def tuner(out, method=METHOD, settings=FAST, *, model=None, data=batch, **options):
    model = classifier() if model is None else model
    return TokenTuner(model, method, data, out, settings, **options)


def slowly(number):
    """Leave the time to kill the run."""
    time.sleep(0.1)
    return batch(number)


if __name__ == "__main__":
    kind = sys.argv[2]
    run_settings = dataclasses.replace(FAST, steps=3) if kind == "two" else FAST
    with tuner(sys.argv[1], settings=run_settings, data=slowly if kind == "slow" else batch) as run:
        run.run()
