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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtr.api import Handle, apply
from vtr.core.method import Method
from vtr.errors import UnsupportedMethodError, UnsupportedModelError, missing
from vtr.methods.common.attention import AttentionMethod
from vtr.train.loop import Data, Tuner
from vtr.train.tuned import ADAPTER, load, save, transformer_of
from vtr.train.tuning import TuningSettings

__all__ = ["SparseTuner", "TuningSettings", "load"]

Batch = Mapping[str, Any]

FLOW = (
    "AuraFlow", "Chroma", "CogView4", "EasyAnimate", "Flux", "Flux.2", "FramePack", "HunyuanImage",
    "HunyuanVideo", "HunyuanVideo-1.5", "Kandinsky-5", "LTX-Video", "Qwen-Image", "SD3", "SkyReels-V2",
    "Wan", "Wan-Animate", "Wan-VACE",
)  # fmt: skip
"""Families that predict eps - x0 at x_t = (1 - t) x0 + t eps, with timesteps that rise with t."""


class SparseTuner(Tuner):
    """Trains a transformer with a sparse method, one :meth:`step` at a time or in a :meth:`run`.

    Args:
        model: a diffusion transformer of diffusers that :func:`vtr.apply` knows, or a pipeline with one. It
            stays wrapped until :meth:`close`. Without ``lora`` its weights must be in float32, and those with
            ``requires_grad`` are trained.
        method: of the attention. If it learns, its modules are trained at ``module_rate``.
        data: batches (:data:`vtr.train.loop.Data`). A batch is a mapping: ``latents`` (B, ...) float, clean, in the
            shape in which the transformer takes ``hidden_states``, and further arguments of its forward call.
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

    HINT = "Call model.requires_grad_(True), or give lora="

    settings: TuningSettings

    def __init__(
        self,
        model: Any,
        method: Method,
        data: Data,
        out: str | Path,
        settings: TuningSettings | None = None,
        *,
        resume: bool = False,
        inputs: Callable[[Tensor, Tensor, Batch], Batch] | None = None,
        teacher: nn.Module | None = None,
        accelerator: Any = None,
    ) -> None:
        settings = settings or TuningSettings()
        self.model, self.family = transformer_of(model)
        if self.family.name not in FLOW:
            raise UnsupportedModelError(
                f"{self.family.name} does not predict eps - x0 at (1 - t) x0 + t eps, or not at timesteps that "
                f"rise with t, which this trainer needs. These families do: {', '.join(FLOW)}"
            )
        self.method = _checked(method, settings)
        self.inputs = inputs or self._inputs
        state = self.open(data, out, settings, resume, accelerator)
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
                self.load(*state)
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
        student = _Student(self.model, self.modules)
        trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        own = [p for n, p in trained.items() if n.startswith("model.")]
        learned = [p for n, p in trained.items() if not n.startswith("model.")]
        more = settings.module_rate or settings.rate
        self.begin(student, [{"params": own, "lr": settings.rate}, {"params": learned, "lr": more}])

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

    def prepare_step(self, step: int) -> None:
        """Bring the method to the density of this step (VSA's schedule)."""
        assert self.handle is not None
        target = getattr(self.method, "density", None)
        if target is None or self.settings.sparsity_step is None:
            return
        density = self.settings.density(step, target)
        current: Any = self.handle.methods[0]
        if current.density == density:
            return
        self.handle.remove()
        more = {} if self.modules is None else {"modules": self.modules}
        self.handle = apply(self.model, self.method.replace(density=density), **more)

    def moved(self, batch: Any, device: torch.device) -> Batch:
        return _moved(batch, device)

    def loss_of(self, batch: Batch, number: int) -> Tensor:
        """The loss of one batch; noise and times follow from the seed and its number."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + number)
        latents = batch["latents"].float()
        t = self.settings.times(len(latents), generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        t = t.to(latents.device)
        at = t.view(-1, *[1] * (latents.ndim - 1))
        given = self.inputs((1 - at) * latents + at * noise, t, batch)
        target = noise - latents
        with self.autocast():
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

    def facts(self) -> dict[str, float]:
        """Return the ``density`` that the attention calls had."""
        return {"density": self._seen()}

    def _seen(self) -> float:
        assert self.handle is not None
        notes = self.handle.trace.notes.get("attention", {}).values()
        seen = [note["density"] for note in notes if "density" in note]
        return float(sum(seen) / len(seen)) if seen else 1.0

    def check_first_step(self) -> None:
        """Raise if nothing is learned about the mask."""
        super().check_first_step()
        assert self.handle is not None
        method: Any = self.handle.methods[0]
        if self._seen() >= 1.0 and getattr(method, "density", None) != 1.0:
            raise UnsupportedMethodError(
                f"{method} computed all attention densely in training, in which every call is the first step of a "
                "run: there is no mask that the weights could learn. Methods that learn nothing over the steps "
                "of a run (topk-sparse, sla, the static masks) can be trained with"
            )

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


def _moved(batch: Batch, device: torch.device) -> Batch:
    if not isinstance(batch, Mapping) or not isinstance(batch.get("latents"), Tensor):
        raise ValueError(
            "a batch must be a mapping with a tensor 'latents' and further arguments of the transformer's "
            f"forward call, got {type(batch).__name__}"
            + (f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "")
        )
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
