"""Compare every method with its paper and its authors' code, and write docs/fidelity.md.

    python benchmarks/fidelity.py                            # plain calculations, of all methods
    python benchmarks/fidelity.py --methods tome,evs
    python benchmarks/fidelity.py --authors CHECKOUTS        # the authors' own files as well
    python benchmarks/fidelity.py --authors CHECKOUTS --write
    python benchmarks/fidelity.py --presets --write          # dry runs of presets, in place of the tests
    python benchmarks/fidelity.py --page                     # the page alone, from what is recorded

*Plain*: runs the tests of a method, which write its formulas out token by token, and prints the largest
difference between the float32 or float64 tensors that they compare. *Authors*: if CHECKOUTS holds a
checkout of the authors' repository, runs functions of their files unmodified on the same numbers
(``fidelity_authors.py``). A missing repository is named, and its recorded result is kept. *Presets*: runs each
published setting on a small model with the layers and tokens of the real one (``fidelity_presets.py``), and ends
with code 1 if one acts at another layer, leaves another number of tokens, or has other FLOPs than the paper says.

The description of a method is in ``fidelity.toml``, the measured results are in
``results/fidelity.json``; --write renews the results and the page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # vtr and its tests, fidelity_authors

ROWS, RESULTS = ROOT / "benchmarks/fidelity.toml", ROOT / "benchmarks/results/fidelity.json"
PAGE = ROOT / "docs/fidelity.md"
VERDICTS = ("exact", "explained", "not comparable")


@dataclass(frozen=True)
class Row:
    """One method's entry of ``fidelity.toml``.

    Attributes:
        name: of the method.
        verdict: ``"exact"`` (the same choices and numbers), ``"explained"`` (the same except for
            ``differs``), ``"not comparable"``.
        compared: the parts that were compared, or the reason why none can be.
        differs: the differences from the authors' code.
        tests: files or node ids of pytest that hold the method to plain calculations.
        only: pytest's ``-k``.
        authors: ``owner/repository``; empty if nothing was released.
        commit: the commit that was compared.
        found: the result of a comparison by hand, if ``fidelity_authors.py`` has none.
        settings: published setting -> how to write it here, if no preset has it.
        dry: what the dry runs of presets must do (``fidelity_presets.Expected``), or None without presets that
            can be run.
        costs: the paper's own FLOPs of presets (``fidelity_presets.Cost``).
    """

    name: str
    verdict: str
    compared: str
    tests: tuple[str, ...]
    differs: str = ""
    only: str = ""
    authors: str = ""
    commit: str = ""
    found: str = ""
    settings: tuple[tuple[str, str], ...] = ()
    dry: Mapping[str, Any] | None = None
    costs: tuple[Mapping[str, Any], ...] = ()


def rows(path: Path = ROWS) -> list[Row]:
    """Read the rows of the file, sorted by the methods' names."""
    import tomllib

    found = []
    for name, facts in tomllib.loads(path.read_text(encoding="utf-8")).items():
        text = {k: " ".join(v.split()) for k, v in facts.items() if isinstance(v, str)}
        settings = tuple(facts.get("settings", {}).items())
        more = {
            "settings": settings,
            "dry": facts.get("dry"),
            "costs": tuple(facts.get("costs", ())),
        }
        found.append(Row(name, **{**text, "tests": tuple(facts["tests"]), **more}))
        if found[-1].verdict not in VERDICTS:
            raise ValueError(
                f"{name}: verdict must be one of {VERDICTS}, got {found[-1].verdict!r}"
            )
    return sorted(found, key=lambda row: row.name)


# ---- measuring -----------------------------------------------------------------------------------


