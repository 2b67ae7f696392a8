"""The support matrix of encoders, diffusion transformers and UNets: floors, laws, page and command.

A class of each form is tried here; ``python -m recipes.model_matrix`` tries all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vtr
from vtr.compat.tested import installed
from vtr.core.method import Reduction
from vtr.core.tokens import TokenMap
from vtr.testing.matrix import KINDS_OF_ROWS, Row, generators, matrix, table, towers
from vtr.testing.matrix.tower_models import candidates

pytestmark = [pytest.mark.usefixtures("without_gradients"), pytest.mark.filterwarnings("ignore")]
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
#: Kind -> the least number of classes that work, wholly or partly.
FLOORS = {"tower": 55, "dit": 34, "unet": 1}


def printed(kind: str) -> dict[str, Row]:
    """The committed rows of a kind, by library and class."""
    start, end = (f"<!-- vtr models --kind {kind}{tail} -->" for tail in ("", ": end"))
    text = PAGE.read_text("utf-8").partition(start)[2].partition(end)[0]
    rows = {}
    for line in [line for line in text.splitlines() if "`" in line]:
        library, name, state, sites, methods, about = (
            cell.strip() for cell in line.replace("\\|", "/").split("|")[1:-1]
        )
        found = tuple(filter(None, sites.split(", ")))
        made: Any = (kind, library, name.strip("`"), state, found, int(methods or 0), about)
        rows[f"{library} {name.strip('`')}"] = Row(*made)
    return rows


@pytest.mark.parametrize("kind", FLOORS)
def test_the_matrix_has_its_floor(kind: str) -> None:
    rows = printed(kind)
    assert sum(row.state != "refused" for row in rows.values()) >= FLOORS[kind]
    for row in rows.values():
        assert row.about or row.state == "works", f"{row.name} has no reason"
        assert not row.about.startswith("law "), f"{row.name} breaks a law"
        assert bool(row.methods and row.sites) == (row.state != "refused")


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_the_page_has_every_class_of_diffusers(kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    from vtr.compat.diffusers import transformer_classes

    if diffusers.__version__ not in PAGE.read_text("utf-8"):
        pytest.skip("the page was made with another diffusers")
    rows = {row.name for each in ("dit", "unet") for row in printed(each).values()}
    assert rows == set(transformer_classes()), (
        "write the page again: python -m recipes.model_matrix --kind dit --kind unet"
    )


CASES = sorted(generators.cases()) if installed("diffusers") else []


@pytest.mark.parametrize("name", CASES)
def test_a_wrapped_generator_holds_the_laws(name: str) -> None:
    kind = "unet" if name.startswith("UNet") else "dit"
    (row,) = matrix(kind, [name])
    assert row.state != "refused", row.about
    if str(installed("diffusers")) in (PAGE.read_text("utf-8")):
        assert row._replace(about="") == printed(kind)[f"diffusers {name}"]._replace(about="")


ENCODERS = {
    "transformers": [
        *("CLIPVisionModel", "SiglipForImageClassification", "Siglip2VisionModel"),
        *("Dinov2WithRegistersBackbone", "VJEPA2Model", "SwinModel", "SamVisionModel"),
        *("BeitModel", "PixtralVisionModel"),
    ],
    "open_clip": ["VisionTransformer", "TimmModel"],
}


@pytest.mark.parametrize("library", ENCODERS)
def test_encoders_hold_the_laws(library: str) -> None:
    pytest.importorskip(library)
    wanted = ENCODERS[library]
    listed = candidates(wanted, [library])
    rows = [row for c in listed if (row := towers.tower_row(c)) is not None]
    assert {row.name for row in rows} == set(wanted)
    committed = printed("tower")
    for row in rows:
        assert row.state == committed[f"{library} {row.name}"].state, row


def test_a_fault_of_an_adapter_is_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that drops other tokens than it says breaks the law of masked keys, and the class is not said to work."""
    pytest.importorskip("transformers")
    plain = vtr.Random.reduce

    def wrong(self: Any, site: Any) -> Any:
        made = plain(self, site)
        if made is None or made.map is None:
            return made
        hidden = site.hidden
        hidden.mul_(1.5)  # what is left is not what the model computed
        return Reduction(TokenMap.keep(made.map.kept, site.n))

    monkeypatch.setattr(vtr.Random, "reduce", wrong)
    (candidate,) = candidates(["ViTModel"], ["transformers"])
    row = towers.tower_row(candidate)
    assert row is not None and row.state == "refused"
    assert "law 'fewer tokens are masked ones' does not hold" in row.about


def test_a_subclass_that_is_not_wrapped_is_not_taken_for_its_base() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.DreamLiteUNetModel()
    with pytest.raises(vtr.UnsupportedModelError, match="not wrapped yet"):
        vtr.apply(model, vtr.ToMeSD(0.5))


def test_a_table_has_working_classes_first_and_escapes_bars() -> None:
    rows = [
        Row("dit", "diffusers", "A", "refused", about="a | b"),
        Row("dit", "diffusers", "B", "works", ("attention",), 3),
    ]
    assert table(rows).splitlines()[2:] == [
        "| diffusers | `B` | works | attention | 3 |  |",
        "| diffusers | `A` | refused |  |  | a \\| b |",
    ]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of vlm, tower, dit, unet"):
        list(matrix("resnet"))
    assert list(KINDS_OF_ROWS) == ["vlm", "tower", "dit", "unet"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    from vtr.cli import commands

    monkeypatch.setattr(sys, "argv", ["vtr", "models", *arguments])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    return int(stop.value.code or 0)


def test_the_command_prints_a_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    name = "PixArtTransformer2DModel"
    assert run(monkeypatch, name, "--kind", "dit", "--json") == 0
    out = capsys.readouterr()
    (row,) = json.loads(out.out)
    assert (row["kind"], row["library"], row["name"]) == ("dit", "diffusers", name)
    assert row["state"] == "works" and row["methods"] >= 20
    assert f"dit {name}: works" in out.err
    assert run(monkeypatch, "MotionAdapter", "--kind", "unet") == 0
    assert "0 of 1 classes work" in capsys.readouterr().out
    assert run(monkeypatch, "NoModel", "--kind", "unet") == 2
    assert "have no class NoModel" in capsys.readouterr().err
    assert run(monkeypatch, "--kind", "cnn") == 2
    assert "--kind must be one of vlm, tower, dit, unet" in capsys.readouterr().err
