"""Which run, step and branch a call of a transformer belongs to."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """Where a call stands: run, step and branch as in :class:`vtr.diffusion.site.Call`."""

    run: int
    step: int
    branch: str


class PipelineRef:
    """A pipeline that is known but not owned: a copy of its transformer does not copy it, a copy of
    the pipeline refers to the copy."""

    def __init__(self, pipeline: Any = None) -> None:
        self._ref = None if pipeline is None else weakref.ref(pipeline)

    def __call__(self) -> Any:
        return None if self._ref is None else self._ref()

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineRef:
        pipeline = self()
        return PipelineRef(None if pipeline is None else memo.get(id(pipeline)))

    def __reduce__(self) -> tuple[Any, ...]:
        return PipelineRef, ()

    @property
    def timesteps(self) -> Tensor | None:
        """The schedule of the current run: a new object in every run."""
        found = getattr(getattr(self(), "scheduler", None), "timesteps", None)
        return found if isinstance(found, Tensor) else None

    def steps(self, time: float, scale: float, named: bool) -> int | None:
        """Denoising steps of a run that begins at ``time``, or None where this pipeline does not
        say: its schedule was never set, or has no such timestep (another pipeline runs).

        Counted in the schedule from there on, since image-to-image begins in its midst.

        Args:
            scale: the schedule's timesteps over the model's.
            named: whether calls have names of branches. Then a timestep that comes again
                (second-order schedulers) is a step of its own, as it is for :class:`Session`.
        """
        times = self.timesteps
        scheduler = getattr(self(), "scheduler", None)
        unset = getattr(scheduler, "num_inference_steps", None) is None
        if times is None or (unset and not getattr(scheduler, "custom_timesteps", False)):
            return None
        entries = times.flatten().tolist()
        apart = [abs(entry - time * scale) for entry in entries]
        rounded = _ROUNDING if scale == 1 else 2 * _ROUNDING  # before the division and after it
        if not apart or min(apart) > rounded * max(1.0, abs(time * scale)):
            return None
        rest = entries[apart.index(min(apart)) :]
        return len(rest) if named else len(set(rest))


_ROUNDING = 2.0**-8
"""Relative rounding of a timestep in bfloat16, in which some pipelines pass it."""


@dataclass
class Session:
    """Counts runs and steps from what calls show; nothing is counted per layer or per processor,
    so that a cache that skips layers, or an exception, leaves the counts right.

    A new timestep is a new step; a timestep that jumps back to the start of a schedule, or another
    schedule object of the pipeline, is a new run. The pipeline's own step index decides where it
    gives one. A call with the timestep of the one before is the next branch of the step; where
    branches have names, a name that comes again is a new run at the first step (the last one was
    interrupted), else a step of the same timestep (second-order schedulers).
    """

    run: int = -1
    step: int = 0
    time: float = 0.0
    times: Tensor | None = None
    rising: bool = False
    seen: set[tuple[int, str]] = field(default_factory=set)

    def enter(
        self,
        member: int,
        time: float,
        *,
        name: str | None = None,
        index: int | None = None,
        times: Tensor | None = None,
        rising: bool = False,
        training: bool = False,
    ) -> Place:
        """Register a call.

        Args:
            member: number of the transformer in the pipeline.
            time: its timestep.
            name: of the branch, None where it has none.
            index: the pipeline's own 0-based step.
            times: the pipeline's schedule.
            rising: whether timesteps rise during a run, where no schedule tells.
            training: each call is a run of its own.
        """
        again = name is not None and (member, name) in self.seen
        if times is None:
            self.rising = rising
        elif times is not self.times:
            self.rising = bool(times.flatten()[-1] > times.flatten()[0])
        if self.run < 0 or training or (times is not None and times is not self.times):
            fresh, step = True, index or 0
        elif index is not None:
            fresh = index < self.step or (index == self.step and again)
            step = index
        elif time != self.time:
            fresh = (time > self.time) != self.rising
            step = 0 if fresh else self.step + 1
        else:
            fresh = again and self.step == 0
            step = self.step + (again and not fresh)
        if fresh:
            self.run += 1
        if fresh or step != self.step:
            self.seen = set()
        self.step, self.time, self.times = step, time, times if times is not None else self.times
        branch = str(sum(m == member for m, _ in self.seen)) if name is None else name
        self.seen.add((member, branch))
        return Place(self.run, step, branch)
