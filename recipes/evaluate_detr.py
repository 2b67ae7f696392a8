"""``python -m recipes.evaluate_detr``: the built-in detector on held-out pictures, dense and with every method
that chooses the tokens of its encoder.

With ``--out PREFIX`` it writes PREFIX.json, PREFIX.md and PREFIX.png. A run that was stopped continues:
configurations that PREFIX.json holds are not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import vtr
from recipes.comparison import Store, choose
from vtr.core.method import Method
from vtr.evaluate.configurations import measure_all, on_the_line, seeded
from vtr.zoo import detection, evaluate_detector, load

PICTURES = 500
SEEDS = (0, 1, 2)  # of methods that draw
BUDGETS = (0.02, 0.1, 0.2, 0.3, 0.5)
DENSE, RANDOM = "dense", "random"
OBJECTS = 60  # tokens in FocusDETR's attention between objects, as it was trained
FLAT = (1.0, 1.0, 1.0, 1.0)  # every layer computes the same tokens
ROUNDS = 7  # of timing
COMMAND = "python -m recipes.evaluate_detr --out docs/detection-digits"


@dataclass(frozen=True)
class DetectionResult:
    """One configuration.

    Attributes:
        name, method: its name, and the method with its settings.
        encoder: FLOPs of the encoder's layers, the method's own included, as a share of the dense ones.
        whole: the same for the whole detector.
        map, map50: in [0, 1]; the mean over seeds if the method draws.
        spread: standard deviation of ``map`` over seeds, else None.
        ratio: time of the dense detector over that of this one, both called in turns.
    """

    name: str
    method: str
    encoder: float
    whole: float
    map: float
    map50: float
    spread: float | None
    ratio: float


def methods() -> dict[str, list[Method]]:
    """Every method in all its settings, by name."""
    return {
        RANDOM: [vtr.Random(keep=k, site="detector", layers=(0,)) for k in BUDGETS],
        "feature norm": [vtr.Objectness(keep=k, by="norm", layers=(0,)) for k in BUDGETS],
        "class head": [vtr.Objectness(keep=k, by="class", layers=(0,)) for k in BUDGETS],
        "SparseDETR": [vtr.SparseDETR(keep=k, weights="digits-sparse-detr") for k in BUDGETS],
        "FocusDETR": [
            vtr.FocusDETR(keep=k, weights="digits-focus-detr", objects=0) for k in BUDGETS
        ],
        "FocusDETR, no cascade": [
            vtr.FocusDETR(keep=k, weights="digits-focus-detr", objects=0, cascade=FLAT)
            for k in BUDGETS
        ],
        "FocusDETR, dual": [
            vtr.FocusDETR(keep=k, weights="digits-focus-detr-dual", objects=OBJECTS)
            for k in BUDGETS
        ],
    }


def rest_of(model: Any) -> tuple[int, int]:
    """Count the matrix products and convolutions of one picture: in the encoder, and outside of it."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros(1, 3, detection.IMAGE, detection.IMAGE))
    counts = counter.get_flop_counts()
    # The backbone has a module of the same name.
    encoder = sum(counts[f"{type(model).__name__}.model.encoder"].values())
    return encoder, sum(counts["Global"].values()) - encoder


