"""SpAtten against the paper's rules in float64 numpy: what is summed, what goes, and that it never returns."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vtr
from tests.tiny import images, vit
from tests.vision import towers
from vtr.core.encoder_attention import EncoderAttentionSite
from vtr.methods.common.cascade import first_pruned, linear_counts
from vtr.methods.common.lowbit import split_bits
from vtr.testing.trial import instead

Call = tuple[EncoderAttentionSite, Tensor]


def run(
    model: Any, method: Any, x: Tensor, plan: Any = None
) -> tuple[Tensor, list[Call], vtr.Trace]:
    calls: list[Call] = []
    plain = method.attend

    def attend(site: EncoderAttentionSite) -> Tensor:
        calls.append((site, plain(site)))
        return calls[-1][1]

    watched = instead(method, "attend", attend)
    given = watched
    if plan is not None:
        given = vtr.Plan((watched,), fingerprint=plan.fingerprint, tables=plan.tables)
    with torch.no_grad(), vtr.apply(model, given) as handle:
        out = model(x)
        return out, calls, handle.trace


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def maps(site: EncoderAttentionSite, bits: tuple[int, int] | None = None, flat: float = 0.0) -> Any:
    """(B, H, T, T) float64, the probabilities of a layer."""
    q, k = (t.double().numpy() for t in (site.q, site.k))
    if bits is None:
        return softmax(q @ k.swapaxes(-1, -2) * site.scale)
    most, least = bits
    found = []
    for drop in (True, False):
        rounded = []
        for x in (q, k):
            step = np.abs(x).max((2, 3), keepdims=True) / (2 ** (most + least - 1) - 1)
            level = np.round(x / step)
            rounded.append((np.floor(level / 2**least) * 2**least if drop else level) * step)
        found.append(softmax(rounded[0] @ rounded[1].swapaxes(-1, -2) * site.scale))
    high, full = found
    return np.where(high.max(-1, keepdims=True) < flat, full, high)


def best(scores: Any, number: int) -> Any:
    return np.sort(np.argsort(-scores, kind="stable")[:number])


@pytest.mark.parametrize("prefix", [1, 0])
@pytest.mark.parametrize(
    "method",
    [
        vtr.SpAtten(0.3),
        vtr.SpAtten(9, start=0.5),
        vtr.SpAtten((0.9, 30, 20), start=0.2, heads=0.4, head_start=0.0),
        vtr.SpAtten(0.4, heads=0.5, values=0.3, head_start=0.2),
        vtr.SpAtten(0.4, heads=0.5, bits=(5, 4), flat=0.2, head_start=0.2),
    ],
    ids=str,
)
def test_tokens_and_heads_are_those_of_the_paper(method: vtr.SpAtten, prefix: int) -> None:
    more: dict[str, Any] = {} if prefix else {"class_token": False, "global_pool": "avg"}
    model, x = vit(depth=4, **more), images(2)
    out, calls, trace = run(model, method, x)
    first = math.ceil(method.start * 4)
    cuts = list(range(first, 4))
    if isinstance(method.keep, tuple):
        left = [math.ceil(k * 64) if isinstance(k, float) else k for k in method.keep]
    else:
        last = math.ceil(method.keep * 64) if isinstance(method.keep, float) else method.keep
        left = [64 - round((64 - last) * (i + 1) / len(cuts)) for i in range(len(cuts))]
    pruning = list(range(max(1, math.ceil(method.head_start * 4)), 4)) if method.heads < 1 else []
    fewest = math.ceil(method.heads * 3 - 1e-9)
    heads = [3 - round((3 - fewest) * (i + 1) / len(pruning)) for i in range(len(pruning))]
    for b in range(2):
        tokens, importance = np.zeros(64), np.zeros(3)
        kept, alive = np.arange(64), np.ones(3, bool)
        for layer, (site, found) in enumerate(calls):
            if layer in pruning:
                rest = np.where(alive, importance, -np.inf)
                now = np.zeros(3, bool)
                now[best(rest, heads[pruning.index(layer)])] = True
                assert not (now & ~alive).any()
                alive = now
            p = maps(site, method.bits, method.flat)[b]
            used = p.copy()
            for row in used.reshape(-1, used.shape[-1]):
                row[
                    np.argsort(-row, kind="stable")[math.ceil(method.values * len(row) - 1e-9) :]
                ] = 0
            wanted = used @ site.v[b].double().numpy() * alive[:, None, None]
            np.testing.assert_allclose(found[b].double().numpy(), wanted, atol=2e-5, rtol=1e-3)
            importance += np.abs(wanted).sum((1, 2))
            tokens[kept] += (p * alive[:, None, None]).sum((0, 1))[prefix:]
            assert site.map.kept[b].tolist() == kept.tolist()
            if layer in cuts:
                kept = kept[best(tokens[kept], left[cuts.index(layer)])]
        assert trace.kept is not None and trace.kept[b].tolist() == kept.tolist()
    assert [s.tokens_out for s in trace.stages] == left
    assert out.isfinite().all()


def test_what_is_pruned_never_returns() -> None:
    model = vit(depth=6)
    method = vtr.SpAtten(0.2, heads=0.34, head_start=0.0, start=0.0)
    _, calls, trace = run(model, method, images(4))
    for before, after in pairwise(trace.stages):
        for b in range(4):
            assert set(after.total.kept[b].tolist()) < set(before.total.kept[b].tolist())
    zero = [(out == 0).all(-1).all(-1) for _, out in calls]
    for earlier, later in pairwise(zero):
        assert bool((later | ~earlier).all())
    assert not zero[0].any() and (zero[-1].sum(1) == 1).all()  # of 3 heads 2 are left: ceil(1.02)


def test_a_pruned_head_is_a_head_whose_output_is_zero() -> None:
    """Against the unwrapped model, in which a hook zeroes the head's channels before the projection."""
    model, x = vit(depth=4), images(2)
    out, calls, _ = run(model, vtr.SpAtten(1.0, heads=0.5, head_start=0.0), x)
    alive = [(found != 0).any(-1).any(-1) for _, found in calls]
    assert not bool(alive[-1].all())
    hooks = [
        block.attn.proj.register_forward_pre_hook(
            lambda m, args, live=live: (args[0] * live.repeat_interleave(16, 1)[:, None],)
        )
        for block, live in zip(model.blocks, alive, strict=True)
    ]
    with torch.no_grad():
        wanted = model(x)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-4)


