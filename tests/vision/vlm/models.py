"""The tiny vision-language models of :mod:`vtr.testing`, for tests."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")

from vtr.testing.models.vlms import *  # noqa: E402, F403
