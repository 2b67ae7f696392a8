"""Samples of a prompt, taken apart and put together by :mod:`vtr.testing`, for tests."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from vtr.testing.models.prompts import *  # noqa: F403
