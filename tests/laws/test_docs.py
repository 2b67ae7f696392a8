"""The code of docs/laws.md, run as it is printed there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from vtr.testing import check_method
from vtr.testing.methods import ATTENTION, CACHE, CONTRAST, INSIDE, TOKENS, WINDOWS

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = pytest.mark.filterwarnings("ignore")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Writes the modules of the pages, and gives the code of this one."""
    printed, (model, adapter, *_) = blocks("laws.md"), blocks("custom-vit.md")
    (tmp_path / "mymethods.py").write_text(printed[0])
    package = tmp_path / "mymodels"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "vit.py").write_text(model)
    (package / "vtr_adapter.py").write_text(adapter)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield printed
    for name in [n for n in sys.modules if n.partition(".")[0] in ("mymethods", "mymodels")]:
        del sys.modules[name]


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "docs/laws.md", "exec"), names)
    return names


def test_the_page_runs_as_printed(code: list[str]) -> None:
    tests = run(code[1])
    tests["test_the_laws_hold"]()
    tests["test_a_setting_of_one_s_own_on_some_kinds"]()
    others = run(code[2], LargestNorm=tests["LargestNorm"], dataclass=dataclass)
    assert check_method(others["OtherNames"], ["timm"]) == ("timm",)


def test_the_adapter_of_the_page(code: list[str]) -> None:
    torch.manual_seed(0)
    run(code[3])["test_the_adapter"]()


def test_the_method_inside_attention_of_the_page(code: list[str]) -> None:
    run(code[4])["test_inside_attention"]()


def test_the_page_names_every_law() -> None:
    page = (DOCS / "laws.md").read_text()
    laws = {**TOKENS, **ATTENTION, **INSIDE, **CACHE, **CONTRAST, **WINDOWS}
    assert not [law for law in laws if f"| {law} |" not in page]