class Bench:
    """Measures configurations of one detector on the same pictures.

    Args:
        model: the detector.
        pictures: how many.
        seeds: of methods that draw.
    """

    def __init__(self, model: Any, pictures: int, seeds: Sequence[int]) -> None:
        self.model, self.pictures, self.seeds = model, pictures, seeds
        self.rest = rest_of(model)[1]
        self.batch = detection.pictures(16, torch.Generator().manual_seed(0), "heldout").images

    def measure(self, name: str, method: Method | None) -> DetectionResult:
        """Measure one configuration; None is the bare detector."""
        if method is None:
            score = evaluate_detector(self.model, self.pictures)
            return DetectionResult(DENSE, DENSE, 1.0, 1.0, score.map, score.map50, None, 1.0)
        draws = seeded(method, 0) != seeded(method, 1)
        scores, ratio = [], 1.0
        for seed in self.seeds if draws else self.seeds[:1]:
            handle = vtr.apply(self.model, seeded(method, seed))
            try:
                scores.append(evaluate_detector(self.model, self.pictures))
                dense, reduced = handle.report().flops["encoder"]
                if len(scores) == 1:
                    ratio = self.ratio(handle)
            finally:
                handle.remove()
        found = [score.map for score in scores]
        return DetectionResult(
            name=name,
            method=str(method),
            encoder=reduced / dense,
            whole=(reduced + self.rest) / (dense + self.rest),
            map=statistics.mean(found),
            map50=statistics.mean(score.map50 for score in scores),
            spread=statistics.stdev(found) if len(found) > 1 else None,
            ratio=ratio,
        )

    @torch.no_grad()
    def ratio(self, handle: vtr.Handle) -> float:
        """Median over rounds of the dense time over the reduced time, called one after the other."""
        found = []
        for _ in range(ROUNDS):
            seconds = []
            for switch in (handle.pause, handle.resume):
                switch()
                start = time.perf_counter()
                self.model(self.batch)
                seconds.append(time.perf_counter() - start)
            found.append(seconds[0] / seconds[1])
        return statistics.median(found)


def random_at(results: Sequence[DetectionResult], encoder: float) -> float | None:
    """mAP of random tokens at these FLOPs of the encoder, between its own settings; None outside."""
    return on_the_line(((r.encoder, r.map) for r in results if r.name in (RANDOM, DENSE)), encoder)


