"""What is said of diffusers' transformers is complete, and is what the documentation prints."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any

import pytest

import vtr
from tests.diffusion.models import ALL
from vtr.cli import commands
from vtr.diffusion.coverage import coverage, markdown
from vtr.diffusion.families import FAMILIES, LATER, REFUSED, family_of
from vtr.testing.models.unets import UNETS

PAGE = Path(__file__).parents[2] / "docs" / "diffusion.md"


def transformers() -> set[str]:
    """The models in the modules of diffusers' folders of transformers and UNets that diffusers itself exports."""
    import diffusers
    from diffusers.models import transformers as folder
    from diffusers.models import unets

    found = set()
    modules = [
        f"{each.__name__}.{module.name}"
        for each in (folder, unets)
        for module in pkgutil.iter_modules(each.__path__)
        if not module.name.endswith("_flax")
    ]
    for name in modules:
        held = importlib.import_module(name)
        for name, kind in vars(held).items():
            own = inspect.isclass(kind) and kind.__module__ == held.__name__
            if own and issubclass(kind, diffusers.ModelMixin) and hasattr(diffusers, name):
                found.add(name)
    return found


def test_every_transformer_of_diffusers_is_decided_on() -> None:
    states = {row.name: row.state for row in coverage()}
    unknown = {name for name in transformers() if states.get(name, "unknown") == "unknown"}
    assert not unknown, (
        f"diffusers has transformers that nobody has decided on: {', '.join(sorted(unknown))}. Give each "
        "a family in vtr/diffusion/families.py, or a line in REFUSED (with the reason) or in LATER there"
    )


def test_no_class_is_named_twice() -> None:
    wrapped = [name for family in FAMILIES for name in family.classes]
    named = [*wrapped, *REFUSED, *LATER]
    assert len(named) == len(set(named))


def test_every_wrapped_class_is_tested() -> None:
    tested = {type(case.make()).__name__ for case in (*ALL.values(), *UNETS.values())}
    missing = {name for family in FAMILIES for name in family.classes} - tested
    assert not missing, f"give a Case of vtr/testing/models to {', '.join(sorted(missing))}"


def test_the_page_has_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    start, end = "<!-- vtr families -->\n", "\n<!-- vtr families: end -->"
    printed = page.partition(start)[2].partition(end)[0]
    assert printed == markdown(), (
        "print it again: python -c 'from vtr.diffusion.coverage import markdown; print(markdown())'"
    )


@pytest.mark.parametrize("name", ["SanaTransformer2DModel", "LuminaNextDiT2DModel"])
def test_the_reason_is_in_the_error(name: str) -> None:
    import diffusers

    kind: Any = getattr(diffusers, name)
    model = kind.__new__(kind)
    reason = {"SanaTransformer2DModel": "attention is linear"}.get(name, "not wrapped yet")
    assert family_of(model) is None
    with pytest.raises(vtr.UnsupportedModelError, match=f"{name} is not supported.*{reason}"):
        vtr.apply(model, vtr.RandomSparse(0.5))


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["vtr", "families", *more])
        with pytest.raises(SystemExit) as stop:
            commands.main()
        assert not stop.value.code
        out = capsys.readouterr().out
        assert "Flux2Transformer2DModel" in out
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["Flux2Transformer2DModel"] == {
        "name": "Flux2Transformer2DModel", "state": "wrapped", "about": "Flux.2",
    }  # fmt: skip
