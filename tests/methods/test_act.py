"""ACT: hidden sinks by mean attention, and where their attention goes; recomputed in loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from vtr.errors import UnsupportedMethodError

from .language_sites import Prompt, info

KINDS = ("..ttvvvvvvvvttttt", "tvvvvvvvvvvvvtttt")
METHOD = vtr.ACT(0.4, threshold=0.12, heads=((2, 0), (2, 3)))


def slow_sinks(maps: Tensor, valid: list[bool], threshold: float) -> list[int]:
    """The hidden sinks of one head's map (S, S)."""
    first, found = valid.index(True), []
    for j in range(first + 1, len(valid)):
        rows = [i for i in range(j, len(valid)) if valid[i]]
        if valid[j] and float(maps[rows, j].sum()) / len(rows) > threshold:
            found.append(j)
    return found


def brute_force(prompt: Prompt, sample: int, method: Any) -> Tensor:
    """The edited attention of a sample, (H, S, S) float64."""
    maps, valid = prompt.maps(sample), prompt.valid[sample].tolist()
    first = valid.index(True)
    for layer, h in method.heads:
        if layer != prompt.layer:
            continue
        sinks = slow_sinks(maps[h], valid, method.threshold)
        for i in range(first + 1, len(valid)):
            a = maps[h, i].clone()
            others = [j for j in range(len(valid)) if j not in sinks]
            room = float(a[others].sum())
            if not room:
                continue
            free = (1 - method.keep) * float(a[sinks].sum())
            maps[h, i, sinks] = method.keep * a[sinks]
            maps[h, i, others] = a[others] * (1 + free / room)
    return maps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_a_prompt_equals_the_loops(seed: int, dtype: torch.dtype) -> None:
    prompt = Prompt(*KINDS, seed=seed, dtype=dtype)
    out = METHOD.attend(prompt.site())
    for b in range(2):
        valid = prompt.valid[b]
        before, maps = prompt.maps(b), brute_force(prompt, b, METHOD)
        changed = (maps != before).any(-1)
        assert changed[[0, 3]].any(1).all() and not changed[[1, 2]].any()
        assert not changed[:, int(valid.int().argmax())].any()
        assert float((maps.sum(-1)[:, valid] - 1).abs().max()) < 1e-12
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        wanted = prompt.outputs(b, maps)[:, valid]
        torch.testing.assert_close(
            out[b, :, valid].double(), wanted, atol=tolerance, rtol=tolerance
        )


def test_rows_sum_to_one() -> None:
    prompt = Prompt(*KINDS)
    site, sums = prompt.site(), []
    whole = type(site).weigh

    def weigh(attention: Tensor) -> Tensor:
        sums.append(attention.sum(-1))
        return whole(site, attention)

    site.weigh = weigh  # type: ignore[method-assign]
    METHOD.attend(site)
    total = torch.cat(sums, 2)
    assert float((total[total > 0] - 1).abs().max()) < 1e-6


def test_a_row_alone_is_a_row_in_a_padded_batch() -> None:
    prompt = Prompt(*KINDS)
    out = METHOD.attend(prompt.site())
    for b in range(2):
        alone = METHOD.attend(prompt.alone(b).site())
        torch.testing.assert_close(out[b, :, prompt.valid[b]], alone[0], atol=2e-6, rtol=1e-5)


def test_many_rows_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = Prompt("tvvvvvvvvvvvvtttt")
    wanted = METHOD.attend(prompt.site())
    monkeypatch.setattr("vtr.methods.common.sinks.ROWS", 5)
    monkeypatch.setattr("vtr.core.language_attention._BYTES", 4 * 4 * 17 * 3)
    torch.testing.assert_close(METHOD.attend(prompt.site()), wanted, atol=1e-6, rtol=1e-6)


def test_other_layers_later_calls_and_keep_1_are_dense() -> None:
    prompt = Prompt(*KINDS)
    dense = prompt.site().dense()
    assert torch.equal(vtr.ACT(heads=((1, 0),)).attend(prompt.site()), dense)
    assert torch.equal(METHOD.replace(keep=1.0).attend(prompt.site()), dense)
    for start, end in ((12, 17), (16, 17)):
        site = prompt.site(start, end)
        assert torch.equal(METHOD.attend(site), site.dense())


def test_a_plan_says_which_heads() -> None:
    table = {"heads": torch.zeros(4, 4, dtype=torch.bool)}
    table["heads"][2, [0, 3]] = True
    prompt = Prompt(*KINDS, table=table)
    found = METHOD.replace(heads=None).attend(prompt.site())
    assert torch.equal(found, METHOD.attend(prompt.site()))
    with pytest.raises(UnsupportedMethodError, match=r"ACT lacks its heads .* run vtr\.calibrate"):
        vtr.ACT().attend(Prompt("tvvt").site())
    assert vtr.ACT().needs_table(info()) and not METHOD.needs_table(info())


def test_calibration_takes_the_heads_that_spend_most_on_hidden_sinks() -> None:
    method = vtr.ACT(threshold=0.12, least=0.2)
    calibrator = method.calibrator(info(layers=5))
    mass = torch.zeros(5, 4, dtype=torch.float64)
    for layer in range(5):
        for seed in range(2):
            prompt = Prompt(*KINDS, seed=10 * layer + seed, layer=layer, layers=5)
            calibrator.see(prompt.site())
            calibrator.see(prompt.site(14))  # only prompts count
            for b in range(2):
                maps, valid = prompt.maps(b), prompt.valid[b].tolist()
                for h in range(4):
                    sinks = slow_sinks(maps[h], valid, 0.12)
                    mass[layer, h] += maps[h][:, sinks].sum() / sum(valid) / 4
    found = calibrator.finish()
    torch.testing.assert_close(found["mass"].double(), mass, atol=1e-6, rtol=1e-5)
    wanted = mass >= 0.2
    wanted[:2] = wanted[-1] = False
    assert wanted.any() and torch.equal(found["heads"], wanted)


def test_calibration_refuses_to_choose_no_head() -> None:
    calibrator = vtr.ACT(threshold=1.0).calibrator(info())
    for layer in range(4):
        calibrator.see(Prompt("tvvt", layer=layer).site())
    with pytest.raises(ValueError, match="lower one of them"):
        calibrator.finish()


def test_search_takes_the_heads_that_raise_a_score() -> None:
    good = {(2, 1), (3, 0), (1, 1), (4, 1)}
    method = vtr.ACT.search(
        lambda m: 0.5 + 0.1 * (m.heads[0] in good), 0.5, layers=5, heads=2, threshold=0.2
    )
    assert method == vtr.ACT(heads=((2, 1), (3, 0)), threshold=0.2)
    with pytest.raises(ValueError, match=r"none of 4 heads raises the score above 0\.5"):
        vtr.ACT.search(lambda m: 0.5, 0.5, layers=5, heads=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": -0.1}, "keep must be"),
        ({"threshold": 2}, "threshold must be"),
        ({"least": "1"}, "least must be"),
        ({"heads": (1, 2)}, r"heads must be \(layer, head\) pairs"),
        ({"heads": ((0, -1),)}, "heads must be pairs of ints >= 0"),
        ({"heads": ()}, "heads must be pairs"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtr.ACT(**options)


@pytest.mark.parametrize("pair", [(4, 0), (0, 4)])
def test_heads_that_the_model_lacks_are_named(pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="none has 4 layers of 4 heads here"):
        vtr.ACT(heads=(pair,)).check(info())
