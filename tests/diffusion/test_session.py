"""Runs, steps and branches: counted right in every pipeline, through repeats, errors and caches."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import vtr
from tests.diffusion import pipes
from tests.diffusion.models import CASES, Fixed
from vtr.diffusion.run import DiffusionRun
from vtr.diffusion.session import Clock, ScheduleRef, Session


@dataclasses.dataclass(frozen=True)
class Watch(Fixed):
    """Keeps what it sees, and counts its own calls in its state."""

    seen: list[tuple[Any, ...]] = dataclasses.field(default_factory=list, compare=False)
    fail_at: int | None = None
    name: ClassVar[str] = "watch"

    def attend(self, site: Any) -> Tensor:
        count = site.state.setdefault("calls", 0)
        site.state["calls"] += 1
        self.seen.append((site.run, site.step, site.steps, site.branch, site.layer, count))
        if self.fail_at is not None and site.step == self.fail_at:
            raise ArithmeticError("on purpose")
        return super().attend(site)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [3, 8])
@pytest.mark.parametrize("name", pipes.PIPES)
def test_steps_and_branches_of_a_pipeline(name: str, steps: int) -> None:
    pipe, branches = pipes.make(name), pipes.PIPES[name][2]
    method = Watch()
    with vtr.apply(pipe, method):
        first = pipes.call(pipe, name, steps)
        again = pipes.call(pipe, name, steps)
    assert torch.equal(first, again), "two runs in a row are equal"
    layers = max(layer for *_, layer, _ in method.seen) + 1
    want = [(r, s, steps, b) for r in (0, 1) for s in range(steps) for b in branches]
    found = [tuple(s[:4]) for s in method.seen if s[4] == 0]
    assert found == want
    assert len(method.seen) == layers * len(want), "every layer sees every call"
    if name != "wan2.2":  # the second expert begins later
        assert all(count == step for _, step, _, _, _, count in method.seen), "state is per run"
    else:
        late = min(s for _, s, _, _, _, c in method.seen if c == 0 and s > 0)
        assert 0 < late < steps, "both experts take part"
        assert all(c in (s, s - late) for _, s, _, _, _, c in method.seen)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in pipes.PIPES if name != "wan2.2"])
def test_fifty_steps(name: str) -> None:
    pipe, branches = pipes.make(name), pipes.PIPES[name][2]
    method = Watch()
    with vtr.apply(pipe, method):
        pipes.call(pipe, name, 50)
    want = [step for step in range(50) for _ in branches]
    assert [s[1] for s in method.seen if s[4] == 0] == want
    assert {s[2] for s in method.seen} == {50}


@pytest.mark.parametrize(("dense", "first"), [(0, 0), (3, 3), (0.25, 2), (0.99, 7), (8, 8)])
def test_dense_steps_are_exact(dense: float, first: int) -> None:
    pipe = pipes.make("wan")
    method = Watch(dense_steps=dense)
    with vtr.apply(pipe, method):
        out = pipes.call(pipe, "wan", 8)
    assert sorted({s[1] for s in method.seen}) == list(range(first, 8))
    if first == 8:
        assert torch.equal(out, pipes.call(pipe, "wan", 8))


@pytest.mark.parametrize(("dense", "first", "second"), [
    ((2, 1), 2, 1), ((0, 3), 0, 3), ((0.25, 0.13), 2, 1), ([1, 0], 1, 0),
])  # fmt: skip
def test_dense_steps_of_each_expert(dense: Any, first: int, second: int) -> None:
    """Counted from the step in which an expert takes over, in every run."""
    pipe, every = pipes.make("wan2.2"), Watch()
    with vtr.apply(pipe, every) as handle:
        experts: list[int] = []
        seen = every.attend

        def attend(self: Any, site: Any) -> Tensor:
            experts.append(site.expert)
            return seen(site)

        object.__setattr__(every, "attend", attend.__get__(every))
        pipes.call(pipe, "wan2.2", 8)
        handle.remove()
    late = next(s[1] for s, expert in zip(every.seen, experts, strict=True) if expert == 1)
    assert set(experts) == {0, 1} and late >= 3 and 8 - late >= 3
    method = Watch(dense_steps=dense)
    with vtr.apply(pipe, method):
        for _ in range(2):
            pipes.call(pipe, "wan2.2", 8)
    want = [*range(first, late), *range(late + second, 8)]
    assert [(s[0], s[1]) for s in method.seen if s[3:5] == ("cond", 0)] == [
        (run, step) for run in range(2) for step in want
    ]


def test_dense_steps_for_experts_that_do_not_exist() -> None:
    for name, steps in (("wan", (3, 1)), ("wan2.2", (3,)), ("wan2.2", (3, 1, 1))):
        with pytest.raises(ValueError, match=f"is for {len(steps)} transformers, Wan has"):
            vtr.apply(pipes.make(name), Watch(dense_steps=steps))
    with pytest.raises(ValueError, match="dense_steps must be"):
        Watch(dense_steps=(3, 1.5))
    with pytest.raises(ValueError, match="dense_steps must be"):
        Watch(dense_steps=())


@pytest.mark.parametrize("stop", [0, 1, 4])
@pytest.mark.parametrize("name", ["wan", "sd3", "flux", "wan2.2"])
def test_an_interrupted_run_leaves_nothing_behind(name: str, stop: int) -> None:
    pipe = pipes.make(name)
    method = Watch()

    def break_off(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == stop:
            raise KeyboardInterrupt
        return kwargs

    with vtr.apply(pipe, method):
        want = pipes.call(pipe, name, 5)
        method.seen.clear()
        with pytest.raises(KeyboardInterrupt):
            pipes.call(pipe, name, 5, callback_on_step_end=break_off)
        method.seen.clear()
        assert torch.equal(pipes.call(pipe, name, 5), want)
    assert method.seen[0][:2] == (2, 0)
    assert all(count == 0 for *_, step, _, _, _, count in method.seen if step == 0)


@pytest.mark.parametrize("name", ["wan", "wan2.2", "sd3", "pixart"])
def test_states_are_let_go(name: str) -> None:
    """They may be gigabytes: an expert's end with its part of the run, all with the run."""
    pipe = pipes.make(name)
    held: list[set[int]] = []

    class Look(Watch):
        def attend(self, site: Any) -> Tensor:
            held.append({key[1] for key in wrapping.run.states})
            return super().attend(site)

    with vtr.apply(pipe, Look()) as handle:
        wrapping: Any = handle._wrapping
        pipes.call(pipe, name, 8)
        assert not wrapping.run.states
    assert held[0] == {0}
    assert held[-1] == ({1} if name == "wan2.2" else {0})


