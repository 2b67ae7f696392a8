"""``python -m recipes.evaluate_wan``: the built-in generator, dense and with sparse attention.

Without options: the dense model on 200 prompts, read by :mod:`vtr.evaluate.digit_judge`. With ``--sparse`` it
runs the comparison that ``docs/diffusion-digits.md`` shows and writes it to ``--out``: every method at
three densities beside a random mask, attention inside the own frame, and the blocks with the most
attention, which takes the dense map to find. Methods that were fine-tuned (:mod:`recipes.train_sparse`) are those of
the folders given with ``--tuned``.

Each row is written to ``--results`` when it is done, and rows that are there, or in ``--out``, are not run again. So
a run may be stopped and continued, ``--only`` runs a part of the rows, and ``--part 1/2`` every second one, beside another
process with ``--part 2/2``. ``--collect`` runs nothing and writes the pages of the rows that are there.

A block of the masks is 16 tokens: one row of patches of a frame of 16 x 32 pixels.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from recipes.wan_methods import VIDEOS, RunTime, mean_density, run_time, search
from vtr.evaluate import digit_judge
from vtr.evaluate.generator import measure
from vtr.kernels import BlockMask
from vtr.methods.base import Grid, MaskedAttention
from vtr.methods.common.attention import AttentionMethod

if TYPE_CHECKING:
    from vtr.diffusion.site import DiffusionAttentionSite

BLOCK, STEPS = 16, 12
DENSITIES = (0.5, 0.25, 0.125)
KNOB = ("radial", "Re-ttention of it", "random")  # what is shown at other shares of dense steps


# ---- masks to compare with --------------------------------------------------------------------


@dataclass(frozen=True)
class Nearest(MaskedAttention):
    """The nearest key blocks of every query block, as many for each; no published method.

    Args:
        density: share of the key blocks.
        order: ``"radial"`` ranks by (rows apart + 1/2) * 2^(frames apart), the order in which the
            radial mask thins out, for densities that its formula does not reach on so few frames;
            ``"frame"`` takes rows of the own frame only, at most all of them.
    """

    name: ClassVar[str] = "nearest"

    density: float = 0.25
    order: str = "radial"

    def grid_mask(self, grid: Grid) -> BlockMask:
        frames, height, width = grid
        per_frame = height * width // self.block
        if per_frame * self.block != height * width:
            raise ValueError(
                f"this mask wants frames of whole blocks: {height} x {width} tokens are "
                f"no multiple of {self.block}"
            )
        blocks = frames * per_frame
        frame, place = torch.arange(blocks) // per_frame, torch.arange(blocks) % per_frame
        apart = (frame[:, None] - frame).abs()
        rows = (place[:, None] - place).abs() + 0.5
        keep = max(1, round(self.density * blocks))
        if self.order == "frame":
            cost, keep = rows + 1e6 * (apart > 0), min(keep, per_frame)
        else:
            cost = rows * 2.0**apart
        live = torch.zeros(blocks, blocks, dtype=torch.bool)
        live.scatter_(1, cost.argsort(dim=1, stable=True)[:, :keep], True)
        total = frames * height * width
        return BlockMask.from_blocks(live, q_len=total, k_len=total, block=self.block)


@dataclass(frozen=True)
class Top(AttentionMethod):
    """The key blocks with the most attention in the dense map of the same call, for every head and
    query block. It makes the dense map first, so it saves nothing: it shows what a mask that knew
    where the attention goes would be worth."""

    name: ClassVar[str] = "top"

    density: float = 0.25

    def attend(self, site: DiffusionAttentionSite) -> Tensor:
        q, k, v = site.q, site.k, site.v
        n = -(-q.shape[2] // self.block)
        if n * self.block != q.shape[2]:
            raise ValueError(f"{q.shape[2]} tokens are no multiple of {self.block}")
        share = (q * site.scale @ k.transpose(-1, -2)).softmax(-1)
        blocks = share.unflatten(-1, (n, self.block)).unflatten(-3, (n, self.block))
        mass = blocks.sum((-3, -1), dtype=torch.float32)
        best = mass.topk(max(1, round(self.density * n)), -1).indices
        live = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, best, True)
        site.count(live.float().mean())
        seen = (blocks * live[..., None, :, None]).flatten(-2).flatten(-3, -2)
        total = seen.sum(-1, keepdim=True, dtype=torch.float32)
        return ((seen @ v) / total).to(v.dtype)


# ---- the comparison ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One line of the comparison: a method, the density it is meant to have, its label."""

    label: str
    density: float
    method: AttentionMethod


