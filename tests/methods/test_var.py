"""VAR: sinks by massive channels, image-centric rows, and the attention that moves; recomputed in loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from vtr.errors import UnsupportedMethodError

from .language_sites import Prompt, info

FREE = {"dims": (3, 7), "tau": 1.5, "rho": 0.3, "summ": 0.1, "dense_layers": 0}
KINDS = ("..ttvvvvvvvvttttt", "tvvvvvvvvvvvvtttt")


def slow_sinks(hidden: Tensor, dims: tuple[int, ...], tau: float) -> list[int]:
    """The tokens of hidden (L, C) with a massive channel."""
    found = []
    for i, x in enumerate(hidden.double().tolist()):
        size = math.sqrt(sum(v * v for v in x) / len(x) + 1e-6)
        if any(abs(x[d]) / size > tau for d in dims):
            found.append(i)
    return found


def brute_force(prompt: Prompt, sample: int, method: Any, prompt_end: int) -> tuple[Tensor, int]:
    """The edited attention of a sample, (H, S, S) float64, and how many (head, row) pairs changed."""
    maps = prompt.maps(sample)
    valid, visual = prompt.valid[sample].tolist(), prompt.visual[sample].tolist()
    sinks = [
        i for i in slow_sinks(prompt.hidden[sample], method.dims, method.tau)
        if valid[i] and i < prompt_end
    ]  # fmt: skip
    image = [i for i, v in enumerate(visual) if v]
    others = [i for i in image if i not in sinks]
    changed = 0
    for h in range(maps.shape[0]):
        for i in range(maps.shape[1]):
            if not valid[i] or i <= image[-1] or not set(image) & set(sinks):
                continue
            a = maps[h, i].clone()
            on_image, on_others = float(a[image].sum()), float(a[others].sum())
            if on_image < method.summ or on_others < method.rho * on_image or not on_others:
                continue
            budget = 0.0
            for s in sinks:
                budget += (1 - method.keep) * float(a[s])
                maps[h, i, s] = method.keep * a[s]
            for v in others:
                maps[h, i, v] = a[v] + budget * a[v] / on_others
            changed += 1
    return maps, changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_a_prompt_and_its_decoding_equal_the_loops(seed: int, dtype: torch.dtype) -> None:
    method = vtr.VAR(0.3, **FREE)
    prompt = Prompt(*KINDS, seed=seed, dtype=dtype)
    end = len(KINDS[0]) - 2
    calls = [prompt.site(0, end), prompt.site(end, end + 1), prompt.site(end + 1)]
    out = torch.cat([method.attend(site) for site in calls], 2)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for b in range(2):
        maps, changed = brute_force(prompt, b, method, end)
        assert 0 < changed < maps.shape[0] * 5
        wanted = prompt.outputs(b, maps)[:, prompt.valid[b]]
        found = out[b, :, prompt.valid[b]].double()
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_rows_sum_to_one_and_only_pairs_that_pass_change(seed: int) -> None:
    method = vtr.VAR(0.3, **FREE)
    prompt = Prompt(*KINDS, seed=seed)
    site = prompt.site()
    rows = method.rows(site)
    assert rows is not None
    before = site.attention_rows(rows)
    method.attend(site)
    after = method.edit(site, before, rows)
    live = (rows >= 0)[:, None].expand(after.shape[:3])
    assert float((after.sum(-1)[live] - 1).abs().max()) < 1e-6
    changes = (after != before).any(-1)
    for b in range(2):
        assert int(changes[b].sum()) == brute_force(prompt, b, method, len(KINDS[0]))[1]


def test_a_row_alone_is_a_row_in_a_padded_batch() -> None:
    method = vtr.VAR(0.3, **FREE)
    prompt = Prompt(*KINDS)
    out = method.attend(prompt.site())
    for b in range(2):
        alone = method.attend(prompt.alone(b).site())
        torch.testing.assert_close(out[b, :, prompt.valid[b]], alone[0], atol=2e-6, rtol=1e-5)


def test_a_planted_massive_channel_makes_exactly_that_token_a_sink() -> None:
    method = vtr.VAR(0.3, dims=(3, 7), tau=4.0, rho=0.0, summ=0.0, dense_layers=0)
    prompt = Prompt("ttvvvvvvtttttt")
    prompt.hidden[0, 5, 7] = -100.0
    prompt.hidden[0, 9, 4] = 100.0  # of another channel
    prompt.hidden[0, 12, 3] = 100.0  # of a generated token
    for start, end in ((0, 11), (11, 12), (12, 13), (13, 14)):
        method.attend(prompt.site(start, end))
    assert prompt.state["sinks"][0].nonzero().flatten().tolist() == [5]


def test_the_prompt_of_a_later_turn_has_sinks_and_what_was_generated_has_none() -> None:
    method = vtr.VAR(0.3, dims=(3, 7), tau=4.0, dense_layers=0)
    prompt = Prompt("ttvvvvtttttvvtt")
    prompt.hidden[0, [3, 8, 12], 3] = 100.0  # in the prompt, generated, in the next turn
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 15)):
        method.attend(prompt.site(start, end))
    assert prompt.state["sinks"][0].nonzero().flatten().tolist() == [3, 12]


def test_keeping_all_and_a_layer_without_a_visual_sink_change_nothing() -> None:
    prompt = Prompt(*KINDS)
    dense = prompt.site().dense()
    assert torch.equal(vtr.VAR(1.0, **FREE).attend(prompt.site()), dense)
    prompt.hidden[:, 0], prompt.hidden[:, 1:] = 0.0, 1.0
    prompt.hidden[1, 0, 3] = 100.0  # the first token, which is text
    method = vtr.VAR(0.1, dims=(3,), tau=4.0, rho=0.0, summ=0.0, dense_layers=0)
    site = prompt.site()
    out = method.attend(site)
    assert prompt.state["sinks"].sum() == 1
    rows = method.rows(site)
    assert rows is not None
    attention = site.attention_rows(rows)
    assert torch.equal(method.edit(site, attention, rows), attention)
    torch.testing.assert_close(out[:, :, 2:], dense[:, :, 2:], atol=2e-6, rtol=1e-5)


def test_the_first_two_layers_and_the_last_are_left_alone() -> None:
    layers = [stage.layer for stage in vtr.VAR().stages(info(layers=6))]
    assert layers == [2, 3, 4]
    assert [s.layer for s in vtr.VAR(last_layer=True).stages(info(layers=6))] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("sizes", "dims"), [((4096, 32, 32, 32), (1415, 2533)), ((5120, 40, 40, 40), (2100, 4743))]
)
def test_channels_of_llama_2_are_known_by_its_sizes(sizes: Any, dims: Any) -> None:
    dim, heads, kv_heads, layers = sizes
    prompt = Prompt("tvvt", layers=layers, model=info(layers, heads, kv_heads, dim))
    prompt.hidden = torch.zeros(1, 4, dim)
    for token, channel in ((1, dims[0]), (2, dims[1]), (3, 5)):
        prompt.hidden[0, token, channel] = 1.0
    vtr.VAR().attend(prompt.site())
    assert prompt.state["sinks"].tolist() == [[False, True, True, False]]


def test_other_models_need_a_plan() -> None:
    model = info(32, 32, 8, 4096)  # Llama-3-8B
    with pytest.raises(
        UnsupportedMethodError,
        match=r"VAR lacks its dims for this none of 32 layers: run vtr\.calibrate",
    ):
        vtr.VAR().attend(Prompt("tvvt", layers=32, model=model).site())
    prompt = Prompt("tvvt", table={"dims": torch.tensor([4])})
    prompt.hidden[:] = 1.0
    prompt.hidden[0, 2, 4] = 1e3
    vtr.VAR(tau=3.0).attend(prompt.site())
    assert prompt.state["sinks"].tolist() == [[False, False, True, False]]
    assert vtr.VAR().needs_table(model) and not vtr.VAR(dims=(1,)).needs_table(model)
    assert not vtr.VAR().needs_table(info(32, 32, 32, 4096))


def test_calibration_finds_the_channels_of_the_first_token() -> None:
    method = vtr.VAR(tau=3.0)
    calibrator = method.calibrator(info())
    for layer in range(4):
        prompt = Prompt("..ttvvt", "tttvvvt", layer=layer)
        if layer in (1, 2):
            prompt.hidden[0, 2, [11, 20]] = 50.0
            prompt.hidden[1, 0, [11, 20]] = -50.0
        else:
            prompt.hidden[:, :, 5] = 1e4  # only middle layers count
        calibrator.see(prompt.site())
        calibrator.see(prompt.site(4))  # only prompts count
    assert calibrator.finish()["dims"].tolist() == [11, 20]


def test_calibration_refuses_a_model_without_massive_channels() -> None:
    calibrator = vtr.VAR().calibrator(info())
    with pytest.raises(ValueError, match="no channel of the first token is above tau=20"):
        calibrator.finish()
    calibrator.see(Prompt("tvvt", layer=1).site())
    with pytest.raises(ValueError, match="calibrate with a lower tau"):
        calibrator.finish()


def test_a_cropped_cache_forgets_its_newest_columns() -> None:
    method, prompt = vtr.VAR(0.3, **FREE), Prompt("ttvvvvtttttt")
    method.attend(prompt.site(0, 7))
    wanted = prompt.state["sinks"].clone()
    for start, end in ((7, 11), (8, 9)):  # a draft of four tokens, of which one is accepted
        method.attend(prompt.site(start, end))
    assert torch.equal(prompt.state["sinks"][:, :7], wanted) and prompt.state["sinks"].shape == (
        1,
        9,
    )


def test_a_window_lets_go_of_the_oldest_columns() -> None:
    method, prompt = vtr.VAR(0.3, **FREE), Prompt("ttvvvvvvvvttttttt")
    whole = Prompt("ttvvvvvvvvttttttt")
    for start, end in ((0, 12), (12, 13), (13, 15), (15, 16)):
        method.attend(prompt.site(start, end, window=6))
        method.attend(whole.site(start, end))
        columns = prompt.state["sinks"].shape[1]
        assert columns == (end if start == 0 else 5 + end - start)
        assert torch.equal(prompt.state["sinks"], whole.state["sinks"][:, -columns:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1.2}, r"keep must be a number in \[0, 1\]"),
        ({"rho": -0.1}, "rho must be"),
        ({"summ": True}, "summ must be"),
        ({"tau": -1}, "tau must be"),
        ({"dims": ()}, "dims must be"),
        ({"dims": (-1,)}, "dims must hold"),
        ({"last_layer": 1}, "last_layer must be"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtr.VAR(**options)
