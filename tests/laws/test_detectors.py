"""Every registered method is held to the laws on detectors: by registration alone, no test names it."""

from __future__ import annotations

import pytest

from tests.laws.everyone import METHODS, NAMES, hold_on
from vtr.core.registry import registry

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", [n for n in METHODS if "detector" in registry()[n].sites])
def test_the_laws_hold(name: str) -> None:
    hold_on(name, NAMES["Detector"])
