"""Training of image classifiers with fewer tokens: methods that learn, and backbones that get used to a method.

::

    settings = TokenSettings(steps=30_000, rate=1e-3, backbone_factor=0.01, loss=TokenLoss(target=0.6))
    with TokenTuner(model, vtr.ToFe(trained=True), data, "runs/tofe", settings) as tuner:
        tuner.run()

and in another process::

    vtr.apply(model, vtr.train.load(model, "runs/tofe"))

The model is a timm classifier or a ``...ForImageClassification`` of transformers. Methods that learn are trained by their
policies, with a budget on the expected cost (``loss=TokenLoss(target=...)``). Methods that cut by their options (EViT,
ToMe) train the backbone alone, with their budget as it is or falling to it (``shrink=``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtr.core.method import Method
from vtr.core.module_files import FILE, ModuleFile
from vtr.core.registry import create
from vtr.core.wrapping import wrapping_of
from vtr.errors import UnsupportedModelError
from vtr.train.loop import Data, Tuner
from vtr.train.losses import TokenLoss
from vtr.train.modules import Student
from vtr.train.schedules import Shrink
from vtr.train.settings import LoopSettings, positive

MODEL = "model.safetensors"
"""Name of the file with the backbone's weights in a folder of a training run."""


@dataclass(frozen=True, kw_only=True)
class TokenSettings(LoopSettings):
    """Settings of a :class:`TokenTuner`, beside model and data.

    Those of :class:`vtr.train.settings.LoopSettings`, and these.

    Attributes:
        rate: learning rate of the method's modules; times ``backbone_factor``, of the backbone.
        backbone_factor: share of ``rate`` for the backbone (DynamicViT: 0.01); 0 leaves it as it is, and then the
            modules fit the model as it was.
        weight_decay: of matrices. Thresholds, biases, norms and what timm's ``no_weight_decay`` names have none.
        loss: weights of the loss terms.
        shrink: schedule of the method's ``keep``; None has the method's from the first step.
    """

    backbone_factor: float = 1.0
    loss: TokenLoss = field(default_factory=TokenLoss)
    shrink: Shrink | None = None
    clip: float | None = 1.0
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("backbone_factor", "a number >= 0", lambda v: v == 0 or positive(v))
        self.require("loss", "a TokenLoss", lambda v: isinstance(v, TokenLoss))
        self.require("shrink", "a Shrink or None", lambda v: v is None or isinstance(v, Shrink))