def cases(dense_steps: float, densities: tuple[float, ...] = DENSITIES) -> Iterator[Case]:
    """List the methods to compare, at one share of dense steps."""
    import vtr

    # A fixed backend: time must not depend on whether a compiler is at hand.
    common: dict[str, Any] = {"block": BLOCK, "dense_steps": dense_steps, "backend": "sdpa"}
    # Windows that are whole tiles of 4 x 4 tokens, so that no block is cut.
    windows = {0.5: (3, 8, 12), 0.25: (3, 4, 12), 0.125: (5, 4, 4)}
    for density in densities:
        radial: MaskedAttention = Nearest(density=density, **common)
        if density == 0.5:  # the least that the method itself reaches on five frames
            radial = vtr.RadialAttention(decay=0.05, sink=False, **common)
        yield Case("radial", density, radial)
        yield Case("Re-ttention of it", density, vtr.Rettention(mask=radial, **common))
        yield Case(
            "rectified",
            density,
            vtr.RectifiedSparse(
                p=0.0, drop=1 - density, order="raster", neighbours=False, **common
            ),
        )
        yield Case(
            "its bare mask",
            density,
            vtr.RectifiedSparse(
                p=0.0, drop=1 - density, order="raster", neighbours=False, rectify=False, **common
            ),
        )
        if density in windows:
            yield Case(
                "neighbourhood",
                density,
                vtr.NeighborhoodAttention(
                    window=windows[density], stride=(1, 4, 4), tile=(1, 4, 4), **common
                ),
            )
        yield Case("random", density, vtr.RandomSparse(density=density, **common))
        if density < 0.5:
            yield Case("own frame", density, Nearest(density=density, order="frame", **common))
        yield Case("top of the dense map", density, Top(density=density, **common))


@dataclass(frozen=True)
class Job:
    """A row to run: a method at a density and a share of dense steps, or the folder of a fine-tuned one."""

    label: str
    density: float
    dense_steps: float
    case: Case | RunTime | Path

    @property
    def key(self) -> str:
        return key_of(self.label, self.density, self.dense_steps)

    @property
    def head(self) -> dict[str, Any]:
        """The facts that name the row."""
        return {
            "attention": self.label, "target": self.density, "dense_steps": self.dense_steps,
        }  # fmt: skip


def key_of(label: str, density: float, dense_steps: float) -> str:
    """The name of a row, and of its files."""
    return f"{label} {density:g} {dense_steps:g}"


def jobs(
    shares: tuple[float, ...], densities: tuple[float, ...], tuned: Sequence[Path] = ()
) -> list[Job]:
    """List all rows but the dense one: all methods at the first share of dense steps, and those of
    :data:`KNOB` at the others."""
    found = []
    for number, share in enumerate(shares):
        listed: list[Case | RunTime] = [*cases(share, densities)]
        listed += run_time(share, densities) if number == 0 else []
        found += [
            Job(case.label, case.density, share, case)
            for case in listed
            if number == 0 or case.label in KNOB
        ]
    for folder in tuned:
        label, density = tuned_label(folder)
        found.append(Job(label, density, shares[0], folder))
    return found


