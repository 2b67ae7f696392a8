"""Outputs line up with the columns that the caller gave, whatever was cut and wherever padding is."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.tiny import vit
from tests.vision.vlm.alone import padded, split, with_completion
from tests.vision.vlm.methods import cutting, method_of
from tests.vision.vlm.models import FAMILIES, Inputs, transformers, visual
from tests.vision.vlm.picks import (
    BOTH,
    CLOSE,
    DECODER,
    MIDDLE,
    PROMPT,
    STEPS,
    Masked,
    Pick,
    generate,
    gone_of,
    same,
)
from tests.vision.vlm.videos import VIDEOS
from vtr.compat.transformers import cache_of, with_cache
from vtr.vision.vlm.outputs import Exit, align
from vtr.vision.vlm.sequence import SequenceLayout

ALL = FAMILIES | VIDEOS
LENGTHS = (2, 4)  # of the completions
# Every sample keeps as many tokens, whatever its row.
ENTRY = Pick(keep=((5,),))
LAYERS = Pick(DECODER.at, ((7,), (3,)))

pytestmark = pytest.mark.usefixtures("without_gradients")


@cache
def made(name: str) -> tuple[Any, dict[str, Any]]:
    return ALL[name](2)


@cache
def batch(name: str) -> tuple[list[Any], Any, list[int]]:
    """Two samples with completions alone; four rows of them, padded on both sides, left and right; and the
    completion's length in each."""
    _, inputs = made(name)
    rows = split(inputs)
    size = [row["input_ids"].shape[1] for row in rows]
    long = int(
        size[1] > size[0]
    )  # the longer prompt gets the longer completion: the other is padded twice
    number = [LENGTHS[b == long] for b in range(2)]
    tokens = torch.randint(5, 140, (2, 4), generator=torch.Generator().manual_seed(5))
    rows = [with_completion(row, t[:n]) for row, t, n in zip(rows, tokens, number, strict=True)]
    width = max(size) + max(number) + 1
    both = [max(size) - n for n in size]
    left = [*both, width - rows[0]["input_ids"].shape[1], 0]
    return rows, padded([*rows, *rows], left, width), number * 2


def cast(inputs: Inputs, kind: torch.dtype) -> Inputs:
    return {k: v.to(kind) if v.is_floating_point() else v for k, v in inputs.items()}


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Of the tokens behind the first, as trainers take them."""
    found = logits[:, :-1].float().log_softmax(-1)
    return found.gather(-1, ids[:, 1:, None])[..., 0]


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """The state of each row's last token, found by the mask that was given."""
    last = (mask * torch.arange(mask.shape[1])).argmax(1)
    return hidden[torch.arange(len(mask)), last]


# They choose by rotated keys, and so by positions, which transformers counts from the padding unless they are given.
ROTATED = frozenset({"dart"})


def with_positions(inputs: Inputs, name: str) -> Inputs:
    """The inputs with positions from each row's first token, as ``generate`` numbers them; Qwen counts like that itself."""
    if "qwen" in name:
        return inputs
    found = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**inputs, "position_ids": found}


def check(
    name: str, model: Any, tolerance: float, samples: tuple[int, ...] = (0, 1), given: bool = False
) -> None:
    """Every row of these samples is what the sample is alone; ``given``: with positions."""
    kind = next(model.parameters()).dtype
    rows, together, number = batch(name)
    rows, together = [cast(row, kind) for row in rows], cast(together, kind)
    ids, mask = together["input_ids"], together["attention_mask"]
    if given:
        together = with_positions(together, name)
    out = model(**together, output_hidden_states=True)
    if not vtr.handles(model)[0].trace.stages:
        return
    alone = {b: model(**rows[b], output_hidden_states=True) for b in samples}
    assert out.logits.shape[:2] == ids.shape
    got, last = log_probs(out.logits, ids), pooled(out.hidden_states[-1], mask)
    close = {"rtol": 0, "atol": tolerance}
    for b, n in enumerate(number):
        if b % 2 not in alone:
            continue
        one, row, live = alone[b % 2], rows[b % 2], mask[b].bool()
        end = int(live.nonzero().max())
        want = log_probs(one.logits, row["input_ids"])[0, -n:]
        torch.testing.assert_close(got[b, end - n : end], want, **close)
        torch.testing.assert_close(last[b], one.hidden_states[-1][0, -1], **close)
        for many, few in zip(out.hidden_states, one.hidden_states, strict=True):
            torch.testing.assert_close(many[b, live], few[0], **close)


