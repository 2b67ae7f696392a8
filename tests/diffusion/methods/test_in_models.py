"""The methods inside tiny random transformers of the real classes, against the same formulas put into
torch's attention function from outside."""

from __future__ import annotations

import pytest
import torch

import vtr
from tests.diffusion.models import CASES, replaced
from tests.methods.sites import attention
from tests.methods.test_rettention import _band
from tests.methods.test_tomesd import _by_loops
from vtr.core.registry import registry
from vtr.methods.common.cells import cell_split
from vtr.testing import examples

INSIDE = {
    name: examples(cls)
    for name, cls in registry().items()
    if set(cls.sites) & {"attention", "block"}
}
DENSE = [method for found in INSIDE.values() for method in found.everything]
METHODS = [found.some[0] for found in INSIDE.values()]
RETTENTION = vtr.Rettention(density=0.3, dense_steps=1, refresh=3, block=16)


def apply(model, method):
    """Or skip what is for videos alone."""
    try:
        return vtr.apply(model, method)
    except vtr.UnsupportedMethodError as error:
        pytest.skip(str(error))


@torch.no_grad()
def run(model, given):
    return model(**given)[0]


@pytest.mark.parametrize("method", DENSE, ids=lambda m: m.name)
@pytest.mark.parametrize("name", CASES)
def test_a_full_density_is_the_unwrapped_model(name, method):
    case = CASES[name]
    model, given = case.build(), case.call()
    expected = run(model, given)
    with apply(model, method):
        found = run(model, given)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=3e-5)
    assert torch.equal(run(model, given), expected), "removed without a trace"


@pytest.mark.parametrize("name", ["wan", "pixart", "hunyuan-video", "flux", "cogvideox"])
def test_rettention_over_steps_and_branches(name):
    case = CASES[name]
    model = case.build()
    method = vtr.Rettention(density=0.4, dense_layers=1, dense_steps=1, refresh=3, block=16)
    width = int(case.grid[1] * case.grid[2] * 0.4)
    band = _band(case.grid, case.text, case.text_first, width)
    state, now = {}, {}

    def formula(layer, q, k, v, seen):
        scale = q.shape[-1] ** -0.5
        dense, whole = attention(q, k, v, seen, scale)
        if now["step"] == 0:
            return dense
        sparse, part = attention(q, k, v, band & seen, scale)
        key, since = (layer, now["branch"]), (now["step"] - 1) % 3
        if since == 0:
            ratio = torch.exp(part - whole)[..., None]
            state[key] = ratio, dense - ratio * sparse
            return dense
        return (state[key][0] + 0.04 * (since - 1)) * sparse + state[key][1]

    # Two calls per step, as guidance in two calls makes them; the second with other text.
    times = [900.0, 800.0, 700.0, 600.0, 500.0]

    def generate():
        made = []
        for step, time in enumerate(times):
            for branch in ("0", "1"):
                now.update(step=step, branch=branch)
                given = case.call(batch=2, time=time)
                if branch == "1":
                    given["encoder_hidden_states"] = given["encoder_hidden_states"] * 0.5
                made.append(run(model, given))
        return made

    with replaced(model, case.attention[1:], formula):
        outputs = generate()
    bare = generate()
    with vtr.apply(model, method, steps=5):
        found = generate()
    for a, b in zip(found, outputs, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(outputs, bare, strict=True))


@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "sd3"])
def test_own_frame_or_window_in_a_model(name):
    case = CASES[name]
    model, given = case.build(), case.call()
    frame = torch.arange(case.tokens) // (case.grid[1] * case.grid[2])
    method = vtr.OwnFrame(block=16)
    near = frame[:, None] == frame[None]
    if case.grid[0] == 1:
        method = vtr.NeighborhoodAttention(window=(3, 3), block=16)
        near = vtr.kernels.masks.neighborhood(case.grid[1:], 3, block=16).to_dense()
    seen = torch.ones(case.tokens + case.text, case.tokens + case.text, dtype=torch.bool)
    first = case.text if case.text_first else 0
    seen[first : first + case.tokens, first : first + case.tokens] = near

    def formula(layer, q, k, v, valid):
        mask = seen if q.shape[2] == seen.shape[0] else near  # attention without the text
        return attention(q, k, v, mask & valid, q.shape[-1] ** -0.5)[0]

    with replaced(model, case.attention, formula):
        expected = run(model, given)
    with vtr.apply(model, method):
        found = run(model, given)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=5e-5)
    assert (found - run(model, given)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["pixart", "dit"])