@pytest.mark.parametrize("fail_at", [0, 2])
def test_an_error_inside_attention_leaves_the_model_usable(fail_at: int) -> None:
    pipe = pipes.make("wan")
    dense = pipes.call(pipe, "wan", 4)
    handle = vtr.apply(pipe, Watch(fail_at=fail_at))
    with pytest.raises(ArithmeticError, match="on purpose"):
        pipes.call(pipe, "wan", 4)
    handle.remove()
    assert torch.equal(pipes.call(pipe, "wan", 4), dense)
    with vtr.apply(pipe, Fixed()):
        sparse = pipes.call(pipe, "wan", 4)
    with vtr.apply(pipe.transformer, Fixed()):
        assert torch.equal(pipes.call(pipe, "wan", 4), sparse)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", pipes.PIPES)
def test_a_run_that_an_exception_ends_is_forgotten(name: str) -> None:
    pipe = pipes.make(name)
    dense = pipes.call(pipe, name, 3)
    method = Watch()
    with vtr.apply(pipe, method):
        want = pipes.call(pipe, name, 3)
        object.__setattr__(method, "fail_at", 1)
        with pytest.raises(ArithmeticError, match="on purpose"):
            pipes.call(pipe, name, 3)
        object.__setattr__(method, "fail_at", None)
        method.seen.clear()
        assert torch.equal(pipes.call(pipe, name, 3), want)
        assert method.seen[0][1] == 0 and method.seen[0][-1] == 0
    assert torch.equal(pipes.call(pipe, name, 3), dense)


