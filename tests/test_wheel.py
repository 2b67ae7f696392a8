"""The wheel holds all of vtr and nothing else: the built-in weights, and neither tests nor recipes."""

from __future__ import annotations

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
