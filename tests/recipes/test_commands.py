"""Every recipe is a command of the repository, and the documentation names them rightly."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from recipes.train import RECIPES

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(
    file.stem for file in (ROOT / "recipes").glob("*.py") if "\ndef main(" in file.read_text()
)
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("vtr/zoo/cards/*.md")],
    key=lambda page: page.name,
)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_recipe_says_how_it_is_called(name, capsys):
    pytest.importorskip("diffusers" if "wan" in name else "transformers")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"recipes.{name}").main(["--help"])
    assert stop.value.code == 0
    assert f"usage: python -m recipes.{name}" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_documentation_exist(page, capsys):
    for name, rest in re.findall(r"python -m recipes\.(\w+)([^`\n]*)", page.read_text()):
        assert name in COMMANDS, f"there is no command recipes.{name}"
        if name == "train":
            assert rest.split()[0] in RECIPES
        if options := re.findall(r"--[\w-]+", rest):
            pytest.importorskip("diffusers" if "wan" in name else "transformers")
            with pytest.raises(SystemExit):
                importlib.import_module(f"recipes.{name}").main(["--help"])
            shown = capsys.readouterr().out
            assert [option for option in options if option not in shown] == []
