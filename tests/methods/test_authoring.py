"""What a method costs its author: few lines, public names, and a score."""

from __future__ import annotations

import ast
import io
import re
import statistics
import textwrap
import tokenize
from pathlib import Path
from typing import Any

import pytest
import torch

import vtr
from tests.tiny import images, vit
from tests.vision.vlm.models import made
from vtr.core import registry
from vtr.methods.base import ScoredMethod

ROOT = Path(__file__).parents[2]
METHODS = ROOT / "vtr/methods"
FILES = sorted(METHODS / f"{module}.py" for module in set(vtr.methods.TABLE.values()))


def code_lines(text: str) -> int:
    """Lines of code: without docstrings, comments and blank lines."""
    docs: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    nothing = {
        tokenize.COMMENT,
        *(tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in nothing:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def test_lines_are_counted_without_words() -> None:
    text = '"""Doc."""\n\n# why\nx = (\n    1,\n)\ny = 2  # two\n'
    assert code_lines(text) == 4


def test_a_method_is_short() -> None:
    counted = {file.name: code_lines(file.read_text()) for file in FILES}
    assert statistics.median(counted.values()) <= 70, counted


@pytest.mark.parametrize("file", sorted(METHODS.rglob("*.py")), ids=lambda f: f.name)
def test_methods_import_public_names(file: Path) -> None:
    """No name or module with an underscore, and no question of what class a site is."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
        if isinstance(node, ast.ImportFrom):
            names.append(str(node.module))
        parts = [part for name in names for part in name.split(".")]
        assert not [p for p in parts if p.startswith("_") and not p.startswith("__")], names
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            assert "Site" not in ast.unparse(node.args[1]), ast.unparse(node)
    assert not file.name.startswith("_") or file.name == "__init__.py"


def example() -> str:
    """The method of CONTRIBUTING.md."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add a method")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found
    return textwrap.dedent(found[1])


@pytest.fixture
def largest_norm(monkeypatch: pytest.MonkeyPatch) -> Any:
    registry.registry()  # which is put back behind the test
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    space: dict[str, Any] = {"__name__": __name__}
    exec(compile(example(), "CONTRIBUTING.md", "exec", dont_inherit=True), space)
    return space["LargestNorm"]


def test_the_example_is_the_shortest_method() -> None:
    shortest = min(code_lines(file.read_text()) for file in FILES)
    assert code_lines(example()) <= min(25, shortest)


def test_the_example_cuts_an_encoder(largest_norm: Any) -> None:
    """By hand: the norms where it cuts, one layer after the other, each sample for itself."""
    model, seen = vit(), []

    class Seen(largest_norm):  # type: ignore[misc]
        def score(self, site: Any) -> torch.Tensor:
            seen.append((site.hidden.clone(), site.index.clone()))
            return super().score(site)  # type: ignore[no-any-return]

    method = Seen(keep=(0.5, 0.2), layers=(1, 3))
    with torch.no_grad(), vtr.apply(model, method) as handle:
        model(images(3))
    assert [s.tokens_out for s in handle.trace.stages] == [32, 13]
    for (hidden, index), stage in zip(seen, handle.trace.stages, strict=True):
        for b in range(3):
            norms = [float(x.norm()) for x in hidden[b]]
            order = sorted(range(len(norms)), key=lambda i: -norms[i])
            kept = sorted(order[: stage.tokens_out])
            assert stage.total.kept[b].tolist() == index[b, kept].tolist()


@pytest.mark.parametrize("site", [None, "decoder"])
def test_the_example_cuts_a_language_model(largest_norm: Any, site: str | None) -> None:
    """Images of different sizes in one batch: the budget is per image, and the largest norms stay."""
    model, inputs = made("llava_next", 2)
    seen: list[Any] = []

    class Seen(largest_norm):  # type: ignore[misc]
        def score(self, site: Any) -> torch.Tensor:
            seen.append((site.hidden.norm(dim=-1), site.valid_mask, site.images))
            return super().score(site)  # type: ignore[no-any-return]

    with torch.no_grad(), vtr.apply(model, Seen(keep=5, site=site)) as handle:
        model(**inputs)
    ((norms, valid, pictures),) = seen
    (stage,) = handle.trace.stages
    for b in range(2):
        index = valid[b].nonzero()[:, 0].tolist()
        best = sorted(index, key=lambda i: -float(norms[b, i]))[: 5 * len(pictures[b])]
        kept = stage.total.kept[b]
        assert kept[kept >= 0].tolist() == sorted(best)


def test_the_example_in_low_precision_and_kept_whole(largest_norm: Any) -> None:
    model, x = vit().bfloat16(), images().bfloat16()
    with torch.no_grad():
        bare = model(x)
        with vtr.apply(model, largest_norm(keep=1.0)) as handle:
            assert torch.equal(model(x), bare) and not handle.trace.stages
        with vtr.apply(model, largest_norm(keep=9)) as handle:
            assert model(x).dtype == torch.bfloat16
    assert handle.trace.stages[-1].tokens_out == 9


def test_a_score_of_the_wrong_shape_is_refused(largest_norm: Any) -> None:
    class PerChannel(largest_norm):  # type: ignore[misc]
        def score(self, site: Any) -> torch.Tensor:
            return site.hidden  # type: ignore[no-any-return]

    words = r"PerChannel.score must return one number per token, \(2, 64\) here, got \(2, 64, 48\)"
    with vtr.apply(vit(), PerChannel()) as handle, pytest.raises(ValueError, match=words):
        handle.target(images())


def test_what_the_base_refuses(largest_norm: Any) -> None:
    for options, words in (
        ({"keep": 0}, "keep must be an int >= 1"),
        ({"keep": (0.2, 0.5), "layers": (1, 2)}, "keep must not grow"),
        ({"keep": (0.5, 0.2), "layers": (1,)}, "keep must have one entry per stage"),
        ({"layers": (2, 1)}, "layers must be strictly ascending"),
        ({"site": "promt"}, "site must be one of encoder, prompt, decoder or None"),
        ({"site": "prompt", "layers": (1, 2)}, "layers must be one layer for a cut at the prompt"),
        ({"site": "prompt", "keep": (0.5, 0.2)}, "keep must be one budget for a cut at the prompt"),
    ):
        with pytest.raises(ValueError, match=words):
            largest_norm(**options)
    with pytest.raises(
        ValueError, match=r"layers must be in 0\.\.5 for a model of 6 layers, got 6"
    ):
        vtr.apply(vit(), largest_norm(layers=(6,)))
    with pytest.raises(ValueError, match=r"keep has 2 entries for the 1 layers \(1,\)"):
        vtr.apply(vit(), largest_norm(keep=(0.5, 0.2)))
    with pytest.raises(NotImplementedError, match=r"ScoredMethod must define score\(site\)"):
        ScoredMethod().score(None)
