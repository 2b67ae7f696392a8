"""The loop that every training of this package shares.

A :class:`Tuner` takes steps with AdamW on accelerate: one to many processes, mixed precision, gradient accumulation,
averaged weights. Its :meth:`~Tuner.run` shows the progress, writes ``log.jsonl`` and checkpoints, and may be killed
at any time: resumed on a CPU, the rest of the run is bit for bit what it would have been. Everything random in a step
follows from the seed and the number of the batch.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from vtr.core.calibration import Fingerprint
from vtr.core.method import Method
from vtr.errors import UnsupportedModelError, missing
from vtr.train.settings import LoopSettings
from vtr.train.state import load_state, moments, put_moments, save_state

STATE = "state.safetensors"
LOG = "log.jsonl"


class Tuner:
    """Base of the training loops. A subclass prepares its student and defines :meth:`loss_of`.

    Its ``__init__`` calls :meth:`open`, builds the student, calls :meth:`begin`, and, if there is a state,
    :meth:`load`.

    Attributes:
        position: steps done.
        method: as it is trained.
        origin: fingerprint of the model before training.
        student: the trained module, as accelerate has prepared it.
        weights: the trained parameters by name, in the order of the optimiser's groups.
        optimizer: AdamW, as accelerate has prepared it.
        averages: the averaged weights; empty without ``ema``.
    """

    EXTRA = "diffusion"
    """Extra of the package that has accelerate."""

    HINT = "Call model.requires_grad_(True)"
    """Advice if nothing is trained."""

    settings: LoopSettings
    method: Method
    origin: Fingerprint

    # ---- for subclasses -------------------------------------------------------------------------

    def loss_of(self, batch: Any, number: int) -> Tensor | tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss of one batch, a scalar; and what else the log shows, scalars by name.

        Args:
            batch: on the device.
            number: of the batch, over all processes.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss_of(batch, number)")

    def moved(self, batch: Any, device: torch.device) -> Any:
        """Return a batch on the device. Raises ``ValueError`` if it is none."""
        raise NotImplementedError(f"{type(self).__name__} must define moved(batch, device)")

    def prepare_step(self, step: int) -> None:
        """Do what comes before a step: schedules of the method."""

    def facts(self) -> dict[str, float]:
        """Return what else the log shows after a step."""
        return {}

    def check_first_step(self) -> None:
        """Raise if the gradients of the first step show that nothing can be learned."""
        if all(p.grad is None for p in self.weights.values()):
            raise RuntimeError(f"no gradient reached the weights through {self.method}")

    def export(self, folder: str | Path | None = None) -> Path:
        """Write the result into a folder (None: that of the run)."""
        raise NotImplementedError(f"{type(self).__name__} must define export(folder)")

    def close(self) -> None:
        """Give the model back. Doing it twice is harmless."""
        raise NotImplementedError(f"{type(self).__name__} must define close()")

    # ---- the beginning --------------------------------------------------------------------------

    def open(
        self,
        data: Any,
        out: str | Path | None,
        settings: LoopSettings,
        resume: bool,
        accelerator: Any,
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Take the arguments; returns the state of the run in ``out`` if it is to be resumed.

        Raises:
            FileExistsError: ``out`` holds a run, and ``resume`` is False.
            FileNotFoundError: ``resume`` is True, and ``out`` holds no run.
            ValueError: the accelerator does not fit the settings.
            MissingDependencyError: accelerate or the tracker is not installed.
        """
        if out is None and resume:
            raise ValueError("resume=True needs the folder of the run: give out=")
        self.settings, self.data, self.position = settings, data, 0
        self.folder = None if out is None else Path(out)
        self.averages: dict[str, Tensor] = {}
        self._pending: dict[str, list[float]] = {}
        self._batches: Iterator[Any] | None = None
        self._tracking = False
        state = None
        if self.folder is not None:
            if not resume and (self.folder / STATE).exists():
                raise FileExistsError(
                    f"{out} holds a run: resume=True continues it, or choose another folder"
                )
            state = load_state(self.folder / STATE) if resume else None
        self.accelerator = accelerator or _accelerator(settings, self.folder, self.EXTRA)
        _check_accelerator(self.accelerator, settings)
        return state

    def begin(self, student: nn.Module, groups: list[dict[str, Any]]) -> None:
        """Take the student and the groups of its trained parameters, each with its ``lr``.

        Raises:
            ValueError: nothing is trained, or a weight is not in float32.
        """
        settings, device = self.settings, self.accelerator.device
        student = student.to(device)
        names = {id(p): n for n, p in student.named_parameters()}
        groups = [group for group in groups if group["params"]]
        self.weights: dict[str, nn.Parameter] = {
            names[id(p)]: p for group in groups for p in group["params"]
        }
        _check_weights(self.weights, self.HINT)
        self._rates = [group["lr"] for group in groups]
        optimizer = torch.optim.AdamW(
            groups, weight_decay=settings.weight_decay, betas=settings.betas
        )
        if settings.ema is not None:
            self.averages = {n: p.detach().clone() for n, p in self.weights.items()}
        self._held = student
        self.scaler = (
            torch.amp.GradScaler(device.type) if settings.precision == "fp16" else None  # type: ignore[attr-defined]
        )
        self.student, self.optimizer = self.accelerator.prepare(student, optimizer)

    @property
    def out(self) -> Path:
        """Folder of the run. Raises ``ValueError`` if it has none (``out=None``), so that it only takes steps."""
        if self.folder is None:
            raise ValueError("this run has no folder (out=None): take steps, or give out=")
        return self.folder

    # ---- a step ---------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """Take one optimiser step.

        Returns:
            ``loss`` and what else :meth:`loss_of` and :meth:`facts` return, averaged over the batches of the
            step and all processes, ``norm`` of the gradient before clipping (0 without clipping), and ``rate``
            of the first group of weights.

        Raises:
            RuntimeError: gradients are switched off (``torch.no_grad``), or none reached the weights.
        """
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise RuntimeError(
                "a training step needs gradients, which torch.no_grad or torch.inference_mode has switched off"
            )
        settings, step, device = self.settings, self.position, self.accelerator.device
        self.prepare_step(step)
        factor = settings.factor(step)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        totals: dict[str, Tensor] = {}
        processes, own = self.accelerator.num_processes, self.accelerator.process_index
        for part in range(settings.accumulate):
            number = (step * settings.accumulate + part) * processes + own
            batch = self.moved(self._batch(number), device)
            last = part == settings.accumulate - 1
            with (
                nullcontext() if last else self.accelerator.no_sync(self.student),
                seeded(settings.seed * 1_000_003 + number, device),
            ):
                found = self.loss_of(batch, number)
                loss, seen = found if isinstance(found, tuple) else (found, {})
                scaled = loss / settings.accumulate
                self.accelerator.backward(
                    scaled if self.scaler is None else self.scaler.scale(scaled)
                )
            for name, value in {"loss": loss, **seen}.items():
                share = value.detach().float() / settings.accumulate
                totals[name] = totals[name] + share if name in totals else share
        if step == 0:
            self.check_first_step()
        norm = self._descend()
        self.position += 1
        self._average()
        # One look at the device per step.
        means = self.accelerator.reduce(torch.stack(list(totals.values())), reduction="mean")
        news = dict(zip(totals, means.tolist(), strict=True))
        loss_now = news.pop("loss")
        return {
            "loss": loss_now,
            "norm": norm,
            "rate": self._rates[0] * factor,
            **news,
            **self.facts(),
        }

    def _descend(self) -> float:
        clip, norm = self.settings.clip, 0.0
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if clip is not None:
            norm = float(self.accelerator.clip_grad_norm_(list(self.weights.values()), clip))
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        return norm

    def autocast(self) -> Any:
        """Return the context in which the student computes in the precision of the settings."""
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.settings.precision)
        kind = self.accelerator.device.type
        return torch.autocast(kind, low, enabled=low is not None)

    def _batch(self, number: int) -> Any:
        if callable(self.data):
            return self.data(number)
        processes = self.accelerator.num_processes
        if self._batches is None:
            if hasattr(self.data, "stream"):
                self._batches = iter(self.data.stream(number, processes))
            else:
                self._batches = _endless(self.data)
                for _ in range(number // processes):  # those of the steps before resuming
                    next(self._batches)
        return next(self._batches)

    @torch.no_grad()
    def _average(self) -> None:
        if self.settings.ema is None:
            return
        # The average of few steps must not remember the start.
        share = 1 - min(self.settings.ema, self.position / (self.position + 9))
        for name, kept in self.averages.items():
            kept.lerp_(self.weights[name].detach(), share)

    # ---- a run ----------------------------------------------------------------------------------

    def run(self, minutes: float | None = None) -> bool:
        """Train to the last step, with a progress bar, checkpoints and a line of ``log.jsonl`` every
        ``log_every`` steps (means of the steps since the line before); then :meth:`export`.

        Args:
            minutes: stop after so long; ``resume=True`` continues.

        Returns:
            True if the last step is done.
        """
        settings, name = self.settings, self.method.name
        self.out.mkdir(parents=True, exist_ok=True)
        self._track()
        started = time.monotonic()
        with _bar(self.accelerator.is_main_process) as bar:
            task = bar.add_task(name, total=settings.steps, completed=self.position, news="")
            while self.position < settings.steps:
                if minutes is not None and time.monotonic() - started > 60 * minutes:
                    break
                news = self.step()
                for key, value in news.items():
                    self._pending.setdefault(key, []).append(value)
                bar.update(task, completed=self.position, news=_news(news))
                if self.position % settings.log_every == 0:
                    self._log({"seconds": time.monotonic() - started})
                if self.position % settings.save_every == 0:
                    self.save()
        self.save()
        if self.accelerator.is_main_process:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self._tracking = False
        self.accelerator.trackers.clear()
        if self.position < settings.steps:
            return False
        self.export()
        return True

    def _track(self) -> None:
        """Start the trackers, once per run."""
        if self.accelerator.log_with and not self._tracking:
            config = {k: v if isinstance(v, (int, float, str)) else json.dumps(v)
                      for k, v in self.settings.to_dict().items()}  # fmt: skip
            self.accelerator.init_trackers("vtr", {**config, "method": str(self.method)})
            self._tracking = True

    def _log(self, more: Mapping[str, float]) -> None:
        """Write the means since the last line."""
        means = {key: sum(values) / len(values) for key, values in self._pending.items()}
        self._pending = {}
        line = {key: v if math.isfinite(v) else None for key, v in {**means, **more}.items()}
        if self._tracking:
            shown = {key: value for key, value in line.items() if value is not None}
            self.accelerator.log(shown, step=self.position)
        if self.accelerator.is_main_process:
            with open(self.out / LOG, "a", encoding="utf-8") as log:
                log.write(json.dumps({"step": self.position, **line}) + "\n")

    # ---- the state ------------------------------------------------------------------------------

    def _buffers(self) -> dict[str, Tensor]:
        """The student's buffers that belong to its state."""
        held = self._held.state_dict(keep_vars=True)
        return {n: b for n, b in held.items() if not isinstance(b, nn.Parameter)}

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that the next step depends on, by name."""
        tensors: dict[str, Tensor] = {f"weights.{n}": p for n, p in self.weights.items()}
        tensors |= {f"averages.{n}": p for n, p in self.averages.items()}
        tensors |= {f"buffers.{n}": b for n, b in self._buffers().items()}
        return tensors | moments(self.optimizer, list(self.weights))

    def save(self) -> None:
        """Write the checkpoint as safetensors, without pickle. A kill while it is written leaves the one before."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        about = {**self._about(), "step": self.position, "model": self.origin.to_dict()}
        about["pending"] = self._pending
        if self.scaler is not None:
            about["scaler"] = self.scaler.state_dict()
        save_state(self.out / STATE, self.state(), about)

    def _about(self) -> dict[str, Any]:
        options = json.loads(json.dumps(self.method.to_dict()))
        return {"settings": self.settings.to_dict(), "method": options}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Continue from the checkpoint in the run's folder.

        Raises:
            UnsupportedModelError: it is of another model.
            ValueError: it is of another method, of other settings, or not of this kind of run.
        """
        difference = Fingerprint.from_dict(about["model"]).difference(self.origin)
        if difference:
            raise UnsupportedModelError(
                f"the run in {self.out} began with another model: {difference}. Give the model that it began "
                "with, before any training"
            )
        for part, now in self._about().items():
            changed = sorted(k for k in {*now, *about[part]} if now.get(k) != about[part].get(k))
            if changed:
                raise ValueError(
                    f"the run in {self.out} has another {part.removesuffix('s')} ({', '.join(changed)} differ): "
                    "give the same, or another folder"
                )
        self.load_tensors(tensors, int(about["step"]))
        self._pending = {key: list(values) for key, values in about.get("pending", {}).items()}
        if self.scaler is not None:
            self.scaler.load_state_dict(about["scaler"])
        if self.accelerator.is_main_process:
            _shorten(self.out / LOG, self.position)

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor], position: int) -> None:
        """Put back what :meth:`state` returned after ``position`` steps."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "weights": self.weights,
            "averages": self.averages,
            "buffers": self._buffers(),
        }
        for place, held in parts.items():
            for name, tensor in held.items():
                if f"{place}.{name}" not in tensors:
                    raise ValueError(
                        f"the checkpoint has no {place}.{name}: another release wrote it, or the "
                        "model has other trained weights now"
                    )
                tensor.copy_(tensors[f"{place}.{name}"])
        put_moments(self.optimizer, list(self.weights), tensors)
        self.position = position

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights into the model and its modules for a while, if there are any."""
        kept = {n: self.weights[n].detach().clone() for n in self.averages}
        try:
            with torch.no_grad():
                for name, tensor in self.averages.items():
                    self.weights[name].copy_(tensor)
            yield
        finally:
            with torch.no_grad():
                for name, tensor in kept.items():
                    self.weights[name].copy_(tensor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers from a seed for a while, on the CPU and on the device; the caller's are kept."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if not devices else device.type):
        torch.manual_seed(seed)
        yield


def _shorten(file: Path, position: int) -> None:
    """Drop the lines that a killed run has written after its last checkpoint; the run writes them again."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError):  # half a line
            continue
        if step <= position:
            kept.append(line + "\n")
    unfinished = file.with_suffix(".part")
    unfinished.write_text("".join(kept), encoding="utf-8")
    os.replace(unfinished, file)


