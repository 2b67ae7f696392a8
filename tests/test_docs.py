"""The code of README.md, CONTRIBUTING.md and docs/ runs, its commands exist, and every picture has its command."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import vtr
from recipes import method_pictures
from recipes.method_text import methods
from tests import markdown
from tests.markdown import Block, blocks
from vtr.core import adapters, registry

ROOT = Path(__file__).parents[1]
PAGES = markdown.pages()
PYTHON = [page for page in PAGES if any(b.language == "python" for b in blocks(page))]
ALL = [block for page in PAGES for block in blocks(page)]
NOT_RUN = 10  # blocks that need a model of the hub, a server or days; lower it if one is rewritten


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---- Python --------------------------------------------------------------------------------------


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own; what pages register, import and apply is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.registry()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(
        adapters, "ADAPTERS", {name: list(paths) for name, paths in adapters.ADAPTERS.items()}
    )
    known = set(sys.modules)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield tmp_path
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in {"page", "mymodels", "mymethods"}:
            del sys.modules[name]


def remove_methods(names: dict[str, Any]) -> None:
    """Take off what a page left on a model that other pages are given."""
    for name in ("model", "vit", "vlm", "pipe"):
        target = names.get(name)
        target = getattr(target, "transformer", target)
        if isinstance(target, torch.nn.Module):
            for handle in vtr.handles(target):
                handle.remove()


@pytest.mark.parametrize("page", PYTHON, ids=named)
@pytest.mark.filterwarnings("ignore")
def test_the_code_of_a_page_runs(page: Path, clean: Path) -> None:
    names: dict[str, Any] = {}
    try:
        names = markdown.run(page)
    finally:
        remove_methods(names or getattr(sys.modules.get("page"), "__dict__", {}))


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    left = [f"{b.page}:{b.line}" for b in ALL if b.marked("not run, ")]
    assert len(left) <= NOT_RUN, left


def test_what_another_test_runs_is_read_by_it() -> None:
    for block in ALL:
        if other := block.marked("run by "):
            text = (ROOT / other).read_text(encoding="utf-8")
            assert Path(block.page).name in text, f"{block.page}:{block.line}: not in {other}"


def test_what_is_a_part_of_a_module_is_in_it() -> None:
    for block in ALL:
        if module := block.marked("part of "):
            text = "".join((ROOT / module).read_text(encoding="utf-8").split())
            without_words = re.sub(r'""".*?"""', "\n", block.code, flags=re.DOTALL)
            for part in without_words.split("\n\n"):
                code = "".join(part.split()).removesuffix(",}")
                assert code in text, f"{block.page}:{block.line}: {part} is not in {module}"


def test_a_fault_of_a_page_has_its_line(clean: Path) -> None:
    page = clean / "page.md"
    page.write_text(
        "# A page\n\n```python\nx = 1\n```\n\n- an item:\n\n  ```python\n  y = x / 0\n  ```\n"
    )
    with pytest.raises(ZeroDivisionError) as caught:
        markdown.run(page)
    assert caught.traceback[-1].lineno == 9  # counted from 0


def test_marks_of_blocks_are_read(clean: Path) -> None:
    page = clean / "page.md"
    page.write_text(
        "<!-- code: file mymodels/a.py -->\n```python\nA = 3\n```\n\n"
        "<!-- code: not run, it needs a GPU -->\n```python\nraise SystemExit\n```\n\n"
        "<!-- code: with vit -->\n\n```python\nfrom mymodels.a import A\nB = len(images) * A\n```\n"
        "```python\ndef test_it():\n    done.append(B)\n\ndone = []\n```\n"
    )
    names = markdown.run(page)
    assert (names["B"], names["done"]) == (12, [12])
    with pytest.raises(ValueError, match="a mark begins with"):
        Block("page.md", 1, "python", "skip", "")


# ---- commands ------------------------------------------------------------------------------------


def commands(code: str, program: str) -> list[list[str]]:
    """List the calls of a program in a block of shell commands."""
    joined = code.replace("\\\n", " ")
    lines = (line for line in joined.splitlines() if line.split()[:1] == [program])
    words = (shlex.split(line, comments=True)[1:] for line in lines)
    ends = {"|", ">", "&&", "&"}
    return [list(itertools.takewhile(lambda word: word not in ends, found)) for found in words]


def parse(words: list[str]) -> str:
    """Parse the options of a ``vtr`` command without running it; returns the name of the command.

    Raises click's UsageError for an option that does not exist.
    """
    from vtr.cli.commands import app

    group: Any = typer.main.get_command(app)
    if words[0].startswith("-"):  # they act at once: --version
        known = {option for parameter in group.params for option in parameter.opts}
        if words[0] not in known:
            raise ValueError(f"no such option: {words[0]}")
        return words[0]
    context = group.make_context("vtr", list(words))
    name, command, rest = group.resolve_command(context, words)
    command.make_context(name, rest, parent=context)
    return str(name)


VTR = [
    (b, words) for b in ALL if b.language == "sh" for words in commands(b.code, "vtr")
]  # fmt: skip


@pytest.mark.parametrize(
    ("block", "words"), VTR, ids=[f"{b.page}-{' '.join(w)}"[:70] for b, w in VTR]
)
def test_a_command_of_a_page_exists(block: Block, words: list[str]) -> None:
    assert parse(words) == words[0]


@pytest.mark.parametrize(
    "words", [["nothing"], ["--nothing"], ["draw", "a.png", "--no-such-option", "1"]]
)
def test_a_wrong_command_is_caught(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"(?i)no such"):
        parse(words)


def test_targets_scripts_and_extras_of_pages_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras, lost = set(project["optional-dependencies"]), []
    for block in (b for b in ALL if b.language == "sh"):
        for words in commands(block.code, "make"):
            targets = [w for w in words if "=" not in w and not w.startswith("-")]
            lost += [t for t in targets if not re.search(rf"^{re.escape(t)}\b.*:", makefile, re.M)]
        for words in commands(block.code, "python"):
            scripts = [w for w in words[:1] if w.endswith(".py")]
            lost += [script for script in scripts if not (ROOT / script).is_file()]
        for found in re.findall(r"(?:vtr|\.)\[([\w,]+)\]", block.code):
            lost += [extra for extra in found.split(",") if extra not in extras]
    assert not lost


# ---- pictures ------------------------------------------------------------------------------------

IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
ENDINGS = ("*.png", "*.webp", "*.gif", "*.svg", "*.jpg")


def pictures() -> dict[str, str]:
    """Read the table of docs/pictures.md: each pattern of files with the command that draws them."""
    text = (ROOT / "docs/pictures.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `([^`]+)` \| `([^`]+)`", text, re.M))


def shown() -> set[Path]:
    """Find the pictures that pages show."""
    every = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", *ROOT.glob("vtr/zoo/cards/*.md")]
    return {
        (page.parent / target).resolve()
        for page in every
        for target in IMAGE.findall(page.read_text(encoding="utf-8"))
    } | {method_pictures.FOLDER / f"{name}.webp" for name in methods()}  # pages of a recipe


def test_every_picture_has_its_command_and_a_page_that_shows_it() -> None:
    known, on_pages = pictures(), shown()
    files = [file for ending in ENDINGS for file in (ROOT / "docs").rglob(ending)]
    assert files
    for file in files:
        name = file.relative_to(ROOT)
        assert any(name.match(pattern) for pattern in known), f"docs/pictures.md lacks {name}"
        assert file in on_pages, f"no page shows {name}"


def test_every_line_of_the_pictures_names_files_and_a_command_that_exist() -> None:
    for pattern, command in pictures().items():
        assert list(ROOT.glob(pattern)), f"no file is called {pattern}"
        words = shlex.split(command)
        if words[0] == "vtr":
            assert parse(words[1:]) == words[1]
        elif words[:3] == ["python", "-m", "pytest"]:
            assert (ROOT / words[3]).is_file(), command
        elif words[:2] == ["python", "-m"]:
            assert ROOT.joinpath(*words[2].split(".")).with_suffix(".py").is_file(), command
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), command
        else:
            raise AssertionError(f"a picture is drawn by vtr or python, got {command}")
