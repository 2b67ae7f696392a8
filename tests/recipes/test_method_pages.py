"""The pages of the methods: complete, derived, deterministic, and their lines run."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes import method_numbers, method_pages, method_pictures, method_text
from recipes.method_pictures import REASONS, scenes
from recipes.method_text import methods
from vtr.core.text import parse

ROOT = Path(__file__).parents[2]
NAMES = sorted(methods())
SECTIONS = (
    "## Idea",
    "## Picture",
    "## Options",
    "## Try it",
    "## Differences from the authors' code",
    "## Numbers",
    "## More",
)


@functools.cache
def page(name: str) -> str:
    return method_pages.page(name)


def section(name: str, title: str) -> str:
    return page(name).split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize("name", NAMES)
def test_page_has_every_part(name: str) -> None:
    found = re.findall(r"^## .*$", page(name), re.MULTILINE)
    assert [title for title in found if title in SECTIONS] == list(SECTIONS)
    assert "$$" in section(name, "Idea")
    for title in SECTIONS:
        assert len(section(name, title.removeprefix("## ")).strip()) > 20, title


@pytest.mark.parametrize("name", NAMES)
def test_docstring_has_an_idea_a_formula_and_differences(name: str) -> None:
    cls = methods()[name]
    text = method_text.read(cls)
    assert len(f"{text.title} {text.idea} {' '.join(text.more)}".split()) >= 30
    assert text.formulas
    for formula in text.formulas:
        plain = re.sub(r"\\[{}]", "", formula)
        assert plain.count("{") == plain.count("}")
        assert re.findall(r"\\begin{(\w+)}", formula) == re.findall(r"\\end{(\w+)}", formula)
        assert formula.count(r"\left") - formula.count(r"\leftarrow") == len(
            re.findall(r"\\right(?!arrow)", formula)
        )
    differs = section(name, "Differences from the authors' code")
    assert re.search(r"\*\*(Exact|Explained|Not comparable)\*\*", differs)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_the_fields(name: str) -> None:
    cls = methods()[name]
    rows = re.findall(
        r"^\| `(\w+)` \| `(.+?)` \| `(.+?)` \| (.*) \|$", section(name, "Options"), re.M
    )
    fields = [f for f in dataclasses.fields(cls) if f.init]
    assert [row[0] for row in rows] == [f.name for f in fields]
    for (_, _, default, meaning), field in zip(rows, fields, strict=True):
        made = (
            field.default if field.default is not dataclasses.MISSING else field.default_factory()
        )  # type: ignore[misc]
        assert default == repr(made)
        assert meaning, field.name


def test_every_method_has_a_picture_or_a_reason() -> None:
    files = {file.stem for file in (method_pages.FOLDER / "pictures").iterdir()}
    assert files == set(scenes())
    assert not files & set(REASONS)
    assert files | set(REASONS) == set(NAMES)
    assert len(REASONS) <= 8
    total = sum(f.stat().st_size for f in (method_pages.FOLDER / "pictures").iterdir())
    assert total < 2.5e6


def test_a_committed_picture_is_what_is_drawn() -> None:
    from PIL import Image

    torch.manual_seed(0)
    scene, method = scenes()["tome"]
    drawn = np.asarray(scene.draw(method).convert("RGB"), dtype=np.float32)
    apart = {}
    for name in scenes():
        held = np.asarray(Image.open(method_pages.picture_file(name)).convert("RGB"), np.float32)
        if held.shape == drawn.shape:
            apart[name] = float(np.abs(drawn - held).mean())
    assert len(apart) > 5
    assert min(apart, key=apart.__getitem__) == "tome"
    assert apart["tome"] < 16  # of 255: WebP is lossy


def test_pages_are_deterministic(tmp_path: Path) -> None:
    first = method_pages.write(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/gone.md").write_text("of a method that was renamed")
    second = method_pages.write(tmp_path / "b")
    assert {f.name for f in first} == {f"{name}.md" for name in [*NAMES, "index"]}
    assert sorted(f.name for f in (tmp_path / "b").iterdir()) == sorted(f.name for f in second)
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    before = second[0].stat().st_mtime_ns
    method_pages.write(tmp_path / "b")
    assert second[0].stat().st_mtime_ns == before


def test_index_names_every_method_once() -> None:
    index = method_pages.index()
    assert sorted(re.findall(r"^- \[\w+\]\(([\w-]+)\.md\): \S", index, re.M)) == NAMES
    assert re.findall(r"^## (.*)$", index, re.M) == [*method_pages.FAMILIES, "Symbols"]


def test_families_are_those_of_the_sites() -> None:
    of = {name: method_pages.family(cls) for name, cls in methods().items()}
    some = {
        "tome": "Vision encoders",
        "dtop": "Vision encoders",
        "fastv": "Vision-language models",
        "damro": "Vision-language models",
        "fastvid": "Video",
        "minference": "Sparse prefill",
        "vhr": "Attention edits",
        "h2o": "KV cache and decoding",
        "tidaldecode": "KV cache and decoding",
        "sparse-detr": "Detectors and windows",
        "expedit": "Detectors and windows",
        "radial": "Diffusion transformers",
        "tomesd": "Diffusion transformers",
    }
    assert {name: of[name] for name in some} == some


def test_links_lead_to_files() -> None:
    index = method_pages.index()
    headings = [x.lower().replace(" ", "-") for x in re.findall(r"^## (.*)$", index, re.M)]
    for name in [*NAMES, "index"]:
        text = index if name == "index" else page(name)
        for link in re.findall(
            r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
        ):
            if link.startswith("https://"):
                continue
            file, _, heading = link.partition("#")
            if file.removesuffix(".md") in [*NAMES, "index"]:
                assert not heading or heading in headings, (name, link)
            else:
                assert (method_pages.FOLDER / file).is_file(), (name, link)


def test_numbers_are_those_of_the_files() -> None:
    rows = json.loads((ROOT / "docs/vit-accuracy-flops.json").read_text())
    mine = [r for r in rows if r["method"].startswith("ToMe(")]
    assert mine
    for row in mine:
        share = row["flops"] / rows[0]["flops"]
        line = (
            f"| `{row['method']}` | {100 * row['accuracy']:.1f} % | {row['tokens']} | {share:.2f} |"
        )
        assert line in page("tome")
    assert "`ToMeSD(" not in page("tome")
    assert rows[0]["method"] == "dense" and rows[0]["flops"] == method_numbers.VIT_DENSE


def test_every_file_of_numbers_is_shown() -> None:
    shown = {
        s.path for cls in methods().values() for s, _, _ in method_numbers.tables(cls.__name__)
    }
    assert shown == {source.path for source in method_numbers.SOURCES}


def test_commands_give_the_method() -> None:
    drawn = [
        method for name, (scene, method) in scenes().items() if scene.model in method_pages.DRAW
    ]
    assert len(drawn) > 30
    for method in drawn:
        assert str(parse(method_pages.command(method).strip("'"))) == str(method)


@pytest.mark.parametrize(
    "name", ["tome", "fastv", "evs", "flexprefill", "act", "h2o", "objectness", "todo"]
)
def test_lines_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"```python\n(.*?)```", section(name, "Try it"), re.S)
    assert len(code) == 1
    exec(compile(code[0], name, "exec"), {})
    said = capsys.readouterr().out
    assert said.strip() and "no reduction" not in said


def test_lines_are_of_every_built_in_model() -> None:
    assert {scene.model for scene, _ in scenes().values()} == {
        key.partition(",")[0] for key in method_pages.TRY
    }


def test_formulas_are_taken_out_of_the_text() -> None:
    class Example:
        r"""Keep what is large.

        The score is the norm of `x`::

            score = x.norm()

        .. math::

            s = \begin{cases} a & b \\
            c & d \end{cases}, \qquad t

        Difference from the authors' code:

        - :class:`vtr.ToMe` and ``code``.

        Args:
            keep: how many; of
                all tokens.
            first, second: a pair.
        """

    text = method_text.read(Example)
    assert text.formulas == ("s = \\begin{cases} a & b \\\\\nc & d \\end{cases}, \\qquad t",)
    assert text.idea == "The score is the norm of `x`:\n\n```python\nscore = x.norm()\n```"
    assert text.differs == ("Difference from the authors' code:\n\n- [ToMe](tome.md) and `code`.",)
    assert method_pages.in_lines(text.formulas[0]).count("\\\\\n") == 2
    assert method_text.entries(inspect.cleandoc(Example.__doc__ or "")) == {
        "keep": "how many; of all tokens.",
        "first": "a pair.",
        "second": "a pair.",
    }


def test_only_named_pictures_are_drawn(tmp_path: Path) -> None:
    made = method_pictures.write(tmp_path, ("random",))
    assert made == [tmp_path / "random.webp"]
    assert list(tmp_path.iterdir()) == made