class Differences:
    """A pytest plugin that records the largest difference that the tests' comparisons tolerate."""

    def __init__(self) -> None:
        self.largest, self.compared, self.passed, self.failed = 0.0, 0, 0, 0

    def pytest_configure(self) -> None:
        import torch

        check = torch.testing.assert_close

        def watched(actual: Any, expected: Any, *args: Any, **options: Any) -> None:
            if options.get("atol", 0.0) < 1e-3:  # more is for half precision, shown in float32
                self.see(actual, expected)
            check(actual, expected, *args, **options)

        torch.testing.assert_close = watched  # type: ignore[assignment]
        self.undo = lambda: setattr(torch.testing, "assert_close", check)

    def pytest_unconfigure(self) -> None:
        self.undo()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            self.passed += report.passed
        self.failed += report.failed

    def see(self, actual: Any, expected: Any) -> None:
        import torch

        wide = (torch.float32, torch.float64)
        for a, b in pairs(actual, expected):
            if a.dtype in wide and b.dtype in wide and a.shape == b.shape and a.numel():
                both = a.isfinite() & b.isfinite()
                apart = (a.detach().double() - b.detach().double())[both].abs()
                self.compared += 1
                self.largest = max(self.largest, float(apart.max()) if apart.numel() else 0.0)


def pairs(actual: Any, expected: Any) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of tensors at the same place of two structures."""
    import torch

    if isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor):
        yield actual, expected
    elif isinstance(actual, (list, tuple)) and isinstance(expected, (list, tuple)):
        for a, b in zip(actual, expected, strict=False):
            yield from pairs(a, b)


def plain(row: Row) -> dict[str, Any]:
    """Run the tests of a method."""
    import contextlib
    import io

    import pytest

    seen = Differences()
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT)]
    options += ["-k", row.only] if row.only else []
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = pytest.main([*options, *(str(ROOT / t) for t in row.tests)], plugins=[seen])
    if status != 0:
        print(output.getvalue(), file=sys.stderr)
        raise SystemExit(f"{row.name}: the tests fail ({seen.failed}), or fidelity.toml names none")
    return {"tests": seen.passed, "compared": seen.compared, "largest": seen.largest}


def authors(row: Row, folder: Path) -> dict[str, Any] | str:
    """Run the authors' code; returns the reason as a line if it cannot run."""
    from fidelity_authors import COMPARISONS, Checkout, Missing

    if row.name not in COMPARISONS:
        return "recorded by hand" if row.authors else "nothing to compare with"
    name, compare = COMPARISONS[row.name]
    try:
        code = Checkout(folder, name)
        return {"commit": code.commit, **asdict(compare(code))}
    except Missing as error:
        return str(error)


def dry_runs(row: Row) -> dict[str, Any]:
    """Run the presets of a method that have a model; returns the numbers of each."""
    from fidelity_presets import model_of, run

    from vtr.core.registry import registry

    cls: Any = registry()[row.name]
    found: dict[str, Any] = {}
    for preset in getattr(cls, "PRESETS", {}):
        if (name := model_of(row.name, preset)) is not None:
            done = run(cls.preset(preset), name)
            found[preset] = {"steps": [list(s) for s in done.steps], "flops": list(done.flops)}
            print(f"{row.name}/{preset}: {steps(found[preset])}", flush=True)
    return found


def wrong(row: Row, found: dict[str, Any]) -> list[str]:
    """List what dry runs of a method's presets do otherwise than published."""
    from fidelity_presets import CLOSE, Cost, Dry, Expected

    from vtr.core.registry import registry

    cls: Any = registry()[row.name]
    if row.dry is None:
        return ["fidelity.toml does not say what to expect"] if found else []
    expected, out = Expected.of(row.dry), []
    for preset, facts in found.items():
        done = Dry(tuple(map(tuple, facts["steps"])), tuple(facts["flops"]))
        out += [f"{preset}: {w}" for w in expected.wrong(cls.preset(preset), preset, done)]
        for cost in (Cost(**c) for c in row.costs if c["preset"] == preset):
            if cost.counts and (off := cost.off(row.name, done)) > CLOSE:
                out.append(f"{preset}: FLOPs differ from the paper's by {off:.1%}")
    return out


