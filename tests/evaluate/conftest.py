"""A small copy of the built-in benchmark for all tests of the evaluation, in a cache of their own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

# datasets reads these when it is imported; the tests must not write into the user's cache.
_CACHE = tempfile.TemporaryDirectory(prefix="vtr-tests-")
os.environ["HF_DATASETS_CACHE"] = f"{_CACHE.name}/datasets"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

QUESTIONS = 40


@pytest.fixture(scope="session")
def cache() -> Path:
    """``$VTR_CACHE`` of the tests, holding the built-in benchmark with 40 questions."""
    pytest.importorskip("lmms_eval")
    root = Path(_CACHE.name) / "vtr"
    os.environ["VTR_CACHE"] = str(root)
    from vtr.evaluate.tasks import write

    write(QUESTIONS)
    return root
