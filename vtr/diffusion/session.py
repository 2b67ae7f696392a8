"""Count the run, step and branch a call of a transformer belongs to."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtr.compat.diffusers import BEGIN, CURRENT, POSITION


class Moment(NamedTuple):
    """Run, step and branch of a call, as in :class:`vtr.diffusion.site.CallFacts`."""

    run: int
    step: int
    branch: str


class Clock(NamedTuple):
    """The facts that the schedule of a pipeline shows at a call.

    Attributes:
        times: the schedule, a new object in every run; None if it is not known.
        position: how far the scheduler has come in it; None before its first step, and for
            schedulers that do not count (DDIM, DDPM).
        current: the pipeline's current timestep, a new object in every step; None for pipelines
            that do not keep it.
    """

    times: Tensor | None = None
    position: int | None = None
    current: Tensor | None = None

    @property
    def tells_steps(self) -> bool:
        """Tell whether a new step shows without a look at its timestep."""
        return self.position is not None or self.current is not None


class ScheduleRef:
    """The pipeline, or the scheduler, that runs a transformer: known but not owned. A copy of the
    transformer does not copy it; a copy of the pipeline refers to the copy."""

    def __init__(self, pipeline: Any = None, scheduler: Any = None) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._scheduler = None if scheduler is None else weakref.ref(scheduler)

    def __deepcopy__(self, memo: dict[int, Any]) -> ScheduleRef:
        held = (ref and ref() for ref in (self._pipeline, self._scheduler))
        return ScheduleRef(*(None if each is None else memo.get(id(each)) for each in held))

    def __reduce__(self) -> tuple[Any, ...]:
        return ScheduleRef, ()

    @property
    def pipeline(self) -> Any:
        return None if self._pipeline is None else self._pipeline()

    @property
    def scheduler(self) -> Any:
        if self._scheduler is not None:
            return self._scheduler()
        return getattr(self.pipeline, "scheduler", None)

    def clock(self) -> Clock:
        """Read what the schedule shows now: nothing if it has come to its end, since the call is then of
        another pipeline."""
        scheduler, pipeline = self.scheduler, self.pipeline
        if self._over():
            return Clock()
        times = getattr(scheduler, "timesteps", None)
        position = getattr(scheduler, POSITION, None)
        current = getattr(pipeline, CURRENT, None)
        return Clock(
            times if isinstance(times, Tensor) else None,
            position if isinstance(position, int) else None,
            current if isinstance(current, Tensor) else None,
        )

    def _over(self) -> bool:
        """Tell whether the scheduler has taken all its steps."""
        times = getattr(self.scheduler, "timesteps", None)
        position = getattr(self.scheduler, POSITION, None)
        if not isinstance(times, Tensor) or not isinstance(position, int):
            return False
        return position >= len(times)

    def steps(self, time: float, scale: float, dtype: torch.dtype | None = None) -> int | None:
        """Denoising steps of a run that begins at ``time``, or None if the schedule does not
        say: it was never set, or has no such timestep (another pipeline runs).

        Counted in the schedule from there on, since image-to-image begins in its midst. Every entry
        is a step, a timestep that comes again (second-order schedulers) too.

        Args:
            time: the timestep that the transformer was given.
            scale: the schedule's timesteps over the transformer's.
            dtype: of the given timestep: entries may be one after rounding to it.
        """
        scheduler, (times, _, current) = self.scheduler, self.clock()
        unset = getattr(scheduler, "num_inference_steps", None) is None
        if times is None or (unset and not getattr(scheduler, "custom_timesteps", False)):
            return None
        entries = times.flatten().tolist()
        apart = [abs(entry - time * scale) for entry in entries]
        rounded = _ROUNDING if scale == 1 else 2 * _ROUNDING  # before the division and after it
        near = rounded * max(1.0, abs(time * scale))
        if not apart or min(apart) > near:
            return None
        begin = getattr(scheduler, BEGIN, None)
        if isinstance(begin, int) and begin < len(entries) and apart[begin] <= near:
            return len(entries) - begin
        now = None if current is None else float(current)
        if now in entries and apart[entries.index(now)] <= near:  # Mochi's counts the other way
            return len(entries) - entries.index(now)
        # A run that does not say where it begins, begins as early as it may.
        alike = _alike(times, time, scale, dtype) or [apart.index(min(apart))]
        return len(entries) - alike[0]

    def repeats(self, time: float, scale: float, dtype: torch.dtype | None) -> bool:
        """Tell whether several steps of the schedule have the timestep ``time`` after rounding."""
        times = self.clock().times
        return times is not None and len(_alike(times, time, scale, dtype)) > 1


_ROUNDING = 2.0**-8
"""Relative rounding of a timestep in bfloat16, in which some pipelines pass it."""


def _alike(times: Tensor, time: float, scale: float, dtype: torch.dtype | None) -> list[int]:
    """The entries of a schedule that are ``time`` once a pipeline has rounded and scaled them."""
    given = times.flatten().to(dtype) if dtype is not None else times.flatten()
    given = given / scale if scale != 1 else given
    return [at for at, entry in enumerate(given.tolist()) if entry == time]


@dataclass
class Session:
    """Counts runs and steps from what calls show; nothing is counted per layer or per processor,
    so that a cache that skips layers, or an exception, leaves the counts right.

    Another schedule object is a new run. A new step shows in the pipeline's own step index if it
    gives one, in the schedule (:class:`Clock`: the scheduler has moved on, the pipeline has another
    current timestep), or in the timestep. A timestep alone does not decide: pipelines round it to
    the dtype of the latents, and second-order schedulers repeat it. While the schedule is the same,
    neither an equal timestep nor a name of a branch that comes again is a new run.

    If no schedule is known, a timestep that jumps back is a new run, and calls of one timestep
    are branches of one step; if they have names, a name that comes again is the next step if the
    latents have changed, else a run that starts again.
    """

    run: int = -1
    step: int = 0
    time: float = 0.0
    clock: Clock = field(default_factory=Clock)
    rising: bool = False
    over: bool = False
    seen: set[tuple[int, str]] = field(default_factory=set)
    latents: Tensor | None = None

    def end(self) -> None:
        """The run is over, or was broken off: the next call is of another."""
        self.over = True

    def enter(
        self,
        member: int,
        time: float,
        *,
        name: str | None = None,
        index: int | None = None,
        clock: Clock | None = None,
        repeats: Callable[[], bool] = lambda: False,
        latents: Tensor | None = None,
        rising: bool = False,
        training: bool = False,
    ) -> Moment:
        """Register a call.

        Args:
            member: number of the transformer in the pipeline.
            time: its timestep.
            name: of the branch, None if it has none.
            index: the pipeline's own 0-based step.
            clock: what the pipeline's schedule shows.
            repeats: whether several steps of the schedule have this timestep.
            latents: what tells the latents of a call from others, (); only looked at if nothing
                else decides, since that waits for the device.
            rising: whether timesteps rise during a run, if no schedule tells.
            training: each call is a new run.
        """
        clock = Clock() if clock is None else clock
        times = clock.times
        other = times is not None and times is not self.clock.times
        if times is None:
            self.rising = rising
        elif other:
            self.rising = bool(times.flatten()[-1] > times.flatten()[0])
        again = name is not None and (member, name) in self.seen
        if self.run < 0 or training or self.over or other:
            fresh, step = True, index or 0
        elif index is not None:
            fresh = index < self.step or (index == self.step and again)
            step = index
        else:
            fresh, further = self._compare(time, clock, name, again, repeats, latents)
            step = 0 if fresh else self.step + further
        if fresh:
            self.run += 1
        if fresh or step != self.step:
            self.seen, self.latents = set(), latents
        self.step, self.time, self.over = step, time, False
        self.clock = clock if times is not None else clock._replace(times=self.clock.times)
        branch = str(sum(m == member for m, _ in self.seen)) if name is None else name
        self.seen.add((member, branch))
        return Moment(self.run, step, branch)

    def _compare(
        self, time: float, clock: Clock, name: str | None, again: bool,
        repeats: Callable[[], bool], latents: Tensor | None,
    ) -> tuple[bool, bool]:  # fmt: skip
        """Tell whether a call begins a run, and whether it begins a step, by what the last one showed."""
        before = self.clock
        back = time != self.time and (time > self.time) != self.rising
        if clock.position != before.position:
            restarted = clock.position is None or clock.position < (before.position or 0)
            return restarted, not restarted
        if clock.current is not before.current or time != self.time:
            return back, not back
        if again:
            restarted = self.step == 0 and not clock.tells_steps and self._same(latents)
            return restarted, not restarted
        if name is None and not clock.tells_steps and repeats():
            return False, not self._same(latents)
        return False, False

    def _same(self, latents: Tensor | None) -> bool:
        """Tell whether these are the latents of the step's first call."""
        if latents is None or self.latents is None:
            return True
        return latents.device == self.latents.device and bool(latents == self.latents)