# ---- the page ------------------------------------------------------------------------------------


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def cell(row: Row, measured: dict[str, Any]) -> tuple[str, str]:
    """Summarise the results of plain calculations and of the authors' code in a few words."""
    done = measured.get("plain")
    own = "" if done is None else f"{done['tests']} tests"
    if done and done["compared"]:
        own += f", {number(done['largest'])}"
    found = measured.get("authors")
    if found is None:
        return own, row.found
    parts = []
    if found["of"]:
        share = "all" if not found["differ"] else f"all but {found['differ']}"
        parts.append(f"{share} of {found['of']:,} alike")
    if found["largest"] or not found["of"]:
        parts.append(f"{number(found['largest'])}")
    return own, ", ".join(parts)


def steps(facts: dict[str, Any]) -> str:
    """Write the visual tokens of a dry run as ``576, from layer 2 on 288``."""
    (_, first), *later = facts["steps"]
    return ", ".join([f"{first:,}", *(f"from layer {i} on {n:,}" for i, n in later)])


def costs(row: Row, preset: str, facts: dict[str, Any]) -> str:
    """Write the FLOPs of a dry run beside those that the paper says."""
    from fidelity_presets import Cost, Dry

    parts = []
    for cost in (Cost(**c) for c in row.costs if c["preset"] == preset):
        said = f"{100 * cost.value:.3g} %" if cost.share else f"{cost.value:.3g} T"
        if cost.counts:
            done = Dry(tuple(map(tuple, facts["steps"])), tuple(facts["flops"]))
            ours, _ = cost.ours(row.name, done)
            number = f"{100 * ours:.3g} %" if cost.share else f"{ours:.3g} T"
            parts.append(f"{said}; here so counted {number}: {cost.note} ({cost.source})")
        else:
            parts.append(f"{said}: {cost.note} ({cost.source})")
    return "; ".join(parts) or "-"


def dry_cell(row: Row, found: dict[str, Any]) -> str:
    """Summarise the dry runs of a method's presets."""
    if not found:
        return "-"
    by_paper = [c["preset"] for c in row.costs if c.get("counts") and c["preset"] in found]
    if row.dry and row.dry["says"] == "content":
        return f"{len(found)} run, numbers by content"
    text = f"{len(found)} as published"
    return f"{text}, FLOPs of {len(by_paper)} within 2 %" if by_paper else text


def page(found: list[Row], results: dict[str, Any]) -> str:
    """Write the text of docs/fidelity.md."""
    lines = [HEAD.strip(), ""]
    lines += ["| method | compared with | result | plain calculation | authors' code | presets |"]
    lines += ["|---|---|---|---|---|---|"]
    runs = results.get("presets", {})
    for row in found:
        source = f"[{row.authors}](https://github.com/{row.authors})" if row.authors else "-"
        measured = results["methods"].get(row.name, {})
        commit = measured.get("authors", {}).get("commit", row.commit)
        source += f" `{row.commit if commit == 'unknown' else commit}`" if row.authors else ""
        own, theirs = cell(row, measured)
        dry = dry_cell(row, runs.get(row.name, {}))
        lines.append(
            f"| `{row.name}` | {source} | {row.verdict} | {own} | {theirs or '-'} | {dry} |"
        )
    lines += ["", f"Measured with {results['with']}.", "", "## Method by method", ""]
    for row in found:
        lines += [f"### `{row.name}`", "", f"{row.compared}", ""]
        if row.differs:
            lines += [f"What differs: {row.differs}", ""]
        settings = [*row.settings, *presets(row.name)]
        if settings:
            lines += ["| published setting | here |", "|---|---|"]
            lines += [f"| {name} | `{text}` |" for name, text in settings]
            lines.append("")
        if runs.get(row.name):
            lines += [
                "| preset | visual tokens of a layer | TFLOPs, dense | reduced | the paper's |"
            ]
            lines += ["|---|---|---|---|---|"]
            for preset, facts in runs[row.name].items():
                dense, reduced = (f"{f / 1e12:.3g}" for f in facts["flops"])
                theirs = costs(row, preset, facts)
                lines.append(f"| `{preset}` | {steps(facts)} | {dense} | {reduced} | {theirs} |")
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def presets(name: str) -> list[tuple[str, str]]:
    """List the presets of a method: the call, and the method that it creates."""
    from vtr.core.registry import registry
    from vtr.evaluate.cells import spelled

    cls = registry()[name]
    listed = getattr(cls, "PRESETS", {})
    return [(f'`{cls.__name__}.preset("{key}")`', spelled(cls.preset(key))) for key in listed]


