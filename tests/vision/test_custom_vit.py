"""The model and the adapter of docs/custom-vit.md, run as they are printed there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtr
from tests.tiny import images, ours, spread
from vtr.core import adapters
from vtr.core.method import TokenMethod

PAGE = Path(__file__).parents[2] / "docs" / "custom-vit.md"
EXACT = {"atol": 1e-5, "rtol": 1e-5}


def blocks() -> list[str]:
    """The code of the page: model, adapter, use and proof."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Writes the package ``mymodels`` of the page, and gives the code that uses it."""
    model, adapter, use, _ = blocks()
    package = tmp_path / "mymodels"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "vit.py").write_text(model)
    (package / "vtr_adapter.py").write_text(adapter)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = {name: list(paths) for name, paths in adapters.ADAPTERS.items()}
    yield use
    adapters.ADAPTERS.clear()
    adapters.ADAPTERS.update(known)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mymodels"]:
        del sys.modules[name]


@pytest.fixture
def model(code: str) -> Any:
    from mymodels.vit import ViT  # type: ignore[import-not-found]

    vtr.register_adapter("mymodels", "mymodels.vtr_adapter")
    return spread(ViT())


METHODS = [
    vtr.EViT(keep=0.5),
    vtr.ToMe(r=8),
    vtr.CLSAttention(keep=0.5),
    vtr.Random(keep=0.5),
    vtr.FlowCut(keep=0.5),
]


def test_the_page_runs_as_printed(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    exec(compile(code, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out
    assert "encoder[5] tome: 24 -> 16 tokens" in printed
    for name in ("cls-attention", "evit", "flowcut", "random", "tofe", "tome"):
        assert f"'{name}'" in printed


def test_the_adapter_keeps_the_laws(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks()[3], str(PAGE), "exec"), {})
    assert capsys.readouterr().out == "('random', 'cls-attention', 'tome')\n"


def test_the_adapter_is_short() -> None:
    adapter = blocks()[1]
    assert len([line for line in adapter.splitlines() if line.strip()]) <= 37


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_methods_work_and_come_off(model: Any, method: Any) -> None:
    x = images()
    with torch.no_grad():
        dense = model(x)
        with vtr.apply(model, method) as handle:
            both = model(x)
            assert handle.trace.stages and not torch.equal(both, dense)
            alone = torch.cat([model(x[:1]), model(x[1:])])
            report = handle.report()
        assert torch.equal(model(x), dense) and not ours(model)
    assert torch.isfinite(both).all()
    if method.name != "random":  # its choice depends on the place in the batch
        torch.testing.assert_close(both, alone, **EXACT)
    dense_flops, reduced_flops = report.flops["encoder"]
    assert reduced_flops < dense_flops


@pytest.mark.parametrize(
    "method",
    [vtr.EViT(keep=1.0), vtr.ToMe(r=0), vtr.CLSAttention(keep=1.0), vtr.Random(keep=1.0)],
    ids=lambda m: m.name,
)
def test_keeping_everything_changes_nothing(model: Any, method: Any) -> None:
    x = images()
    with torch.no_grad():
        dense = model(x)
        with vtr.apply(model, method):
            assert torch.equal(model(x), dense)


def by_hand(model: Any, x: Tensor, stages: list[Any], sized: bool) -> Tensor:
    """The model in plain code at full length: a token that is dropped or merged away keeps its row, is no
    key any more, and merged tokens count by their size in attention (``sized``) and in the mean."""
    x = model.patch(x).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls.expand(len(x), -1, -1), x], 1) + model.positions
    size = torch.ones(x.shape[:2])
    for layer, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        counts = size if sized else (size > 0).float()
        weights = (logits + counts.log()[:, None, None]).softmax(-1)
        x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        for stage in (s for s in stages if s.layer == layer):
            for b in range(len(x)):
                rows, total = x[b].clone(), torch.zeros_like(size[b])
                total[0] = 1
                for slot, token in enumerate(stage.total.kept[b].tolist()):
                    here = 1 + (stage.total.source[b] == slot).nonzero()[:, 0]
                    share = size[b, here]
                    rows[1 + token] = (share[:, None] * x[b, here]).sum(0) / share.sum()
                    total[1 + token] = share.sum()
                x[b], size[b] = rows, total
        x = x + block.mlp(block.norm2(x))
    x = model.norm(x)
    share = size[:, 1:, None] / size[:, 1:].sum(1)[:, None, None]
    return model.head(torch.cat([x[:, 0], (x[:, 1:] * share).sum(1)], 1))


@pytest.mark.parametrize(
    "method",
    [vtr.CLSAttention(keep=0.4), vtr.Random(keep=20), vtr.ToMe(r=8)],
    ids=lambda m: m.name,
)
def test_a_shortened_sequence_is_the_full_one_with_masked_keys(model: Any, method: Any) -> None:
    x = images()
    with torch.no_grad():
        with vtr.apply(model, method) as handle:
            short = model(x)
            stages = handle.trace.stages
        want = by_hand(model, x, stages, sized=method.name == "tome")
    torch.testing.assert_close(short, want, **EXACT)


def test_a_method_that_has_not_asked_for_the_attention_is_told_so(model: Any) -> None:
    @dataclass(frozen=True)
    class Curious(TokenMethod):
        name: ClassVar[str] = "curious"
        paper: ClassVar[str] = "none"
        sites: ClassVar[tuple[str, ...]] = ("encoder",)

        def stages(self, info: vtr.ModelInfo) -> tuple[vtr.Stage, ...]:
            return (vtr.Stage("encoder", 1),)

        def reduce(self, site: vtr.Site) -> None:
            site.keys.mean()

    with (
        vtr.apply(model, Curious()),
        pytest.raises(RuntimeError, match="name the signal in its needs"),
    ):
        model(images())


def test_the_grid_of_images_that_are_not_square(model: Any) -> None:
    wrapping = type(vtr.apply(model, "random")._wrapping)
    vtr.handles(model)[0].remove()
    shapes = []

    class Wide(wrapping):  # type: ignore[misc,valid-type]
        def install(self) -> None:
            super().install()
            self.note_grid(self.root.patch)

    class Noting(vtr.Random):
        def reduce(self, site: vtr.Site) -> Any:
            shapes.append(site.grid)
            return super().reduce(site)

    model.positions = torch.nn.Parameter(torch.randn(1, 1 + 4 * 9, 48))
    own = ModuleType("wide_adapter")
    own.__dict__.update(FAMILIES=("wide",), locate=lambda target: target, wrap=Wide)
    vtr.register_adapter("mymodels", own)
    with torch.no_grad(), vtr.apply(model, Noting(keep=0.5)):
        model(images(size=72)[:, :, :32])
    assert shapes == [(4, 9)]


def test_restored_outputs_have_full_length(model: Any) -> None:
    found: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        for output in ("reduced", "restored"):
            with vtr.apply(model, vtr.Random(keep=16), output=output):
                model(images())
    assert [x.shape[1] for x in found] == [17, 65]
