"""Every registered method is held to the laws on encoders with windows: by registration alone, no test names it."""

from __future__ import annotations

import pytest

from tests.laws.everyone import METHODS, NAMES, hold_on

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", METHODS)
def test_the_laws_hold(name: str) -> None:
    hold_on(name, NAMES["Windowed"])
