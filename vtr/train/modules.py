"""A classifier with a method that learns as one plain module, for a training loop of your own.

In timm's ``train.py`` or a loop like it (``examples/train_own_loop.py``)::

    model = Student(create_model(...), vtr.DynamicViT(keep=0.7))
    train_loss_fn = model.loss

In transformers' ``Trainer`` (``examples/train_with_trainer.py``)::

    Trainer(Student(ViTForImageClassification(...), vtr.ToFe(trained=True), TokenLoss(target=0.5)), ...)

:class:`vtr.train.tokens.TokenTuner` is a loop around this module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtr.api import Handle, apply
from vtr.core.method import Method
from vtr.core.module_files import ModuleFile
from vtr.errors import UnsupportedModelError
from vtr.train.losses import (
    EncoderCost,
    TokenLoss,
    budget_loss,
    distil_logits,
    distil_tokens,
    encoder_session,
    surviving,
)


class Student(nn.Module):
    """A wrapped image classifier and the method's modules, with the loss that trains both.

    In training mode a method that learns keeps every token and masks (its policies are in
    ``handle.trace.policies``); in eval mode it cuts. ``parameters()`` and ``state_dict()`` have the model's under
    ``model.`` and the method's under ``learned.``; the teacher's are not among them, but it follows ``to()``.

    Args:
        model: a timm classifier, or one of transformers (``...ForImageClassification``). It stays wrapped until
            :meth:`remove`.
        method: of tokens in encoders. Its modules are new, or those of ``weights=``, or ``modules``.
        loss: weights of the terms; None for :class:`vtr.train.losses.TokenLoss` with its defaults.
        teacher: the dense classifier for the distillation; None is a frozen copy of ``model`` as it is now. One of
            another architecture can give its classes alone (``tokens=0``).
        modules: of the method, from an earlier student or handle.

    Attributes:
        model, learned: the classifier, and the method's modules or None.
        handle: of :func:`vtr.apply`.
        weights: the loss's.

    Raises:
        UnsupportedModelError: the model is no encoder that classifies images.
        UnsupportedMethodError: the model lacks what the method needs.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        loss: TokenLoss | None = None,
        *,
        teacher: nn.Module | None = None,
        modules: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.weights = loss or TokenLoss()
        if teacher is None and self.weights.distils:
            teacher = copy.deepcopy(model)
        # In a tuple, so that it is no part of this module.
        self._teacher = (None if teacher is None else _Classifier(teacher),)
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        self.model = model
        self._classifier = (_Classifier(model),)
        more = {} if modules is None else {"modules": modules}
        self.handle: Handle = apply(model, method, **more)
        try:
            encoder_session(self.handle)
        except UnsupportedModelError:
            self.remove()
            raise
        self.learned = self.handle.modules[0] if method.learned else None
        self._cost = EncoderCost.of(self.handle)
        self._call: tuple[Tensor, Tensor | None] | None = None
        self._seen: dict[str, Tensor] = {}

    @property
    def method(self) -> Method:
        """The method as it is applied now."""
        return self.handle.methods[0]

    @property
    def teacher(self) -> nn.Module | None:
        """The dense classifier, None without distillation."""
        found = self._teacher[0]
        return None if found is None else found.model

    def change(self, method: Method) -> None:
        """Apply the method with other options, such as another ``keep``; its modules stay."""
        if method == self.method:
            return
        self.handle.remove()
        more = {} if self.learned is None else {"modules": self.learned}
        self.handle = apply(self.model, method, **more)
        self._cost = EncoderCost.of(self.handle)

    def save(self, file: str | Path) -> None:
        """Write the method's modules as a safetensors file, for ``weights=`` of the method. The classifier's weights
        are not in it.

        Raises:
            ValueError: the method has no modules.
        """
        if self.learned is None:
            raise ValueError(
                f"{self.method} has no modules to write: save the classifier's weights"
            )
        options = {
            k: v for k, v in self.method.to_dict().items() if k not in ("weights", "untrained")
        }
        origin = self.handle._wrapping.fingerprint()
        ModuleFile(self.learned.state_dict(), options, origin).write(Path(file))

    def remove(self) -> None:
        """Take the method off the model. Doing it twice is harmless."""
        if "handle" in self.__dict__:
            self.handle.remove()
        for found in (*self._classifier, *self._teacher):
            if found is not None:
                found.close()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Student:
        if self.teacher is not None:
            self.teacher._apply(fn)  # type: ignore[operator]
        return super()._apply(fn, recurse)

    # ---- forward and loss -----------------------------------------------------------------------

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        """Classify images.

        Args:
            pixel_values: (B, 3, H, W).
            labels: (B,) classes, or (B, K) probabilities; for loops that take the loss from the model.

        Returns:
            The logits (B, K); with ``labels`` a dictionary of ``loss`` and ``logits``, as transformers' Trainer
            takes it. In eval mode the loss is the cross-entropy alone.
        """
        logits, tokens = self._classifier[0](pixel_values)
        self._call = (pixel_values, tokens) if self.training else None
        if labels is None:
            return logits
        loss = self.loss(logits, labels) if self.training else self.weights.classes(logits, labels)
        return {"loss": loss, "logits": logits}

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of the training call that returned ``logits``, a scalar."""
        return torch.stack(list(self.terms(logits, labels).values())).sum()

    def terms(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the terms of the loss with their weights: ``classes``, ``budget``, ``logits``, ``tokens`` and the
        method's own; those of weight 0 are left out.

        Raises:
            RuntimeError: the call before was none in training mode, or its terms were computed already.
            UnsupportedMethodError: there is a budget, and the method records no policies in training.
            ValueError: the teacher's tokens do not fit the student's.
        """
        if self._call is None:
            raise RuntimeError(
                "the loss is of a call in training mode, once: call student.train(), then student(images), then "
                "student.loss(logits, labels)"
            )
        (images, tokens), self._call = self._call, None
        weights, trace = self.weights, self.handle.trace
        weights.check(self.handle)
        found = {"classes": weights.classes(logits, labels)}
        cost = self._costs()
        if weights.target is not None:
            dense = self._cost.dense(self._tokens())
            budget = budget_loss(cost * dense, dense, weights.target, weights.form)
            found["budget"] = weights.budget * budget
        teacher = self._teacher[0]
        if teacher is not None and weights.distils:
            with torch.no_grad():
                classes, features = teacher(images)
            if weights.logits:
                found["logits"] = weights.logits * distil_logits(
                    logits, classes, weights.temperature
                )
            if weights.tokens:
                found["tokens"] = weights.tokens * self._token_term(tokens, features)
        own = self.handle.methods[0].training_losses(trace, self.learned)
        found.update({name: term.float() for name, term in own.items()})
        right = labels.argmax(1) if labels.dim() == 2 else labels
        self._seen = {
            "accuracy": (logits.detach().argmax(1) == right).float().mean(),
            "cost": cost.detach().mean(),
        }
        return found

    @property
    def facts(self) -> Mapping[str, Tensor]:
        """Scalars of the last training call: ``accuracy``, and ``cost``, the share of the dense blocks' FLOPs that
        eval mode would have spent, the modules' included."""
        return self._seen

    def _tokens(self) -> int:
        trace = self.handle.trace
        policy = next((r.policy for r in trace.policies if r.policy is not None), None)
        return encoder_session(self.handle).run.tokens if policy is None else policy.shape[1]

    def _costs(self) -> Tensor:
        """(B,) or scalar share of the dense FLOPs."""
        session = encoder_session(self.handle)
        if any(r.policy is not None for r in self.handle.trace.policies):
            return self._cost.expected(self.handle.trace.policies) / self._cost.dense(
                self._tokens()
            )
        dense, reduced = session.flops()
        first = next(self.model.parameters())
        return torch.tensor(reduced / max(dense, 1), device=first.device)

    def _token_term(self, tokens: Tensor | None, features: Tensor | None) -> Tensor:
        if tokens is None or features is None:
            raise ValueError(
                "the model or the teacher shows no tokens of its last layer, which the distillation of tokens "
                "compares: give TokenLoss(tokens=0)"
            )
        prefix = encoder_session(self.handle).prefix
        wanted, weight = surviving(self.handle.trace, features[:, prefix:])
        own = tokens[:, prefix:]
        if own.shape != wanted.shape:
            raise ValueError(
                f"the teacher's tokens are {tuple(wanted.shape)} and the student's {tuple(own.shape)}: give a "
                "teacher of the same shape, or TokenLoss(tokens=0)"
            )
        return distil_tokens(own, wanted, weight, self.weights.token_form)


class _Classifier:
    """Calls a classifier of timm or transformers; returns its logits and the tokens of its last layer."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.hooks: list[Any] = []
        self.found: list[Tensor] = []
        self.by_parts = hasattr(model, "forward_features") and hasattr(model, "forward_head")
        if not self.by_parts:
            for child in model.children():
                self.hooks.append(child.register_forward_hook(partial(_keep, self.found)))

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.by_parts:
            features = self.model.forward_features(images)
            return _logits(self.model.forward_head(features), self.model), features
        self.found.clear()
        logits = _logits(self.model(images), self.model)
        tokens = self.found[0] if self.found else None
        self.found.clear()
        return logits, tokens

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()


def _keep(found: list[Tensor], module: Any, args: Any, output: Any) -> None:
    """Remember the tokens that a part of a transformers model returns."""
    tokens = getattr(output, "last_hidden_state", None)
    if isinstance(tokens, Tensor) and tokens.dim() == 3:
        found.append(tokens)


def _logits(output: Any, model: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UnsupportedModelError(
            f"a {type(model).__name__} returns no logits (B, classes): give a timm model with num_classes > 0, or a "
            "...ForImageClassification of transformers"
        )
    return logits
