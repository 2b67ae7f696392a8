"""A method that is calibrated, for tests: each head's output is scaled by its attention to the image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from vtr.core import registry
from vtr.core.site import ModelInfo
from vtr.methods.common.language_attention import LanguageAttentionMethod


@dataclass(frozen=True, kw_only=True)
class ImageShare(LanguageAttentionMethod):
    """Scale heads by the mean share of the last row's attention that visual tokens get."""

    name: ClassVar[str] = "image-share"
    paper: ClassVar[str] = "a test"
    calibrated: ClassVar[bool] = True

    power: float = 1.0

    def calibrator(self, info: ModelInfo) -> Shares:
        return Shares(info)

    def attend(self, site: Any) -> Tensor:
        factor = site.table["share"][site.layer] ** self.power
        scaled: Tensor = site.dense() * factor[:, None, None].to(site.q.dtype)
        return scaled


class Shares:
    """Averages the share over all samples; ``phases`` and ``grad`` say how the model was called."""

    def __init__(self, info: ModelInfo) -> None:
        self.found: dict[int, list[Tensor]] = {}
        self.layers = info.depth["attention"]
        self.phases: set[str] = set()
        self.grad = self.training = False

    def see(self, site: Any) -> None:
        self.phases.add(site.phase)
        self.grad |= torch.is_grad_enabled()
        self.training |= site.training
        rows = torch.full((site.q.shape[0], 1), site.q.shape[2] - 1, device=site.q.device)
        share = (site.attention_rows(rows)[:, :, 0] * site.visual[:, None]).sum(-1)
        self.found.setdefault(site.layer, []).extend(share)

    def finish(self) -> dict[str, Tensor]:
        assert self.phases == {"prefill"} and not self.grad and not self.training
        return {
            "share": torch.stack([torch.stack(self.found[n]).mean(0) for n in range(self.layers)])
        }


@pytest.fixture
def image_share(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ImageShare]]:
    """The method, registered for the time of a test."""
    registry.registry()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    yield registry.register(ImageShare)