@pytest.mark.parametrize("mlp", [False, True])
def test_token_merging_by_hand(name, mlp):
    """Merged inputs of attention (and MLP), by plain loops over the block's input."""
    case = CASES[name]
    model, given = case.build(), case.call()
    method = vtr.ToMeSD(ratio=0.5, merge_mlp=mlp, seed=None)
    target = cell_split(case.grid, method.cell, None)[1].tolist()
    maps, handles = {}, []

    def look(number):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            maps[number] = [_by_loops(h, case.grid, method.cell, 0.5, target) for h in hidden]

        return hook

    def merging(number, plain):
        def forward(hidden, *args, **kwargs):
            rows = []
            for x, (kept, slots) in zip(hidden, maps[number], strict=True):
                at = torch.tensor(slots)
                rows.append(torch.stack([x[at == s].mean(0) for s in range(len(kept))]))
            out = plain(torch.stack(rows), *args, **kwargs)
            return torch.stack([o[s] for o, (_, s) in zip(out, maps[number], strict=True)])

        return forward

    for number, block in enumerate(model.transformer_blocks):
        handles.append(block.register_forward_pre_hook(look(number), with_kwargs=True))
        for part in ("attn1", "ff") if mlp else ("attn1",):
            module = getattr(block, part)
            module.forward = merging(number, module.forward)
    expected = run(model, given)
    for handle in handles:
        handle.remove()
    for block in model.transformer_blocks:
        for part in ("attn1", "ff"):
            getattr(block, part).__dict__.pop("forward", None)
    with vtr.apply(model, method) as handle:
        found = run(model, given)
        half = int(case.tokens * 0.5)
        sizes = [(s.tokens_in, s.tokens_out) for s in handle.trace.stages]
        assert sizes == [(case.tokens, case.tokens - half)] * len(model.transformer_blocks)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=3e-5)
    assert (found - run(model, given)).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_batch_is_its_samples_in_cross_attention_to_padded_text(method):
    case = CASES["pixart"]  # other families: see tests/laws
    model, given = case.build(), case.call(batch=2)
    with apply(model, method):
        both = run(model, given)
        for i in range(2):
            alone = {
                k: v[i : i + 1] if isinstance(v, torch.Tensor) and v.shape[:1] == (2,) else v
                for k, v in given.items()
            }
            torch.testing.assert_close(run(model, alone), both[i : i + 1], atol=3e-5, rtol=3e-5)


def test_two_runs_in_a_row_are_equal():
    """State of the first run (a ratio, a residual) does not reach the second."""
    case = CASES["wan"]
    model = case.build()
    with vtr.apply(model, RETTENTION):
        runs = [
            [run(model, case.call(time=t)) for t in (900.0, 700.0, 500.0, 300.0)] for _ in range(2)
        ]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "method",
    [RETTENTION, INSIDE["rectified-sparse"].some[0], INSIDE["tomesd"].some[0]],
    ids=lambda m: m.name,
)
def test_a_cache_of_diffusers_skips_blocks(method):
    """A cache that reuses the blocks after the first, in all steps but the first of each three: the
    skipped layers keep their state, and nothing counts calls."""
    from diffusers import FirstBlockCacheConfig

    case = CASES["wan"]
    model = case.build()
    computed = []
    handles = [
        b.attn1.register_forward_hook(lambda m, a, o, i=i: computed.append(i))
        for i, b in enumerate(model.blocks)
    ]
    times = [900.0, 800.0, 700.0, 600.0]

    def generate():
        made = []
        for step, time in enumerate(times):
            for name in ("cond", "uncond"):
                with model.cache_context(name, step_index=step, num_inference_steps=4):
                    made.append(run(model, case.call(time=time)))
        return made

    with vtr.apply(model, method):
        full = generate()
        model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        computed.clear()
        found = generate()
        assert computed.count(0) == 8 and computed.count(2) == 2, "later steps reuse the blocks"
        model.disable_cache()
        again = generate()
    for a, b, c in zip(full, found, again, strict=True):
        assert torch.isfinite(b).all() and torch.equal(a, c)
    assert torch.equal(full[0], found[0]) and torch.equal(full[1], found[1])
    for handle in handles:
        handle.remove()
