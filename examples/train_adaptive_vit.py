"""Train Adaptive Sparse ViT, which keeps another number of tokens in each image, to a share of the dense cost.

python examples/train_adaptive_vit.py                                      # the built-in ViT, a few minutes of a core
python examples/train_adaptive_vit.py --model timm:deit_small_patch16_224 --train imagenet/train --val imagenet/val \
    --batch 256 --steps 150000 --rate 2e-5 --workers 16 --precision bf16 --log-with tensorboard
accelerate launch examples/train_adaptive_vit.py --model ... # several processes

The thresholds of the method and the model are trained together (Liu et al., IJCAI 2023, arXiv 2209.13802). Folders
have one folder of images for each class. A run that was stopped, or killed, continues with --resume. The folder in
--out is the trained model: vtr.apply(model, vtr.train.load(model, folder)).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import vtr
import vtr.train
from vtr.core.trace import PolicyRecord
from vtr.train.data import image_folder
from vtr.train.losses import EncoderCost, TokenLoss
from vtr.train.tokens import TokenSettings, TokenTuner, images_of
from vtr.zoo import data as pictures
from vtr.zoo.loading import load_encoder


def digits(options: argparse.Namespace) -> tuple[Any, Iterable[Any]]:
    """Return drawn pictures: training batches by their numbers, and 512 pictures to measure on."""

    def batch(number: int) -> Any:
        return pictures.digits(options.batch, torch.Generator().manual_seed(number))

    generator = torch.Generator().manual_seed(1)
    return batch, [
        pictures.digits(128, generator, "heldout") for _ in range(options.measure // 128)
    ]


def folders(model: Any, options: argparse.Namespace) -> tuple[Any, Iterable[Any]]:
    """Return the images of two folders, transformed as the model was trained and is measured."""
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model)
    ways = [create_transform(**config, is_training=training) for training in (True, False)]
    train = image_folder(options.train, options.batch, ways[0], workers=options.workers)
    return train, image_folder(options.val, 256, ways[1], workers=options.workers).once()


@torch.no_grad()
def measured(model: Any, batches: Iterable[Any], handle: vtr.Handle | None) -> dict[str, float]:
    """Return accuracy, and of the method the mean cost and the tokens of single images."""
    right: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    costs: list[torch.Tensor] = []
    device = next(model.parameters()).device
    for batch in batches:
        images, labels = images_of(batch)
        right.append(model(images.to(device)).argmax(1).cpu() == labels)
        if handle is not None and handle.trace.stages:
            stages = handle.trace.stages
            kept.append(stages[-1].total.valid.sum(1).float().cpu())
            # The report counts the longest sequence of the batch for all; this counts each image's own.
            left = [(s.total.source >= 0).float() for s in stages]
            cuts = [
                PolicyRecord(s.layer, "end", s.method, x) for s, x in zip(stages, left, strict=True)
            ]
            cost = EncoderCost.of(handle)
            costs.append(cost.expected(cuts).cpu() / cost.dense(left[0].shape[1]))
    found = {"accuracy": torch.cat(right).float().mean().item()}
    if kept:
        counts = torch.cat(kept)
        found |= {"cost": torch.cat(costs).mean().item(), "fewest": counts.min().item()}
        found |= {"mean": counts.mean().item(), "most": counts.max().item()}
    return found


def rows(found: dict[str, dict[str, float]]) -> Iterator[list[str]]:
    for name, row in found.items():
        counts = (
            "/".join(f"{row[k]:.0f}" for k in ("fewest", "mean", "most"))
            if "mean" in row
            else "all"
        )
        yield [name, f"{row['accuracy']:.1%}", f"{row.get('cost', 1.0):.2f}", counts]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="digits-vit", help="digits-vit, or timm:NAME")
    parser.add_argument("--train", help="folder of training images; without one, drawn digits")
    parser.add_argument("--val", help="folder of images to measure on")
    parser.add_argument("--target", type=float, default=0.6, help="share of the dense cost")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="images per process and step")
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--measure", type=int, default=512, help="drawn digits to measure on")
    parser.add_argument("--log-with", help="tensorboard, trackio, ...")
    parser.add_argument("--out", type=Path, default=Path("runs/adaptive-vit"))
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    options = parser.parse_args(arguments)
    if bool(options.train) != bool(options.val):
        parser.error("give both --train and --val, or neither")

    model = load_encoder(options.model, pretrained=True)
    train, val = folders(model, options) if options.train else digits(options)
    val = list(val) if not options.train else val
    settings = TokenSettings(
        steps=options.steps,
        rate=options.rate,
        warmup=options.steps // 20,
        loss=TokenLoss(target=options.target, tokens=0.0),
        precision=options.precision,
        log_with=options.log_with,
        save_every=max(options.steps // 20, 1),
    )
    found = {"dense": measured(model, val, None)}
    if options.train:
        val = folders(model, options)[1]
    method = vtr.AdaptiveSparseViT()
    with TokenTuner(model, method, train, options.out, settings, resume=options.resume) as tuner:
        tuner.run()
        main_process = tuner.accelerator.is_main_process
    if not main_process:
        return
    # As a colleague would load it.
    model = load_encoder(options.model, pretrained=True)
    trained = vtr.train.load(model, options.out)
    with vtr.apply(model.eval(), trained) as handle:
        found["trained thresholds"] = measured(model, val, handle)
    table = Table("model", "accuracy", "cost of an image", "tokens (fewest/mean/most)")
    for row in rows(found):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