def markdown(results: Sequence[DetectionResult], facts: Mapping[str, Any]) -> str:
    """The page of results."""
    dense = results[0]
    lines = [
        "# Built-in detector: mAP against FLOPs",
        "",
        f"`{COMMAND}`: {facts['pictures']} held-out pictures of one to five digits, float32 on a CPU core. "
        f"Dense: mAP@[.5:.95] {100 * dense.map:.1f}, mAP@.5 {100 * dense.map50:.1f}. The encoder has 534 tokens "
        f"and {facts['encoder_share']:.0%} of the detector's FLOPs (matrix products and convolutions).",
        "",
        "![mAP against FLOPs](detection-digits.png)",
        "",
        "A method chooses the tokens that the encoder's layers compute; the layers read the values of all tokens, "
        "and all come back. FLOPs of the encoder include the method's own. *Random* is the mAP of random tokens at "
        f"the encoder FLOPs of the row, on straight lines between its settings; ± is the standard deviation over "
        f"{len(facts['seeds'])} seeds. *Time* is the dense detector's over this one's, backbone and decoder "
        "included, both called in turns with 16 pictures: above 1 is faster.",
        "",
        "| method | tokens | encoder FLOPs | all FLOPs | mAP | mAP@.5 | random | time |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        peer = random_at(results, r.encoder) if r.name not in (RANDOM, DENSE) else None
        spread = "" if r.spread is None else f" ± {100 * r.spread:.1f}"
        cells = [
            facts["keep"].get(r.method, "100%"),
            f"{r.encoder:.0%}",
            f"{r.whole:.0%}",
            f"{100 * r.map:.1f}{spread}",
            f"{100 * r.map50:.1f}",
            "" if peer is None else f"{100 * peer:.1f}",
            f"{r.ratio:.2f}",
        ]
        lines.append(f"| {r.name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "- The detector was trained with some tokens left out of the encoder, every second time at random "
        "(`vtr/zoo/cards/digits-detr.md`): random choices are nothing new to it, and cost less than "
        "they would in a detector trained with all tokens.",
        "- *Feature norm* and *class head* need no training (`Objectness`). SparseDETR and FocusDETR have one set of "
        "weights for all budgets, trained by `python -m recipes.train digits-detr-scorers` at 30 %, the detector "
        "frozen. The tokens of FocusDETR are those of its first layer; later ones compute fewer, except without its "
        "cascade.",
        "- mAP@.5 hardly changes, except with the dual attention: methods lose accuracy of the boxes, and few digits.",
        "- FocusDETR calls a token foreground if the sides of its box are at most 8 strides away, on the finest such "
        "level. Digits are smaller than 64 pixels, so this is the level of stride 8 for all of them, and the selector "
        "leaves out the coarser tokens, from which this detector proposes the larger digits.",
        "- *FocusDETR, dual* has the paper's attention between the tokens of objects, which changes what the later "
        "layers read. It was trained for 400 steps beside a frozen detector, and the paper trains both together; it "
        "does harm here.",
        "",
        "Settings, in the order of the rows:",
        "",
    ]
    lines += [f"- {r.name}: `{r.method}`" for r in results[1:]]
    return "\n".join(lines) + "\n"


def plot(results: Sequence[DetectionResult], path: str | Path) -> None:
    """mAP against FLOPs of the encoder and against time, one line per method."""
    from vtr.errors import missing

    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise missing("matplotlib", "plots", "the plot") from error
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=True)
    names = dict.fromkeys(r.name for r in results[1:])
    for panel, key in zip(panels, ("encoder", "ratio"), strict=True):
        panel.axhline(100 * results[0].map, color="0.6", lw=1, ls="--", label=DENSE)
        for i, name in enumerate(names):
            rows = sorted((r for r in results if r.name == name), key=lambda r: r.encoder)
            drawn = {"ls": ":", "color": "0.4"} if name == RANDOM else {"color": f"C{i}"}
            panel.errorbar(
                [getattr(r, key) for r in rows],
                [100 * r.map for r in rows],
                [100 * (r.spread or 0) for r in rows],
                marker="osv^D"[i % 5],
                ms=4,
                label=name,
                **drawn,
            )
        panel.grid(alpha=0.25)
    panels[0].set(xlabel="FLOPs of the encoder (dense = 1)", ylabel="mAP@[.5:.95]")
    panels[1].set(xlabel="speed of the whole detector (dense = 1)")
    panels[0].legend(fontsize=8)
    figure.suptitle("Built-in detector: held-out pictures")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def row(held: Mapping[str, Any]) -> DetectionResult:
    """One stored result."""
    return DetectionResult(**held)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.evaluate_detr", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--methods", nargs="*", help="names of methods; default: all")
    parser.add_argument("--out", type=Path, help="write PREFIX.json, .md and .png")
    options = parser.parse_args(arguments)

    from rich.console import Console

    torch.set_num_threads(1)
    everything = methods()
    wanted = choose(parser, everything, options.methods, "method")
    console = Console()
    model = load("digits-detr")
    encoder, rest = rest_of(model)
    facts: dict[str, Any] = {
        "pictures": options.pictures,
        "seeds": options.seeds,
        "encoder_share": encoder / (encoder + rest),
        "keep": {str(m): f"{m.keep:.0%}" for found in everything.values() for m in found},  # type: ignore[attr-defined]
    }
    store = Store(parser, options.out, facts, row, beside=("keep",))
    bench = Bench(model, options.pictures, options.seeds)
    results = measure_all(
        DENSE,
        wanted,
        bench.measure,
        known=store.known,
        report=store.keep,
        progress=console.is_terminal,
    )
    for r in results:
        console.print(
            f"{r.name:14} encoder {r.encoder:5.0%}  mAP {100 * r.map:5.1f}  time {r.ratio:.2f}"
        )
    together = store.finish(results, everything=options.methods is None)
    if store.path is not None:
        store.path.with_suffix(".md").write_text(markdown(together, facts))
        plot(together, store.path.with_suffix(".png"))
        console.print(f"wrote {store.path.with_suffix('')}.json, .md and .png")


if __name__ == "__main__":
    main()
