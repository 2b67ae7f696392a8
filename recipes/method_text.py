"""Parts of the docstring of a method, as Markdown, for ``recipes.method_pages``."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import vtr.methods
from vtr.core.method import Method
from vtr.methods import TABLE

SECTION = re.compile(r"^(Args|Attributes|Raises|Returns)\b.*:$", re.MULTILINE)
MATH = re.compile(r"^\.\. math::\n\n?((?: {4}.*(?:\n|$)|\n(?= {4}))+)\n?", re.MULTILINE)
DIFFERS = re.compile(
    r"authors' (code|own|entry|kernel|public|first version)|(released|disclose|have) (no|neither)\b"
    r"|has no code|was released|our readings?\b|are ours\b|\bis ours\b|\(ours|in their code|released code"
    r"|Against the (paper|papers|authors)|Differences? from|The authors (use|do|run|merge|multiply|evaluate|store|choose)"
    r"|authors' (does|choice|numbers|window|Python)|Ours is|as the authors do\b",
    re.IGNORECASE,
)
ENTRY = re.compile(r"^(\w+(?:, \w+)*): +(.*)$")
CODE = re.compile(r"(``.+?``)", re.DOTALL)
ROLE = re.compile(r":(?:class|func|mod|meth|data|attr):`~?([^`]+)`")


@dataclass(frozen=True)
class Text:
    """The parts of a docstring.

    Attributes:
        lead: the sentence at the top of the module, or the first one of the class.
        title: the first line of the class.
        idea: Markdown of the first paragraph behind it.
        formulas: LaTeX.
        more: Markdown of further paragraphs.
        differs: Markdown of the paragraphs about the authors' code and about what is a reading of ours.
    """

    lead: str
    title: str
    idea: str
    formulas: tuple[str, ...]
    more: tuple[str, ...]
    differs: tuple[str, ...]


def read(cls: type) -> Text:
    """Take the docstring of a method's class apart."""
    doc = inspect.getdoc(cls) or ""
    body = SECTION.split(doc, 1)[0]
    formulas = tuple(textwrap.dedent(m).strip() for m in MATH.findall(body))
    title, *paragraphs = _paragraphs(MATH.sub("", body))
    module = sys.modules[cls.__module__]
    shared = list(TABLE.values()).count(cls.__module__.rpartition(".")[2]) > 1
    lead = title if shared else inspect.cleandoc(module.__doc__ or "").split("\n\n")[0]
    idea, rest = (paragraphs[0], paragraphs[1:]) if paragraphs else ("", [])
    if DIFFERS.match(idea):
        idea, rest = "", paragraphs
    differs = tuple(p for p in rest if DIFFERS.search(" ".join(p.split())))
    more = tuple(p for p in rest if p not in differs)
    return Text(
        markdown(lead.replace("\n", " ")),
        markdown(title.replace("\n", " ")),
        markdown(idea),
        formulas,
        tuple(map(markdown, more)),
        tuple(map(markdown, differs)),
    )


def _paragraphs(text: str) -> list[str]:
    """Split at blank lines; what is indented, and a list, belongs to the paragraph before it (not to the title)."""
    found: list[str] = []
    for part in re.split(r"\n\s*\n", text.strip()):
        listed = re.match(r"( {2}|- |\d\. )", part) is not None
        if len(found) > 1 and listed:
            found[-1] += "\n\n" + part
        else:
            found.append(part)
    return found


def markdown(text: str) -> str:
    """Convert a paragraph of a docstring."""
    blocks = re.split(r"::\n\n((?: {4}.*\n?|\n)+)", text)
    out = [_inline(blocks[0])]
    for code, after in zip(blocks[1::2], blocks[2::2], strict=True):
        out += [f":\n\n```python\n{textwrap.dedent(code).strip()}\n```\n", _inline(after)]
    return "".join(out).strip()


def _inline(text: str) -> str:
    parts = CODE.split(text)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = part[1:-1]
        else:
            parts[i] = ROLE.sub(_named, part).replace("<", "&lt;").replace("$", "\\$")
    return "".join(parts)


def _named(role: re.Match[str]) -> str:
    name = role[1].rpartition(".")[2]
    if name in TABLE:
        return f"[{name}]({pages()[name]}.md)"
    return f"`{role[1].removeprefix('~')}`"


@functools.cache
def methods() -> Mapping[str, type[Method]]:
    """The package's own methods by name, in order; the registry may hold others as well."""
    own: list[type[Method]] = [getattr(vtr.methods, name) for name in TABLE]
    return {cls.name: cls for cls in sorted(own, key=lambda cls: cls.name)}


@functools.cache
def pages() -> Mapping[str, str]:
    """The name of each method by the name of its class."""
    return {cls.__name__: name for name, cls in methods().items()}


def option_texts(cls: type) -> dict[str, str]:
    """Markdown about each option: the nearest docstring that describes it, of the class and its bases."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        if "__doc__" in base.__dict__ and base.__doc__:
            for name, text in entries(inspect.cleandoc(base.__doc__)).items():
                found.setdefault(name, text)
    return {
        f.name: found.get(f.name, "")
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.init
    }


def entries(doc: str) -> dict[str, str]:
    """Read the sections *Args* and *Attributes*: name to Markdown."""
    found: dict[str, str] = {}
    parts = SECTION.split(doc)
    for head, text in zip(parts[1::2], parts[2::2], strict=True):
        if head not in ("Args", "Attributes"):
            continue
        names: list[str] = []
        lines = textwrap.dedent(
            text.lstrip("\n").split("\n\n")[0] if head == "Args" else text.lstrip("\n")
        )
        for line in lines.splitlines():
            if start := ENTRY.match(line):
                names = start[1].split(", ")
                for name in names:
                    found[name] = start[2]
            elif line.startswith(" ") or not line:
                for name in names:
                    found[name] += " " + line.strip()
            else:
                break
    return {name: _inline(text.strip()) for name, text in found.items()}


def default(field: Any) -> str:
    """Write the default of an option as Python."""
    given = field.default is not dataclasses.MISSING
    value = field.default if given else field.default_factory()
    return f"`{value!r}`" if not isinstance(value, type) else f"`{value.__name__}`"
