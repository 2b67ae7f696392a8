"""``python -m recipes.compare_search``: searched plans against the same methods' own schedules, at equal cost.

For every family (``vit``, ``vlm``, ``dit``) and every seed: a search on training data finds a plan within a share of
the dense FLOPs, and :class:`vtr.strategies.Uniform` solves the method's one budget for the same share, which the
method then spreads over the layers as its paper does. Both are judged on held-out data that neither has seen. Every
search and every row is kept in ``--results``, so that a run that was stopped continues.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

import vtr
from vtr.core.method import Method
from vtr.strategies import GSearch, PSigmoid, Strategy, Uniform
from vtr.strategies.runs import Runner

METHODS: dict[str, list[tuple[Method, float]]] = {
    "vit": [
        (vtr.EViT(keep=0.7), 0.35),
        (vtr.CLSAttention(layers=(0, 1, 2, 3, 4)), 0.3),
        (vtr.Random(layers=(0, 1, 2, 3, 4)), 0.5),
    ],
    "vlm": [(vtr.PyramidDrop(), 0.5), (vtr.EViT(keep=0.7), 0.35)],
    "dit": [(vtr.TopKSparse(density=0.25, block=16, dense_steps=0.0), 0.25)],
}
"""Per family, methods and the share of the dense FLOPs that they may use."""

UNITS = {"vit": "accuracy (%)", "vlm": "right answers (%)", "dit": "PSNR to the dense videos (dB)"}
SEARCHED, OWN = "searched", "own schedule"


@dataclass(frozen=True)
class Row:
    """A plan on held-out data.

    Attributes:
        family, method, target: what was searched.
        seed: of the search, and of both kinds of data.
        schedule: :data:`SEARCHED` or :data:`OWN`.
        loss: on the data of the search.
        share: FLOPs on the data of the search, as a share of the dense model's.
        score: on held-out data, in the unit of :data:`UNITS`.
        dense: the dense model's.
        heldout: loss on held-out data.
    """

    family: str
    method: str
    target: float
    seed: int
    schedule: str
    loss: float
    share: float
    score: float
    dense: float
    heldout: float


class Family:
    """A model with data to search on and a judge.

    Args:
        samples: of the data that a search sees.
        heldout: of the data that plans are judged on.
    """

    def __init__(self, samples: int, heldout: int) -> None:
        self.samples, self.heldout = samples, heldout

    model: Any
    objective: str | None = None

    def strategy(self, trials: int) -> Strategy:
        return PSigmoid(trials=trials)

    def data(self, seed: int, split: Any = "train", samples: int | None = None) -> list[Any]:
        """Batches of one of both splits."""
        raise NotImplementedError

    def score(self, plan: Any, seed: int) -> float:
        """Judge a plan, or the dense model (None), on held-out data."""
        raise NotImplementedError


class Vit(Family):
    """The built-in ViT: accuracy on digits."""

    def __init__(self, samples: int = 500, heldout: int = 2000) -> None:
        super().__init__(samples, heldout)
        from vtr.zoo import load

        self.model = load("digits-vit")

    def data(self, seed: int, split: Any = "train", samples: int | None = None) -> list[Any]:
        from vtr.zoo.data import digits

        drawn = torch.Generator().manual_seed(1000 + seed)
        batch = digits(samples or self.samples, drawn, split)
        return list(batch.images.split(100))

    @torch.inference_mode()
    def score(self, plan: Any, seed: int) -> float:
        from vtr.zoo.data import digits

        batch = digits(self.heldout, torch.Generator().manual_seed(2000 + seed), "heldout")
        torch.manual_seed(seed)

        def right() -> float:
            pairs = zip(batch.images.split(100), batch.labels.split(100), strict=True)
            hits = sum(int((self.model(x).argmax(1) == y).sum()) for x, y in pairs)
            return 100 * hits / self.heldout

        return _with(self.model, plan, right)


class Vlm(Family):
    """The built-in LLaVA: whole answers that are right."""

    def __init__(self, samples: int = 64, heldout: int = 600) -> None:
        super().__init__(samples, heldout)
        from vtr.zoo import load_vlm

        self.model, self.processor = load_vlm("digits-llava")

    def data(self, seed: int, split: Any = "train", samples: int | None = None) -> list[Any]:
        from vtr.strategies import answered
        from vtr.zoo.questions import prompt, vqa

        asked = vqa(samples or self.samples, 1000 + seed, split)
        batches = [
            prompt(self.processor, asked[start : start + 16]) for start in range(0, len(asked), 16)
        ]
        return answered(self.model, batches, 5)

    def score(self, plan: Any, seed: int) -> float:
        from vtr.zoo.questions import evaluate_vlm, vqa

        asked = vqa(self.heldout, 2000 + seed)
        # The built-in model was trained with the positions of the whole picture.
        return _with(
            self.model,
            plan,
            lambda: 100 * evaluate_vlm(self.model, self.processor, asked)["mean"],
            positions="original",
        )


class Dit(Family):
    """The built-in Wan: how close videos are to the dense model's."""

    def __init__(self, samples: int = 4, heldout: int = 20) -> None:
        super().__init__(samples, heldout)
        from vtr.zoo import load_pipeline

        self.model = load_pipeline("digits-wan")
        self.model.set_progress_bar_config(disable=True)
        self.reference: tuple[int, Tensor] | None = None

    def strategy(self, trials: int) -> Strategy:
        return GSearch()

    def data(self, seed: int, split: Any = "train", samples: int | None = None) -> list[Any]:
        from vtr.evaluate.generator import asked
        from vtr.zoo.videos import DIRECTIONS

        # Prompts are alike in both splits; the noise is not.
        place = (1000 if split == "train" else 500) + seed * self.samples
        digits, ways = (x[place:][: samples or self.samples] for x in asked(2000))
        prompts = [
            f"a {int(d)} moving {DIRECTIONS[int(w)]}" for d, w in zip(digits, ways, strict=True)
        ]
        noise = torch.Generator().manual_seed(place)
        return [{"prompt": prompts, "num_frames": 5, "generator": noise, "output_type": "latent"}]

    def score(self, plan: Any, seed: int) -> float:
        from vtr.evaluate.generator import measure

        if self.reference is None or self.reference[0] != seed:
            _, videos = measure(self.model, None, self.heldout, None, seed=2000 + seed)
            self.reference = seed, videos
        if plan is None:
            return 90.0  # the limit of the measure: the videos are its own
        row, _ = measure(self.model, plan, self.heldout, self.reference[1], seed=2000 + seed)
        return float(row["psnr"])


