"""The code of Markdown pages: its blocks, the marks that say how one is run, and the names that it is given.

A comment before a block says what is special about it:

- ``<!-- code: with NAMES -->``: it is given names of :data:`GIVEN`, from here on in the page;
- ``<!-- code: file PATH -->``: it is a module, which later blocks import;
- ``<!-- code: run by TEST -->``: that file of tests runs it;
- ``<!-- code: part of MODULE -->``: its lines are lines of that file;
- ``<!-- code: not run, REASON -->``: nothing runs it.

Blocks without a mark run as they are printed, after one another, in one namespace for each page.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import vtr

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "docs/howto", "docs/reference")  # docs/methods is written by a recipe
BLOCK = re.compile(
    r"(?:^[ ]*<!-- code: (?P<mark>[^>]*?) -->\n\s*)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
)
MARKS = ("with ", "file ", "run by ", "part of ", "not run, ")


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    page: str
    line: int
    language: str
    mark: str
    code: str

    def __post_init__(self) -> None:
        if self.mark and not self.mark.startswith(MARKS):
            raise ValueError(f"{self.page}:{self.line}: a mark begins with one of {MARKS}")

    def marked(self, kind: str) -> str:
        """Return what follows a mark, "" if the block has another or none."""
        return self.mark[len(kind) :].strip() if self.mark.startswith(kind) else ""


def pages() -> list[Path]:
    """List the pages whose code is run."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return found + [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """Read the blocks of a page; their code is without the indentation of the list that they are in."""
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    found = []
    for match in BLOCK.finditer(text):
        indent, code = match["indent"], match["code"]
        lines = [line.removeprefix(indent) for line in code.splitlines()]
        line = text.count("\n", 0, match.start("code"))
        found.append(
            Block(name, line, match["language"], match["mark"] or "", "\n".join(lines) + "\n")
        )
    return found


# ---- names ---------------------------------------------------------------------------------------


@functools.cache
def _vit() -> Any:
    return vtr.zoo.load("digits-vit")


@functools.cache
def _vlm(name: str) -> Any:
    model, processor = vtr.zoo.load_vlm(name)
    model.generation_config.max_new_tokens = 2
    return model, processor


@functools.cache
def _pipe() -> Any:
    pipe = vtr.zoo.load_pipeline("digits-wan")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vit() -> dict[str, Any]:
    """The built-in ViT: ``model``, ``vit``, ``images``, ``image``, ``batches`` and ``loader``."""
    images, _ = vtr.zoo.samples("digits-vit", 4)
    model, batches = _vit().eval(), [images[:2], images[2:]]
    given = {"model": model, "vit": model, "images": images, "image": images[0]}
    return {**given, "batches": batches, "loader": batches}


def llava() -> dict[str, Any]:
    """The built-in LLaVA: ``model``, ``vlm``, ``processor``, ``inputs``, ``image`` and ``batches``."""
    from vtr.zoo.questions import vqa

    model, processor = _vlm("digits-llava")
    samples = vqa(2, seed=1)
    chats = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": s.image},
                    {"type": "text", "text": s.question},
                ],
            }
        ]
        for s in samples
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True, **options)
    given = {"model": model, "vlm": model, "processor": processor, "inputs": inputs}
    return {**given, "image": samples[0].image, "batches": [inputs], "prompts": [inputs]}


def video() -> dict[str, Any]:
    """The built-in video model: ``model``, ``processor``, ``inputs``, ``batches``, ``clip`` and ``prompt``."""
    from vtr.zoo.video_questions import prompt, video_qa

    model, processor = _vlm("digits-video")
    samples = video_qa(1, seed=1)
    inputs = prompt(processor, samples)
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "which digit is red ?"}]}]  # fmt: skip
    given = {"model": model, "processor": processor, "inputs": inputs, "batches": [inputs]}
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    return {**given, "clip": samples[0].frames.permute(0, 3, 1, 2), "prompt": text}


def clip() -> dict[str, Any]:
    """A file ``clip.mp4`` in the current folder; ``data`` has its bytes, ``file`` is it opened."""
    from vtr.zoo.clips import write
    from vtr.zoo.video_questions import video_qa

    write("clip.mp4", video_qa(1, seed=5, per_second=8)[0].frames)
    data = Path("clip.mp4").read_bytes()
    return {"data": data, "file": Path("clip.mp4").open("rb")}


def pipe() -> dict[str, Any]:
    """The built-in generator, with three steps a run if the call does not say otherwise: ``pipe`` and ``prompt``."""
    return {"pipe": _pipe(), "prompt": "a 7 moving right"}


def custom() -> dict[str, Any]:
    """The modules ``mymodels.vit`` and ``mymodels.vtr_adapter`` of docs/custom-vit.md."""
    for block in blocks(ROOT / "docs/custom-vit.md"):
        if path := block.marked("file "):
            write_module(path, block.code)
    return {}


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    function.__name__: function for function in (vit, llava, video, clip, pipe, custom)
}


# ---- running -------------------------------------------------------------------------------------


def write_module(path: str, code: str) -> None:
    """Write a module of a page into the current folder."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.parent != Path():
        (file.parent / "__init__.py").touch()
    file.write_text(code, encoding="utf-8")


def run(page: Path) -> dict[str, Any]:
    """Run the Python blocks of a page in the current folder; returns the names that they define.

    Tests that a page defines are called. An error has the line of the page in its trace.
    """
    module = ModuleType("page")
    sys.modules["page"] = module  # dataclasses look up the module of their annotations
    names = module.__dict__
    for block in blocks(page):
        if block.language != "python" or any(
            map(block.marked, ("run by ", "part of ", "not run, "))
        ):
            continue
        if path := block.marked("file "):
            write_module(path, block.code)
            continue
        for given in block.marked("with ").split(","):
            if given.strip():
                names.update(GIVEN[given.strip()](), vtr=vtr)
        before = set(names)
        code = "\n" * block.line + block.code
        exec(compile(code, block.page, "exec", dont_inherit=True), names)
        for name in set(names) - before:
            if name.startswith("test_"):
                names[name]()
    return names
