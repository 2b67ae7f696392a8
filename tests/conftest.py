"""What all tests share: one thread, no network, fixed seeds, gpu tests only where there is a GPU.

A machine with a GPU often has few libraries. A test module that imports one which is not installed, or a gpu test
that needs one, is skipped, and the reason names the library.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

try:
    import hypothesis
except ModuleNotFoundError:
    hypothesis = None  # type: ignore[assignment]

# What vtr's extras and the tests import (without torch, numpy, pillow, rich, safetensors and typer).
OPTIONAL = frozenset({
    "accelerate", "av", "decord", "diffusers", "fastapi", "flash_attn", "ftfy", "httpx", "openai",
    "prometheus_client", "pydantic", "starlette", "uvicorn", "gradio", "huggingface_hub",
    "hypothesis", "lmms_eval", "loguru", "matplotlib", "open_clip", "optuna", "peft", "pyarrow",
    "pycocotools", "sklearn", "sqlalchemy", "tensorboard", "timm", "tokenizers", "torchmetrics",
    "torchvision", "transformers", "triton", "vllm", "webdataset",
})  # fmt: skip

torch.set_num_threads(1)
# Convolutions are rounded to TF32 there unless told otherwise, which is more than tests allow.
torch.backends.cudnn.allow_tf32 = False
if hypothesis is not None:
    hypothesis.settings.register_profile(
        "vtr",
        deadline=None,
        derandomize=True,
        max_examples=25,
        suppress_health_check=[
            hypothesis.HealthCheck.too_slow,
            hypothesis.HealthCheck.function_scoped_fixture,
        ],
    )
    hypothesis.settings.load_profile("vtr")


def missing(error: BaseException | None) -> str:
    """Return the optional library whose absence raised an error or a cause of it, "" if there is none."""
    while error is not None:
        name = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and name in OPTIONAL and name not in sys.modules:
            return name
        error = error.__cause__ or error.__context__
    return ""


def skip_if_missing(report: Any, call: Any, path: Path) -> None:
    """Turn a report of a failure by a missing library into a skip that names the library."""
    name = missing(call.excinfo.value) if call is not None and call.excinfo is not None else ""
    if name and report.outcome == "failed":
        reason = f"Skipped: needs {name}, which is not installed"
        report.outcome, report.longrepr = "skipped", (str(path), 1, reason)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    if isinstance(collector, pytest.Module):
        skip_if_missing(report, getattr(report, "call", None), collector.path)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    report = yield
    if "gpu" in item.keywords:
        skip_if_missing(report, call, item.path)
    return report


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
