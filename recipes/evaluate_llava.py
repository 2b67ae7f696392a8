"""``python -m recipes.evaluate_llava``: accuracy of the built-in LLaVA on held-out questions, dense
and with visual tokens dropped where they enter the language model.

Written in plain tensor code on purpose, without the package's methods and adapters: it is the
check from outside that their numbers are compared with (``python -m recipes.evaluate digits-llava``
asks the same questions through the methods).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vtr.zoo import load_vlm
from vtr.zoo.llava import PATCHES
from vtr.zoo.questions import KINDS, VOCABULARY, Sample, ask, prompt, sample_of
from vtr.zoo.scenes import Scenes, scenes

Score = Literal["cls", "random", "ink"]

KEEPS = (72, 36, 17, 9)  # of 144: 50, 25, 12 and 6 %
_NEW_TOKENS = 5  # the longest answer has four with its end


class Seen(NamedTuple):
    """Features and scores of the tower for a batch of pictures.

    Attributes:
        visual: ``(n, 144, d)``, the projected features that the language model reads.
        cls: ``(n, 144)`` in [0, 1], attention of the CLS token in the layer whose output the
            features are, mean over heads.
    """

    visual: Tensor
    cls: Tensor


@torch.no_grad()
def look(model: Any, pixels: Tensor) -> Seen:
    """Tower and projector of a ``LlavaForConditionalGeneration`` with a CLIP tower, by hand.

    Args:
        model: reads the last layer but one, without the CLS token, as the built-in one does.
        pixels: ``(n, 3, 96, 96)``, normalised.
    """
    tower = model.model.vision_tower
    states = tower(pixels, output_hidden_states=True).hidden_states
    layer = tower.encoder.layers[-2]
    entering = layer.layer_norm1(states[-3])
    n, tokens, _ = entering.shape
    attention = layer.self_attn
    query = attention.q_proj(entering[:, :1]).view(n, 1, attention.num_heads, -1)
    key = attention.k_proj(entering).view(n, tokens, attention.num_heads, -1)
    weights = torch.einsum("nqhd,nkhd->nhqk", query, key) * attention.scale
    return Seen(
        visual=model.model.multi_modal_projector(states[-2][:, 1:]),
        cls=weights.float().softmax(-1)[:, :, 0, 1:].mean(1),
    )


@torch.no_grad()
def answer(model: Any, input_ids: Tensor, visual: Tensor, kept: Tensor) -> Tensor:
    """Free greedy answers that see only some patches, which keep their original positions.

    Args:
        model: a ``LlavaForConditionalGeneration``.
        input_ids: ``(n, L)`` int64 without padding, the 144 image tokens in one run and at the
            same place in every row.
        visual: ``(n, 144, d)`` from :func:`look`.
        kept: ``(n, k)`` int64, ascending.

    Returns:
        ``(n, m)`` int64, the new tokens.
    """
    n = len(input_ids)
    first = int((input_ids[0] == VOCABULARY["<image>"]).nonzero()[0])
    words = model.get_input_embeddings()(input_ids)
    chosen = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1])).to(words.dtype)
    after = first + PATCHES
    embeds = torch.cat([words[:, :first], chosen, words[:, after:]], 1)
    places = torch.arange(input_ids.shape[1], device=kept.device).expand(n, -1)
    positions = torch.cat([places[:, :first], kept + first, places[:, after:]], 1)
    return model.generate(
        inputs_embeds=embeds,
        position_ids=positions,
        # Of ones, not None: without a mask, gaps between positions are read as packed sequences.
        attention_mask=torch.ones_like(positions),
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
    )


def right(processor: Any, tokens: Tensor, samples: list[Sample]) -> list[bool]:
    """Compare each whole answer with that of its sample."""
    said = processor.batch_decode(tokens, skip_special_tokens=True)
    return [a.strip() == s.answer for a, s in zip(said, samples, strict=True)]


def choice(
    score: Score, seen: Seen, batch: Scenes, keep: int, generator: torch.Generator
) -> Tensor:
    """The patches that stay, ``(n, keep)`` int64, ascending."""
    if score == "cls":
        ranking = seen.cls
    elif score == "random":
        ranking = torch.rand(batch.ink.shape, generator=generator)
    else:
        ranking = batch.ink
    return ranking.topk(keep, 1).indices.sort(1).values


def evaluate(
    model: Any,
    processor: Any,
    images: int = 500,
    seed: int = 99,
    *,
    keeps: tuple[int, ...] = KEEPS,
    show_progress: bool = False,
) -> list[dict[str, float | str]]:
    """Accuracy of whole, freely generated answers on held-out digits.

    Args:
        model: the built-in LLaVA.
        processor: its processor.
        images: how many pictures; every kind of question is asked about each.
        seed: of the pictures, the questions and the random choice.
        keeps: how many of the 144 patches stay.
        show_progress: draw a progress bar.

    Returns:
        Rows with ``kept``, ``score`` (CLS attention, chance, or the true place of the digits, which
        no method knows), ``accuracy``, the accuracy of every kind under its name, and ``ink`` (mean
        share of the digits' ink in the patches kept), all in [0, 1]; the first row is the dense
        model, asked through its own ``generate(input_ids, pixel_values)``.
    """
    from rich.progress import track

    scores: tuple[Score, ...] = ("cls", "random", "ink")
    jobs: list[tuple[int, Score]] = [(keep, score) for keep in keeps for score in scores]
    hits = torch.zeros(1 + len(jobs), len(KINDS))
    ink = torch.zeros(1 + len(jobs))
    pictures = torch.Generator().manual_seed(seed)
    chance = torch.Generator().manual_seed(seed + 1)
    sizes = [min(50, images - start) for start in range(0, images, 50)]
    for size in track(sizes, "images", disable=not show_progress, transient=True):
        batch = scenes(size, pictures, "heldout")
        asked = []
        for kind in KINDS:
            turns, answers = ask(batch, kind, pictures)
            asked.append([sample_of(batch, turns, answers, kind, i) for i in range(size)])
        inputs = [prompt(processor, samples) for samples in asked]
        seen = look(model, inputs[0]["pixel_values"].to(model.dtype))
        kept = [choice(score, seen, batch, keep, chance) for keep, score in jobs]
        for column, samples in enumerate(asked):
            ids = inputs[column]["input_ids"]
            pixels = inputs[column]["pixel_values"].to(model.dtype)
            out = model.generate(
                input_ids=ids,
                attention_mask=inputs[column]["attention_mask"],
                pixel_values=pixels,
                max_new_tokens=_NEW_TOKENS,
                do_sample=False,
            )[:, ids.shape[1] :]
            hits[0, column] += sum(right(processor, out, samples))
            for row, patches in enumerate(kept, 1):
                out = answer(model, ids, seen.visual, patches)
                hits[row, column] += sum(right(processor, out, samples))
        ink[0] += size
        for row, patches in enumerate(kept, 1):
            ink[row] += (batch.ink.gather(1, patches).sum(1) / batch.ink.sum(1)).sum()
    return [
        {
            "kept": keep,
            "score": score,
            "accuracy": round(hits[row].mean().item() / images, 4),
            **{kind: round(hits[row, i].item() / images, 4) for i, kind in enumerate(KINDS)},
            "ink": round(ink[row].item() / images, 3),
        }
        for row, (keep, score) in enumerate([(PATCHES, "-"), *jobs])
    ]


def load_folder(folder: Path) -> tuple[Any, Any]:
    """Model, in float32, and processor of a finished training run.

    Raises:
        ValueError: ``folder`` holds no model.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    if not (folder / "config.json").is_file():
        raise ValueError(f"no config.json in {folder}: give the folder that training wrote")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def table(rows: list[dict[str, float | str]], title: str) -> Any:
    """A rich table of :func:`evaluate`'s rows."""
    from rich.table import Table

    out = Table(title=title)
    for heading in ("tokens", "chosen by"):
        out.add_column(heading)
    for heading in ("answers", *KINDS, "ink kept"):
        out.add_column(heading, justify="right")
    for row in rows:
        shares = [f"{float(row[key]):.1%}" for key in ("accuracy", *KINDS)]
        out.add_row(str(row["kept"]), str(row["score"]), *shares, f"{float(row['ink']):.2f}")
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.evaluate_llava", description=__doc__)
    parser.add_argument("--weights", type=Path, help="folder of a training run's model")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=99)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(arguments)
    pair = load_folder(options.weights) if options.weights else load_vlm("digits-llava")
    rows = evaluate(*pair, options.images, options.seed, show_progress=not options.json)
    if options.json:
        print(json.dumps(rows, indent=2))
        return

    from rich.console import Console

    title = f"digits-llava, {options.images} held-out pictures, {len(KINDS)} questions about each"
    Console().print(table(rows, title))


if __name__ == "__main__":
    main()
