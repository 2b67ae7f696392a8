"""Faults of the harness are named once, with the package, its version and what to install."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

pytest.importorskip("lmms_eval")

from vtr.compat.tested import TESTED
from vtr.errors import HarnessError
from vtr.evaluate import harness
from vtr.evaluate.runner import evaluate, prepare, run
from vtr.zoo import loading


@pytest.fixture(autouse=True)
def _cache(cache):
    """The benchmark with few questions."""


@pytest.fixture
def versions(monkeypatch):
    """Installed versions as a test wants them."""
    found: dict[str, str | None] = {"lmms-eval": "0.7.3"}
    monkeypatch.setattr(harness, "_version", lambda name: found.get(name))
    return found


def test_a_package_without_a_module_is_named_before_the_weights(monkeypatch, versions):
    """filelock 4.3 moved the module by which lmms-eval makes its locks reentrant."""
    from lmms_eval import evaluator

    monkeypatch.setattr(evaluator._enable_reentrant_filelocks, "_patched", False, raising=False)
    monkeypatch.setitem(sys.modules, "filelock._api", None)
    monkeypatch.setattr(loading, "load_found", lambda *a, **k: pytest.fail("the model was loaded"))
    versions["filelock"] = "4.3.1"
    with pytest.raises(HarnessError) as caught:
        evaluate(methods="flowcut", keep=36, limit=2)
    message = str(caught.value)
    assert message.startswith("lmms-eval 0.7.3 does not work with filelock 4.3.1 (")
    assert message.endswith(
        f"vtr was tested with filelock {harness.BESIDE['filelock']}: pip install "
        f"'filelock=={harness.BESIDE['filelock']}'"
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_the_first_evaluation_that_cannot_run_is_the_last(monkeypatch, versions):
    """Also for a package that vtr names no version of, in the middle of an evaluation."""
    from lmms_eval import evaluator

    calls = []

    def gone(*args, **kwargs):
        calls.append(1)
        import yaml.not_there  # noqa: F401

    monkeypatch.setattr(evaluator, "evaluate", gone)
    versions["pyyaml"] = "7.0"
    said = []
    with pytest.raises(HarnessError, match=r"does not work with pyyaml 7\.0 .*'vtr\[eval\]'"):
        run(prepare(methods="flowcut,fastv", keep=36, limit=2), None, said.append)
    assert calls == [1] and len(said) == 1


def test_a_missing_attribute_is_named_where_a_task_is_loaded(monkeypatch, versions):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)  # it is tried five times
    monkeypatch.delattr("datasets.load_dataset")
    versions["datasets"] = "6.1.0"
    with pytest.raises(
        HarnessError, match=r"datasets 6\.1\.0 \(module 'datasets' has no attribute"
    ):
        evaluate(limit=2)


def test_a_package_that_is_not_installed_is_named(monkeypatch, versions, tmp_path):
    """One that a task of the user's own imports."""
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_visual: !function utils.see\ndoc_to_text: q\ndoc_to_target: a\n"
    )
    (tmp_path / "utils.py").write_text("import a_package_of_nobody\n\ndef see(doc): return []\n")
    with pytest.raises(HarnessError) as caught:
        run(prepare(tasks="own", include=tmp_path))
    assert "needs the package a-package-of-nobody, which is not installed" in str(caught.value)
    assert str(caught.value).endswith("pip install 'a-package-of-nobody'")


def test_a_tested_version_that_lacks_something_is_not_whole(versions):
    versions["tqdm"] = harness.BESIDE["tqdm"]
    assert "pip install --force-reinstall 'tqdm==" in harness._message("tqdm", "no such thing")
    assert "'lmms-eval==0.7.3'" in harness._message("lmms_eval", "no such thing")
    versions["transformers"] = "6.0"
    told = harness._message("transformers", "no such thing")
    assert TESTED["transformers"].requirement in told


def lmms(code: str, name: str = "lmms_eval.evaluator") -> BaseException:
    """What a piece of lmms-eval's code raises."""
    module = ModuleType(name)
    try:
        exec(compile(code, name, "exec"), module.__dict__)
    except Exception as error:
        return error
    raise AssertionError("it did not raise")


@pytest.mark.parametrize(
    ("code", "package"),
    [
        ("import numpy; numpy.not_there", "numpy"),
        ("from numpy import not_there", "numpy"),
        ("import numpy.not_there", "numpy"),
        ("import numpy; numpy.ndarray.not_there", "numpy"),
        ("import numpy; numpy.zeros(1).not_there", "numpy"),
        ("import nosuchpackage", "nosuchpackage"),
    ],
)
def test_import_errors_and_missing_attributes_are_recognised(code, package):
    error = lmms(code)
    assert package in (harness.fault(error) or "")
    wrapped = ValueError("somewhere above")
    wrapped.__cause__ = error
    assert harness.fault(wrapped) == harness.fault(error)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import numpy; numpy.not_there", "vtr.evaluate.model"),  # ours
        ("import numpy; numpy.not_there", "somebody"),
        ("import numpy; numpy.float64(1).lower()", "lmms_eval.tasks.own.utils"),  # odd data
        ("'text'.not_there", "lmms_eval.evaluator"),
        ("import json.not_there", "lmms_eval.evaluator"),
        ("raise ImportError('of nothing')", "lmms_eval.evaluator"),
        ("int('x')", "lmms_eval.evaluator"),
    ],
)
def test_other_errors_are_not_the_harness_s(code, name):
    assert harness.fault(lmms(code, name)) is None


def test_the_command_says_it_in_one_line(monkeypatch, capsys, versions):
    from vtr.cli import commands as cli

    monkeypatch.setattr(harness, "rehearse", lambda: (_ for _ in ()).throw(HarnessError("words")))
    monkeypatch.setattr(sys, "argv", ["vtr", "eval", "--limit", "2", "--store", ":memory:"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and capsys.readouterr().err.endswith("vtr: words\n")
