"""Fingerprints of models: what they depend on, and what they do not."""

from __future__ import annotations

import hashlib
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vtr.core.calibration import Fingerprint, digest, fingerprint, weight_hash
from vtr.errors import UnsupportedModelError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Config:
    def __init__(self, **entries: Any) -> None:
        self.entries = entries

    def to_dict(self) -> dict[str, Any]:
        return self.entries


class Model(nn.Module):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(20, 7) for _ in range(3))
        self.config = Config(**config)


def of(model: nn.Module) -> Fingerprint:
    return fingerprint(model, model.layers[-1])  # type: ignore[index, arg-type]


def test_signs_are_hashed_eight_to_a_byte():
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    signs = "".join("1" if x < 0 else "0" for x in weight.flatten().tolist())
    signs += "0" * (-len(signs) % 8)
    packed = bytes(int(signs[i : i + 8], 2) for i in range(0, len(signs), 8))
    assert weight_hash(weight) == hashlib.sha256(packed).hexdigest()


def test_the_hash_is_the_same_in_every_dtype():
    # Small enough that float16 rounds some to zero.
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 1e-6
    assert (weight.half() == 0).any()
    assert len({weight_hash(weight.to(dtype)) for dtype in FLOATS}) == 1
    assert len({weight_hash((weight * 1e6).to(d)) for d in (*FLOATS, torch.float8_e5m2)}) == 1


def test_the_hash_does_not_depend_on_the_layout():
    weight = torch.randn(6, 9)
    assert weight_hash(weight) == weight_hash(weight.T.contiguous().T)
    assert weight_hash(weight) != weight_hash(weight.T.contiguous().view(6, 9))


def test_one_sign_changes_the_hash():
    weight = torch.randn(50, 50)
    other = weight.clone()
    other[-1, -1] *= -1
    assert weight_hash(weight) != weight_hash(other)


def test_bytes_of_quantised_weights_are_hashed():
    weight = torch.arange(12, dtype=torch.uint8).view(3, 4)
    assert weight_hash(weight) == hashlib.sha256(bytes(range(12))).hexdigest()
    assert weight_hash(torch.empty(3, 4, device="meta")) == ""


def test_tensors_are_hashed_by_their_bytes():
    parts = torch.tensor([1.5, -2.0]), torch.tensor([True, False]), torch.zeros(0)
    expected = np.array([1.5, -2.0], np.float32).tobytes() + b"\x01\x00"
    assert digest(parts) == hashlib.sha256(expected).hexdigest()


def test_a_model_equals_its_copies():
    model = Model(hidden_size=20)
    for other in (deepcopy(model), deepcopy(model).half(), deepcopy(model).to("meta")):
        assert of(model).difference(of(other)) == ""
        assert of(other).difference(of(model)) == ""
    assert of(model).weight == "layers.2.weight"
    assert of(model).shape == (7, 20)


def test_an_adapter_leaves_it_the_same():
    peft = pytest.importorskip("peft")
    model = Model()
    before = of(model)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["layers.2"]), model)
    assert of(model).weight == before.weight
    assert before.difference(of(model)) == ""


def test_sizes_are_those_of_the_parts_too():
    model = Model(
        hidden_size=8,
        vocab_size=100,
        model_type="x",
        image_size=[3, 4],
        sliding_window=None,
        text_config={"hidden_size": 9, "vocab_size": 5, "rope": {"head_dim": 1}},
    )
    assert of(model).sizes == {"hidden_size": 8, "image_size": [3, 4], "text_config.hidden_size": 9}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "Other"}, "it is of the class Model, and this model is a Other"),
        ({"sizes": {"depth": 3}}, "its depth is 2, and this model's is 3"),
        ({"sizes": {}}, ""),
        ({"sizes": {"depth": 2, "head_dim": 1}}, ""),
        ({"weight": "another.name"}, ""),
        ({"shape": (5, 5)}, r"its weight w has the shape (4, 5), and this model's (5, 5)"),
        ({"sha256": "ef"}, "its weight w has other numbers"),
        ({"sha256": ""}, ""),
    ],
)
def test_differences_are_named(changed, words):
    own: dict[str, Any] = {
        "model": "Model",
        "sizes": {"depth": 2},
        "weight": "w",
        "shape": (4, 5),
        "sha256": "ab",
    }
    found = Fingerprint(**own).difference(Fingerprint(**{**own, **changed}))
    assert words in found and bool(words) == bool(found)


def test_a_part_without_a_matrix_is_refused():
    model = Model()
    with pytest.raises(UnsupportedModelError, match="LayerNorm has no weight by which"):
        fingerprint(model, nn.LayerNorm(4))