def test_keeping_everything_is_the_model_bit_by_bit() -> None:
    model, x = vit(depth=4), images(2)
    with torch.no_grad():
        assert torch.equal(run(model, vtr.SpAtten(1.0), x)[0], model(x))


def test_a_batch_is_its_images() -> None:
    model, x = vit(depth=4), images(3)
    method = vtr.SpAtten(0.4, heads=0.5, values=0.5, bits=(6, 4), head_start=0.0)
    both = run(model, method, x)[0]
    alone = torch.cat([run(model, method, x[i : i + 1])[0] for i in range(3)])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["siglip", "dinov2", "clip"])
def test_towers_of_transformers(name: str) -> None:
    model, x = towers.build(name), images(2)[..., :32, :32]
    with torch.no_grad(), vtr.apply(model, vtr.SpAtten(0.3, heads=0.5)) as handle:
        out = model(x)
        assert [s.tokens_out for s in handle.trace.stages][-1] == 20
    assert out.last_hidden_state.isfinite().all()


def test_the_report_counts_the_attention_that_is_read_for_the_scores() -> None:
    model, x = vit(depth=4), images(2)
    with torch.no_grad(), vtr.apply(model, vtr.SpAtten(16, start=1.0)) as handle:
        model(x)
        dense, reduced = handle.report().flops["encoder"]
    mlp = (
        48
        * 64
        * sum(2 * m.weight.numel() for m in (model.blocks[3].mlp.fc1, model.blocks[3].mlp.fc2))
        // 64
    )
    assert dense - reduced == mlp - 4 * 2 * 65 * 65 * 48


