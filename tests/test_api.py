"""The one verb: what it accepts, what it refuses, and what the handle tells."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import vtr
from tests.tiny import images, ours, vit
from vtr.methods.tofe import ToFeModules


def test_an_unknown_model() -> None:
    for target in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), "vit", None, 3):
        for call in (lambda t=target: vtr.apply(t, "evit"), lambda t=target: vtr.supported(t)):
            with pytest.raises(vtr.UnsupportedModelError, match="no adapter for") as error:
                call()
            assert "timm" in str(error.value) and "register_adapter" in str(error.value)
    assert issubclass(vtr.UnsupportedModelError, (vtr.VtrError, TypeError))


def test_an_unknown_model_around_a_known_one() -> None:
    model = vit()
    holder = type("Pipeline", (), {"model": model})()
    for target, name in (
        (nn.DataParallel(model), "module"),
        (nn.ModuleDict({"head": nn.Linear(2, 2), "tower": nn.Sequential(model)}), r"tower\.0"),
        (holder, "model"),
    ):
        with pytest.raises(
            vtr.UnsupportedModelError, match=f"Its part {name}, a VisionTransformer"
        ):
            vtr.apply(target, "evit")
    assert ours(model) == []


def test_replicas_are_refused() -> None:
    """What nn.DataParallel calls on every GPU."""
    model = vit()
    with vtr.apply(model, "evit"):
        replica = model._replicate_for_data_parallel()
        with pytest.raises(vtr.UnsupportedModelError, match="DistributedDataParallel"):
            replica(images())
    assert ours(model) == [] and not model._forward_pre_hooks


def test_unknown_options_and_methods() -> None:
    model = vit()
    keys = sorted(model.__dict__)
    for options in ({"ouput": "restored"}, {"keep": 0.5}):
        with pytest.raises(ValueError, match=r"unknown option .* it has: output, modules"):
            vtr.apply(model, "evit", **options)
    with pytest.raises(ValueError, match=r"'keep' is an option of the method: vtr\.create\('evit'"):
        vtr.apply(model, "evit", keep=0.5)
    with pytest.raises(ValueError, match="Did you mean 'evit'"):
        vtr.apply(model, "evitt")
    with pytest.raises(ValueError, match=r"give an instance, EViT\(...\), not the class"):
        vtr.apply(model, vtr.EViT)  # type: ignore[arg-type]
    for bad in (3, None, {"keep": 0.5}, [3], object()):
        with pytest.raises(ValueError, match="method must be a vtr method"):
            vtr.apply(model, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="non-empty list"):
        vtr.apply(model, [])
    with pytest.raises(ValueError, match=r"layers must be in 0..5 for a model of 6 layers, got 6"):
        vtr.apply(model, vtr.EViT(layers=(6,)))
    with pytest.raises(ValueError, match=r"keep has 2 entries for the 3 layers"):
        vtr.apply(model, vtr.EViT(keep=(0.5, 0.5)))
    assert sorted(model.__dict__) == keys and ours(model) == []


def test_modules_are_checked() -> None:
    model = vit()
    modules = ToFeModules(48, 3)
    with pytest.raises(ValueError, match="modules= needs exactly one method that learns"):
        vtr.apply(model, vtr.EViT(), modules=modules)
    with pytest.raises(ValueError, match="modules= needs exactly one method that learns"):
        vtr.apply(model, [vtr.ToFe(trained=True), vtr.ToFe(trained=True)], modules=modules)
    with pytest.raises(ValueError, match="modules"):
        vtr.apply(model, vtr.ToFe(trained=True), modules=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="modules"):
        vtr.apply(model, vtr.ToFe(trained=True), modules=ToFeModules(32, 3))
    with pytest.raises(ValueError, match="modules"):
        vtr.apply(model, vtr.ToFe(trained=True), modules=ToFeModules(48, 2))
    assert ours(model) == []
    with vtr.apply(model, vtr.ToFe(trained=True), modules=modules) as handle:
        assert handle.modules[0] is modules
        model(images())
    with pytest.raises(
        ValueError, match=r"missing-file|no weights|not found|There is no|there is no"
    ):
        vtr.apply(model, vtr.ToFe(weights="missing-file"))


def test_ways_to_name_a_method() -> None:
    x, outs = images(), []
    for method in (
        vtr.EViT(keep=0.5),
        {"name": "evit", "keep": 0.5},
        [vtr.EViT(keep=0.5)],
        vtr.Plan((vtr.EViT(keep=0.5),)),
        (m for m in [vtr.EViT(keep=0.5)]),
    ):
        model = vit()
        with vtr.apply(model, method) as handle, torch.no_grad():  # type: ignore[arg-type]
            outs.append(model(x))
            assert handle.methods == (vtr.EViT(keep=0.5),)
    assert all(torch.equal(outs[0], out) for out in outs)
    with vtr.apply(vit(), "evit") as handle:
        assert handle.methods == (vtr.EViT(),) and repr(handle) == f"Handle({vtr.EViT()!r}; on)"


def test_trace_and_summary() -> None:
    model = vit()
    with vtr.apply(model, vtr.EViT(keep=0.5, layers=(1, 3), fuse=False)) as handle:
        assert handle.trace.stages == [] and handle.trace.kept is None
        assert handle.trace.summary() == "no reduction took place"
        with pytest.raises(RuntimeError, match="has not been called"):
            handle.report()
        model(images(3))
        trace = handle.trace
        assert trace.batch == 3
        assert (
            trace.summary() == "encoder[1] evit: 64 -> 32 tokens\nencoder[3] evit: 32 -> 16 tokens"
        )
        assert trace.tokens["encoder"] == {
            0: (64, 64),
            1: (64, 32),
            2: (32, 32),
            3: (32, 16),
            4: (16, 16),
            5: (16, 16),
        }
        assert trace.kept is not None and trace.kept.shape == (3, 16)
        model(images(1))
        assert trace.batch == 3 and handle.trace.batch == 1, "a call has its own trace"


def test_report() -> None:
    model = vit()
    with vtr.apply(model, vtr.EViT(keep=0.5, layers=(1,), fuse=False)) as handle:
        model(images())
        report = handle.report()
    assert handle.report() == report  # of the call before it was removed
    data = report.to_dict()
    assert data["stages"] == [
        {"site": "encoder", "layer": 1, "method": "evit", "tokens_in": 64, "tokens_out": 32}
    ]

    def block(before: int, after: int, c: int = 48) -> int:
        # Linear layers: qkv and proj 4 c^2, MLP 8 c^2 multiply-adds per token; attention 2 n^2 c.
        return 2 * (before * 4 * c * c + 2 * before * before * c + after * 8 * c * c)

    dense = 6 * block(65, 65)
    reduced = block(65, 65) + block(65, 33) + 4 * block(33, 33)
    assert data["flops"] == {"encoder": {"dense": dense, "reduced": reduced}}
    assert data["kv_bytes"] is None
    assert data["methods"] == [repr(vtr.EViT(keep=0.5, layers=(1,), fuse=False))]
    rich = pytest.importorskip("rich.console").Console(width=100, record=True)
    rich.print(report)
    assert "tokens encoder[1]" in rich.export_text()
    assert "tokens encoder[1]" in str(report) and "GFLOPs encoder" in str(report)


def test_the_flops_of_the_paper() -> None:
    """EViT's published GMACs on DeiT-S: 4.6 dense, then 4.0, 3.5, 3.0, 2.6, 2.3 (with fusion)."""
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        model = VisionTransformer(img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6)
    patch_embedding = 196 * 768 * 384
    found = []
    for keep in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        with vtr.apply(model, vtr.EViT(keep=keep)) as handle, torch.no_grad():
            model(torch.empty(1, 3, 224, 224, device="meta"))
            found.append(handle.report().flops["encoder"][1] / 2 + patch_embedding)
    assert [f"{f / 1e9:.2f}" for f in found] == ["4.60", "4.02", "3.48", "3.03", "2.63", "2.31"]


