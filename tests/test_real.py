"""What `make real` does without a network: mapping, scores, and what it says when nothing can be fetched."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("timm")

from tests.tiny import vit

FOLDER = Path(__file__).parents[1] / "benchmarks" / "real"


@pytest.fixture
def script(monkeypatch):
    """Load a script of the benchmark; they import each other as neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    loaded = []

    def load(name: str) -> ModuleType:
        loaded.append(name)
        return importlib.import_module(name)

    yield load
    for name in [
        n for n, m in sys.modules.items() if str(FOLDER) in str(getattr(m, "__file__", ""))
    ]:
        del sys.modules[name]


def _backbone(seed=0):
    """Random tensors by the names of the published file."""
    make = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=make) * 0.05

    found = {
        "embeddings.cls_token": draw(1, 1, 384), "embeddings.mask_token": draw(1, 384),
        "embeddings.position_embeddings": draw(1, 1370, 384),
        "embeddings.patch_embeddings.projection.weight": draw(384, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": draw(384),
        "layernorm.weight": 1 + draw(384), "layernorm.bias": draw(384),
    }  # fmt: skip
    widths = {"norm1": (384,), "norm2": (384,), "mlp.fc1": (1536, 384), "mlp.fc2": (384, 1536)}
    widths |= {f"attention.attention.{n}": (384, 384) for n in ("query", "key", "value")}
    widths["attention.output.dense"] = (384, 384)
    for i in range(12):
        for name, shape in widths.items():
            found[f"encoder.layer.{i}.{name}.weight"] = draw(*shape)
            found[f"encoder.layer.{i}.{name}.bias"] = draw(shape[0])
        for n in (1, 2):
            found[f"encoder.layer.{i}.layer_scale{n}.lambda1"] = 1 + draw(384)
    return {f"backbone.{name}": tensor for name, tensor in found.items()}


def test_two_libraries_give_the_same_features(script):
    pytest.importorskip("transformers")
    weights = script("weights")
    tensors = _backbone()
    pictures = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = weights.dinov2_timm(tensors).forward_features(pictures)
        theirs = weights.dinov2(tensors)(pictures).last_hidden_state
    assert (ours - theirs).abs().max() < 1e-5


def test_the_area_under_the_curve(script):
    tasks = script("tasks")
    make = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (12, 12), generator=make).float()  # with ties
    truth = torch.rand(12, 12, generator=make) < 0.3
    pairs = scores[truth][:, None] - scores[~truth][None]
    wanted = ((pairs > 0).double() + 0.5 * (pairs == 0)).mean()
    assert tasks.area(scores, truth) == pytest.approx(float(wanted))


def test_what_does_not_change_a_formula(script):
    reader = script("reader")
    assert reader.plain(r"\Bigl( { \cal A } \, + x _ { 1 } \Bigr)") == "(A+x_1)"
    assert reader.similarity(r"\frac { 1 } { 2 }", r"\frac{1}{2}") == 1.0
    assert reader.similarity("a+b", "c") == 0.0


def test_formulas_are_many_and_long(script):
    formulas = script("formulas")
    assert len(set(formulas.FORMULAS)) >= 48
    picture = formulas.picture(formulas.FORMULAS[0], (128, 512))
    assert picture.shape == (1, 128, 512)
    assert picture.max() > 0.9 and (picture[picture.sum((1, 2)) > 0] < 0.5).float().mean() > 0.02


def test_no_encoder_method_is_forgotten(script):
    import vtr

    settings = script("settings")
    made = {name: make() for name, make in settings.settings(12, 256, 0.5).items()}
    assert sum("random" in name for name in made) == 2 * len(settings.SEEDS)
    works = {s.name for s in vtr.supported(vit()) if s.supported}
    assert {method.name for method in made.values()} | set(settings.LEFT_OUT) == works


def test_without_a_network_it_says_so(tmp_path):
    run = subprocess.run(
        [sys.executable, str(FOLDER), "--out", str(tmp_path / "out")],
        env={**os.environ, "VTR_CACHE": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    assert "cannot be fetched" in run.stderr and "needs a network once" in run.stderr
    assert not (tmp_path / "out").exists()


def test_another_file_than_the_pinned_one_is_refused(script, tmp_path, monkeypatch):
    packages = script("packages")
    monkeypatch.setenv("VTR_CACHE", str(tmp_path))
    downloads = packages.cache() / "downloads"
    downloads.mkdir(parents=True)
    wheel = downloads / "easy_vqa-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("easy_vqa/data/test/questions.json", json.dumps([]))
    with pytest.raises(packages.NotFetched, match=r"has hash .*, not fcb51b309b"):
        packages.folder("easy-vqa")
    assert not wheel.exists()
