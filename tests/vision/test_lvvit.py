"""LV-ViT: sizes and names of the released checkpoints, the paper's forward pass, and methods on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import vtr
import vtr.testing
from tests.tiny import images, spread
from vtr.vision.lvvit import LVViT, LVViTSize

TINY = LVViTSize(48, 4, 3, skip=2.0, stem=8, patch=8)


def tiny(seed: int = 0) -> Any:
    return spread(LVViT(TINY, 64, 10), seed)


# The README of zihangJiang/TokenLabeling: S 25.77 M without the head of the patches, M 55.83 M.
@pytest.mark.parametrize(
    ("size", "image", "millions"),
    [
        ("s", 224, 26.15),
        ("s", 384, 26.30),
        ("m", 224, 55.83),
        ("m", 384, 56.03),
        ("l", 448, 150.47),
    ],
)
def test_numbers_of_parameters(size: str, image: int, millions: float) -> None:
    with torch.device("meta"):
        model = LVViT(size, image)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_names_of_tensors() -> None:
    """As in the authors' classes (tlt/models/lvvit.py and models/layers.py)."""
    with torch.device("meta"):
        state = LVViT("s").state_dict()
    block = {
        "attn.proj.bias": (384,), "attn.proj.weight": (384, 384), "attn.qkv.weight": (1152, 384),
        "mlp.fc1.bias": (1152,), "mlp.fc1.weight": (1152, 384),
        "mlp.fc2.bias": (384,), "mlp.fc2.weight": (384, 1152),
        "norm1.bias": (384,), "norm1.weight": (384,), "norm2.bias": (384,), "norm2.weight": (384,),
    }  # fmt: skip
    stem: dict[str, tuple[int, ...]] = {
        "conv1.weight": (64, 3, 7, 7), "conv2.weight": (64, 64, 3, 3), "conv3.weight": (64, 64, 3, 3),
        "proj.weight": (384, 64, 8, 8), "proj.bias": (384,),
    }  # fmt: skip
    for number in (1, 2, 3):
        for name in ("weight", "bias", "running_mean", "running_var"):
            stem[f"bn{number}.{name}"] = (64,)
        stem[f"bn{number}.num_batches_tracked"] = ()
    wanted: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 384), "pos_embed": (1, 197, 384), "norm.weight": (384,), "norm.bias": (384,),
        "head.weight": (1000, 384), "head.bias": (1000,),
        "aux_head.weight": (1000, 384), "aux_head.bias": (1000,),
        **{f"patch_embed.{k}": v for k, v in stem.items()},
        **{f"blocks.{i}.{k}": v for i in range(16) for k, v in block.items()},
    }  # fmt: skip
    assert {k: tuple(v.shape) for k, v in state.items()} == wanted


def written_out(model: Any, x: Tensor) -> Tensor:
    p, state = model.patch_embed, dict(model.named_parameters())
    for conv, bn, stride in ((p.conv1, p.bn1, 2), (p.conv2, p.bn2, 1), (p.conv3, p.bn3, 1)):
        x = F.conv2d(x, conv.weight, stride=stride, padding=conv.weight.shape[-1] // 2)
        mean, var = bn.running_mean[:, None, None], bn.running_var[:, None, None]
        x = (x - mean) / (var + 1e-5).sqrt() * bn.weight[:, None, None] + bn.bias[:, None, None]
        x = x.clamp(min=0)
    x = F.conv2d(x, p.proj.weight, p.proj.bias, stride=4).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), 1, 48), x], 1) + state["pos_embed"]
    for block in model.blocks:
        h = F.layer_norm(x, (48,), block.norm1.weight, block.norm1.bias, 1e-5)
        q, k, v = (h @ block.attn.qkv.weight.T).reshape(len(x), 65, 3, 3, 16).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).reshape(len(x), 65, 48)
        x = x + block.attn.proj(y) / 2
        h = F.layer_norm(x, (48,), block.norm2.weight, block.norm2.bias, 1e-5)
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(h))) / 2
    x = F.layer_norm(x, (48,), state["norm.weight"], state["norm.bias"], 1e-5)
    return model.head(x[:, 0]) + 0.5 * model.aux_head(x[:, 1:]).max(1)[0]  # type: ignore[no-any-return]


