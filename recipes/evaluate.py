"""``python -m recipes.evaluate NAME``: accuracy on held-out digits, dense and with tokens dropped.

Written in plain tensor code on purpose, without the package's methods and adapters: it is the
check from outside that their numbers are compared with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vtr.compat.timm import embed
from vtr.zoo import data, load, vit

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

Score = Literal["cls", "random", "ink"]


def cls_attention(block: Any, tokens: Tensor) -> Tensor:
    """Attention of the CLS token to every patch in a timm block, mean over heads.

    Args:
        block: a timm ``Block`` without query and key norms.
        tokens: ``(n, 1 + t, c)``, what enters the block.

    Returns:
        ``(n, t)``, in [0, 1].
    """
    attention = block.attn
    n, count, _ = tokens.shape
    qkv = attention.qkv(block.norm1(tokens)).view(n, count, 3, attention.num_heads, -1)
    query, key = qkv[:, :1, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
    weights = (query @ key.transpose(-1, -2) * attention.scale).softmax(-1)
    return weights[:, :, 0, 1:].mean(1)


@torch.no_grad()
def predict(
    model: VisionTransformer,
    batch: data.Digits,
    cuts: dict[int, float],
    score: Score,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Classes of a batch when patches are dropped at the output of some blocks.

    Args:
        model: a built-in ViT.
        batch: the pictures.
        cuts: block (from 0) to the share of all 144 patches that is left after it.
        score: what decides who stays: the block's CLS attention, chance, or the true place of the
            digit (which no method knows).
        generator: of the random choice.

    Returns:
        predictions ``(n,)``, and ``(n,)`` the share of the digit's ink in the patches that
        reached the end.
    """
    tokens = model.norm_pre(embed(model, model.patch_embed(batch.images)))
    ink = batch.ink
    for index, block in enumerate(model.blocks):
        if index not in cuts:
            tokens = block(tokens)
            continue
        if score == "cls":
            ranking = cls_attention(block, tokens)
        elif score == "random":
            ranking = torch.rand(ink.shape, generator=generator)
        else:
            ranking = ink
        tokens = block(tokens)
        kept = ranking.topk(max(1, round(cuts[index] * vit.TOKENS)), 1).indices
        ink = ink.gather(1, kept)
        patches = tokens[:, 1:].gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([tokens[:, :1], patches], 1)
    logits = model.head(model.norm(tokens)[:, 0])
    return logits.argmax(1), ink.sum(1) / batch.ink.sum(1)


def evaluate(
    model: VisionTransformer, images: int = 2000, seed: int = 99, *, show_progress: bool = False
) -> list[dict[str, float | str]]:
    """Accuracy on held-out digits, dense and after dropping at block 1 or 2 or in three steps.

    Args:
        model: a built-in ViT.
        images: how many pictures.
        seed: of the pictures and of the random choice.
        show_progress: draw a progress bar.

    Returns:
        Rows with ``cut``, ``score``, ``accuracy`` and ``ink`` (mean share of the digit's ink
        among the kept patches), both in [0, 1]; the first row is the dense model.
    """
    from rich.progress import track

    plans: list[tuple[str, dict[int, float]]] = [("dense", {})]
    plans += [
        (f"{keep:.0%} after block {layer}", {layer: keep})
        for layer in (1, 2)
        for keep in (0.25, 0.12)
    ]
    plans.append(("50/25/12% after blocks 1/2/3", {1: 0.5, 2: 0.25, 3: 0.12}))
    scores: tuple[Score, ...] = ("cls", "random", "ink")
    jobs = [(cut, cuts, score) for cut, cuts in plans for score in (scores if cuts else ("cls",))]

    pictures = torch.Generator().manual_seed(seed)
    choice = torch.Generator().manual_seed(seed + 1)
    correct, ink = torch.zeros(len(jobs)), torch.zeros(len(jobs))
    sizes = [min(100, images - start) for start in range(0, images, 100)]
    for size in track(sizes, "images", disable=not show_progress, transient=True):
        batch = data.digits(size, pictures, "heldout")
        for row, (_, cuts, score) in enumerate(jobs):
            predicted, kept = predict(model, batch, cuts, score, choice)
            correct[row] += (predicted == batch.labels).sum()
            ink[row] += kept.sum()
    return [
        {
            "cut": cut,
            "score": score if cuts else "-",
            "accuracy": round(correct[row].item() / images, 4),
            "ink": round(ink[row].item() / images, 3),
        }
        for row, (cut, cuts, score) in enumerate(jobs)
    ]


def load_weights(path: Path) -> VisionTransformer:
    """The built-in ViT with the weights of a finished training run, in float32."""
    from safetensors.torch import load_file

    model = vit.build()
    model.load_state_dict(load_file(path))
    return model.eval()


def _llava(options: argparse.Namespace) -> None:
    """Every method at 50, 25, 12 and 6 % of the visual tokens."""
    from rich.console import Console

    from vtr.evaluate import vlm
    from vtr.zoo import load_vlm
    from vtr.zoo.questions import vqa

    model, processor = load_vlm(str(options.weights or options.name))
    samples = vqa(options.images or 400, options.seed)
    everything = {}
    for keep in (72, 36, 17, 9):
        results = vlm.evaluate(
            model,
            processor,
            vlm.methods_at(keep),
            samples,
            seeds=(0, 1, 2),
            progress=not options.json,
        )
        everything[keep] = vlm.to_dicts(results)
        if not options.json:
            title = f"{options.name}, {len(samples)} held-out questions, {keep} of 144 tokens"
            Console().print(vlm.table(results, title))
    if options.json:
        print(json.dumps(everything, indent=2))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.evaluate", description=__doc__)
    parser.add_argument("name", choices=["digits-vit", "digits-llava"])
    parser.add_argument("--weights", type=Path, help="of a training run, instead of the packaged")
    parser.add_argument("--images", type=int, help="or questions; default: 2000, of the LLaVA 400")
    parser.add_argument("--seed", type=int, default=99)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(arguments)
    if options.name == "digits-llava":
        _llava(options)
        return
    options.images = options.images or 2000
    model = load_weights(options.weights) if options.weights else load(options.name)
    rows = evaluate(model, options.images, options.seed, show_progress=not options.json)
    if options.json:
        print(json.dumps(rows, indent=2))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{options.name}, {options.images} held-out pictures")
    for heading in ("patches kept", "chosen by"):
        table.add_column(heading)
    for heading in ("accuracy", "ink kept"):
        table.add_column(heading, justify="right")
    for row in rows:
        accuracy, ink = float(row["accuracy"]), float(row["ink"])
        table.add_row(str(row["cut"]), str(row["score"]), f"{accuracy:.2%}", f"{ink:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