FAMILIES: dict[str, Callable[[], Family]] = {"vit": Vit, "vlm": Vlm, "dit": Dit}


def _with(model: Any, plan: Any, judge: Callable[[], float], **options: Any) -> float:
    if plan is None:
        return judge()
    with vtr.apply(model, plan, **options):
        return judge()


def loss_of(
    family: Family, plan: vtr.Plan, method: Method, seed: int, options: dict[str, Any]
) -> float:
    """Return the loss of a plan on held-out data, which its search has not seen."""
    batches = family.data(seed, "heldout", 4 * family.samples)
    runner = Runner(
        family.model, batches, method, objective=family.objective, seed=seed, options=options
    )
    return runner.evaluate(plan).loss


def _label(family: str, method: str, target: float, seed: int, schedule: str) -> str:
    return f"{family} {method} {target:g} {seed} {schedule}".replace(" ", "-")


def name_of(row: Row) -> str:
    """Return the name of the row's method."""
    return next(m.name for m, _ in METHODS[row.family] if str(m) == row.method)


def finished(name: str, seeds: Sequence[int], folder: Path) -> list[Row]:
    """Read the rows of a family that are in ``folder``."""
    files = [
        folder / f"{_label(name, method.name, target, seed, schedule)}.json"
        for method, target in METHODS[name]
        for seed in seeds
        for schedule in (OWN, SEARCHED)
    ]
    return [Row(**json.loads(file.read_text())) for file in files if file.is_file()]


def compare(
    name: str, family: Family, seeds: Sequence[int], trials: int, folder: Path
) -> list[Row]:
    """Search and judge all methods of a family; rows that are in ``folder`` are not run again."""
    rows = []
    for method, target in METHODS[name]:
        for seed in seeds:
            batches: list[Any] | None = None
            dense: float | None = None
            for schedule in (OWN, SEARCHED):
                label = _label(name, method.name, target, seed, schedule)
                file = folder / f"{label}.json"
                if not file.is_file():
                    batches = family.data(seed) if batches is None else batches
                    dense = family.score(None, seed) if dense is None else dense
                    how = Uniform() if schedule == OWN else family.strategy(trials)
                    study = folder / f"{label}.sqlite"
                    options = {"positions": "original"} if name == "vlm" else {}
                    plan = vtr.search(
                        family.model, batches, method, target={"flops": target}, strategy=how,
                        objective=family.objective, study=study, seed=seed, progress=True,
                        description=f"training data of the built-in {name}", **options,
                    )  # fmt: skip
                    plan.save(folder / f"{label}.plan.json")
                    measured = plan.measured
                    row = Row(
                        name, str(method), target, seed, schedule, measured["loss"],
                        measured["costs"]["flops"]["share"], family.score(plan, seed), dense,
                        loss_of(family, plan, method, seed, options),
                    )  # fmt: skip
                    file.write_text(json.dumps(vars(row), indent=2) + "\n")
                    print(row, flush=True)
                rows.append(Row(**json.loads(file.read_text())))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown: mean and standard deviation over seeds, and the difference of pairs."""
    lines = [
        "| family | method | FLOPs | seeds | dense | own | searched | difference | unit | loss, own | searched |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for family, method, target in dict.fromkeys((r.family, r.method, r.target) for r in rows):
        here = [r for r in rows if (r.family, r.method, r.target) == (family, method, target)]
        own, found = (
            {r.seed: r.score for r in here if r.schedule == kind} for kind in (OWN, SEARCHED)
        )
        gains = [found[seed] - own[seed] for seed in sorted(own.keys() & found.keys())]
        cells = [
            family,
            f"`{method}`",
            f"{target:g}",
            str(len(gains)),
            "-" if family == "dit" else f"{mean(r.dense for r in here):.1f}",
            *(spread(list(scores.values())) for scores in (own, found)),
            spread(gains, "+"),
            UNITS[family],
            *(
                spread([r.heldout for r in here if r.schedule == kind], digits=3)
                for kind in (OWN, SEARCHED)
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], sign: str = "", digits: int = 1) -> str:
    """Return mean and sample standard deviation as text."""
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{deviation}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.compare_search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("families", nargs="*", help=f"{', '.join(FAMILIES)}; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=15, help="of each search")
    parser.add_argument("--results", type=Path, default=Path("runs/compare-search"))
    parser.add_argument("--out", type=Path, default=Path("docs/search-digits"))
    parser.add_argument("--plans", type=Path, default=Path("docs/plans"))
    parser.add_argument("--collect", action="store_true", help="run nothing, write the page")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.families) - set(FAMILIES))
    if unknown:
        parser.error(f"no family is called {', '.join(unknown)}; there are: {', '.join(FAMILIES)}")
    options.families = options.families or list(FAMILIES)
    options.results.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in options.families:
        if options.collect:
            rows += finished(name, options.seeds, options.results)
            continue
        rows += compare(name, FAMILIES[name](), options.seeds, options.trials, options.results)
    print(table(rows))
    if set(options.families) == set(FAMILIES):
        write(rows, options)


PAGE = """# Searched plans against the methods' own schedules

