"""SearchedTile: windows against loops over tiles and tokens in float64, and calibration on pipelines."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch

import vtr
from tests.diffusion import pipes
from tests.diffusion.models import CASES
from tests.methods.sites import Run, attention, tensors, visible
from vtr.core.site import ModelInfo
from vtr.diffusion.site import DiffusionAttentionSite
from vtr.methods import SearchedTile
from vtr.testing.trial import instead

GRID, TILE = (4, 4, 6), (1, 2, 2)  # 4 x 2 x 3 tiles
INFO = ModelInfo("test", {"attention": 4}, {"attention": frozenset({"qkv", "denoising", "frames"})})


@functools.cache
def seen(grid, tile, window, text=0, text_first=False):
    """(S, S) bool: tiles of a window that is shifted at the borders, and text dense both ways."""
    places = list(itertools.product(*map(range, grid)))
    counts = [-(-n // t) for n, t in zip(grid, tile, strict=True)]
    length, first = len(places) + text, text if text_first else 0
    mask = torch.ones(length, length, dtype=torch.bool)
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            inside = True
            for x, y, t, w, n in zip(a, b, tile, window, counts, strict=True):
                start = min(max(x // t - w // 2, 0), n - w)
                inside &= start <= y // t < start + w
            mask[first + i, first + j] = inside
    return mask


def slow_candidates(tiles, density):
    most = max(1, int(density * math.prod(tiles) + 1e-9))
    every = [
        w for w in itertools.product(*(range(1, n + 1) for n in tiles)) if math.prod(w) <= most
    ]
    return sorted(
        w for w in every
        if not any(o != w and all(a >= b for a, b in zip(o, w, strict=True)) for o in every)
    )  # fmt: skip


@pytest.mark.parametrize("tiles", [(4, 2, 3), (1, 5, 4), (5, 6, 10), (1, 1, 1)])
@pytest.mark.parametrize("density", [0.01, 0.25, 0.5, 1.0])
def test_candidates_are_the_windows_that_cannot_grow(tiles, density):
    found = SearchedTile(density, tile=TILE, block=16).candidates(tiles)
    assert found == slow_candidates(tiles, density)
    assert found == [tiles] if density == 1 else len(found) >= 1


PADDED = torch.tensor([[True] * 3 + [False] * 4, [False] + [True] * 6])
CASES_OF_TEXT = {
    "video only": {},
    "text first": {"text": 7, "text_first": True},
    "text last, padded": {"text": 7, "text_valid": PADDED},
}


@pytest.mark.parametrize("case", CASES_OF_TEXT.values(), ids=CASES_OF_TEXT)
def test_search_and_use_equal_the_loops(case):
    text, first = case.get("text", 0), case.get("text_first", False)
    method = SearchedTile(0.3, tile=TILE, block=16, dense_steps=1, dense_layers=(0,))
    tokens = slice(text if first else 0, 96 + (text if first else 0))
    windows = slow_candidates((4, 2, 3), 0.3)
    valid = visible(GRID, text, first, case.get("text_valid"), 2)[:, None, None]
    runs = {layer: Run(method, GRID, **case, steps=3, layer=layer) for layer in (0, 1)}
    search, error = method.calibrator(INFO), torch.zeros(3, 2, 2, len(windows), dtype=torch.float64)
    for prompt, step, layer in itertools.product(range(2), range(3), runs):
        qkv = tensors(GRID, text, seed=100 * prompt + 10 * step + layer)
        search.see(runs[layer].site(qkv, step))
        full = attention(*qkv, valid, 0.25)[0][:, :, tokens]
        for n, window in enumerate(windows):
            out, _ = attention(*qkv, seen(GRID, TILE, window, text, first) & valid, 0.25)
            error[step, layer, :, n] += (out[:, :, tokens] - full).square().mean((2, 3)).mean(0) / 2
    table = search.finish()
    assert table["windows"].tolist() == [list(w) for w in [*windows, (4, 2, 3)]]
    assert table["window"].shape == (3, 4, 2) and table["grid"].tolist() == list(GRID)
    torch.testing.assert_close(table["error"][1:, 1].double(), error[1:, 1], atol=1e-8, rtol=1e-4)
    assert torch.equal(table["window"][1:, 1], error[1:, 1].argmin(-1))
    assert (table["window"][0] == len(windows)).all() and (
        table["window"][:, 0] == len(windows)
    ).all()
    assert table["window"][1:, 1].unique().numel() > 1, "heads and steps differ"
    for step, layer in itertools.product(range(3), runs):
        qkv = tensors(GRID, text, seed=7 + step)
        site = runs[layer].site(qkv, step)
        site.table = table
        out = method.attend(site)
        for head in range(2):
            window = [*windows, (4, 2, 3)][int(table["window"][step, layer, head])]
            expected, _ = attention(*qkv, seen(GRID, TILE, window, text, first) & valid, 0.25)
            rows = valid[:, 0, 0, :, None]
            torch.testing.assert_close(
                out[:, head].double() * rows, expected[:, head] * rows, atol=1e-5, rtol=1e-5
            )


def test_named_windows_any_grid_and_grouped_heads():
    method = SearchedTile(windows=((4, 1, 1), (1, 2, 3)), tile=TILE, block=16)
    assert method.candidates((4, 2, 3)) == [(4, 1, 1), (1, 2, 3)]
    with pytest.raises(
        ValueError, match=r"\(4, 1, 1\) is larger than the grid of \(1, 2, 3\) tiles"
    ):
        method.candidates((1, 2, 3))
    method = SearchedTile(0.4, block=16)  # tiles that divide the grid best
    run, search = Run(method, (3, 5, 5), steps=2), method.calibrator(INFO)
    for step in range(2):
        search.see(run.site(tensors((3, 5, 5), heads=4, key_heads=2, seed=step), step))
    table = search.finish()
    qkv = tensors((3, 5, 5), heads=4, key_heads=2, seed=9)
    site = run.site(qkv, 1)
    site.table = table
    out = method.attend(site)
    assert out.shape == (2, 4, 75, 16) and 0 < float(run.notes["density"]) < 1
    alone = run.site([t[:1] for t in qkv], 1)
    alone.table = table
    torch.testing.assert_close(method.attend(alone), out[:1])


# ---- calibration of pipelines --------------------------------------------------------------------


def prompts(number: int, steps: int = 3, name: str = "wan") -> list[dict[str, Any]]:
    given = pipes.PIPES[name][1]
    return [
        {**given, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(n)}
        for n in range(number)
    ]


METHOD = SearchedTile(0.3, tile=(1, 1, 2), block=16, dense_steps=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["wan", "wan2.2", "cogvideox", "flux"])
def test_a_pipeline_is_calibrated_and_runs_with_its_plan(name, tmp_path):
    pipe = pipes.make(name)
    before = pipes.call(pipe, name, 3)
    method = METHOD.replace(tile=(1, 2, 2))
    plan = vtr.calibrate(pipe, prompts(2, name=name), method, description="noise")
    assert torch.equal(pipes.call(pipe, name, 3), before) and not vtr.handles(pipe)
    facts = dict(plan.data)
    assert (facts["batches"], facts["runs"], facts["description"]) == (2, 2, "noise")
    assert len(facts["sha256"]) == 64 and facts["grid"] == plan.tables[0]["grid"].tolist()
    assert set(plan.versions) == {"vtr", "torch", "diffusers"}
    index = plan.tables[0]["window"]
    assert index.shape[0] == 3 and (index[0] == len(plan.tables[0]["windows"]) - 1).all()
    made = []
    for file in ("plan.json", "plan.safetensors"):
        plan.save(tmp_path / file)
        again = vtr.Plan.load(tmp_path / file)
        assert again == plan
        with vtr.apply(pipe, again):
            made.append(pipes.call(pipe, name, 3))
    assert torch.equal(*made) and not torch.allclose(made[0], before, atol=1e-4)


def test_errors_are_averaged_over_prompts_and_branches():
    """Every call of the pipeline is seen again by hand."""
    pipe, sites = pipes.make("wan"), []
    own = vtr.OwnFrame(9, block=16)  # dense; only looks
    plain = own.attend

    def attend(site: DiffusionAttentionSite) -> torch.Tensor:
        sites.append(
            (site.step, site.layer, site.branch, [t.clone() for t in (site.q, site.k, site.v)])
        )
        return plain(site)

    with vtr.apply(pipe, instead(own, "attend", attend)):
        for given in prompts(2):
            pipe(**given)
    table = vtr.calibrate(pipe, prompts(2), METHOD).tables[0]
    grid = CASES["wan"].grid
    windows = [tuple(w) for w in table["windows"].tolist()[:-1]]
    assert {branch for _, _, branch, _ in sites} == {"cond", "uncond"}
    error = torch.zeros(3, 3, 2, len(windows), dtype=torch.float64)
    for step, layer, _, qkv in sites:
        scale = qkv[0].shape[3] ** -0.5
        full, _ = attention(*qkv, torch.ones(1, 1, dtype=torch.bool), scale)
        for n, window in enumerate(windows):
            out, _ = attention(*qkv, seen(grid, (1, 1, 2), window), scale)
            error[step, layer, :, n] += (out - full).square().mean((0, 2, 3)) / 4
    torch.testing.assert_close(table["error"][1:].double(), error[1:], atol=1e-6, rtol=1e-3)
    assert torch.equal(table["window"][1:], table["error"][1:].argmin(-1))


def test_a_transformer_is_calibrated_call_by_call():
    case = CASES["wan"]
    model = case.build().train()
    calls = [case.call(time=t) for t in (900.0, 600.0, 300.0)]
    plan = vtr.calibrate(model, calls, METHOD.replace(dense_steps=0))
    assert model.training and plan.tables[0]["window"].shape == (3, 3, 2)
    assert plan.data["runs"] == 1 and plan.data["samples"] == 2
    model.eval()
    with vtr.apply(model, plan), torch.no_grad():
        for given in calls:
            model(**given)


def test_a_plan_is_for_one_model_one_size_and_one_number_of_steps():
    pipe = pipes.make("wan")
    plan = vtr.calibrate(pipe, prompts(1), METHOD)
    with vtr.apply(pipe, plan):
        with pytest.raises(
            RuntimeError, match=r"calibrated for \(3, 3, 5\) tokens .* here are \(3, 5, 5\)"
        ):
            pipes.call(pipe, "wan", 3, height=80)
        with pytest.raises(
            RuntimeError, match=r"3 denoising steps, this run has 4.*num_inference_steps=3"
        ):
            pipes.call(pipe, "wan", 4)
        pipes.call(pipe, "wan", 3)
        pipe.transformer.train()
        with pytest.raises(RuntimeError, match="training has no such steps"):
            pipe.transformer(**CASES["wan"].call())
        pipe.transformer.eval()
    other = pipes.make("wan")
    with torch.no_grad():
        for p in other.transformer.blocks[-1].parameters():
            p.neg_()
    with pytest.raises(vtr.UnsupportedModelError, match="has other numbers than this model's"):
        vtr.apply(other, plan)
    with pytest.raises(vtr.UnsupportedModelError, match=r"transformers|other numbers"):
        vtr.apply(pipes.make("wan2.2"), plan)
    with pytest.raises(vtr.UnsupportedModelError, match="it is of the class WanTransformer3DModel"):
        vtr.apply(pipes.make("ltx"), plan)


def test_what_is_refused():
    pipe = pipes.make("wan")
    with pytest.raises(
        vtr.UnsupportedMethodError, match=r"vtr\.calibrate\(model, batches, SearchedTile"
    ):
        vtr.apply(pipe, METHOD)
    with pytest.raises(vtr.UnsupportedMethodError, match="radial needs no calibration"):
        vtr.calibrate(pipe, prompts(1), vtr.RadialAttention())
    with pytest.raises(ValueError, match=r"batch 0 must be a mapping of the arguments .* got str"):
        vtr.calibrate(pipe, ["a red ball"], METHOD)
    with pytest.raises(ValueError, match="at least one batch"):
        vtr.calibrate(pipe, [], METHOD)
    with pytest.raises(ValueError, match="one size and one number of steps"):
        vtr.calibrate(pipe, [*prompts(1), *prompts(1, steps=4)], METHOD)
    with pytest.raises(ValueError, match="every step and layer of the batches is dense"):
        vtr.calibrate(pipe, prompts(1), METHOD.replace(dense_steps=3))
    with pytest.raises(vtr.UnsupportedMethodError, match=r"sale (acts at|needs)"):
        vtr.calibrate(pipe, prompts(1), vtr.SALE())
    assert not vtr.handles(pipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"density must be in \(0, 1\], got 0"),
        ({"windows": ()}, r"windows must name at least one candidate, or be None, got \(\)"),
        ({"windows": ((0, 1, 1),)}, "windows must be a float"),
        ({"tile": (0, 1, 1)}, "tile must be a float"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SearchedTile(**options)
