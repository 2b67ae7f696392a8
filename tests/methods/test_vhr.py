"""VHR: heads by their divergence without the image; recomputed in loops."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

import vtr
from vtr.errors import UnsupportedMethodError
from vtr.methods.common.divergence import vision_aware

from .language_sites import Prompt, info

KINDS = ("..ttvvvvvvvvttttt", "tvvvvvvvvvvvvtttt")


def slow_divergence(prompt: Prompt, sample: int) -> tuple[list[float], list[float]]:
    """Per head: distance between the outputs of the last row, and the squared norm without the image."""
    maps, visual = prompt.maps(sample)[:, -1:].clone(), prompt.visual[sample]
    whole = prompt.outputs(sample, maps)[:, 0]
    maps[:, :, visual] = 0.0
    text = prompt.outputs(sample, maps / maps.sum(-1, keepdim=True))[:, 0]
    return (whole - text).norm(dim=-1).tolist(), text.square().sum(-1).tolist()


def slow_heads(apart: list[float], without: list[float]) -> list[bool]:
    """Equations 6 and 7 of the paper."""
    limits = [statistics.mean(x) + statistics.stdev(x) for x in (apart, without)]
    apart = [
        0.0 if a > limits[0] and w > limits[1] else a for a, w in zip(apart, without, strict=True)
    ]
    return [a > statistics.median_low(apart) for a in apart]


def brute_force(prompt: Prompt, sample: int, scale: float) -> Tensor:
    """The outputs of a sample, (H, S, D) float64, if the whole of it is the prompt."""
    out = prompt.outputs(sample, prompt.maps(sample))
    for h, aware in enumerate(slow_heads(*slow_divergence(prompt, sample))):
        if aware:
            out[h] *= scale
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_a_prompt_equals_the_loops(seed: int, dtype: torch.dtype) -> None:
    prompt = Prompt(*KINDS, heads=8, seed=seed, dtype=dtype)
    out = vtr.VHR(1.7).attend(prompt.site())
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for b in range(2):
        valid = prompt.valid[b]
        wanted = brute_force(prompt, b, 1.7)[:, valid]
        torch.testing.assert_close(
            out[b, :, valid].double(), wanted, atol=tolerance, rtol=tolerance
        )


def test_a_surge_without_the_image_is_left_out() -> None:
    apart = [5.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    for without in ([9.0, *[1.0] * 7], [1.0] * 7 + [9.0]):
        found = vision_aware(torch.tensor(apart), torch.tensor(without))
        assert found.tolist() == slow_heads(apart, without)
        assert bool(found[0]) == (without[0] == 1.0)


def test_heads_are_chosen_once_and_kept() -> None:
    prompt, method = Prompt(*KINDS, heads=8), vtr.VHR(3.0)
    method.attend(prompt.site(0, 14))
    heads = prompt.state["heads"]
    assert 0 < int(heads[0].sum()) <= 4
    for start, end in ((14, 15), (15, 17)):
        site = prompt.site(start, end)
        factor = torch.where(heads, 3.0, 1.0)[:, :, None, None]
        torch.testing.assert_close(method.attend(site), site.dense() * factor)
    assert torch.equal(prompt.state["heads"], heads)


def test_an_image_of_a_later_turn_is_the_first() -> None:
    prompt, method = Prompt("tttttvvvtt", heads=8), vtr.VHR(3.0)
    first = prompt.site(0, 4)
    assert torch.equal(method.attend(first), first.dense())
    step = prompt.site(4, 5)
    assert torch.equal(method.attend(step), step.dense())
    assert not prompt.state["heads"].any()
    method.attend(prompt.site(5, 10))
    assert prompt.state["heads"][0].tolist() == slow_heads(*slow_divergence(prompt, 0))


def test_a_row_alone_is_a_row_in_a_padded_batch() -> None:
    prompt, method = Prompt(*KINDS, heads=8), vtr.VHR()
    out = method.attend(prompt.site())
    for b in range(2):
        alone = method.attend(prompt.alone(b).site())
        torch.testing.assert_close(out[b, :, prompt.valid[b]], alone[0], atol=4e-6, rtol=1e-5)


def test_padding_on_the_right_is_not_the_last_row() -> None:
    left, right = Prompt("..ttvvvttt"), Prompt("ttvvvttt..")
    for name in ("q", "k", "v"):
        setattr(right, name, getattr(left, name).roll(-2, 2))
    vtr.VHR().attend(left.site())
    vtr.VHR().attend(right.site())
    assert torch.equal(left.state["heads"], right.state["heads"])


def test_scale_1_changes_nothing() -> None:
    prompt = Prompt(*KINDS)
    assert torch.equal(vtr.VHR(1.0).attend(prompt.site()), prompt.site().dense())


def test_layers_are_the_second_and_the_last_14_of_32() -> None:
    def layers(method: vtr.VHR, depth: int) -> list[int]:
        return [stage.layer for stage in method.stages(info(layers=depth))]

    assert layers(vtr.VHR(), 32) == [1, *range(18, 32)]
    assert layers(vtr.VHR(), 40) == [1, *range(22, 40)]
    assert layers(vtr.VHR(), 2) == [1]
    assert layers(vtr.VHR(layers=(0, 3)), 4) == [0, 3]
    with pytest.raises(ValueError, match="layer"):
        layers(vtr.VHR(layers=(4,)), 4)


def test_a_plan_has_the_heads_of_mean_divergence() -> None:
    calibrator = vtr.VHR().calibrator(info(heads=8))
    wanted = []
    for layer in range(2):
        found = []
        for seed in range(2):
            prompt = Prompt(*KINDS, heads=8, seed=4 * layer + seed, layer=layer)
            calibrator.see(prompt.site())
            calibrator.see(prompt.site(14))  # only prompts count
            calibrator.see(Prompt("tttt", heads=8, layer=layer).site())  # without an image
            found += [torch.tensor(slow_divergence(prompt, b)) for b in range(2)]
        wanted.append(slow_heads(*torch.stack(found).mean(0).tolist()))
    table = calibrator.finish()
    assert table["heads"].tolist() == wanted and table["divergence"].shape == (2, 8)
    prompt = Prompt("tvvvt", "ttttt", heads=8, layer=1, table=table)
    out = vtr.VHR(2.0, heads="plan").attend(prompt.site())
    factor = 1.0 + table["heads"][1][:, None, None]
    torch.testing.assert_close(out[0], prompt.site().dense()[0] * factor)
    assert torch.equal(out[1], prompt.site().dense()[1])  # no image


def test_a_missing_plan_and_a_calibration_without_images_are_refused() -> None:
    with pytest.raises(UnsupportedMethodError, match=r"VHR lacks its heads .* run vtr\.calibrate"):
        vtr.VHR(heads="plan").attend(Prompt("tvvt").site())
    assert vtr.VHR(heads="plan").needs_table(info()) and not vtr.VHR().needs_table(info())
    calibrator = vtr.VHR().calibrator(info())
    calibrator.see(Prompt("tttt").site())
    with pytest.raises(ValueError, match="no prompt of the calibration has an image"):
        calibrator.finish()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1}, "scale must be"),
        ({"layers": (2, 1)}, "layers must be strictly ascending"),
        ({"heads": "all"}, "heads must be one of sample, plan"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtr.VHR(**options)  # type: ignore[arg-type]