class TokenTuner(Tuner):
    """Trains a classifier with a token method, one :meth:`step` at a time or in a :meth:`run`.

    Args:
        model: a timm classifier, or one of transformers, with weights in float32 (of the frozen backbone in any
            dtype). It stays wrapped until :meth:`close`.
        method: of tokens in encoders.
        data: batches (:data:`vtr.train.loop.Data`): ``(images, labels)``, or a mapping with ``pixel_values`` or
            ``images`` and ``labels``. Labels are classes (B,) or, with mixup, probabilities (B, K).
        out: folder for the checkpoint, the log and the result; None for a loop of your own that takes steps and
            keeps their :meth:`state`.
        settings: of the run.
        resume: continue the run in ``out``, with the arguments that it began with.
        teacher: the dense classifier; None is a frozen copy of the model as it is now.
        accelerator: of accelerate; None for a new one.

    Raises:
        UnsupportedModelError: the model is no classifier that vtr knows, has methods applied, or ``out`` holds a
            run of another model.
        UnsupportedMethodError: the model lacks what the method needs, or the loss has a budget that the method
            cannot be trained to.
        ValueError: a setting that does not fit, nothing to train, or a run in ``out`` with another method or other
            settings.
        FileExistsError: ``out`` holds a run, and ``resume`` is False.
        FileNotFoundError: ``resume`` is True, and ``out`` holds no run.
        MissingDependencyError: accelerate or the tracker is not installed.
    """

    EXTRA = "train"

    settings: TokenSettings

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        data: Data,
        out: str | Path | None,
        settings: TokenSettings | None = None,
        *,
        resume: bool = False,
        teacher: nn.Module | None = None,
        accelerator: Any = None,
    ) -> None:
        settings = settings or TokenSettings()
        if wrapping_of(model) is not None:
            raise UnsupportedModelError(
                f"methods are applied to this {type(model).__name__}: remove their handles first"
            )
        if settings.shrink is not None:
            settings.shrink.check(method)
        self.model, self.method = model, method
        state = self.open(data, out, settings, resume, accelerator)
        self._before = [(p, p.requires_grad) for p in model.parameters()], model.training
        self._checkpointed = False
        self.classifier: Student | None = None
        try:
            self._prepare(teacher)
            if state is not None:
                self.load(*state)
        except BaseException:
            self.close()
            raise

    def _prepare(self, teacher: nn.Module | None) -> None:
        settings, model = self.settings, self.model
        if teacher is None and settings.loss.distils:
            teacher = copy.deepcopy(model)
        if settings.backbone_factor == 0:
            model.requires_grad_(False)
        if settings.checkpointing:
            _checkpoint(model, True)
            self._checkpointed = True
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.classifier = Student(model, self.method, settings.loss, teacher=teacher)
        self.modules = self.classifier.learned
        self.origin = self.classifier.handle._wrapping.fingerprint()
        self.classifier.train()
        self.begin(self.classifier, self._groups())

    def _groups(self) -> list[dict[str, Any]]:
        """Matrices and vectors of modules and backbone: four groups, as far as they are trained."""
        settings, groups = self.settings, []
        named = getattr(self.model, "no_weight_decay", lambda: ())()
        parts = [(self.modules, settings.rate, ()), (self.model, self.backbone_rate, named)]
        for part, rate, exempt in parts:
            found = [] if part is None else [
                (n, p) for n, p in part.named_parameters() if p.requires_grad
            ]  # fmt: skip
            plain = {n for n, p in found if p.dim() < 2 or n in exempt}
            groups.append({"params": [p for n, p in found if n not in plain], "lr": rate})
            groups.append(
                {"params": [p for n, p in found if n in plain], "lr": rate, "weight_decay": 0.0}
            )
        return groups

    @property
    def backbone_rate(self) -> float:
        """Learning rate of the backbone."""
        return self.settings.rate * self.settings.backbone_factor

    def prepare_step(self, step: int) -> None:
        assert self.classifier is not None
        self.classifier.train()
        if self.settings.shrink is not None:
            self.classifier.change(self.settings.shrink.at(step, self.method))

    def moved(self, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        images, labels = images_of(batch)
        return images.to(device), labels.to(device)

    def loss_of(self, batch: Any, number: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert self.classifier is not None
        with self.autocast():
            loss = self.student(*batch)["loss"]
        return loss, self.classifier.facts

    def check_first_step(self) -> None:
        super().check_first_step()
        learned = [] if self.modules is None else list(self.modules.parameters())
        if learned and all(p.grad is None for p in learned):
            raise RuntimeError(
                f"no gradient reached the modules of {self.method}: give the loss a budget (target=)"
            )

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Measure the model in eval mode, when the method cuts, with the averaged weights if there are any.

        Args:
            batches: as those of ``data``.

        Returns:
            ``accuracy``, and ``cost``: FLOPs of the blocks and the method's modules as a share of the dense
            blocks', the mean over the images (of a batch, in which the longest sequence counts for all).
        """
        assert self.classifier is not None
        student = self.classifier.eval()
        try:
            with self.averaged(), torch.no_grad(), self.autocast():
                return measured(student, batches, self.accelerator.device)
        finally:
            student.train()

    def export(self, folder: str | Path | None = None) -> Path:
        """Write what :func:`vtr.train.load` reads into a folder (None: ``out``), with averaged weights if there are
        any: ``modules.safetensors``, and ``model.safetensors`` if the backbone was trained."""
        assert self.classifier is not None
        folder = self.out if folder is None else Path(folder)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with self.averaged():
                model = self.classifier.handle._wrapping.fingerprint()
                trained = any(n.startswith("model.") for n in self.weights)
                save(folder, self.model if trained else None, self.method, self.modules, model)
        return folder

    def close(self) -> None:
        """Take the method off the model, which keeps its trained weights. Doing it twice is harmless."""
        if self.classifier is not None:
            self.classifier.remove()
        if self._checkpointed:
            _checkpoint(self.model, False)
            self._checkpointed = False
        flags, mode = self._before
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        self.model.train(mode)
        if self.classifier is not None and self.modules is not None:
            self.modules.eval()


def images_of(batch: Any) -> tuple[Tensor, Tensor]:
    """Return images and labels of a batch: a pair, or a mapping with ``pixel_values`` or ``images``.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(batch, Mapping):
        images = batch.get("pixel_values", batch.get("images"))
        found: Sequence[Any] = (images, batch.get("labels"))
    elif hasattr(batch, "images"):  # those of vtr.zoo.data
        found = (batch.images, getattr(batch, "labels", None))
    else:
        found = batch if isinstance(batch, (tuple, list)) else ()
    if len(found) != 2 or not all(isinstance(part, Tensor) for part in found):
        raise ValueError(
            "a batch must be (images, labels), or a mapping with 'pixel_values' or 'images' and 'labels', got "
            f"{type(batch).__name__}"
            + (f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "")
        )
    return found[0], found[1]


def measured(student: Student, batches: Iterable[Any], device: torch.device) -> dict[str, float]:
    """Measure a student in eval mode: ``accuracy`` and ``cost`` (see :meth:`TokenTuner.evaluate`)."""
    right = torch.zeros((), device=device)
    seen, cost = 0, 0.0
    for batch in batches:
        images, labels = images_of(batch)
        logits = student(images.to(device))
        right += (logits.argmax(1) == labels.to(device)).sum()
        costs = student.handle._wrapping.costs() or {}
        dense, reduced = costs.get("encoder", (1, 1))
        cost += len(images) * reduced / dense
        seen += len(images)
    if not seen:
        raise ValueError("there are no batches to measure")
    return {"accuracy": float(right) / seen, "cost": cost / seen}


def _checkpoint(model: Any, on: bool) -> None:
    if hasattr(model, "set_grad_checkpointing"):  # timm
        model.set_grad_checkpointing(on)
        return
    # transformers: later releases have the first name, earlier ones the second.
    for kind in ("activation_checkpointing", "gradient_checkpointing"):
        if on and hasattr(model, f"{kind}_enable"):
            getattr(model, f"{kind}_enable")({"use_reentrant": False})
            return
        if not on and hasattr(model, f"{kind}_disable"):
            getattr(model, f"{kind}_disable")()
            return
    raise UnsupportedModelError(f"a {type(model).__name__} has no gradient checkpointing")


# ---- the folder of a trained model --------------------------------------------------------------


def save(
    folder: Path, model: nn.Module | None, method: Method, modules: nn.Module | None, origin: Any
) -> None:
    """Write the folder of a trained model; ``model`` is None if its weights were not trained."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if model is not None:
        held = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
        save_file(held, folder / MODEL)
    options = {k: v for k, v in method.to_dict().items() if k not in ("weights", "untrained")}
    tensors = {} if modules is None else modules.state_dict()
    ModuleFile(tensors, options, origin).write(folder / FILE)


def load(model: nn.Module, folder: str | Path) -> Method:
    """Load the trained weights into a classifier; returns the method that they were trained with.

    Args:
        model: of the class that was trained; if the backbone was frozen, with the weights that it had.
        folder: written by :class:`TokenTuner`.

    Raises:
        UnsupportedModelError: the model is another one than that which was trained, or methods are applied to it.
        ValueError: the folder holds no trained model.
    """
    from safetensors.torch import load_file

    from vtr.api import _wrapping

    file, path = ModuleFile.read(folder), Path(folder)
    if wrapping_of(model) is not None:
        raise UnsupportedModelError(
            f"methods are applied to this {type(model).__name__}: remove their handles first"
        )
    if (path / MODEL).is_file():
        try:
            model.load_state_dict(load_file(path / MODEL))
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"{path} was trained with another model: {error}"
            ) from error
    difference = file.model.difference(_wrapping(model).fingerprint())
    if difference:
        raise UnsupportedModelError(f"{path} was trained with another model: {difference}")
    options = dict(file.method)
    if file.tensors:
        options["weights"] = str(path / FILE)
    return create(**options)