def _check_weights(weights: Mapping[str, Tensor], hint: str) -> None:
    if not weights:
        raise ValueError(
            f"there is nothing to train: every weight of the model is frozen and the method has no modules. {hint}"
        )
    low = next((n for n, p in weights.items() if p.dtype != torch.float32), None)
    if low is not None:
        raise ValueError(
            f"{low} is in {weights[low].dtype}, in which steps of a small learning rate are rounded away: load the "
            'model in float32 (precision="bf16" computes in bfloat16)'
        )


def _accelerator(settings: LoopSettings, out: Path | None, extra: str) -> Any:
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError as error:
        raise missing("accelerate", extra, "training") from error
    # Weights of dense layers' modules, and of inputs that a batch does not have, get no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # Without a precision: accelerate has one for the whole process, and another run may have another.
    if settings.log_with is not None and out is None:
        raise ValueError("log_with needs a folder: give out=")
    found = Accelerator(kwargs_handlers=[unused], log_with=settings.log_with, project_dir=out)
    if (
        settings.log_with is not None and not found.log_with
    ):  # accelerate ignores those that are absent
        raise missing(settings.log_with, extra, f'log_with="{settings.log_with}"')
    return found


def _check_accelerator(accelerator: Any, settings: LoopSettings) -> None:
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise ValueError(
            f"this trainer runs in one process or under DistributedDataParallel, not {kind}: its checkpoints hold "
            "whole weights"
        )
    if accelerator.mixed_precision not in ("no", settings.precision):
        raise ValueError(
            f"precision is {settings.precision!r}, and the accelerator has "
            f"mixed_precision={accelerator.mixed_precision!r}: give both the same"
        )


def _endless(data: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "data has no batches, or is an iterator that has ended: give a list or a DataLoader"
            )


def _news(news: Mapping[str, float]) -> str:
    shown = [f"loss {news['loss']:.4g}"]
    shown += [f"{key} {news[key]:.1%}" for key in ("accuracy", "cost") if key in news]
    return "  ".join(shown)


def _bar(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[news]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not shown,
    )


Data = Callable[[int], Any] | Iterable[Any]
"""Batches: a function of the batch's number over all processes, counted from 0; an object with
``stream(first, every)`` (:mod:`vtr.train.data`); or an iterable, which begins again when it ends and is skipped forward
on resuming (it must then have the same order, and each process must get its own)."""