def test_supported() -> None:
    rows = {s.name: s for s in vtr.supported(vit())}
    assert rows["evit"].supported and rows["evit"].reason == ""
    rows = {s.name: s for s in vtr.supported(vit(class_token=False, global_pool="avg"))}
    assert not rows["evit"].supported and "no class token" in rows["evit"].reason
    assert rows["tome"].supported
    model = vit()
    with vtr.apply(model, "evit"):
        assert {s.name for s in vtr.supported(model) if s.supported} >= {"evit", "tome"}


def test_handles_of_a_model() -> None:
    model = vit()
    assert vtr.handles(model) == []
    first = vtr.apply(model, vtr.EViT(layers=(3,)))
    second = vtr.apply(model, vtr.Random(layers=(1,)))
    assert [h.methods[0].name for h in vtr.handles(model)] == ["evit", "random"]
    vtr.handles(model)[0].remove()
    assert first.removed and not second.removed
    second.remove()
    assert vtr.handles(model) == []


def test_importing_is_cheap_and_pulls_in_no_model_library() -> None:
    heavy = [
        "torch._dynamo",
        "transformers",
        "timm",
        "diffusers",
        "open_clip",
        "decord",
        "matplotlib",
        "rich",
        "typer",
        "sklearn",
    ]
    code = (
        "import torch, sys, time; t = time.process_time(); import vtr; vtr.list_methods(); vtr.ToMe; "
        f"print(time.process_time() - t, [m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, _, found = done.stdout.strip().partition(" ")
    assert found == "[]", found
    assert float(seconds) < 1.0


def test_public_names_resolve() -> None:
    missing = []
    for name in vtr.__all__:
        try:
            getattr(vtr, name)
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("vtr"):
                continue  # an optional library
            missing.append(name)
    assert missing == []
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        vtr.nothing  # noqa: B018
    assert "apply" in dir(vtr)


def test_type_checkers_see_every_public_name() -> None:
    """A checker reads the stub; `python recipes/public_names.py` writes it."""
    from recipes.public_names import stub

    written = Path(str(vtr.__file__)).with_suffix(".pyi").read_text()
    assert written == stub(), "run: python recipes/public_names.py"
    names = [
        alias.asname
        for node in ast.parse(written).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(n for n in names if n) == sorted([*vtr._PUBLIC, *vtr._PACKAGES])


def test_one_table_lists_the_methods() -> None:
    """The registry of a new process holds the classes of the table, and every file is in it."""
    code = (
        "import vtr; from vtr.methods import TABLE\n"
        "found = vtr.list_methods(); names = [m.cls for m in found]\n"
        "assert sorted(names) == sorted(TABLE), names\n"
        "assert set(TABLE) <= set(vtr.__all__) and all(getattr(vtr, n).name for n in TABLE)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    files = {f.stem for f in Path(str(vtr.methods.__file__)).parent.glob("*.py")}
    assert files - {"__init__", "base"} == set(vtr.methods.TABLE.values())
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        vtr.methods.Nothing  # noqa: B018


def test_methods_is_a_package() -> None:
    assert not callable(vtr.methods) and vtr.methods.FastV is vtr.FastV
    assert "FastV" in dir(vtr.methods)