@pytest.mark.parametrize("name", ALL)
def test_every_row_is_what_its_sample_is_alone(name: str) -> None:
    model, _ = made(name)
    cuts = 0
    for method in cutting(model):
        with vtr.apply(model, method) as handle:
            try:
                check(name, model, 1e-4, (cuts % 2,), method.name in ROTATED)
            except (
                vtr.UnsupportedMethodError
            ) as error:  # a tower whose videos are made smaller behind it
                assert "inside the vision tower" in str(error)
            cuts += bool(handle.trace.stages)
    assert cuts > 5


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("method", ["random", "divprune", "fastv"])
def test_every_row_is_what_its_sample_is_alone_in_bfloat16(name: str, method: str) -> None:
    model = copy.deepcopy(made(name)[0]).to(torch.bfloat16)
    with vtr.apply(model, method_of(method)) as handle:
        check(name, model, 0.15)
        assert handle.trace.stages


# ---- against a run that masks what was cut -------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("method", [PROMPT, DECODER, MIDDLE], ids=["prompt", "decoder", "middle"])
def test_what_is_left_stands_in_its_column_and_the_rest_is_zero(name: str, method: Pick) -> None:
    model, _ = made(name)
    _, inputs, _ = batch(name)
    ids, live = inputs["input_ids"], inputs["attention_mask"].bool()
    with vtr.apply(model, method) as handle:
        out = model(**inputs, output_hidden_states=True)
        hidden = model.model(**inputs).last_hidden_state
        gone = gone_of(handle, ids)
        columns = handle.columns
    with Masked(model, gone):
        masked = model(**inputs, output_hidden_states=True)
    for i, (got, want) in enumerate(zip(out.hidden_states, masked.hidden_states, strict=True)):
        # A cut before a layer is seen in what the layer returns, one in its middle as well.
        first = i if method is MIDDLE else max(i - 1, 0)
        cut = torch.stack([g for k, g in gone.items() if k <= first] + [~live]).any(0)
        assert got.shape == want.shape
        torch.testing.assert_close(got[~cut], want[~cut], rtol=0, atol=CLOSE)
        assert float(got[cut].abs().sum()) == 0 or not i
    cut = torch.stack([*gone.values(), ~live]).any(0)
    torch.testing.assert_close(out.logits[~cut], masked.logits[~cut], rtol=0, atol=CLOSE)
    assert float(out.logits[cut].abs().sum()) == 0
    assert torch.equal(hidden, out.hidden_states[-1])
    for row, dropped in zip(columns, cut, strict=True):
        assert row[row >= 0].tolist() == (~dropped).nonzero().flatten().tolist()


def loss_of(logits: Tensor, labels: Tensor, cut: Tensor) -> tuple[Tensor, int]:
    """Sum and number of the losses of one sample's labels, each predicted by what was left before it."""
    left = (~cut).nonzero().flatten()
    wanted = labels[left[1:]]
    here = wanted >= 0
    found = logits[left[:-1]].float().log_softmax(-1)[here]
    return -found.gather(1, wanted[here][:, None]).sum(), int(here.sum())


@pytest.mark.parametrize("output", ["aligned", "reduced"])
@pytest.mark.parametrize("method", [ENTRY, LAYERS], ids=["prompt", "decoder"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "internvl", "video_llama_3"])
def test_the_loss_is_that_of_each_sample_alone(name: str, method: Pick, output: str) -> None:
    """Of all text, also of the first token and of the one behind an image that was cut at its end."""
    model, _ = made(name)
    rows, inputs, _ = batch(name)
    mask = inputs["attention_mask"].bool()
    labels = torch.where(mask & ~visual(inputs["input_ids"]), inputs["input_ids"], -100)
    parts = []
    for row in rows:
        ids = row["input_ids"][0]
        with vtr.apply(model, method) as handle:
            logits = model(**row).logits[0]
            gone = torch.stack(list(gone_of(handle, row["input_ids"]).values())).any(0)[0]
        parts.append(loss_of(logits, torch.where(visual(ids), -100, ids), gone))
    total, number = (2 * sum(x) for x in zip(*parts, strict=True))
    with vtr.apply(model, method, output=output):
        out = model(**inputs, labels=labels)
        plain = model(**inputs, labels=labels, return_dict=False)
        scaled = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(10.0)).loss
    torch.testing.assert_close(out.loss, total / number, rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled, total / 10, rtol=1e-5, atol=0)
    assert torch.equal(plain[0], out.loss) and torch.equal(plain[1], out.logits)
    assert torch.equal(out[0], out.loss)
    assert (out.logits.shape[1] == labels.shape[1]) == (output == "aligned")


