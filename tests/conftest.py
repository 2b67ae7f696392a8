"""What all tests share: one thread, no network, fixed seeds, gpu tests only where there is a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# Convolutions are rounded to TF32 there unless told otherwise, which is more than tests allow.
torch.backends.cudnn.allow_tf32 = False
settings.register_profile(
    "vtr",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("vtr")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _attention_backend() -> Iterator[None]:
    """set_attention_backend of one diffusers model sets that of the process, and no reset undoes it."""
    yield
    module = sys.modules.get("diffusers.models.attention_dispatch")
    registry: Any = getattr(module, "_AttentionBackendRegistry", None)
    if registry is not None:
        registry.set_active_backend(module.AttentionBackendName(module.DIFFUSERS_ATTN_BACKEND))


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
