"""The tiny models that read videos of :mod:`vtr.testing`, for tests."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from vtr.testing.models.videos import *  # noqa: F403