def test_labels_that_the_caller_has_shifted() -> None:
    """As sequence-parallel trainers do: what a column predicts, in that column."""
    model, _ = made("llava")
    _, inputs, _ = batch("llava")
    labels = torch.where(inputs["attention_mask"] == 0, -100, inputs["input_ids"])
    for row in labels:  # answers alone are learned
        row[: int(visual(row.clamp(min=0)).nonzero().max()) + 2] = -100
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    with vtr.apply(model, BOTH):
        want = model(**inputs, labels=labels).loss
        got = model(**inputs, labels=labels, shift_labels=shifted).loss
    torch.testing.assert_close(got, want)


def test_labels_beside_some_logits_are_refused() -> None:
    model, inputs = made("llava")
    for output in ("aligned", "reduced"):
        with (
            vtr.apply(model, PROMPT, output=output),
            pytest.raises(ValueError, match="cannot be combined with logits_to_keep: 3 logits"),
        ):
            model(**inputs, labels=inputs["input_ids"], logits_to_keep=3)


# ---- some logits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("video_llama_3", "qwen2_vl_video")])
def test_logits_to_keep_counts_columns_of_the_caller(name: str) -> None:
    model, _ = made(name)
    _, inputs, _ = batch(name)
    length = inputs["input_ids"].shape[1]
    mixed = torch.randperm(length, generator=torch.Generator().manual_seed(2))
    with vtr.apply(model, BOTH):
        whole = model(**inputs).logits
        for keep in (
            1,
            5,
            length,
            length + 3,
        ):  # the last tokens and the one before, as trainers ask
            got = model(**inputs, logits_to_keep=keep).logits
            torch.testing.assert_close(got, whole[:, -keep:], rtol=0, atol=CLOSE)
        for keep in (torch.tensor([3, length - 1, 0]), mixed, torch.tensor([-2, -1])):
            got = model(**inputs, logits_to_keep=keep).logits
            torch.testing.assert_close(got, whole[:, keep], rtol=0, atol=CLOSE)


@pytest.mark.skipif(
    not hasattr(transformers.modeling_utils, "slice_logits_to_keep"),
    reason="this version of transformers takes one list of columns for all samples",
)
def test_logits_to_keep_of_each_sample() -> None:
    model, _ = made("llava")
    _, inputs, _ = batch("llava")
    mask = inputs["attention_mask"].bool()
    some = torch.randint(0, mask.shape[1], (4, 6), generator=torch.Generator().manual_seed(2))
    with vtr.apply(model, BOTH):
        whole = model(**inputs).logits
        got = model(**inputs, logits_to_keep=some).logits
        flat = model(**inputs, logits_to_keep=mask).logits
    torch.testing.assert_close(
        got, whole.gather(1, some[..., None].expand_as(got)), rtol=0, atol=CLOSE
    )
    torch.testing.assert_close(flat, whole[mask], rtol=0, atol=CLOSE)


def test_the_head_runs_on_what_is_left() -> None:
    """On the last column in generate, on the columns that are left where all logits are asked for."""
    model, inputs = made("llava")
    shapes: list[Any] = []
    with vtr.apply(model, PROMPT) as handle:
        hook = model.lm_head.register_forward_pre_hook(lambda _, x: shapes.append(x[0].shape[1]))
        wide = model(**inputs).logits
        width = handle.columns.shape[1]
        model(**inputs, logits_to_keep=2)
        generate(model, inputs, max_new_tokens=2)
        hook.remove()
    assert wide.shape[1] == inputs["input_ids"].shape[1]
    assert shapes == [width, 2, 1, 1] and width < wide.shape[1]


# ---- other ways to call --------------------------------------------------------------------------


class LlavaForSequenceClassification(  # type: ignore[misc]
    transformers.modeling_layers.GenericForSequenceClassification,  # type: ignore[name-defined]
    transformers.LlavaPreTrainedModel,  # type: ignore[name-defined]
):
    """A head that reads the last token that is no padding."""