def image_to_image(pipe: Any, **changes: Any) -> Any:
    """A pipeline of SD3's transformer that begins in the midst of its schedule."""
    from diffusers import AutoencoderKL, StableDiffusion3Img2ImgPipeline

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    other = StableDiffusion3Img2ImgPipeline(**{**pipe.components, "vae": vae, **changes})
    given = {k: v for k, v in pipes.PIPES["sd3"][1].items() if k not in ("height", "width")}

    def run(steps: int) -> None:
        other.set_progress_bar_config(disable=True)
        other(image=torch.zeros(1, 4, 10, 14), strength=0.5, num_inference_steps=steps, **given)

    return run


def test_another_pipeline_of_the_same_transformer_has_its_own_steps() -> None:
    pipe = pipes.make("sd3")
    method = Watch(dense_steps=0.5)
    with vtr.apply(pipe, method):
        pipes.call(pipe, "sd3", 2)
        method.seen.clear()
        image_to_image(pipe)(8)
    assert {s[1:3] for s in method.seen} == {(2, 4), (3, 4)}


def test_the_steps_of_a_pipeline_that_is_not_known_are_not_guessed() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = pipes.make("sd3")
    run = image_to_image(pipe, scheduler=FlowMatchEulerDiscreteScheduler())
    with (
        vtr.apply(pipe, Watch(dense_steps=0.5)),
        pytest.raises(RuntimeError, match="their number is not known"),
    ):
        run(8)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_run_may_begin_at_any_timestep_in_low_precision(scale: float, dtype: torch.dtype) -> None:
    """Flux and Qwen-Image round it twice: they divide by 1000 in the dtype of the latents."""
    times = torch.linspace(1000, 20, 50) - 0.4
    scheduler = Mock(timesteps=times, num_inference_steps=50)
    pipe = Mock(scheduler=scheduler)
    given = times.to(dtype) / scale
    found = [ScheduleRef(pipe).steps(float(t), scale, dtype) for t in given]
    assert found == list(range(50, 0, -1))


@pytest.mark.parametrize("begin", [0, 7])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_beginning_of_a_schedule_that_rounding_makes_one_number(
    scale: float, begin: int
) -> None:
    times = 1000 - torch.linspace(0, 1, 20)
    given = times.bfloat16() / scale
    assert len(set(given.tolist())) == 1
    scheduler = Mock(timesteps=times, num_inference_steps=20, begin_index=begin)
    value = float(given[begin])
    assert ScheduleRef(scheduler=scheduler).steps(value, scale, torch.bfloat16) == 20 - begin
    scheduler.begin_index = None
    assert ScheduleRef(scheduler=scheduler).steps(value, scale, torch.bfloat16) == 20
    pipe = Mock(scheduler=scheduler, current_timestep=times[begin])
    assert ScheduleRef(pipe).steps(value, scale, torch.bfloat16) == 20 - begin


def test_the_schedule_says_which_way_its_timesteps_go() -> None:
    from diffusers import FlowMatchLCMScheduler

    pipe, method = pipes.make("mochi"), Watch()
    pipe.scheduler = FlowMatchLCMScheduler()  # falling; Mochi's own rises
    with vtr.apply(pipe, method):
        pipes.call(pipe, "mochi", 3)
    assert list(dict.fromkeys(s[:3] for s in method.seen)) == [(0, 0, 3), (0, 1, 3), (0, 2, 3)]


