"""Published settings of the methods for video: what their names say is what they leave."""

from __future__ import annotations

import pytest
import torch

import vtr
from tests.methods.video.by_hand import clip


def share(name: str) -> float:
    return float(name.rpartition("/")[2].removesuffix("%")) / 100


@pytest.mark.parametrize("name", [n for n in vtr.FastVID.PRESETS if "onevision" in n])
def test_fastvid_keeps_the_authors_number_of_every_frame(name: str) -> None:
    """Their code keeps int(196 * ratio) of a frame: 19, not 19.6, at 10 %."""
    method = vtr.FastVID.preset(name)
    g = torch.Generator().manual_seed(0)
    x = clip(8, 196, 4)
    made = method.compress(x, torch.rand(8, 196, generator=g), x.mean(1))
    left = int((made.stands == torch.arange(8 * 196)).sum())
    assert left == 8 * int(196 * share(name))
    if name.endswith("/10%"):
        assert left == 8 * 19, "90.3 % pruned"


@pytest.mark.parametrize("name", vtr.DyCoke.PRESETS)
def test_dycoke_lets_the_named_share_in(name: str) -> None:
    method = vtr.DyCoke.preset(name)
    assert method.retained(32, 196) / (32 * 196) == pytest.approx(share(name), abs=5e-3)
    k = {"47.5%": 0.7, "62.5%": 0.5, "77.5%": 0.3}[name.rpartition("/")[2]]
    assert method.keep == int((1 - k) * 196) and method.kv == pytest.approx(0.3)


@pytest.mark.parametrize("cls", [vtr.HoliTom, vtr.EVS, vtr.FrameFusion])
def test_budgets_are_the_named_share(cls: type) -> None:
    for name, method in cls.presets().items():  # type: ignore[attr-defined]
        assert method.keep == pytest.approx(share(name))


def test_holitom_has_its_own_threshold_at_ten_percent() -> None:
    found = vtr.HoliTom.presets()
    assert {n: m.threshold for n, m in found.items() if m.threshold != 0.8} == {
        "llava-onevision-7b/10%": 0.65
    }
    info = vtr.ModelInfo("", {"encoder": 26, "decoder": 28}, {})
    stages = found["llava-onevision-7b/10%"].stages(info)
    assert stages[-1] == vtr.Stage("decoder", 17, "end"), "layer 18 is the first with fewer tokens"


def test_prunevid_cuts_after_layer_ten() -> None:
    for method in vtr.PruneVid.presets().values():
        for depth in (28, 32):
            info = vtr.ModelInfo("", {"decoder": depth}, {})
            assert method.stages(info)[1] == vtr.Stage("decoder", 10, "end")