@pytest.mark.parametrize(
    "method", [ENTRY, LAYERS, vtr.FastV(keep=4)], ids=["prompt", "decoder", "fastv"]
)
def test_heads_that_read_the_last_token(method: vtr.Method) -> None:
    model, _ = made("llava")
    reward = LlavaForSequenceClassification(model.config).eval()
    reward.model.load_state_dict(model.model.state_dict())
    rows, inputs, _ = batch("llava")
    with vtr.apply(reward, method) as handle:
        got = reward(**inputs, labels=torch.tensor([0, 1, 1, 0]))
        assert handle.trace.stages
        for b in range(4):
            want = reward(**rows[b % 2]).logits[0]
            torch.testing.assert_close(got.logits[b], want, rtol=0, atol=CLOSE)
    assert bool(torch.isfinite(got.loss))


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "llava_next_video"])
@pytest.mark.parametrize("method", [ENTRY, LAYERS], ids=["prompt", "decoder"])
def test_a_turn_on_a_cache_lines_up_with_its_own_columns(name: str, method: Pick) -> None:
    """A second turn with the same images, padded right, on what the first has left in the cache."""
    model, _ = made(name)
    rows, _, _ = batch(name)
    width = max(row["input_ids"].shape[1] for row in rows)
    turn = padded(rows, [0, 0], width)
    first = padded(rows, [width - row["input_ids"].shape[1] for row in rows], width)
    mask = torch.cat([first["attention_mask"], turn["attention_mask"]], 1)
    with vtr.apply(model, method) as handle:

        def second(first: Inputs, turn: Inputs, mask: Tensor) -> Tensor:
            cache = cache_of(model(**first, use_cache=True))
            out = model(
                **{**turn, "attention_mask": mask}, **with_cache(type(model).forward, cache)
            )
            assert out.logits.shape[:2] == turn["input_ids"].shape
            return out.logits

        got = second(first, turn, mask)
        assert handle.columns.shape[1] < width
        for b, row in enumerate(rows):
            twice = torch.cat([row["attention_mask"]] * 2, 1)
            want = second(row, row, twice)[0]
            torch.testing.assert_close(got[b, : len(want)], want, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_hidden_states_of_generate_have_the_columns_of_the_prompt(name: str) -> None:
    model, inputs = made(name)
    with vtr.apply(model, BOTH):
        whole = model(**inputs, output_hidden_states=True).hidden_states
        first = generate(model, inputs, output_hidden_states=True).hidden_states[0]
    for a, b in zip(first, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=CLOSE)


def test_some_hidden_states() -> None:
    model, inputs = made("qwen2_vl")
    with vtr.apply(model, DECODER):
        whole = model(**inputs, output_hidden_states=True).hidden_states
        some = model(**inputs, output_hidden_states=[1, 3]).hidden_states
    assert [i for i, state in enumerate(some) if state is not None] == [1, 3]
    whole = whole[
        len(whole) - len(some) :
    ]  # older versions count from what the first layer returns
    assert torch.equal(some[1], whole[1]) and torch.equal(some[3], whole[3])


def test_calls_by_position_and_tuples() -> None:
    model, inputs = made("llava")
    with vtr.apply(model, BOTH):
        want = model(**inputs).logits
        hidden = model.model(**inputs).last_hidden_state
        assert torch.equal(model(**inputs, return_dict=False)[0], want)
        assert torch.equal(model.model(**inputs, return_dict=False)[0], hidden)
    with vtr.apply(model.model, BOTH):  # without its head
        assert torch.equal(model.model(**inputs).last_hidden_state, hidden)


def test_attention_maps_are_those_of_what_is_left() -> None:
    model, inputs = FAMILIES["llava"](2)
    model.set_attn_implementation("eager")
    with vtr.apply(model, PROMPT) as handle:
        maps = model(**inputs, output_attentions=True).attentions
        assert {m.shape[-2:] for m in maps} == {(handle.columns.shape[1],) * 2}


# ---- output="reduced" and the map ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "video_llama_3"])
@pytest.mark.parametrize("method", [PROMPT, DECODER, MIDDLE], ids=["prompt", "decoder", "middle"])
def test_reduced_outputs_are_those_columns(name: str, method: Pick) -> None:
    model, _ = made(name)
    _, inputs, _ = batch(name)
    with vtr.apply(model, method):
        wide = model(**inputs, output_hidden_states=True)
    with vtr.apply(model, method, output="reduced") as handle:
        short = model(**inputs, output_hidden_states=True)
        columns = handle.columns
    assert short.logits.shape[:2] == columns.shape
    here = columns >= 0
    rows = torch.arange(4)[:, None].expand_as(columns)[here]
    for a, b in ((short.logits, wide.logits), (short.hidden_states[-1], wide.hidden_states[-1])):
        torch.testing.assert_close(a[here], b[rows, columns[here]], rtol=0, atol=CLOSE)
    assert short.hidden_states[-1].shape[1] < wide.hidden_states[0].shape[1]


def test_columns_of_calls_that_cut_nothing() -> None:
    model, inputs = made("llava")
    length = inputs["input_ids"].shape[1]
    live = inputs["attention_mask"].bool()
    text = {k: inputs[k][:, -4:].clone() for k in ("input_ids", "attention_mask")}
    with vtr.apply(model, PROMPT) as handle:
        with pytest.raises(RuntimeError, match="has not been called"):
            _ = handle.columns
        out = generate(model, inputs)
        prompt = handle.columns
        assert prompt.shape[1] < length and bool((prompt[:, -1] == length - 1).all())
        wider = torch.nn.functional.pad(inputs["attention_mask"], (0, STEPS + 2), value=1)
        more = {"input_ids": text["input_ids"][:, :3], "attention_mask": wider}
        model(**more, **with_cache(type(model).forward, cache_of(out)))  # a turn of text
        assert handle.columns.tolist() == [[0, 1, 2]] * 2
        text["attention_mask"][1, :2] = 0
        model(**text)
        assert handle.columns.tolist() == [[0, 1, 2, 3], [-1, -1, 2, 3]]
    every = torch.arange(length).expand_as(live)
    with vtr.apply(model, vtr.DivPrune(keep=1.0)) as handle:
        model(**inputs)
        assert torch.equal(handle.columns, torch.where(live, every, -1))


def test_a_way_of_outputs_that_does_not_exist_or_differs() -> None:
    model, inputs = made("llava")
    with pytest.raises(ValueError, match=r"output must be one of \('aligned', 'reduced'\)"):
        vtr.apply(model, PROMPT, output="restored")
    with vtr.apply(model, PROMPT), pytest.raises(ValueError, match="give all of them output="):
        vtr.apply(model, DECODER, output="reduced")
    with (
        vtr.apply(model, PROMPT, output="reduced"),
        pytest.raises(ValueError, match="which output='reduced' does not return"),
    ):
        model(**inputs, logits_to_keep=torch.tensor([1]))


def test_encoders_have_no_columns() -> None:
    with (
        vtr.apply(vit(), vtr.EViT(keep=0.5)) as handle,
        pytest.raises(vtr.UnsupportedModelError, match=r"use handle\.trace"),
    ):
        _ = handle.columns


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_is_the_same_in_both_ways(name: str) -> None:
    model, inputs = made(name)
    with vtr.apply(model, BOTH):
        wide = generate(model, inputs)
    with vtr.apply(model, BOTH, output="reduced"):
        same(wide, generate(model, inputs))


def test_hidden_states_of_unknown_places_are_refused() -> None:
    layout = SequenceLayout(
        torch.ones(1, 3, dtype=torch.bool), torch.tensor([[False, True, False]])
    )
    output = {"last_hidden_state": torch.ones(1, 3, 2), "hidden_states": (torch.ones(1, 3, 2),) * 2}
    with pytest.raises(
        RuntimeError, match="2 hidden states for 4 layers, which cannot be lined up"
    ):
        align(output, Exit(layout, 3, True), [layout] * 5)


def test_a_loss_of_the_caller_sees_the_columns_that_it_gave() -> None:
    """The Trainer's label smoothing takes the labels out of the call."""
    model, _ = made("llava")
    rows, inputs, _ = batch("llava")
    smooth = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.0)

    def answers(row: Inputs) -> Tensor:
        labels = torch.where(row["attention_mask"] == 0, -100, row["input_ids"])
        for one in labels:
            one[: int(visual(one).nonzero().max()) + 2] = -100
        return labels

    with vtr.apply(model, LAYERS):
        got = smooth(model(**inputs), answers(inputs), shift_labels=True)
        want = [model(**row, labels=answers(row)).loss for row in rows]
    number = [int((answers(row) >= 0).sum()) for row in rows]
    want = sum(x * n for x, n in zip(want, number, strict=True)) / sum(number)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