At the same share of the dense FLOPs, a plan that `vtr.search` found on training data, and the same method with its own
schedule, whose one budget is solved for that share. Both are judged on held-out data ({heldout}). Mean and sample
standard deviation over seeds; a seed draws both kinds of data and the search's samples. The difference is taken within each
seed. The last columns have the loss on held-out data that the search makes small on its own: KL to the dense model in
nats, for `dit` the squared error over the square of the dense output.

{table}

![Scores of both schedules]({plot})

`python -m recipes.compare_search` writes this page; rows that are finished are kept, so that it can be stopped.
The plans of the first seed are in `docs/plans`: `vtr.apply(model, vtr.Plan.load("{plan}"))`.
"""


def write(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Write the page, its numbers, its plot, and the plans of the first seed."""
    import shutil

    out: Path = options.out
    options.plans.mkdir(parents=True, exist_ok=True)
    plan = ""
    for row in rows:
        if row.schedule == SEARCHED and row.seed == options.seeds[0]:
            name = _label(row.family, name_of(row), row.target, row.seed, row.schedule)
            plan = f"docs/plans/{row.family}-{name_of(row)}.json"
            shutil.copy(options.results / f"{name}.plan.json", options.plans / Path(plan).name)
    judged = "2000 pictures, 600 questions, 20 videos a seed"
    text = PAGE.format(
        heldout=judged,
        table=table(rows),
        plot=f"{out.name}.png",
        plan=plan,
    )
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps([vars(r) for r in rows], indent=2) + "\n")
    draw(rows, out.with_suffix(".png"))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel for each family: the score of every seed, connected from its own schedule to the searched one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families = list(dict.fromkeys(row.family for row in rows))
    figure, panels = pyplot.subplots(1, len(families), figsize=(4 * len(families), 3.6))
    for panel, family in zip(panels, families, strict=True):
        here = [row for row in rows if row.family == family]
        methods = list(dict.fromkeys((row.method, row.target) for row in here))
        for place, key in enumerate(methods):
            for seed in sorted({row.seed for row in here}):
                pair = {
                    r.schedule: r.score
                    for r in here
                    if (r.method, r.target, r.seed) == (*key, seed)
                }
                if len(pair) < 2:
                    continue
                panel.plot(
                    [place - 0.2, place + 0.2], [pair[OWN], pair[SEARCHED]], color="0.6", zorder=1
                )
                panel.scatter(place - 0.2, pair[OWN], color="#D55E00", marker="s", label=OWN)
                panel.scatter(place + 0.2, pair[SEARCHED], color="#0072B2", label=SEARCHED)
        if family != "dit":
            panel.axhline(mean(r.dense for r in here), color="0.4", ls="--", lw=1, label="dense")
        names = [
            f"{method.partition('(')[0]}\n{target:g} of the FLOPs" for method, target in methods
        ]
        panel.set_xticks(range(len(methods)), names, fontsize=8)
        panel.set_xlim(-0.6, len(methods) - 0.4)
        panel.set_title(f"built-in {family}")
        panel.set_ylabel(UNITS[family])
        panel.grid(axis="y", alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    panels[0].legend(unique.values(), unique.keys(), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
