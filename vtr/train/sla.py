"""Fine-tuning of diffusion transformers under sparse attention.

A dense model loses quality under a sparse mask, and most of it comes back if its weights are trained with the
mask for a short while (SLA, arXiv 2509.24006: 2000 steps; VSA, arXiv 2505.13389: 4000). A
:class:`SparseTuner` does this for a transformer of diffusers that is trained by flow matching, with any method
that passes gradients: ``SLA``, ``VSA``, ``TopKSparse`` and the static masks::

    settings = TuningSettings(steps=2000, checkpointing=True, precision="bf16")
    with SparseTuner(pipe.transformer, vtr.SLA(density=0.1), batches, "runs/sla", settings) as tuner:
        tuner.run()

and in another process::

    vtr.apply(pipe, vtr.train.sla.load(pipe, "runs/sla"))

Two losses (``TuningSettings.loss``), both at x_t = (1 - t) x0 + t eps:

- ``"distil"``: mean square of the student's velocity - the velocity of the frozen dense model, the loss of
  TurboDiffusion's white-box training (arXiv 2512.16093). Data are only the places at which the two are compared.
- ``"data"``: mean square of the student's velocity - (eps - x0), flow matching on data. SLA's paper trains so.

Out of scope: students of three or four steps (rCM, DMD). TurboDiffusion trains them apart, with dense
attention, and then adds up the changes of the weights.

The modules alone are not enough: the authors of SLA advise to train all weights. A low-rank adapter (``lora``)
is cheaper, and the dense model is then at hand without a second copy.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

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

from vtr.api import Handle, apply
from vtr.core.method import Method
from vtr.errors import UnsupportedMethodError, UnsupportedModelError, missing
from vtr.methods.common.attention import AttentionMethod
from vtr.train.tuned import ADAPTER, load, save, transformer_of
from vtr.train.tuning import TuningSettings, load_state, moments, put_moments, save_state

__all__ = ["SparseTuner", "TuningSettings", "load"]

Batch = Mapping[str, Any]

FLOW = (
    "AuraFlow", "Chroma", "CogView4", "EasyAnimate", "Flux", "Flux.2", "FramePack", "HunyuanImage",
    "HunyuanVideo", "HunyuanVideo-1.5", "Kandinsky-5", "LTX-Video", "Qwen-Image", "SD3", "SkyReels-V2",
    "Wan", "Wan-Animate", "Wan-VACE",
)  # fmt: skip
"""Families that predict eps - x0 at x_t = (1 - t) x0 + t eps, with timesteps that rise with t."""


class SparseTuner:
    """Trains a transformer with a sparse method, one :meth:`step` at a time or in a :meth:`run`.

    Args:
        model: a diffusion transformer of diffusers that :func:`vtr.apply` knows, or a pipeline with one. It
            stays wrapped until :meth:`close`. Without ``lora`` its weights must be in float32, and those with
            ``requires_grad`` are trained.
        method: of the attention. If it learns, its modules are trained at ``module_rate``.
        data: batches. Either a function of the number of the batch, counted from 0 over all processes, or an
            iterable, which begins again when it ends and is skipped forward on resuming (it must then have the
            same order). A batch is a mapping: ``latents`` (B, ...) float, clean, in the shape in which the
            transformer takes ``hidden_states``, and further arguments of its forward call.
        out: folder for the checkpoint, the log and the result.
        settings: of the run.
        resume: continue the run in ``out``, with the arguments that it began with. On a CPU the rest of the run
            is then bit for bit what it would have been: noise and times follow from the seed and the step.
        inputs: returns the arguments of the forward call for noisy latents, times t (B,) in [0, 1] and the
            batch. None is ``hidden_states``, ``timestep`` and the rest of the batch. Give it for models that
            concatenate a condition to their latents.
        teacher: the dense model, for ``loss="distil"``. None is the model itself as it is now: a frozen copy,
            or, with ``lora``, the same weights without the adapter.
        accelerator: of accelerate; None for a new one. Gradients are averaged over the processes of
            DistributedDataParallel.

    Raises:
        UnsupportedModelError: no adapter for this model, it was not trained by flow matching, it is two
            transformers, or ``out`` holds a run of another model.
        UnsupportedMethodError: the method does not act inside attention.
        ValueError: a setting that does not fit, nothing to train, weights in another dtype than float32, or a
            run in ``out`` with another method or other settings.
        FileExistsError: ``out`` holds a run, and ``resume`` is False.
        FileNotFoundError: ``resume`` is True, and ``out`` holds no run.
        MissingDependencyError: accelerate or peft is not installed.
    """

    def __init__(
        self,
        model: Any,
        method: Method,
        data: Callable[[int], Batch] | Iterable[Batch],
        out: str | Path,
        settings: TuningSettings | None = None,
        *,
        resume: bool = False,
        inputs: Callable[[Tensor, Tensor, Batch], Batch] | None = None,
        teacher: nn.Module | None = None,
        accelerator: Any = None,
    ) -> None:
        self.settings = settings = settings or TuningSettings()
        self.out, self.data, self.position = Path(out), data, 0
        self.model, self.family = transformer_of(model)
        if self.family.name not in FLOW:
            raise UnsupportedModelError(
                f"{self.family.name} does not predict eps - x0 at (1 - t) x0 + t eps, or not at timesteps that "
                f"rise with t, which this trainer needs. These families do: {', '.join(FLOW)}"
            )
        self.method = _checked(method, settings)
        self.inputs = inputs or self._inputs
        file = self.out / "state.safetensors"
        if not resume and file.exists():
            raise FileExistsError(
                f"{self.out} holds a run: resume=True continues it, or choose another folder"
            )
        state = load_state(file) if resume else None
        self.accelerator = accelerator or _accelerator()
        _check_accelerator(self.accelerator, settings)
        self.teacher: Any = teacher
        if teacher is None and settings.loss == "distil" and not settings.lora:
            self.teacher = copy.deepcopy(self.model)
        if self.teacher is not None:
            self.teacher.eval().requires_grad_(False).to(self.accelerator.device)
        self._before = [(p, p.requires_grad) for p in self.model.parameters()], self.model.training
        self._checkpointed = False
        self.handle: Handle | None = None
        try:
            self._prepare()
            if state is not None:
                self._load(*state)
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        settings = self.settings
        if settings.lora:
            self._add_adapter()
        if settings.checkpointing:
            self.model.enable_gradient_checkpointing()
            self._checkpointed = True
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.handle = apply(self.model, self.method)
        self.modules = self.handle.modules[0] if self.method.learned else None
        self.origin = self.handle._wrapping.fingerprint()
        self.model.train()
        student = _Student(self.model, self.modules).to(self.accelerator.device)
        self.weights = {n: p for n, p in student.named_parameters() if p.requires_grad}
        _check_weights(self.weights)
        own = [p for n, p in self.weights.items() if n.startswith("model.")]
        learned = [p for n, p in self.weights.items() if not n.startswith("model.")]
        self._rates = [settings.rate] * bool(own)
        self._rates += [settings.module_rate or settings.rate] * bool(learned)
        groups = [
            {"params": part, "lr": rate}
            for part, rate in zip([p for p in (own, learned) if p], self._rates, strict=True)
        ]
        optimizer = torch.optim.AdamW(
            groups, weight_decay=settings.weight_decay, betas=settings.betas
        )
        self.averages: dict[str, Tensor] = {}
        if settings.ema is not None:
            self.averages = {n: p.detach().clone() for n, p in self.weights.items()}
        self.student, self.optimizer = self.accelerator.prepare(student, optimizer)
        self._batches: Iterator[Batch] | None = None

    def _add_adapter(self) -> None:
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise missing("peft", "diffusion", "training of an adapter (lora=)") from error
        settings, rank = self.settings, self.settings.lora
        assert rank is not None
        if getattr(self.model, "peft_config", None):
            raise ValueError(
                "lora: the transformer has adapters already, which the dense teacher would lose: fuse them "
                "(fuse_lora) or unload them first"
            )
        config = LoraConfig(
            r=rank,
            lora_alpha=settings.lora_alpha or rank,  # type: ignore[arg-type]
            target_modules=list(settings.lora_layers),
        )
        self.model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model.add_adapter(config, adapter_name=ADAPTER)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    # ---- a step ---------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """Take one optimiser step.

        Returns:
            ``loss``, averaged over the batches of the step and all processes, ``norm`` of the gradient before
            clipping (0 without clipping), ``rate`` of the first group of weights, and the ``density`` that the
            attention calls had.

        Raises:
            RuntimeError: gradients are switched off (``torch.no_grad``), or none reached the weights.
            UnsupportedMethodError: the method computes all attention densely in training.
        """
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise RuntimeError(
                "a training step needs gradients, which torch.no_grad or torch.inference_mode has switched off"
            )
        settings, step = self.settings, self.position
        self._set_density()
        factor = settings.factor(step)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        total = torch.zeros((), device=self.accelerator.device)
        processes, own = self.accelerator.num_processes, self.accelerator.process_index
        for part in range(settings.accumulate):
            number = (step * settings.accumulate + part) * processes + own
            batch = _moved(self._batch(number), self.accelerator.device)
            last = part == settings.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.student):
                loss = self._loss(batch, number)
                self.accelerator.backward(loss / settings.accumulate)
            total += loss.detach() / settings.accumulate
        if step == 0:
            self._check_gradients()
        norm = 0.0
        if settings.clip is not None:
            norm = float(self.accelerator.clip_grad_norm_(self.student.parameters(), settings.clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.position += 1
        self._average()
        mean = float(self.accelerator.reduce(total, reduction="mean"))
        return {
            "loss": mean,
            "norm": norm,
            "rate": self._rates[0] * factor,
            "density": self._seen(),
        }

    def _loss(self, batch: Batch, number: int) -> Tensor:
        """The loss of one batch; noise and times follow from the seed and its number."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + number)
        latents = batch["latents"].float()
        t = self.settings.times(len(latents), generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        t = t.to(latents.device)
        at = t.view(-1, *[1] * (latents.ndim - 1))
        given = self.inputs((1 - at) * latents + at * noise, t, batch)
        target = noise - latents
        low = self.settings.precision == "bf16"
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=low):
            if self.settings.loss == "distil":
                with torch.no_grad(), self._dense() as teacher:
                    target = teacher(**given, return_dict=False)[0].float()
            found: Tensor = self.student(given).float()
        return (found - target).square().mean()

    def _inputs(self, noisy: Tensor, t: Tensor, batch: Batch) -> Batch:
        rest = {name: value for name, value in batch.items() if name != "latents"}
        return {"hidden_states": noisy, "timestep": t * (1000 / self.family.scale), **rest}

    @contextmanager
    def _dense(self) -> Iterator[Any]:
        """The dense model: the teacher, or the student without method and adapter."""
        if self.teacher is not None:
            yield self.teacher
            return
        assert self.handle is not None
        self.handle.pause()
        self.model.disable_adapters()
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train()
            self.model.enable_adapters()
            self.handle.resume()

    def _batch(self, number: int) -> Batch:
        if callable(self.data):
            return self.data(number)
        if self._batches is None:
            self._batches = _endless(self.data)
            own = self.accelerator.num_processes
            for _ in range(number // own):  # those of the steps before resuming
                next(self._batches)
        return next(self._batches)

    def _set_density(self) -> None:
        """Bring the method to the density of this step (VSA's schedule)."""
        assert self.handle is not None
        target = getattr(self.method, "density", None)
        if target is None or self.settings.sparsity_step is None:
            return
        density = self.settings.density(self.position, target)
        current: Any = self.handle.methods[0]
        if current.density == density:
            return
        self.handle.remove()
        more = {} if self.modules is None else {"modules": self.modules}
        self.handle = apply(self.model, self.method.replace(density=density), **more)

    def _seen(self) -> float:
        assert self.handle is not None
        notes = self.handle.trace.notes.get("attention", {}).values()
        seen = [note["density"] for note in notes if "density" in note]
        return float(sum(seen) / len(seen)) if seen else 1.0

    def _check_gradients(self) -> None:
        """Raise if nothing is learned about the mask; at the first step."""
        assert self.handle is not None
        method: Any = self.handle.methods[0]
        if all(p.grad is None for p in self.weights.values()):
            raise RuntimeError(f"no gradient reached the weights through {method}")
        if self._seen() >= 1.0 and getattr(method, "density", None) != 1.0:
            raise UnsupportedMethodError(
                f"{method} computed all attention densely in training, in which every call is the first step of a "
                "run: there is no mask that the weights could learn. Methods that learn nothing over the steps "
                "of a run (topk-sparse, sla, the static masks) can be trained with"
            )

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
        ``log_every`` steps; then :meth:`export`.

        Args:
            minutes: stop after so long; ``resume=True`` continues.

        Returns:
            True if the last step is done.
        """
        settings, name = self.settings, self.method.name
        self.out.mkdir(parents=True, exist_ok=True)
        started, losses = time.monotonic(), []
        with _bar(self.accelerator.is_main_process) as bar:
            task = bar.add_task(name, total=settings.steps, completed=self.position, news="")
            while self.position < settings.steps:
                if minutes is not None and time.monotonic() - started > 60 * minutes:
                    break
                news = self.step()
                losses.append(news["loss"])
                bar.update(task, completed=self.position, news=f"loss {news['loss']:.4g}")
                if self.position % settings.log_every == 0:
                    mean, losses = sum(losses) / len(losses), []
                    self._log({**news, "loss": mean, "seconds": time.monotonic() - started})
                if self.position % settings.save_every == 0:
                    self.save()
        self.save()
        if self.position < settings.steps:
            return False
        self.export()
        return True

    def _log(self, news: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            line = {"step": self.position, **{k: round(v, 8) for k, v in news.items()}}
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write the checkpoint: weights, averages and the optimiser's moments as safetensors, without pickle."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {f"weights.{n}": p for n, p in self.weights.items()}
        tensors |= {f"averages.{n}": p for n, p in self.averages.items()}
        tensors |= moments(self.optimizer, list(self.weights))
        about = {**self._about(), "step": self.position, "model": self.origin.to_dict()}
        save_state(self.out / "state.safetensors", tensors, about)

    def _about(self) -> dict[str, Any]:
        options = json.loads(json.dumps(self.method.to_dict()))
        return {"settings": self.settings.to_dict(), "method": options}

    @torch.no_grad()
    def _load(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        from vtr.core.calibration import Fingerprint

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
        for place, held in (("weights", self.weights), ("averages", self.averages)):
            for name, tensor in held.items():
                tensor.copy_(tensors[f"{place}.{name}"])
        put_moments(self.optimizer, list(self.weights), tensors)
        self.position = int(about["step"])

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Put the averaged weights into the model and its modules for a while, if there are any."""
        kept = {n: self.weights[n].detach().clone() for n in self.averages}
        try:
            with torch.no_grad():
                for name, tensor in self.averages.items():
                    self.weights[name].copy_(tensor)
            yield self.model
        finally:
            with torch.no_grad():
                for name, tensor in kept.items():
                    self.weights[name].copy_(tensor)

    def export(self, folder: str | Path | None = None) -> Path:
        """Write what :func:`load` reads into a folder (None: ``out``); with averaged weights if there are any."""
        assert self.handle is not None
        folder = self.out if folder is None else Path(folder)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with self.averaged():
                fingerprint = self.handle._wrapping.fingerprint()
                save(
                    folder,
                    self.model,
                    self.method,
                    self.modules,
                    fingerprint,
                    lora=bool(self.settings.lora),
                )
        return folder

    # ---- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Take the method off the model, which keeps its trained weights (or adapter). Doing it twice is harmless."""
        if self.handle is not None:
            self.handle.remove()
        if self._checkpointed:
            self.model.disable_gradient_checkpointing()
            self._checkpointed = False
        flags, mode = self._before
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        self.model.train(mode)

    def __enter__(self) -> SparseTuner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


class _Student(nn.Module):
    """The model and the method's modules as one module, so that gradients of both are averaged."""

    def __init__(self, model: nn.Module, modules: nn.Module | None) -> None:
        super().__init__()
        self.model, self.modules_of_method = model, modules

    def forward(self, given: Batch) -> Tensor:
        out: Tensor = self.model(**given, return_dict=False)[0]
        return out


def _checked(method: Method, settings: TuningSettings) -> Method:
    if not isinstance(method, AttentionMethod):
        raise UnsupportedMethodError(
            f"{method!r} does not act inside the attention of a diffusion transformer: give an attention method, "
            "such as SLA, TopKSparse or RadialAttention"
        )
    if settings.sparsity_step is not None and not hasattr(method, "density"):
        raise ValueError(f"sparsity_step needs a method with a density, and {method.name} has none")
    return method


def _check_weights(weights: Mapping[str, Tensor]) -> None:
    if not weights:
        raise ValueError(
            "there is nothing to train: every weight of the model is frozen and the method has no modules. Call "
            "model.requires_grad_(True), or give lora="
        )
    low = next((n for n, p in weights.items() if p.dtype != torch.float32), None)
    if low is not None:
        raise ValueError(
            f"{low} is in {weights[low].dtype}, in which steps of a small learning rate are rounded away: load the "
            'model in float32 (precision="bf16" computes in bfloat16), or give lora='
        )


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError as error:
        raise missing("accelerate", "diffusion", "fine-tuning") from error
    # Weights of dense layers' modules, and of inputs that a batch does not have, get no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # Without a precision: accelerate has one for the whole process, and another run may have another.
    return Accelerator(kwargs_handlers=[unused])


def _check_accelerator(accelerator: Any, settings: TuningSettings) -> None:
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


def _endless(data: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "data has no batches, or is an iterator that has ended: give a list or a DataLoader"
            )


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


def _moved(batch: Batch, device: torch.device) -> Batch:
    if not isinstance(batch, Mapping) or not isinstance(batch.get("latents"), Tensor):
        raise ValueError(
            "a batch must be a mapping with a tensor 'latents' and further arguments of the transformer's "
            f"forward call, got {type(batch).__name__}"
            + (f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "")
        )
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
