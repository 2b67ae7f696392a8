"""Methods that carry a state from step to step, in pipelines: one for each branch of guidance and layer, freed at
the end of a run. Every call is replayed without a model, by sites that know nothing of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtr
from tests.diffusion import pipes
from vtr.diffusion.site import CallFacts, DiffusionAttentionSite
from vtr.testing.trial import instead

METHODS = (
    vtr.AdaSpa(0.4, search=(1, 3), recall=0.5, block=16),
    vtr.LiteAttention(0.0, block=16),
    vtr.SVG2(0.5, query_clusters=3, key_clusters=5, rounds=3, block=16, key_block=16),
)


def record(
    pipe: Any, name: str, method: Any, steps: int, **more: Any
) -> tuple[torch.Tensor, list[Any]]:
    """Run a pipeline; returns what it made and every call of the method: facts, tensors, output."""
    calls: list[Any] = []
    plain = method.attend

    def attend(site: Any) -> torch.Tensor:
        out: torch.Tensor = plain(site)
        tensors = [t.clone() for t in (site.q, site.k, site.v)]
        calls.append((site.call, site.layer, site.scale, tensors, site._dense, out))
        return out

    with vtr.apply(pipe, instead(method, "attend", attend)) as handle:
        made = pipes.call(pipe, name, steps, **more)
        assert not handle._wrapping.run.states, "states are let go at the end of a run"
    return made, calls


def replay(method: Any, calls: list[Any]) -> None:
    states: dict[Any, dict[str, Any]] = {}
    for facts, layer, scale, (q, k, v), dense, out in calls:
        assert isinstance(facts, CallFacts)
        key = (facts.expert, facts.branch, layer)
        site = DiffusionAttentionSite(
            call=facts, layer=layer, layers=3, q=q, k=k, v=v, scale=scale, dense=dense,
            state=states.setdefault(key, {}), shared={}, memory={}, notes={}, backend="sdpa",
        )  # fmt: skip
        torch.testing.assert_close(method.attend(site), out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["wan2.2", "hunyuan-video", "flux", "mochi"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_each_branch_and_layer_has_its_own_state(name: str, method: Any) -> None:
    pipe = pipes.make(name)
    made, calls = record(pipe, name, method, 5)
    replay(method, calls)
    again, _ = record(pipe, name, method, 5)
    assert torch.equal(made, again), "a second run begins without what the first one left"
    if method.name != "liteattention":  # three blocks of tiny heads: all are near the maximum
        assert not torch.allclose(made, pipes.call(pipe, name, 5), atol=1e-4)


def _one_call(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
    if step == 1:
        pipe._guidance_scale = 1.0
    return given


def _half_a_batch(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
    if step == 1:
        pipe._guidance_scale = 1.0
        return {k: t if k == "latents" else t[-1:] for k, t in given.items()}
    return given


@pytest.mark.parametrize(("name", "callback"), [("wan", _one_call), ("sd3", _half_a_batch)])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_guidance_that_is_switched_off_in_the_middle(name: str, callback: Any, method: Any) -> None:
    pipe = pipes.make(name)
    given = {"callback_on_step_end": callback, "guidance_scale": 5.0}
    if name == "sd3":
        text = ["prompt_embeds", "pooled_prompt_embeds"]
        given["callback_on_step_end_tensor_inputs"] = ["latents", *text]
    _, calls = record(pipe, name, method, 5, **given)
    replay(method, calls)
    kinds = [{(f.branch, len(t[0])) for f, _, _, t, _, _ in calls if f.step == s} for s in (1, 2)]
    assert kinds[1] and kinds[0] != kinds[1], "guidance was switched off"


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_run_that_is_broken_off_leaves_nothing(method: Any) -> None:
    pipe = pipes.make("wan")

    def stop(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return given

    with vtr.apply(pipe, method):
        expected = pipes.call(pipe, "wan", 5)
        with pytest.raises(KeyboardInterrupt):
            pipes.call(pipe, "wan", 5, callback_on_step_end=stop)
        assert torch.equal(pipes.call(pipe, "wan", 5), expected)
