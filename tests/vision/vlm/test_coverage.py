"""The support matrix of vision-language models: its floor, its classes, its page and its command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vtr
from vtr.vision.vlm import coverage, proof
from vtr.vision.vlm.families import SUPPORTED, inner_of
from vtr.vision.vlm.twin import shrunk

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("without_gradients"),
    pytest.mark.filterwarnings("ignore"),
]
LATER = ("encoder", "prompt", "decoder", "attention", "kv", "logits")
PAGE = Path(__file__).parents[3] / "docs" / "models.md"


def table() -> dict[str, list[str]]:
    """Class -> the other columns of the committed table."""
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


TABLE = table()
WORKING = [name for name, row in TABLE.items() if row[0] != "refused"]
BY_STRUCTURE = [
    name
    for name in WORKING
    if name.replace("ForConditionalGeneration", "Model") not in SUPPORTED
    and hasattr(transformers, name)
]


def test_the_matrix_has_its_floor() -> None:
    assert len(WORKING) >= 60
    assert sum(row[0] == "works" for row in TABLE.values()) >= 42
    names = {cls.__name__ for cls in coverage.answering_classes()}
    if transformers.__version__ in PAGE.read_text("utf-8"):
        assert names == set(TABLE), "write the page again: python -m recipes.model_matrix"


@pytest.mark.parametrize("name", BY_STRUCTURE)
def test_a_class_of_the_matrix_is_proven(name: str) -> None:
    model = coverage.tiny(getattr(transformers, name))
    inner = inner_of(model)
    assert inner is not None
    found = proof.proof_of(model, inner)
    assert not found.refused
    closed = bool(found.blind or found.inside or found.two_way)
    assert not closed or TABLE[name][0] == "partly"


def rows(*names: str) -> list[coverage.ModelSupport]:
    return list(coverage.model_support(list(names)))


def test_a_row_says_what_works_and_what_is_closed() -> None:
    none, moe, hybrid = rows(
        "BlipForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3_5ForConditionalGeneration",
    )
    assert (moe.state, moe.title, moe.about) == ("works", "Qwen3-VL-MoE", "")
    assert moe.sites == ("image", "pixels", *LATER)
    assert moe.methods >= 50
    assert hybrid.state == "partly" and "prompt" in hybrid.sites
    assert "layers of the kind linear_attention have no attention" in hybrid.about
    assert none.state == "refused" and "holds no language model" in none.about


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MllamaForConditionalGeneration", "cross-attention"),
        ("Florence2ForConditionalGeneration", "has no list of layers"),
        ("Glm5NextForConditionalGeneration", "layers of the kind indexed_attention"),
        ("Kosmos2ForConditionalGeneration", "no placeholder for visual tokens"),
    ],
)
def test_a_refused_class_has_its_reason(name: str, reason: str) -> None:
    if not hasattr(transformers, name):
        pytest.skip("this version of transformers has no such class")
    (row,) = rows(name)
    assert row.state == "refused" and reason in row.about


def test_models_that_are_wrapped_by_structure_take_methods() -> None:
    """A method of each kind on a class that has no line of code in vtr: GOT-OCR 2."""
    model = coverage.tiny(transformers.GotOcr2ForConditionalGeneration)
    inputs = proof.prompt(model, model.model, proof.pictures(model.model), ((0,), (1, 2)))
    dense = model(**inputs).logits[:, -1]
    for name in ("divprune", "fastv"):
        with vtr.apply(model, vtr.create(name, keep=2)):
            assert not torch.equal(model(**inputs).logits[:, -1], dense)
    torch.testing.assert_close(model(**inputs).logits[:, -1], dense, rtol=0, atol=0)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    from vtr.cli import commands

    monkeypatch.setattr(sys, "argv", ["vtr", "models", *arguments])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    return int(stop.value.code or 0)


def test_the_command_prints_the_matrix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "GotOcr2ForConditionalGeneration"
    assert run(monkeypatch, name, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == name and row["state"] == "works"
    assert run(monkeypatch, name) == 0
    assert "1 of 1 classes work" in capsys.readouterr().out
    assert run(monkeypatch, "NoModel") == 2
    assert "no class NoModel" in capsys.readouterr().err


def test_a_model_of_any_weights_is_proven_by_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof reads no weight: models without any (on the meta device) and adapters around it work."""
    peft = pytest.importorskip("peft")
    cls: Any = transformers.GotOcr2ForConditionalGeneration
    config = shrunk(cls.config_class())
    with torch.device("meta"):
        empty = cls(config)
    assert any(row.supported for row in vtr.supported(empty))
    model = coverage.tiny(cls)
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    with vtr.apply(lora, vtr.create("divprune", keep=2)) as handle:
        inputs = proof.prompt(model, model.model, proof.pictures(model.model), ((0,), (1, 2)))
        lora(**inputs)
        assert handle.trace.stages[0].tokens_out < handle.trace.stages[0].tokens_in
