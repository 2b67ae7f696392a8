"""What vtr expects of other libraries holds for those that are installed: ``pytest -m contract``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.tiny import instances, need
from vtr.compat import contract

pytestmark = pytest.mark.contract
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("library", contract.LIBRARIES)
def test_contract(library: str) -> None:
    need(library)
    lines = contract.moved(contract.contract(library), instances(library))
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


@pytest.mark.parametrize("library", contract.LIBRARIES)
def test_users_exist(library: str) -> None:
    for expected in contract.contract(library):
        assert expected.package == library
        for file in expected.used.split(", "):
            assert (ROOT / file).is_file(), f"{expected.where} is used by {file}, which is no file"


def test_classes_that_adapters_know_have_expectations() -> None:
    for library in ("timm", "transformers"):
        pytest.importorskip(library)
    from vtr.compat import timm
    from vtr.vision.encoders.transformers_layers import LAYERS
    from vtr.vision.vlm.families import SUPPORTED

    named = {
        expected.where.partition("|")[0].rpartition(":")[2]
        for library in contract.LIBRARIES
        for expected in contract.contract(library)
    }
    assert {*SUPPORTED, *LAYERS} <= named
    places = (*timm.MODELS.values(), *timm.PRE_NORM, *timm.POST_NORM, *timm.ATTENTIONS)
    assert {place.rpartition(":")[2] for place in places} <= named


# Names that begin with an underscore and belong to Python, or that a class of vtr inherits.
PYTHON = {"_asdict", "_replace", "_getframe", "_current_frames", "_exit"}
INHERITED = {
    "_execution_device": "vtr/zoo/wan.py",
    "_rank": "vtr/evaluate",
    "_world_size": "vtr/evaluate",
}


def names(tree: ast.AST) -> Iterator[tuple[str, bool, int]]:
    """(name, whether it is made here, line) of names, attributes, strings that are names, and imports."""
    formatted = {
        id(part) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in n.values
    }
    for node in ast.walk(tree):
        if id(node) in formatted:
            continue
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, True, line
        elif isinstance(node, ast.Name):
            yield node.id, isinstance(node.ctx, ast.Store), line
        elif isinstance(node, ast.arg):
            yield node.arg, True, line
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "run", "new")
            yield node.attr, own and isinstance(node.ctx, ast.Store), line
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if all(word.isidentifier() for word in node.value.split(".")):
                yield from ((word, False, line) for word in node.value.split("."))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for word in module.split("."):
                yield word, False, line
            for alias in node.names:
                yield from ((word, False, line) for word in alias.name.split("."))
                if alias.asname:
                    yield alias.asname, True, line


def test_private_names_of_libraries_are_in_one_place() -> None:
    """Nothing outside of vtr/compat uses a name with an underscore that vtr does not define itself."""
    files = sorted((ROOT / "vtr").rglob("*.py"))
    found = {file: list(names(ast.parse(file.read_text(encoding="utf-8")))) for file in files}
    outside = {f: n for f, n in found.items() if ROOT / "vtr" / "compat" not in f.parents}
    own = {name for uses in outside.values() for name, made, _ in uses if made}
    own |= {file.stem for file in files} | PYTHON
    foreign = []
    for file, uses in outside.items():
        place = file.relative_to(ROOT).as_posix()
        for name, _, line in uses:
            private = name.startswith("_") and not name.startswith("__") and name.strip("_")
            if private and name not in own and not place.startswith(INHERITED.get(name, "-")):
                foreign.append(f"{place}:{line}: {name}")
    ours = ("_vtr", "_stderr", "_type", "_static")
    foreign = [line for line in foreign if not line.rpartition(" ")[2].startswith(ours)]
    assert not foreign, "put these in vtr/compat, with an expectation:\n" + "\n".join(foreign)