def test_heads_of_a_plan_are_not_computed() -> None:
    model, data = vit(depth=4), [images(3), images(5)[3:]]
    method = vtr.SpAtten(1.0, heads=0.3, head_start=0.0)
    plan = vtr.calibrate(model, data, method, description="noise")
    assert plan.data["images"] == 5 and plan.data["tokens"] == 320 and plan.data["batches"] == 2
    assert plan.fingerprint is not None and plan.fingerprint.weight.startswith("blocks.3.")
    assert {"vtr", "torch", "timm"} == set(plan.versions)
    table = plan.tables[0]["heads"]
    # By hand: what the heads return in the dense model, summed over the images.
    sums = np.zeros((4, 3))
    for x in data:
        for site, out in run(model, vtr.SpAtten(1.0), x)[1]:
            sums[site.layer] += np.abs(out.double().numpy()).sum((0, 2, 3))
    alive = np.ones(3, bool)
    for layer, number in ((0, 3), (1, 2), (2, 2), (3, 1)):
        rest = np.where(alive, sums[:layer].sum(0), -np.inf)
        alive = np.isin(np.arange(3), best(rest, number)) & alive
        assert table[layer].tolist() == alive.tolist()
    x = images(2)
    out, calls, _ = run(model, method, x, plan)
    for site, found in calls:
        dense = site.dense() * table[site.layer][:, None, None]
        torch.testing.assert_close(found, dense, atol=1e-6, rtol=1e-5)
        assert site.notes.get("density", 1.0) == pytest.approx(
            float(table[site.layer].float().mean())
        )
    with torch.no_grad(), vtr.apply(model, plan) as handle:
        torch.testing.assert_close(model(x), out)
        dense_flops, reduced = handle.report().flops["encoder"]
    missing = float((~table).sum()) / 3
    assert dense_flops - reduced == pytest.approx(missing * 4 * 65 * 65 * 48, abs=4)
    with pytest.raises(vtr.UnsupportedModelError, match="calibrated on another model"):
        vtr.apply(vit(depth=4, seed=9), plan)


def test_calibration_of_encoders_says_what_it_wants() -> None:
    model = vit(depth=4)
    method = vtr.SpAtten(1.0, heads=0.5)
    with pytest.raises(vtr.UnsupportedMethodError, match="leaves out no head"):
        vtr.calibrate(model, [images(1)], vtr.SpAtten(0.5))
    for wrong in ("an image", {}, [images(1)]):
        with pytest.raises(ValueError, match="batch 0 must be a tensor of images"):
            vtr.calibrate(model, [wrong], method)
    tower = towers.build("clip")
    small = images(2)[..., :32, :32]
    by_name = vtr.calibrate(tower, [{"pixel_values": small}], method)
    assert torch.equal(
        by_name.tables[0]["heads"], vtr.calibrate(tower, [small], method).tables[0]["heads"]
    )
    assert "transformers" in by_name.versions


def test_bits_round_symmetrically_with_a_step_for_each_head() -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 3:] = False
    high, full = split_bits(x, 3, 2, valid)
    for b, h in np.ndindex(2, 3):
        rows = x[b, h][valid[b]].double().numpy()
        step = np.abs(rows).max() / 15
        level = np.round(rows / step)
        np.testing.assert_allclose(full[b, h][valid[b]], level * step, atol=1e-6)
        np.testing.assert_allclose(high[b, h][valid[b]], np.floor(level / 4) * 4 * step, atol=1e-6)
    assert float((full - x)[0].abs().max()) <= float(x[0].abs().amax((1, 2)).max()) / 30 + 1e-6


def test_schedules_are_linear() -> None:
    assert [first_pruned(s, 12) for s in (0.0, 0.15, 0.3, 1.0)] == [0, 2, 4, 11]
    assert linear_counts(196, 96, 10) == tuple(range(186, 95, -10))
    assert linear_counts(12, 6, 4) == (10, 9, 8, 6)  # 10.5 rounds to the even 10


def test_options_are_checked() -> None:
    for options, message in (
        ({"keep": 0}, "keep must be"),
        ({"keep": (0.5, 0.9)}, "must not grow"),
        ({"heads": 0.0}, "heads must be"),
        ({"values": 1.5}, "values must be"),
        ({"start": -0.1}, "start must be"),
        ({"head_start": 2.0}, "head_start must be"),
        ({"flat": 2.0}, "flat must be"),
        ({"bits": 8}, "bits must be two ints"),
        ({"bits": (1, 4)}, "bits must be two ints"),
        ({"bits": (12, 8)}, "16 in all"),
    ):
        with pytest.raises(ValueError, match=message):
            vtr.SpAtten(**options)
    with pytest.raises(ValueError, match="keep has 2 entries for the 3 blocks 1 to 3"):
        vtr.apply(vit(depth=4), vtr.SpAtten((0.9, 0.5)))
    assert vtr.create("spatten", bits=[6, 4]) == vtr.SpAtten(bits=(6, 4))
