"""Hold docstrings, comments, messages and pages to the prose rules of CONTRIBUTING.md.

Each rule is a regular expression with the reason. Code in backquotes and fenced blocks is not
read. ``python -m tests.test_prose PATH ...`` prints what the rules find in files or folders.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Folders and modules that are held to the rules, and the pages beside them.
FOLDERS = (
    "benchmarks",
    "examples",
    "recipes",
    "vtr/__init__.py",
    "vtr/api.py",
    "vtr/core",
    "vtr/methods",
    "vtr/cli",
    "vtr/compat",
    "vtr/diffusion",
    "vtr/errors.py",
    "vtr/evaluate",
    "vtr/explore",
    "vtr/inspect",
    "vtr/kernels",
    "vtr/serve",
    "vtr/strategies",
    "vtr/testing",
    "vtr/train",
    "vtr/video",
    "vtr/vision",
    "vtr/zoo",
)
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md")


@dataclass(frozen=True)
class Rule:
    """A phrase that is not written, what to write instead, and a sentence that has it."""

    pattern: str
    instead: str
    example: str
    opening: bool = False  # looked for at the beginning of a docstring alone

    def search(self, text: str) -> re.Match[str] | None:
        pattern = re.compile(self.pattern)
        return pattern.match(text) if self.opening else pattern.search(text)


RULES = (
    Rule(
        r"(?i)\b(stands?|stood|standing)\b(?!-alone|:)",
        'say "is", "means" or "represents"',
        "Text stands first.",
    ),
    Rule(
        r"(?i)\b(go|goes|going|went|gone) on\b",
        'say "continues" or "is kept"',
        "The run goes on.",
    ),
    Rule(
        r"(?i)\bof (its|their) own\b(?= *([^\w\s]|$|(and|as|for|if|in|or|so|that|to|when|which|with)\b))",
        'say "its own ..." or "a separate ..."',
        "decord has a process of its own.",
    ),
    Rule(
        r"(?i)\bthere (is|are|was|were) none\b|\bwhere there (is|are|was|were)\b",
        'say "without ..." or "if there is no ..."',
        "Returns None if there is none.",
    ),
    Rule(
        r"(?i)\b(is|are|was|were|be|been|being) made\b(?! (of|up)\b)",
        'say "computed", "built", "created" or "written"',
        "The mask is made in every call.",
    ),
    Rule(
        r"(?i)\bmakes? of\b",
        "name the result",
        "What the model makes of it.",
    ),
    Rule(
        r"(?i)\blived\b",
        'say "kept" or "left"',
        "The tokens that lived.",
    ),
    Rule(
        r"(?i)\bwhere (not|possible|needed|wanted|nothing|none|no|it|they|this|that|one|both) "
        r"(?!(acts|was|were|went|goes|came|enters?|begins?|starts?|ends?)\b)",
        '"if" and "when"; "where" is for places',
        "It uses flex where no compiler is found.",
    ),
    Rule(
        r"(?:^|[.;:] )Where [^?:]*?, ",
        '"if" and "when"; "where" is for places',
        "Where rates vary, no frame comes twice.",
    ),
    Rule(
        r"(?i)\belse where\b|\bbut where\b|\bexcept where\b|\bonly where\b|\bsave where\b",
        '"if" and "when"; "where" is for places',
        "It is exact except where scores are equal.",
    ),
    Rule(
        r"(?i)\bbut for\b|\bso but\b|\bsave for\b",
        'say "except"',
        "All are alike but for one.",
    ),
    Rule(
        r"(What|Which|Whether|How|Where|When|If|Why|Who|That|There|It)\b",
        "a docstring begins with a verb or names the thing",
        "Whether the mask is exact.",
        opening=True,
    ),
    Rule(
        r"(?:^|[.;] )(What|Whether) [^?:.]*[.]",
        "no clause as the subject: name the thing, then say what it does",
        "What a hook leaves belongs in the session.",
    ),
)


def plain(text: str) -> str:
    """Drop code, links' targets and line breaks from prose."""
    text = re.sub(r"<!--.*?-->", " ", text, flags=re.S)
    text = re.sub(r"(`+).+?\1", "CODE", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return re.sub(r"\s+", " ", text).strip()


def found(text: str, docstring: bool = False) -> list[str]:
    """List the rules that a text breaks, each with the words that break it."""
    text = plain(text)
    return [
        f"{match.group(0).strip()!r}: {rule.instead}"
        for rule in RULES
        if (docstring or not rule.opening) and (match := rule.search(text))
    ]


def docstrings(tree: ast.AST) -> dict[int, ast.Constant]:
    """Find the docstrings of a module by the identity of their node."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    result = {}
    for node in ast.walk(tree):
        if isinstance(node, kinds) and node.body and isinstance(node.body[0], ast.Expr):
            value = node.body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                result[id(value)] = value
    return result


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield comments with their first line; lines of comment below one another are one text."""
    lines: list[str] = []
    start, column, last = 0, 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, at = token.start
        if lines and (line != last + 1 or at != column):
            yield start, " ".join(lines)
            lines = []
        if not lines:
            start, column = line, at
        lines.append(token.string.lstrip("#:! "))
        last = line
    if lines:
        yield start, " ".join(lines)


def messages(tree: ast.AST, skip: dict[int, ast.Constant]) -> Iterator[tuple[int, str]]:
    """Yield strings of several words that are no docstrings: errors, help texts, titles."""
    parts: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(value) for value in node.values}
            texts = [v.value if isinstance(v, ast.Constant) else "CODE" for v in node.values]
            text = "".join(map(str, texts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) in skip or id(node) in parts:
                continue
            text = node.value
        else:
            continue
        if len(text.split()) > 2:
            yield node.lineno, text


def in_module(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the fault of every text of a Python module that breaks a rule."""
    tree = ast.parse(source)
    documented = docstrings(tree)
    for node in documented.values():
        for fault in found(node.value, docstring=True):
            yield node.lineno, fault
    for texts in (comments(source), messages(tree, documented)):
        for line, text in texts:
            for fault in found(text):
                yield line, fault


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Yield the paragraphs, items and table rows of a Markdown page with their first line."""
    lines: list[str] = []
    start, fenced = 1, False
    for number, line in enumerate([*text.split("\n"), ""], 1):
        fence = line.lstrip().startswith("```")
        ends = fence or fenced or not line.strip() or re.match(r"\s*([-*|#]|\d+\.) ?", line)
        if ends and lines:
            yield start, "\n".join(lines)
            lines = []
        if fence:
            fenced = not fenced
        elif not fenced and line.strip():
            start = start if lines else number
            lines.append(re.sub(r"^\s*([-*#]+|\d+\.) ", "", line))


def in_page(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the fault of every paragraph of a page that breaks a rule.

    Words in italics are terms and quotations, which are not read.
    """
    for line, paragraph in paragraphs(text):
        for fault in found(re.sub(r"(?<!\*)\*[^*]+\*(?!\*)", "TERM", paragraph)):
            yield line, fault


def modules(names: Iterable[str]) -> list[Path]:
    """List the Python files of folders and modules."""
    paths = (ROOT / name for name in names)
    return [file for path in paths for file in (sorted(path.rglob("*.py")) or [path])]


def pages() -> list[Path]:
    """List the Markdown pages that are held to the rules."""
    return [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]


def faults(path: Path) -> list[str]:
    """List the faults of a file, as ``path:line: fault``."""
    text = path.read_text(encoding="utf-8")
    look = in_module if path.suffix == ".py" else in_page
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return [f"{name}:{line}: {fault}" for line, fault in look(text)]


# ---- the rules, held -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_docstrings_comments_and_messages_keep_the_rules(name):
    assert (ROOT / name).exists(), f"FOLDERS names {name}, which does not exist"
    broken = [fault for path in modules([name]) for fault in faults(path)]
    assert not broken, "\n".join(["see 'Prose' in CONTRIBUTING.md:", *broken])


def test_pages_keep_the_rules():
    broken = [fault for path in pages() for fault in faults(path)]
    assert not broken, "\n".join(["see 'Prose' in CONTRIBUTING.md:", *broken])


# ---- the pages: links, and paths of the repository --------------------------------------------------

LINK = re.compile(r"\]\(([^)\s]+)\)")
# `vtr/kernels/sdpa.py`, `tests/x.py::test`, `python benchmarks/video.py`, `python -m recipes.evaluate_wan`
PATH = re.compile(r"(?<![\w/.-])((?:benchmarks|docs|examples|recipes|tests|vtr)/[\w./-]*\w)")
MODULE = re.compile(r"python -m ((?:recipes|tests|vtr)[\w.]*)")


def anchors(text: str) -> set[str]:
    """List the anchors of a page's headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    plain_headings = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {heading.replace(" ", "-") for heading in plain_headings}


def missing(path: Path) -> list[str]:
    """List the links, paths and modules that a page names and that do not exist."""
    text = path.read_text(encoding="utf-8")
    lost = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists():
            lost.append(f"{path.name}: link to {target}")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text("utf-8")):
            lost.append(f"{path.name}: {file.name} has no heading #{anchor}")
    for name in PATH.findall(text):
        if not re.search("NAME|LIBRARY", name) and not any(ROOT.glob(f"{name}*")):
            lost.append(f"{path.name}: {name}")
    for name in MODULE.findall(text):
        file = ROOT / name.replace(".", "/")
        if not file.with_suffix(".py").exists() and not (file / "__main__.py").exists():
            lost.append(f"{path.name}: python -m {name}")
    return lost


def test_links_paths_and_modules_of_pages_exist():
    assert not [line for path in pages() for line in missing(path)]


def test_a_lost_link_path_or_module_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading\n[a](#a-heading) [b](#no) [c](gone.md) `vtr/gone.py` `python -m vtr.gone`\n"
    )
    found_lost = [line.partition(": ")[2] for line in missing(page)]
    assert found_lost == [
        "page.md has no heading #no", "link to gone.md", "vtr/gone.py", "python -m vtr.gone",
    ]  # fmt: skip


# ---- the rules catch what they are for --------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.example)
def test_a_planted_sentence_is_caught(rule, tmp_path):
    docstring = f'"""{rule.example}"""\n'
    assert any(rule.instead in fault for _, fault in in_module(docstring))
    if not rule.opening:
        assert any(rule.instead in fault for _, fault in in_page(f"Text.\n\n- {rule.example}\n"))
        planted = f'def f():\n    # {rule.example}\n    raise ValueError(f"{rule.example} {{f}}")\n'
        lines = [line for line, fault in in_module(planted) if rule.instead in fault]
        assert lines == [2, 3]


@pytest.mark.parametrize(
    "sentence",
    [
        "Where every token went: source, kept, size.",
        "Understand the standard.",
        "It uses the step of its own call.",
        "The mask is made of blocks.",
        "What is left? See the trace.",
        "Use `where it is` in code.",
        "Return the token where it was.",
    ],
)
def test_plain_sentences_are_left_alone(sentence):
    assert not found(sentence)


def test_texts_over_several_lines_are_read_as_one():
    source = '# The text\n# stands\n# first.\nx = 1\n"a run that goes " "on here"\n'
    assert [line for line, _ in in_module(source)] == [1, 5]
    assert [line for line, _ in in_page("A\n\nThe run goes\non.\n```\nit stands\n```\n")] == [3]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for file in modules([name]):
            print(*faults(file), sep="\n")