def tuned_label(folder: Path) -> tuple[str, float]:
    """The label and the density of a fine-tuned method, from the folder of its training run."""
    from vtr.train.sla import load
    from vtr.zoo import load_pipeline

    row = judged(folder)
    named = row and re.match(r"(\w+)\(.*\bdensity=([\d.]+)", row["method"])
    if named:
        return f"{named[1]}, fine-tuned", float(named[2])
    method: Any = load(load_pipeline("digits-wan"), folder)
    return f"{type(method).__name__}, fine-tuned", method.density


def judged(folder: Path) -> dict[str, Any] | None:
    """The numbers that a training run has measured itself, ``result.json`` of its folder."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    # Where the weights were is nobody's business but the run's.
    return {**found, "method": re.sub(r"weights='[^']*', |, weights='[^']*'", "", found["method"])}


def run(pipe: Any, job: Job, n: int, reference: Tensor) -> tuple[dict[str, Any], Tensor | None]:
    """Generate the videos of a row; returns the row and the first ten of them.

    A fine-tuned method whose training run has judged its own videos has these numbers, and no videos.
    """
    case, head = job.case, job.head
    searched = None
    if isinstance(case, Path):
        found = judged(case)
        if found is not None:
            return {**head, **found}, None
        from vtr.train.sla import load

        # Its weights are in the transformer from here on.
        method: Any = load(pipe, case).replace(dense_steps=job.dense_steps)
    else:
        method = case.method
    dense = int(job.dense_steps * STEPS) / STEPS  # as in the schedule of a method
    if isinstance(case, RunTime) and case.searched is not None:
        method = search(case, dense, lambda m: measure(pipe, m, VIDEOS, None)[0]["work"])
        searched = {case.searched.option: getattr(method, case.searched.option)}
    row, videos = measure(pipe, method, n, reference)
    if searched is not None:  # the last step is not like the others
        row["density"] = round(mean_density(row["work"], dense), 3)
    more = {"method": str(method), **({} if searched is None else {"searched": searched})}
    return {**head, **row, **more}, videos[:10]


class Results:
    """Rows in a folder, a file for each, and those of an earlier page.

    Args:
        folder: of the rows; made if it does not exist.
        page: PREFIX of an earlier page; rows of PREFIX.json count as run.
        videos: rows of another number of videos do not count.
    """

    def __init__(self, folder: Path, page: Path, videos: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.videos = folder, videos
        self.rows: dict[str, dict[str, Any]] = {}
        if page.with_suffix(".json").is_file():
            held = json.loads(page.with_suffix(".json").read_text())
            if held["videos"] == videos:
                self.rows = {self._key(row): row for row in held["rows"]}
        for path in sorted(folder.glob("*.json")):
            row = json.loads(path.read_text())
            if row.pop("videos") == videos:
                self.rows[self._key(row)] = row

    @staticmethod
    def _key(row: dict[str, Any]) -> str:
        return key_of(row["attention"], row["target"], row["dense_steps"])

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / (re.sub(r"[^A-Za-z0-9.]+", "-", key) + suffix)

    def keep(self, row: dict[str, Any], videos: Tensor | None) -> None:
        """Write a row, and its videos beside it."""
        key = self._key(row)
        self.rows[key] = row
        if videos is not None:
            torch.save(videos.clone(), self._path(key, ".pt"))
        text = json.dumps({**row, "videos": self.videos}, indent=1)
        new = self._path(key, ".new")
        new.write_text(text + "\n")
        new.replace(self._path(key, ".json"))  # whole, or not there

    def sheet(self, key: str) -> Tensor | None:
        """The videos of a row; None for rows of an earlier page."""
        path = self._path(key, ".pt")
        return torch.load(path, weights_only=True) if path.is_file() else None


def dense_row(pipe: Any, results: Results) -> Tensor:
    """The videos of the dense model, from the folder of the results or generated."""
    path = results.folder / "reference.pt"
    if path.is_file():
        held: Tensor = torch.load(path, weights_only=True)
        if len(held) == results.videos:
            return held
    row, reference = measure(pipe, None, results.videos, None)
    torch.save(reference, path)
    head = {"attention": "dense", "target": 1.0, "dense_steps": 1.0}
    if key_of("dense", 1.0, 1.0) not in results.rows:
        results.keep({**head, **row}, reference[:10])
    return reference


def compare(todo: Sequence[Job], results: Results, weights: str) -> None:
    """Run the rows that are not in the results, with a progress bar."""
    from rich.progress import Progress

    from vtr.zoo import load_pipeline

    def fresh() -> Any:
        pipe = load_pipeline(weights, torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    pipe = fresh()
    left = [job for job in todo if job.key not in results.rows]
    with Progress(transient=True) as progress:
        task = progress.add_task("dense", total=1 + len(left))
        reference = dense_row(pipe, results)
        for job in left:
            progress.update(task, description=job.key, advance=1)
            row, videos = run(pipe, job, results.videos, reference)
            results.keep(row, videos)
            progress.console.print(json.dumps(row))
            if isinstance(job.case, Path):
                pipe = fresh()


def part_of(text: str) -> tuple[int, int]:
    """Read ``"1/2"``, the first of two parts."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(
            f"a part is a number and a count such as 1/2, got {text!r}"
        )
    return int(number), int(count)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.evaluate_wan", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--weights", help="folder of a training run's model")
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--sparse", action="store_true", help="compare masks and methods")
    parser.add_argument("--dense-steps", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument(
        "--tuned",
        type=Path,
        nargs="+",
        default=[],
        help="folders of recipes.train_sparse, whose --videos was that of this comparison",
    )
    parser.add_argument("--only", nargs="+", help="run rows whose name has one of these texts")
    parser.add_argument(
        "--part", type=part_of, default=(1, 1), help="such as 1/2: every second row"
    )
    parser.add_argument("--results", type=Path, default=Path("runs/evaluate-wan"))
    parser.add_argument("--collect", action="store_true", help="run nothing, write the pages")
    parser.add_argument("--out", type=Path, default=Path("docs/diffusion-digits"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    from vtr.zoo import load_pipeline

    weights = options.weights or "digits-wan"
    certain = digit_judge.accuracy()
    print("judge on real held-out videos:", {k: round(v, 4) for k, v in certain._asdict().items()})
    if not options.sparse:
        pipe = load_pipeline(weights, torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        row, _ = measure(pipe, None, options.videos, None)
        print(json.dumps(row, indent=2))
        return

    from recipes import wan_report

    results = Results(options.results, options.out, options.videos)
    listed = jobs(tuple(options.dense_steps), tuple(options.densities), options.tuned)
    for job in listed:  # numbers of training runs cost nothing, and may be newer
        found = judged(job.case) if isinstance(job.case, Path) else None
        if found is not None:
            results.keep({**job.head, **found}, None)
    if not options.collect:
        number, count = options.part
        wanted = [
            job
            for job in listed
            if options.only is None or any(text in job.key for text in options.only)
        ]
        compare(wanted[number - 1 :: count], results, weights)
    order = {job.key: place for place, job in enumerate(listed)}
    rows = sorted(results.rows.values(), key=lambda row: order.get(Results._key(row), -1))
    missing = [job.key for job in listed if job.key not in results.rows]
    if missing:
        print(f"not run yet: {', '.join(missing)}")
        if not options.collect:
            return  # another part may be running: --collect writes the page
    sheets = {
        key: held for key in map(Results._key, rows) if (held := results.sheet(key)) is not None
    }
    wan_report.write(options.out, rows, sheets, asdict_verdict(certain), options.videos)
    print(f"wrote {options.out}.json, .md and .png")


def asdict_verdict(verdict: digit_judge.Verdict) -> dict[str, float]:
    return {key: round(value, 4) for key, value in verdict._asdict().items()}


if __name__ == "__main__":
    main()