HEAD = """
# Fidelity

<!-- Written by benchmarks/fidelity.py from benchmarks/fidelity.toml and benchmarks/results/fidelity.json. -->

Each method of vtr was compared with its paper's formulas and, if they are public, with the files of its authors' code.
This page lists the results and the known differences.

- *exact*: the same choices and the same numbers, up to the order of float operations.
- *explained*: the same except for the differences listed below.
- *not comparable*: nothing was released, or the method is a baseline of ours.
- *plain calculation*: tests that write the method's formulas out token by token, and the largest difference
  between float32 or float64 tensors in them.
- *authors' code*: functions of the authors' files, unmodified, on the same random numbers: choices (tokens,
  blocks of a mask, merged rows) that are alike, and the largest difference of a value. The noise that the authors
  add to densities to break ties is left out. Text without such numbers describes a comparison by hand.
- *presets*: dry runs of published settings on a small model with random weights, of the class of the real one, with
  its layers and visual tokens. The setting must cut at the published layers and leave the published numbers of tokens
  (within 2 %; those that depend on the content are not held to a number, and show that of random weights). Tables of
  presets have vtr's FLOPs of the language model for the real widths, two per multiply-add, with 56 tokens of text and
  the read-out of one. A paper's own number must be met within 2 % when counted as the paper does. Presets of models
  that transformers does not have, of vision transformers and of diffusion are not run.

Fractions of tokens are rounded up here unless said otherwise; authors round in different ways. To leave exactly as
many tokens as the authors do, give the number of tokens, or that number as a fraction.

```
python benchmarks/fidelity.py                                  # the plain calculations
python benchmarks/fidelity.py --authors CHECKOUTS --write      # with the authors' repositories, and this page
python benchmarks/fidelity.py --presets --write                # the dry runs of presets, and this page
```
"""


def main() -> None:
    from options import named

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", help="names with commas; default: all")
    parser.add_argument("--authors", type=Path, help="folder with checkouts of their repositories")
    parser.add_argument("--presets", action="store_true", help="dry runs of presets, not the tests")
    parser.add_argument("--write", action="store_true", help="record the results, renew the page")
    parser.add_argument("--page", action="store_true", help="renew only the page; measure nothing")
    given = parser.parse_args()
    if given.authors is not None and not given.authors.is_dir():
        raise SystemExit(f"--authors: there is no folder {given.authors}")
    found = rows()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"with": "", "methods": {}}
    if given.page:
        PAGE.write_text(page(found, results), encoding="utf-8")
        return
    wanted = named("--methods", given.methods, [row.name for row in found])
    if given.presets:
        runs = results.setdefault("presets", {})
        failed = []
        for row in (r for r in found if r.name in wanted):
            if done := dry_runs(row):
                runs[row.name] = done
                failed += [f"{row.name}/{w}" for w in wrong(row, done)]
        if failed:
            raise SystemExit("otherwise than published:\n" + "\n".join(failed))
        if given.write:
            write(found, results)
        return
    for row in found:
        if row.name not in wanted:
            continue
        measured = results["methods"].setdefault(row.name, {})
        measured["plain"] = plain(row)
        line = f"{row.name}: {row.verdict}; plain calculation: {cell(row, measured)[0]}"
        if given.authors is not None:
            done = authors(row, given.authors)
            if isinstance(done, dict):
                measured["authors"] = done
            shown = done if isinstance(done, str) else cell(row, measured)[1]
            line += f"; authors' code: {shown}"
        print(line, flush=True)
    if given.write:
        import torch
        import transformers

        results["with"] = (
            f"torch {torch.__version__.partition('+')[0]} and transformers {transformers.__version__}"
        )
        results["methods"] = {row.name: results["methods"].get(row.name, {}) for row in found}
        write(found, results)


def write(found: list[Row], results: dict[str, Any]) -> None:
    """Record the results, and renew the page."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(found, results), encoding="utf-8")
    print(f"wrote {RESULTS.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
