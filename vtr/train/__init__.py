"""Losses and loops for the methods that learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtr.core.method import Method
from vtr.core.module_files import ModuleFile

__all__ = ["load"]


def load(target: Any, folder: str | Path) -> Method:
    """Load what a training run has written into a model; returns the method that it was trained with.

    ``vtr.apply(target, vtr.train.load(target, folder))`` is then the trained model.

    Args:
        target: the model of the run, untrained: an image classifier, or a diffusion transformer or its pipeline.
        folder: written by :class:`vtr.train.tokens.TokenTuner` or :class:`vtr.train.sla.SparseTuner`.

    Raises:
        UnsupportedModelError: the model is another one than that which was trained, or methods are
            applied to it.
        ValueError: the folder holds no trained model.
    """
    from vtr.core.registry import registry
    from vtr.methods.common.attention import AttentionMethod

    found = registry().get(str(ModuleFile.read(folder).method.get("name")))
    if found is not None and issubclass(found, AttentionMethod):
        from vtr.train import tuned

        return tuned.load(target, folder)
    from vtr.train import tokens

    return tokens.load(target, folder)
