"""The wheel holds all of vtr and nothing else: the built-in weights, and neither tests nor recipes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def content() -> set[str]:
    """The files that setuptools puts into the wheel, by what pyproject.toml says. Writes nothing."""
    setuptools = pytest.importorskip("setuptools")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        distribution = setuptools.Distribution()
        distribution.script_name = "setup.py"
        distribution.parse_config_files(["pyproject.toml"])
        distribution.include_package_data = False  # which would write an egg-info
        build = distribution.get_command_obj("build_py")
        build.ensure_finalized()
        files = {Path(file).as_posix() for _, _, file in build.find_all_modules()}
        for _, source, _, names in build.data_files:
            files |= {(Path(source) / name).as_posix() for name in names}
    return files


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the wheel and the source distribution of a copy of the repository's files."""
    pytest.importorskip("setuptools")
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache")
    for name in ("vtr", "tests", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    code = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,), (source,) = (copy / "dist").glob("*.whl"), (copy / "dist").glob("*.tar.gz")
    return wheel, source


def test_the_source_distribution_has_the_package_and_neither_tests_nor_recipes(archives, content):
    with tarfile.open(archives[1]) as file:
        names = {m.name.partition("/")[2] for m in file.getmembers() if m.isfile()}
    assert content <= names
    beside = {name.partition("/")[0] for name in names - content}
    assert beside == {
        *("LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"),
        "vtr.egg-info",
    }


@pytest.mark.timeout(600)
def test_the_demo_runs_from_the_wheel_alone(archives, tmp_path):
    """The installed command and nothing of the repository; see docs/install.md for an empty environment."""
    pytest.importorskip("timm")
    with zipfile.ZipFile(archives[0]) as wheel:
        wheel.extractall(tmp_path / "site")
    code = (
        "import pathlib, sys, vtr; from vtr.cli import demo_vit; from vtr.cli.commands import main\n"
        "assert pathlib.Path(vtr.__file__).parents[1].name == 'site'\n"
        "demo_vit.IMAGES = 10; demo_vit.digits.demo_methods = lambda: [vtr.EViT(keep=0.4)]\n"
        "sys.argv = ['vtr', 'demo', 'vit', '--out', 'demo']; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    names = {"photo.png", "vit.png", "vit-stages.png", "table.txt", "results.json"}
    assert {f.name for f in (tmp_path / "demo").iterdir()} == names


def test_the_demo_names_a_package_that_is_missing(tmp_path, monkeypatch):
    from rich.console import Console

    from vtr.cli import demo
    from vtr.errors import MissingDependencyError

    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "av" else name)
    with pytest.raises(MissingDependencyError, match=r"'av'.*pip install 'vtr\[demo\]'"):
        demo.run([], tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_every_file_of_the_package_is_in_the_wheel_and_no_other(content):
    # Compiled files and folders of tools (__pycache__, .mypy_cache) aside.
    files = (f.relative_to(ROOT) for f in (ROOT / "vtr").rglob("*") if f.is_file())
    wanted = {f.as_posix() for f in files if not any("cache" in p for p in f.parts[:-1])}
    assert content == wanted


def test_the_built_in_models_come_with_it(content):
    from vtr.zoo import card

    for name in ("digits-vit", "digits-tofe", "digits-adaptive", "digits-dynamicvit"):
        assert f"vtr/zoo/weights/{name}.safetensors" in content and card(name)
    for name in ("digits-llava", "digits-video", "digits-long", "digits-chat"):
        parts = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
        assert {f"vtr/zoo/weights/{name}/{part}" for part in parts} <= content
    parts = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {f"vtr/zoo/weights/digits-detr/{part}" for part in parts} <= content
    assert "vtr/zoo/weights/digits-wan/diffusion_pytorch_model.safetensors" in content


def test_it_holds_neither_tests_nor_recipes(content):
    tops = {file.partition("/")[0] for file in content}
    assert tops == {"vtr"}
    assert not [f for f in content if "/test_" in f or f.endswith("conftest.py")]