@pytest.mark.parametrize("kind", ["HeunDiscreteScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("name", ["cogvideox", "pixart"])
def test_timesteps_that_come_twice_are_two_steps(name: str, kind: str) -> None:
    import diffusers

    pipe, method = pipes.make(name), Watch()
    options = {"skip_prk_steps": True} if kind == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers, kind)(**options)
    with vtr.apply(pipe, method):
        pipes.call(pipe, name, 3)
    steps = len(pipe.scheduler.timesteps)
    want = [(i, steps, *pipes.PIPES[name][2]) for i in range(steps)]
    assert steps > 3 and [s[1:4] for s in method.seen if s[4] == 0] == want


def test_a_cache_that_leaves_out_half_of_the_batch() -> None:
    """FasterCache guesses the unconditional half of some calls: what is left keeps its branch."""
    from diffusers import FasterCacheConfig

    pipe, method = pipes.make("mochi"), Watch()
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=1, unconditional_batch_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 2000), attention_weight_callback=lambda _: 0.5,
        unconditional_batch_timestep_skip_range=(-1, 2000),
        current_timestep_callback=lambda: pipe.current_timestep,
    )  # fmt: skip
    pipe.transformer.enable_cache(config)
    with vtr.apply(pipe, method):
        pipes.call(pipe, "mochi", 4)
    branches = {step: [s[3][-1] for s in method.seen if s[1] == step] for step in range(4)}
    assert set(branches[0]) == {"0", "1"}
    assert set(branches[1]) == set(branches[2]) == {"1"}


def test_a_share_of_the_steps_needs_their_number() -> None:
    case, model = CASES["sd3"], CASES["sd3"].build()
    with (
        vtr.apply(model, Fixed(dense_steps=0.5)),
        pytest.raises(RuntimeError, match="apply the method to the pipeline"),
    ):
        model(**case.call())
    with torch.no_grad(), vtr.apply(model, Fixed(dense_steps=0.5), steps=4) as handle:
        densities = []
        for time in (900.0, 700.0, 500.0, 300.0):
            model(**case.call(time=time))
            densities.append(handle.trace.notes["attention"][0]["density"])
    assert densities[:2] == [1.0, 1.0]
    with pytest.raises(ValueError, match="number of denoising steps"):
        vtr.apply(model, Fixed(), steps=0)


def test_training_has_no_steps() -> None:
    case, model = CASES["wan"], CASES["wan"].build().train()
    method = Watch(dense_steps=3)
    with vtr.apply(model, method):
        for time in (500.0, 200.0, 900.0):
            model(**case.call(time=time))
    assert [s[:2] for s in method.seen if s[4] == 0] == [(0, 0), (1, 0), (2, 0)]
    assert all(s[-1] == 0 for s in method.seen)


def places(calls: list[tuple[float, dict[str, Any]]], **common: Any) -> list[tuple[int, int, str]]:
    session = Session()
    return [tuple(session.enter(0, time, **{**common, **facts})) for time, facts in calls]


def test_calls_without_names() -> None:
    calls = [(t, {}) for t in (9.0, 9.0, 5.0, 5.0, 9.0, 9.0, 5.0)]
    assert places(calls) == [
        (0, 0, "0"), (0, 0, "1"), (0, 1, "0"), (0, 1, "1"), (1, 0, "0"), (1, 0, "1"), (1, 1, "0"),
    ]  # fmt: skip
    rising = places([(t, {}) for t in (0.0, 5.0, 0.0)], rising=True)
    assert rising == [(0, 0, "0"), (0, 1, "0"), (1, 0, "0")]


def test_names_that_come_again() -> None:
    # A second-order schedule repeats timesteps; a run broken off in its first step starts again.
    calls = [(t, {"name": "cond"}) for t in (9.0, 5.0, 5.0, 1.0, 9.0, 9.0)]
    assert [p[:2] for p in places(calls)] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0)]


