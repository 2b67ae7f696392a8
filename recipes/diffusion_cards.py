"""The cards of ``docs/diffusion-methods.md``: ``python -m recipes.diffusion_cards`` writes them.

The text of a card is here. Its numbers come from ``docs/diffusion-digits.json`` (:mod:`recipes.evaluate_wan`), and the
picture of its mask from :mod:`recipes.mask_pictures`. Published numbers are the authors', as said with each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, NUMBERS = ROOT / "docs" / "diffusion-methods.md", ROOT / "docs" / "diffusion-digits.json"
BEGIN, END = "<!-- cards: begin (python -m recipes.diffusion_cards) -->", "<!-- cards: end -->"
SHARE = 0.2  # of the steps dense, in the numbers of the cards


@dataclass(frozen=True)
class Card:
    """One method.

    Attributes:
        name: of the class, or of several in one card.
        idea, formula, when, speed: text.
        rows: labels of its rows in the numbers, each with what it is called here.
        picture: name of the picture of its mask, "" for methods without a mask.
    """

    name: str
    idea: str
    formula: str
    when: str
    speed: str
    rows: tuple[tuple[str, str], ...] = ()
    picture: str = ""


CARDS: Sequence[Card] = (
    Card(
        "TopKSparse",
        "Every query block keeps the key blocks whose mean fits its own mean best. It is the mask of SLA alone, and what "
        'LightX2V and ComfyUI call "SLA".',
        "S_IJ = mean(q_I) . (mean(k_J) - mean(k)); row I keeps its top int(density NK), at least one",
        "With weights that were fine-tuned under it; below a density of 0.5 it loses much without.",
        "One product of block means for each head: the mask costs next to nothing, and the speed is the kernel's.",
        (("TopKSparse", "as it is"), ("TopKSparse, fine-tuned", "fine-tuned")),
        "topk-sparse",
    ),
    Card(
        "SLA",
        "Softmax attention over the critical blocks of `TopKSparse`, linear attention over the others, joined by a learned "
        "projection. The whole model is fine-tuned with it.",
        "O = softmax attention over critical blocks + Proj(phi(q) sum phi(k)^T v / (phi(q) . sum phi(k)))",
        "At high sparsity, if you can train: `vtr.train.sla` distils the dense model in some thousand steps.",
        "Real, and the largest of the list: 90 to 95 % of the blocks are skipped, and the linear branch is 0.6 % of dense "
        "attention's products at 32k tokens (D = 128). The authors measure against FlashAttention 2 on an RTX 5090. In "
        "TurboDiffusion (2512.16093), sparse attention is about 2x of the published 100x to 200x; distillation to three or four "
        "steps and int8 are the rest.",
        (("SLA, fine-tuned", "fine-tuned"),),
        "topk-sparse",
    ),
    Card(
        "VSA",
        "Coarse attention between the means of tiles chooses the tiles of fine attention; a learned gate adds the coarse "
        "output.",
        "S = mean(q) mean(k)^T / sqrt D over tiles; O = attention over the top ceil(density n) tiles + G softmax(S) mean(v)",
        "With weights that were trained with it (FastVideo's). Without training leave the coarse output out (`gate=None`).",
        "Real from about 30k tokens on: the authors' kernel has 85 % of FlashAttention 3's efficiency at 87 to 90 % sparsity.",
        (("VSA, untrained", "untrained, `gate=None`"), ("VSA, fine-tuned", "fine-tuned")),
        "vsa",
    ),
    Card(
        "SpargeAttn",
        "Block means decide for blocks of similar tokens only; blocks whose tokens differ are computed whole.",
        "P = softmax(scale mean(q_I) . mean(k_J)); row I keeps its top share (or a running sum up to cdf); blocks of "
        "self-similarity <= threshold: everything",
        "Without training, at moderate densities; the first to try on an unknown model, since it falls back to dense blocks.",
        "Real at 720p. The published speed includes int8 products, which are not computed here; users report little against "
        "FlashAttention on A100 and H800 (thu-ml/SpargeAttn, issues 18 and 36).",
        (("SpargeAttn", ""),),
        "sparge-attn",
    ),
    Card(
        "SVG2",
        "Clusters queries and keys of every head by k-means, so that a block holds tokens that look alike wherever they are.",
        "P_IJ ~ size_J exp(c_I . c_J / sqrt D) over cluster centres; row I keeps the clusters of largest P up to the share p",
        "Without training, if quality counts most: layout matters more than the score. Expect k-means to cost time.",
        "Real at 720p, mostly measured against FlashAttention 2; against FlashAttention 3 about a third of the gain is lost. "
        "Clusters of uneven size are filled up to blocks, 10 to 20 % of the work.",
        (("SVG2", ""),),
        "svg2",
    ),
    Card(
        "XAttentionDiT",
        "Scores blocks by sums along antidiagonals, which pass every query and every key once, so that nothing is averaged "
        "away.",
        "S_IJ = sum of exp over stride-reduced antidiagonals of tile IJ; row I keeps the fewest blocks that reach threshold",
        "If attention runs along diagonals (the same place in other frames), which block means lose.",
        "Real at 720p, on FlashAttention 2 baselines. Its score reads q and k once at 1 / stride of the products.",
        (("XAttentionDiT", ""),),
        "xattention-dit",
    ),
    Card(
        "DraftAttention",
        "A draft of attention between pooled patches of the frames, and one threshold for all rows of a head.",
        "P = softmax(scale mean(q_I) . mean(k_J)) over patches; the largest density of a head's entries",
        "If heads differ: rows that need more get more. Patches are compact in the frame.",
        "Real at 720p on FlashAttention 2 baselines; the authors' 1.75x at 768p and density 0.1 is not confirmed by others.",
        (("DraftAttention", ""),),
        "draft-attention",
    ),
    Card(
        "Jenga",
        "Blocks along a space-filling curve: the best by pooled scores, and the neighbours in space and time.",
        "P = softmax(pooled); row I keeps its top (1 - drop) NK, those up to the share p, and its neighbours",
        "On HunyuanVideo and Wan with the presets.",
        "The sparse attention is the smaller part of the published 5.24x (HunyuanVideo 720p, H800); TeaCache and generating at "
        "rising resolution are the rest, and are not part of vtr.",
        (("Jenga", "`p=0`, no neighbours"),),
        "jenga",
    ),
    Card(
        "AdaSpa",
        "Finds the exact mass of every block in two steps of a run, and reuses the blocks between them.",
        "W_IJ = sum over tile IJ of exp(q . k / sqrt D - LSE); row I keeps its top density NK; heads with concentrated mass "
        "give blocks to others",
        "Without training, with 30 steps and more: a search step is dense, so few-step models gain nothing.",
        "Real: the search is below 5 % of dense attention's time in the paper, which reports 1.78x on HunyuanVideo 720p (A100, "
        "FlashAttention 2 class, 80 % sparsity).",
        (("AdaSpa", ""),),
        "adaspa",
    ),
    Card(
        "LiteAttention",
        "A tile that stayed far below the maximum of its rows in one step is skipped in all later ones.",
        "skip IJ from step t + 1 on if max over the tile of scores < running maximum + threshold in every row",
        "Many steps that are alike; nothing is estimated, so it is the most cautious of the list.",
        "Real on H100 and H200: the authors' ablation has self-attention 1.66x faster at 42 % sparsity. Their 1.89x end to end "
        "does not fit this (it saves more than all of self-attention takes); do not count on it.",
        (("LiteAttention", ""),),
        "liteattention",
    ),
    Card(
        "RectifiedSparse",
        "Blocks by pooled scores, and the pooled value of the skipped ones in the output.",
        "O = (1 - r) softmax attention over kept blocks + r pooled attention over the rest, r its pooled share",
        "At densities from about 0.5, or with its presets; on this generator the correction does not show.",
        "One product of block means; the correction is inside the kernel's epilogue.",
        (("rectified", ""), ("its bare mask", "`rectify=False`")),
        "rectified",
    ),
    Card(
        "SlidingTile, SearchedTile",
        "Whole tiles around each tile: one window (`SlidingTile`), or one for each step, layer and head, found by "
        "`vtr.calibrate` (`SearchedTile`).",
        "tile I sees tile J if |I - J| <= window / 2 in time, height and width",
        "The safest static mask for videos; search the windows if you generate much with one model and size.",
        "Real against FlashAttention 3: a static window of whole tiles, nothing is chosen at run time.",
        (("SearchedTile", "searched windows"),),
        "sliding-tile",
    ),
    Card(
        "NeighborhoodAttention",
        "A window around each token (or group of tokens), with stride and dilation.",
        "token i sees token j if |i - j| <= window / 2 in every axis",
        "As `SlidingTile`, with windows that are not whole tiles.",
        "Real with stride = tile; with stride 1 many blocks are partly masked (see above).",
        (("neighbourhood", ""),),
        "neighborhood",
    ),
    Card(
        "RadialAttention",
        "Attention that thins out with the distance between frames, at O(N log N) cost.",
        "band width in a frame at distance d: (width of a frame) / 2^ceil(log2 d), and a diagonal beyond",
        "Long videos, at best with LoRA weights that were tuned for it.",
        "Real, no run-time choice; users report no gain on short videos and with blocks of 64 (dense kernels are faster there).",
        (("radial", ""),),
        "radial",
    ),
    Card(
        "Rettention",
        "Any static mask, its softmax rescaled by a ratio from an earlier dense step, plus what that step's mask missed.",
        "O_t = ratio softmax attention(mask) + residual, both measured at refresh steps",
        "Together with a static mask at low density; it needs memory (see below).",
        "Refresh steps are dense. The residual is as large as the output of attention, for each layer and branch.",
        (("Re-ttention of it", "of the radial mask"),),
        "radial",
    ),
    Card(
        "ToDo",
        "Keys and values of every second row and column; all queries.",
        "K' = K[::f, ::f], V' = V[::f, ::f] after the rotary embedding",
        "Images at 2k and more, any backend: it is dense attention with fewer keys.",
        "Real and trivial; the gain grows with the resolution (README of the authors: 1.5x at 768 to 1024 pixels, 3x at 1536 to "
        "2048, UNet).",
        (("ToDo", "`factor=2`"),),
        "todo",
    ),
    Card(
        "ToMeSD, SiTo, OptiPrune",
        "Merge similar tokens (`ToMeSD`) or prune them and copy the nearest (`SiTo`, `OptiPrune`) around attention.",
        "match by cosine to one base token in each cell; compute on the rest; give the results back",
        "Large images with eager attention or little memory.",
        "None, or negative, with flash attention up to 4k tokens: matching costs what attention saves.",
    ),
    Card(
        "ToMA",
        "Merges tokens by a small dense matrix for each window, and restores them by its transpose.",
        "A = softmax(cos / tau) over the windows' destinations; y = A^T attention(A x)",
        "Instead of `ToMeSD` on GPUs.",
        "Real, small: 1.2x on Flux and SDXL (paper, FlashAttention 2 baseline, on which ToMeSD has 1.00x).",
    ),
)

VERDICT = """Attention is a share `a` of a run. With density `s` and a kernel that has `e` of the dense kernel's
efficiency, the run is `1 / ((1 - a) + a s / e)` times as fast. With `a = 0.6`: at `s = 0.2` this is 1.92x for `e = 1` and
1.67x for `e = 0.6` (a FlashAttention 2 class kernel on Hopper); at `s = 0.5` it is 1.43x and 1.11x. So a speed that was
published over FlashAttention 2 shrinks by about a third over FlashAttention 3 (an inference from both kernels' published
TFLOP/s), and little is gained above a density of a half. Speeds on the cards are the authors' unless a source is named;
none was measured by vtr on these models. Numbers of quality are vtr's own, from [diffusion-digits.md](diffusion-digits.md):
the built-in generator (640 tokens, blocks of 16), 100 videos, the first 20 % of 12 steps dense. They rank methods on a
small model and say nothing about their speed. Pictures have the 40 x 40 blocks of one head of that model (layer 2, step 6) at a
density of about 1/4, queries down and keys across; grey lines divide the five frames, and a block is darker the more of
its pairs are computed."""


def numbers(card: Card, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of a card, a line for each density; empty without rows."""
    lines = []
    for label, called in card.rows:
        found = [r for r in rows if r["attention"] == label and r["dense_steps"] == SHARE]
        for row in sorted(found, key=lambda r: -r["target"]):
            near = "" if row["psnr"] is None else f"{row['psnr']:.1f}"
            shares = " | ".join(f"{100 * row[key]:.0f} %" for key in ("digit", "direction"))
            cost = f"{row['density']:.3g} | {row['work']:.2f}"
            lines.append(f"| {called or 'as it is'} | {cost} | {shares} | {near} |")
    if not lines:
        return ["No row in the comparison.", ""]
    head = [
        "| | density | work | digit | direction | PSNR |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    return [*head, *lines, ""]


def cards(rows: Sequence[dict[str, Any]]) -> str:
    """The generated part of the page."""
    dense = next(r for r in rows if r["attention"] == "dense")
    shares = [f"{key} {100 * dense[key]:.0f} %" for key in ("digit", "direction")]
    lines = [VERDICT, "", f"Dense: {', '.join(shares)}.", ""]
    lines += ["![quality against attention work](diffusion-quality.png)", ""]
    for card in CARDS:
        lines += [f"### {card.name}", "", card.idea, ""]
        if card.picture:
            lines += [f"![mask of {card.name}](masks/{card.picture}.png)", ""]
        lines += [f"    {card.formula}", "", *numbers(card, rows)]
        lines += [f"*When*: {card.when}", "", f"*Speed*: {card.speed}", ""]
    return "\n".join(lines)


def page(text: str, rows: Sequence[dict[str, Any]]) -> str:
    """The page with its cards written anew.

    Raises:
        ValueError: the page has no place for them.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE} has no lines {BEGIN!r} and {END!r}")
    return f"{before}{begin}\n\n{cards(rows)}\n{end}{after}"


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="python -m recipes.diffusion_cards", description=__doc__
    ).parse_args(arguments)

    from recipes import mask_pictures, wan_plot

    rows = json.loads(NUMBERS.read_text())["rows"]
    PAGE.write_text(page(PAGE.read_text(), rows))
    wan_plot.draw(rows, PAGE.with_name("diffusion-quality.png"))
    mask_pictures.write(PAGE.with_name("masks"))
    print(f"wrote {PAGE}, the plot and the pictures of masks")


if __name__ == "__main__":
    main()
