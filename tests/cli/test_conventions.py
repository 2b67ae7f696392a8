"""Conventions of the command line: JSON alone on standard output, completion, exit status, documented names."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image

import vtr
from recipes import cli_page
from vtr.cli import commands as cli
from vtr.cli import demo_vit

ROOT = Path(__file__).parents[2]
COMMANDS = {command.name: command for command in typer.main.get_command(cli.app).commands.values()}

# The shortest call of each command that does its work.
CALLS = {
    "methods": [],
    "supported": ["digits-vit"],
    "models": ["LlavaForConditionalGeneration"],
    "families": [],
    "profile": ["digits-vit", "-k", "evit", "--repeats", "1"],
    "draw": ["photo.png", "-k", "evit", "-o", "tokens.png"],
    "demo": ["vit"],
    "plot": ["vit", "--images", "100"],
    "eval": ["--dry-run", "--limit", "2"],
}
# Commands that take long, or serve until they are stopped: the tests of each read its JSON.
ELSEWHERE = {"calibrate", "doctor", "explore", "heatmap", "search", "serve"}
NEEDS = {
    "models": "transformers",
    "families": "diffusers",
    "plot": "matplotlib",
    "eval": "lmms_eval",
}


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Runs ``vtr ARGS`` in this process and an empty folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").resize((96, 96)).save("photo.png")

    def go(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vtr", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return go


def test_every_command_has_json_and_a_test_of_it():
    assert set(COMMANDS) - ELSEWHERE == set(CALLS)
    for name, command in COMMANDS.items():
        assert "--json" in {o for p in command.params for o in p.opts}, name


@pytest.mark.parametrize("name", sorted(CALLS))
def test_standard_output_is_json_and_nothing_else(name, run, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if name == "demo":
        monkeypatch.setattr(demo_vit, "IMAGES", 10)
        monkeypatch.setattr(demo_vit.digits, "demo_methods", lambda: [vtr.EViT(keep=0.4)])
    if name == "plot":
        from vtr.evaluate import digits

        few = dict(list(digits.sweep_methods().items())[:1])
        monkeypatch.setattr(digits, "sweep_methods", lambda: few)
    status, out, err = run(name, *CALLS[name], "--json")
    assert status == 0, err
    assert json.loads(out)


def test_a_mistake_leaves_standard_output_empty(run):
    status, out, err = run("supported", "no-such-model", "--json")
    assert status == 2 and out == "" and err.startswith("vtr: ") and err.count("\n") == 1


def test_a_stopped_command_ends_with_130(run, monkeypatch):
    def stop(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr("vtr.list_methods", stop)
    status, out, err = run("methods")
    assert status == 130 and out == "" and "Traceback" not in err


def _complete(words: str) -> list[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_VTR_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    code = "import sys; sys.argv[0] = 'vtr'; from vtr.cli.commands import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_shell_completes_commands_and_options():
    assert _complete("vtr pro") == ["profile"]
    assert _complete("vtr profile --rep") == ["--repeats"]


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_lists_what_the_commands_take():
    page = cli_page.PAGE.read_text(encoding="utf-8")
    assert page == cli_page.renewed(page), "run: python -m recipes.cli_page"


def test_the_page_knows_a_new_option():
    page = cli_page.PAGE.read_text(encoding="utf-8")
    assert "`--repeats" in page and page != page.replace("`--repeats", "`--times")
    assert cli_page.renewed(page.replace("`--repeats", "`--times")) == page


def _variables(text: str) -> set[str]:
    return set(re.findall(r"\bVTR_[A-Z_]+\b", text))


def test_every_environment_variable_is_in_the_table():
    page = cli_page.PAGE.read_text(encoding="utf-8")
    table = set(re.findall(r"^\| `(VTR_[A-Z_]+)` \|", page, re.M))
    files = [ROOT / "Makefile", *(f for f in (ROOT / "vtr").rglob("*.py*") if f.suffix != ".pyc")]
    files += [f for top in ("recipes", "benchmarks", "tests") for f in (ROOT / top).rglob("*.py")]
    used = set().union(*(_variables(f.read_text(encoding="utf-8")) for f in files))
    assert table == used


# ---- the library -------------------------------------------------------------------------------


def _prints(source: str) -> list[int]:
    """Find the lines that print, except in ``main`` and behind ``__name__`` of a module that can be run."""
    tree = ast.parse(source)
    guards = [n for n in tree.body if isinstance(n, ast.If) and "__name__" in ast.unparse(n.test)]
    mains = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    free = {id(n) for top in guards + (mains if guards else []) for n in ast.walk(top)}
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and id(node) not in free
        and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]


def test_the_library_never_prints():
    for file in (ROOT / "vtr").rglob("*.py"):
        if "cli" not in file.relative_to(ROOT).parts:
            lines = _prints(file.read_text(encoding="utf-8"))
            assert not lines, f"{file}: lines {lines} print; use logging.getLogger(__name__)"


def test_a_planted_print_is_found():
    assert _prints("def f():\n    print(1)\n") == [2]
    assert _prints("def main():\n    print(1)\n") == [2]
    assert _prints('def main():\n    print(1)\nif __name__ == "__main__":\n    main()\n') == []
