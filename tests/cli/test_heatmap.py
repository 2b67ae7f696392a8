"""``vtr heatmap`` on the built-in generator."""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image

from tests.cli import test_commands

run = test_commands.run


def test_heatmap_of_the_built_in_generator(tmp_path: Any, run: Any) -> None:
    out = tmp_path / "map.png"
    arguments = ["heatmap", "a 7 moving right", "--steps", "2", "--out", str(out)]
    status, text, _ = run(*arguments)
    assert status == 0
    lines = text.splitlines()
    assert lines[0].startswith("7: ")
    assert lines[1].startswith("right: ")
    assert "of the attention" in lines[1]
    with Image.open(out) as image:
        assert image.size == (5 * 256 + 4 * 8, 2 * 152 + 10)
    status, text, _ = run(*arguments, "--word", "7", "--json")
    assert status == 0
    found = json.loads(text)
    assert found["out"] == str(out)
    assert 0 < found["attention"]["7"] < 1
    assert set(found["sinks"]) == {"7"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a 7 moving right", "--word", "cat"], "'cat' is not in the prompt"),
        (["a cat"], "does not know 'cat'"),
        (
            ["a 7", "--model", "nope"],
            "no built-in generator 'nope'; there is: digits-wan; or a folder",
        ),
        (["a 7", "--out", "map.txt"], "name a picture"),
        (["a 7", "--out", "no/map.png"], "there is no folder no"),
    ],
)
def test_errors(arguments: list[str], message: str, run: Any) -> None:
    status, _, error = run("heatmap", *arguments)
    assert status == 2
    assert message in error
