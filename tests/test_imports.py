"""Imports inside of vtr go one way: between its folders by a list, and never in a circle.

Read from the syntax trees, so that imports inside of functions and under ``TYPE_CHECKING`` count.
"""

from __future__ import annotations

import ast
import functools
import importlib
from collections import defaultdict
from collections.abc import Container, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]

# Folder -> the folders that it may import. `contracts` is vtr/compat/contracts, which says of the libraries
# what the adapters expect; `vtr` is vtr/__init__.py, which has the names for users: only commands use them.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "compat": {"errors"},
    "kernels": {"compat", "errors"},
    "core": {"kernels", "compat", "errors"},
    "zoo": {"video", "compat", "errors"},
    "vision": {"core", "kernels", "compat", "errors"},
    "video": {"vision", "core", "compat", "errors"},
    "diffusion": {"core", "kernels", "compat", "errors"},
    "contracts": {"diffusion", "compat"},
    "vllm": {"methods", "core", "errors"},
    "methods": {"diffusion", "zoo", "core", "kernels", "errors"},
    "api": {"core", "compat", "errors"},
    "inspect": {"api", "methods", "diffusion", "core", "kernels", "compat", "errors"},
    "train": {"api", "methods", "vision", "diffusion", "core", "compat", "errors"},
    "strategies": {"api", "methods", "inspect", "diffusion", "core", "compat", "errors"},
    "testing": {
        *("vtr", "api", "methods", "vision", "video", "diffusion", "core"),
        *("kernels", "compat", "errors"),
    },
    "evaluate": {
        *("api", "inspect", "methods", "zoo", "video", "vision", "core"),
        *("kernels", "compat", "errors"),
    },
    "serve": {"evaluate", "api", "video", "core", "compat", "errors"},
    "vtr": {
        *("evaluate", "train", "strategies", "api", "inspect", "methods", "zoo", "video", "core"),
        *("kernels", "errors"),
    },
    "explore": {
        *("vtr", "api", "inspect", "methods", "zoo", "video", "core"),
        *("kernels", "errors"),
    },
    "cli": {
        *(
            "vtr",
            "explore",
            "serve",
            "evaluate",
            "strategies",
            "inspect",
            "methods",
            "zoo",
            "video",
        ),
        *("vision", "testing", "diffusion", "core", "kernels", "compat", "errors"),
    },
    "__main__": {"cli"},
}

# What others are parts of: a part may name it in annotations (under TYPE_CHECKING), while the whole makes
# and calls its parts. Such an import within a folder is not counted in a circle of modules.
WHOLES = {
    "vtr.vision.encoders.session",
    *(f"vtr.vision.vlm.{name}" for name in ("wrapping", "language", "call")),
}