def test_the_forward_pass_written_out() -> None:
    model, x = tiny(), images(3)
    model.patch_embed.bn2.running_mean.normal_()
    model.patch_embed.bn2.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(x), written_out(model, x), atol=1e-4, rtol=1e-4)
        cls, patches = model.dense(x)
    assert patches.shape == (3, 64, 10)
    torch.testing.assert_close(model(x), cls + 0.5 * patches.amax(1))


def test_files_of_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LVViT("t", 32, 5).eval()
    x = images(2, size=32)
    with torch.no_grad():
        wanted = model(x)
        parallel = {f"module.{k}": v for k, v in model.state_dict().items()}
        more = {**model.state_dict(), "score_predictor.0.in_conv.0.weight": torch.ones(240)}
        save_file(model.state_dict(), tmp_path / "plain.safetensors")
        torch.save(model.state_dict(), tmp_path / "plain.pth.tar")
        torch.save({"state_dict": parallel, "epoch": 3}, tmp_path / "parallel.pth.tar")
        torch.save({"model": more}, tmp_path / "dynamicvit.pth")
        for file in tmp_path.iterdir():
            loaded = LVViT.load(file)
            assert not loaded.training and torch.equal(loaded(x), wanted), file
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no LV-ViT: it has no cls_token"):
        LVViT.load(tmp_path / "other.pth")
    torch.save({k: v for k, v in more.items() if "blocks.11" not in k}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match="does not hold the tensors of an LV-ViT"):
        LVViT.load(tmp_path / "short.pth")
    torch.save(tiny().state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(
        ValueError, match="holds a model of width 48, and LV-ViT has 240, 384, 512, 768"
    ):
        LVViT.load(tmp_path / "tiny.pth")


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="size must be one of t, s, m, l or an LVViTSize, got 'b'"):
        LVViT("b")
    with pytest.raises(ValueError, match="image must be a multiple of 16 pixels, got 100"):
        LVViT("t", 100)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 64, 64\), got \(2, 3, 32, 32\)"):
        tiny()(images(2, size=32))


def test_the_adapter_obeys_the_laws() -> None:
    assert {"random", "cls-attention", "tome"} <= set(
        vtr.testing.check_adapter(None, tiny(), images(2), compiles=False)
    )


METHODS = [
    vtr.EViT(keep=0.5),
    vtr.ToFe(keep=0.4),
    vtr.AdaptiveSparseViT(layers=(1, 2), thresholds=(0.01, 0.014)),
    vtr.DynamicViT(untrained=True),
    vtr.AViT(scale=1.0, center=0.5),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_methods_leave_tokens_out_of_the_largest_patch(method: vtr.Method) -> None:
    """A batch is padded, and padding is no patch: each image alone has the same classes."""
    model, x = tiny(), images(3)
    torch.manual_seed(0)
    with vtr.apply(model, method) as handle, torch.no_grad():
        out = model(x)
        assert handle.report().flops["encoder"][1] < handle.report().flops["encoder"][0]
        for b in range(3):
            torch.testing.assert_close(model(x[b : b + 1])[0], out[b], atol=2e-4, rtol=2e-4)


def test_training_is_the_cut_pass() -> None:
    model, x = tiny(), images(3)
    model.patch_embed.eval()
    with vtr.apply(model, METHODS[2]) as handle:
        with torch.no_grad():
            short = model(x)
        assert len(set(handle.trace.stages[-1].total.valid.sum(1).tolist())) > 1
        long = model.train()
        model.patch_embed.eval()
        torch.testing.assert_close(long(x), short, atol=3e-4, rtol=3e-4)


def test_stages_of_the_papers() -> None:
    """Of Adaptive Sparse ViT before blocks 5, 9 and 13 (S), of DynamicViT before 4, 8 and 12 (S), 5, 10 and 15 (M)."""
    for size, wanted in (("s", (4, 8, 12)), ("m", (5, 10, 15))):
        with torch.device("meta"):
            model = LVViT(size)
        with vtr.apply(model, vtr.Random(keep=0.5)) as handle:
            info = handle._wrapping.info
        assert tuple(s.layer for s in vtr.AdaptiveSparseViT().stages(info)) == wanted
        assert vtr.DynamicViT().decisions(info) == wanted


def test_stochastic_depth_drops_branches_in_training_alone() -> None:
    model: Any = spread(LVViT(TINY, 64, 10, drop_path=0.999))
    x = images(1)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        assert model.blocks[0].drop_path.rate == 0.0
        rows = model.blocks[3].train()(torch.ones(64, 65, 48))
    assert (rows == 1).all(-1).all(-1).float().mean() > 0.9