def test_names_that_come_again_with_other_latents_are_the_next_step() -> None:
    calls = [
        (9.0, {"name": name, "latents": torch.tensor(norm)})
        for name, norm in [("c", 1.0), ("u", 1.0), ("c", 2.0), ("u", 2.0), ("c", 3.0)]
    ]
    assert [p[:2] for p in places(calls)] == [(0, 0), (0, 0), (0, 1), (0, 1), (0, 2)]
    again = [(9.0, {"name": "c", "latents": torch.tensor(1.0)})] * 2
    assert [p[:2] for p in places(again)] == [(0, 0), (1, 0)]


def test_the_pipelines_own_index_decides() -> None:
    calls = [(t, {"name": n, "index": i}) for t, n, i in
             [(9.0, "c", 0), (9.0, "u", 0), (9.0, "c", 1), (5.0, "c", 2), (9.0, "c", 0)]]  # fmt: skip
    assert [p[:2] for p in places(calls)] == [(0, 0), (0, 0), (0, 1), (0, 2), (1, 0)]


def test_a_new_schedule_is_a_new_run() -> None:
    a, b = Clock(torch.tensor([9.0])), Clock(torch.tensor([9.0]))
    calls = [(9.0, {"clock": a}), (9.0, {"clock": a}), (9.0, {"clock": b})]
    assert places(calls) == [(0, 0, "0"), (0, 0, "1"), (1, 0, "0")]


@pytest.mark.parametrize("name", [None, "cond"])
def test_a_schedule_that_moves_on_is_the_next_step(name: str | None) -> None:
    """By the scheduler's index or by the pipeline's current timestep, whatever the timestep is."""
    times = torch.tensor([9.0, 9.0, 9.0])
    clocks = [Clock(times, position) for position in (None, 1, 2)]
    clocks += [Clock(torch.tensor([9.0, 9.0]), None, torch.tensor(9.0)) for _ in range(1)]
    clocks += [clocks[-1]._replace(current=torch.tensor(9.0))]
    found = places([(9.0, {"clock": c, "name": name}) for c in clocks])
    assert found == [(0, 0, name or "0"), (0, 1, name or "0"), (0, 2, name or "0"),
                     (1, 0, name or "0"), (1, 1, name or "0")]  # fmt: skip


def test_a_timestep_that_comes_twice_in_a_schedule_that_says_nothing_else() -> None:
    clock = Clock(torch.tensor([9.0, 9.0, 5.0]))
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    calls = [(9.0, {"latents": x}) for x in (one, one, two, two)] + [(5.0, {"latents": one})]
    found = places(calls, clock=clock, repeats=lambda: True)
    assert found == [(0, 0, "0"), (0, 0, "1"), (0, 1, "0"), (0, 1, "1"), (0, 2, "0")]
    alone = places(calls, clock=clock)  # no other step has it: these are branches
    assert [p[:2] for p in alone] == [(0, 0)] * 4 + [(0, 1)]


def test_what_is_over_does_not_go_on() -> None:
    session = Session()
    session.enter(0, 9.0, name="cond")
    session.end()
    assert session.enter(0, 5.0, name="cond") == (1, 0, "cond")
    assert session.enter(0, 1.0, name="cond") == (1, 1, "cond")


def test_a_schedule_that_has_come_to_its_end_tells_nothing() -> None:
    """Its pipeline is not the one that calls."""
    times = torch.tensor([9.0, 5.0])
    scheduler = Mock(timesteps=times, step_index=1, begin_index=None, num_inference_steps=2)
    schedule = ScheduleRef(scheduler=scheduler)
    assert schedule.clock() == (times, 1, None) and schedule.steps(9.0, 1.0) == 2
    scheduler.step_index = 2
    assert schedule.clock() == Clock() and schedule.steps(9.0, 1.0) is None


def test_a_state_is_of_as_many_samples() -> None:
    run = DiffusionRun(0, 4)
    run.state(2, 0, 0, "cond", 1)["ratio"] = 0.5
    assert run.state(2, 0, 0, "cond", 1) == {"ratio": 0.5}
    assert run.state(1, 0, 0, "cond", 1) == {} == run.state(2, 0, 0, "cond", 1)