def sources(*folders: str) -> dict[str, str]:
    """The Python files under folders of the repository: name of the module to source."""
    found = {}
    for file in sorted(f for folder in folders for f in (ROOT / folder).rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = file.read_text(encoding="utf-8")
    return found


@functools.cache
def statements(source: str, types: bool = True) -> list[ast.Import | ast.ImportFrom]:
    """The imports of a source, anywhere in it; without ``types`` all but those under ``TYPE_CHECKING``."""
    found = []
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif types or not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            todo += ast.iter_child_nodes(node)
    return found


def imports(source: str, known: Container[str], types: bool = True) -> set[str]:
    """The modules among ``known`` that a source imports (see :func:`statements`)."""
    found = set()
    for node in statements(source, types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        assert node.level == 0, "imports name the whole module"
        inner = {f"{node.module}.{alias.name}" for alias in node.names}
        found |= inner
        # Of names that are no modules, the module that has them.
        if any(name not in known for name in inner):
            found.add(str(node.module))
    return {name for name in found if name in known}


def folder(module: str) -> str:
    """The part of :data:`ALLOWED` that a module of vtr belongs to."""
    parts = module.split(".")
    if parts[1:3] == ["compat", "contracts"]:
        return "contracts"
    return parts[1] if len(parts) > 1 else parts[0]


def graph(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Each module of ``files`` (name to source) with the modules that it imports."""
    return {name: imports(source, files) - {name} for name, source in files.items()}


def forbidden(arrows: Mapping[str, set[str]]) -> list[str]:
    """The imports between folders that :data:`ALLOWED` does not have."""
    return [
        f"{name} imports {other}: {folder(name)} may not import {folder(other)}"
        for name, others in arrows.items()
        for other in sorted(others)
        if folder(other) not in {folder(name), *ALLOWED[folder(name)]}
    ]


def circle(arrows: Mapping[str, set[str]]) -> str:
    """A circle of imports, in words; empty if there is no circle."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return " imports ".join(reversed(error.args[1]))
    return ""


@pytest.fixture(scope="module")
def package() -> dict[str, str]:
    return sources("vtr")


def test_every_import_between_folders_is_in_the_list(package):
    assert forbidden(graph(package)) == []


def test_the_list_goes_one_way():
    assert circle(ALLOWED) == ""


def test_no_modules_import_each_other_in_a_circle(package):
    arrows = graph(package)
    for name, source in package.items():
        if folder(name) == "vision":
            arrows[name] -= WHOLES - imports(source, package, types=False)
    assert circle(arrows) == ""


def test_the_package_imports_nothing_that_is_not_installed(package):
    beside = sources("recipes", "tests", "benchmarks", "examples")
    for name, source in package.items():
        assert not imports(source, beside), name


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("vtr.core.tokens", "from vtr.methods.fastv import FastV"),
        ("vtr.kernels.masks", "if TYPE_CHECKING:\n    from vtr.core import site"),
        ("vtr.methods.fastv", "def apply():\n    import vtr.api"),
        ("vtr.evaluate.cells", "def draw():\n    from vtr import draw"),
        ("vtr.vision.vlm", "class A:\n    def f(self):\n        from vtr.diffusion import adapter"),
    ],
)
def test_a_planted_import_is_caught(package, module, line):
    planted = {**package, module: f"{package[module]}\n{line}\n"}
    (found,) = set(forbidden(graph(planted))) - set(forbidden(graph(package)))
    assert found.startswith(f"{module} imports vtr")


def test_a_planted_circle_is_caught(package):
    planted = {
        "vtr.kernels.rows": "def f():\n    from vtr.kernels.keys import g\n",
        "vtr.kernels.keys": "if TYPE_CHECKING:\n    from vtr.kernels.rows import f\n",
    }
    assert circle(graph(planted)) == (
        "vtr.kernels.rows imports vtr.kernels.keys imports vtr.kernels.rows"
    )


# ---- names of classes ---------------------------------------------------------------------------


def shared_names(files: Mapping[str, str]) -> dict[str, list[str]]:
    """Public classes of one name, with the modules that define them."""
    found = defaultdict(list)
    for name, source in files.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(name)
    return {name: where for name, where in found.items() if len(where) > 1}


def test_no_two_classes_share_a_name(package):
    assert shared_names(package) == {}


def test_a_planted_name_is_caught(package):
    planted = {**package, "vtr.errors": "class Trace:\n    pass\n"}
    assert shared_names(planted)["Trace"] == ["vtr.core.trace", "vtr.errors"]


@pytest.mark.parametrize(
    "name", ["vtr", "vtr.kernels", "vtr.methods", "vtr.strategies", "vtr.video", "vtr.zoo"]
)
def test_no_public_name_is_that_of_a_module_beside_it(name: str) -> None:
    """Import of the module would put it in the place of the function or class."""
    package = importlib.import_module(name)
    folder = Path(str(package.__file__)).parent
    modules = {f.stem for f in folder.iterdir() if f.suffix == ".py" or f.is_dir()}
    shadowed = {
        n for n in modules & set(package.__all__) if not isinstance(getattr(package, n), ModuleType)
    }
    assert not shadowed
