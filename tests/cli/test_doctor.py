"""``vtr doctor``: what it finds here, what it says of what is missing or broken, and its status."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from vtr.cli import doctor, doctor_backends
from vtr.cli.doctor import ABSENT, BROKEN, GOOD, UNTESTED, Diagnosis, Finding
from vtr.compat import contract, tested
from vtr.compat.contract import Expectation


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends that packages have other versions (None: are not installed)."""
    real = tested.installed

    def go(**versions: str | None) -> None:
        def found(package: str) -> str | None:
            return versions[package] if package in versions else real(package)

        for module in (tested, doctor, contract):
            monkeypatch.setattr(module, "installed", found)

    return go


def by_name(findings: Any) -> dict[str, Finding]:
    return {f.name: f for f in findings}


def test_versions_that_are_here() -> None:
    found = by_name(doctor.versions())
    assert found["torch"].status == GOOD
    assert found["torch"].detail == f"{tested.installed('torch')} (tested: 2.11 to 2.15)"
    assert {"python", "vtr", "numpy", "pillow", "transformers", "lmms-eval", "triton"} <= set(found)
    assert all(f.status != BROKEN for f in found.values())


def test_versions_that_were_not_tested_and_are_missing(pretend: Any) -> None:
    pretend(transformers="5.25.0", timm="1.0.20", diffusers=None, matplotlib=None, triton=None)
    found = by_name(doctor.versions())
    assert found["transformers"] == Finding(
        "transformers",
        UNTESTED,
        "5.25.0 (tested: 5.17 to 5.24), newer than what was tested: if something fails, install "
        "transformers>=5.17,<5.25",
    )
    assert found["timm"].status == UNTESTED and "older than what was tested" in found["timm"].detail
    assert found["diffusers"] == Finding("diffusers", ABSENT, "pip install 'vtr[diffusion]'")
    assert found["matplotlib"] == Finding("matplotlib", ABSENT, "pip install 'vtr[plots]'")
    assert found["triton"].status == ABSENT


def test_what_vtr_always_needs(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(safetensors=None)
    found = by_name(doctor.versions())
    assert found["safetensors"] == Finding(
        "safetensors", BROKEN, "vtr needs it: pip install safetensors"
    )
    monkeypatch.setitem(sys.modules, "safetensors", None)  # there, and cannot be imported
    pretend()
    assert by_name(doctor.versions())["safetensors"].status == BROKEN


def test_nothing_more_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [Finding("torch", BROKEN, "2.15.0: torch cannot be imported")]
    monkeypatch.setattr(doctor, "versions", lambda: broken)
    diagnosis = doctor.examine()
    assert list(diagnosis.parts) == ["versions"]
    assert diagnosis.broken == ["versions: torch: 2.15.0: torch cannot be imported"]


def test_devices_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name(doctor.devices())
    assert f"torch uses {torch.get_num_threads()} of" in found["cpu"].detail
    if not torch.cuda.is_available():
        assert found["cuda"].status == ABSENT

    class Facts:
        name, major, minor, total_memory = "NVIDIA H100", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Facts)
    found = by_name(doctor.devices())
    assert found["cuda:1"].detail == "NVIDIA H100, compute capability 9.0, 80 GiB"


def without_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling it takes a quarter of a minute."""
    import vtr.kernels

    backends = {"triton": "needs a GPU", "flex": "not now", "sdpa": "", "reference": ""}
    monkeypatch.setattr(vtr.kernels, "available_backends", lambda kind: backends)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_backends_run_and_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    without_flex(monkeypatch)
    found = by_name(doctor_backends.attention())
    assert found["triton on cpu"] == Finding("triton on cpu", ABSENT, "needs a GPU")
    for name in ("sdpa on cpu", "reference on cpu"):
        assert found[name].status == GOOD and "runs, largest error" in found[name].detail


def test_backends_that_raise_or_compute_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    import vtr.kernels

    without_flex(monkeypatch)

    def wrong(q: Any, *args: Any, backend: str, **kwargs: Any) -> Any:
        if backend == "sdpa":
            raise RuntimeError("no kernel\nfor this device")
        return torch.full_like(q, float("nan"))

    monkeypatch.setattr(vtr.kernels, "block_sparse_attention", wrong)
    found = by_name(doctor_backends.attention())
    assert found["sdpa on cpu"] == Finding(
        "sdpa on cpu", BROKEN, "RuntimeError: no kernel for this device"
    )
    assert found["reference on cpu"].detail == "ArithmeticError: its result is off by nan"


def test_the_hopper_kernel_is_listed_on_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from vtr.kernels import hopper_verdict, triton_common

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(triton_common, "on_hopper", lambda device: device.index > 0)
    monkeypatch.setattr(hopper_verdict, "known", lambda device: ["", "works", ""][device.index])
    monkeypatch.setattr(hopper_verdict, "check", lambda device: "status -11")
    assert list(doctor_backends._hopper()) == [
        Finding("Hopper kernel on cuda:1", GOOD, "equals the reference on this machine"),
        Finding("Hopper kernel on cuda:2", ABSENT, "the Triton kernel runs instead: status -11"),
    ]


@pytest.mark.gpu
def test_backends_run_on_a_gpu() -> None:
    found = by_name(doctor_backends.attention())
    for name in ("triton", "flex", "sdpa", "reference", "bipartite_match"):
        assert found[f"{name} on cuda"].status == GOOD, found[f"{name} on cuda"]


def test_videos_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    found = by_name(doctor_backends.video())
    assert found["pyav"].status == GOOD and found["pyav"].detail.startswith("reads 6 frames")
    assert found["decord"].status in (GOOD, ABSENT)
    monkeypatch.setattr(doctor_backends, "GREY", 20)
    real = doctor_backends._read

    def read(path: Any, backend: str) -> str:
        monkeypatch.setattr(doctor_backends, "GREY", 30)  # other pictures than were written
        return real(path, backend)

    monkeypatch.setattr(doctor_backends, "_read", read)
    broken = by_name(doctor_backends.video())["pyav"]
    assert broken.status == BROKEN and "it reads frames of grey [0, " in broken.detail


def test_videos_without_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    found = by_name(doctor_backends.video())
    assert found["pyav"] == Finding("pyav", ABSENT, "pip install 'vtr[video]'")
    assert found["decord"].status == ABSENT


def test_contracts_of_what_is_installed(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(timm=None)
    monkeypatch.setattr(contract, "LIBRARIES", ("torch", "timm", "accelerate"))
    gone = Expectation("torch:of_tomorrow", "vtr/api.py")
    real = contract.contract
    monkeypatch.setattr(
        contract, "contract", lambda name: (gone,) if name == "torch" else real(name)
    )
    found = by_name(doctor.contracts())
    version = tested.installed("torch")
    line = f"torch {version}: torch has no of_tomorrow (used by vtr/api.py)"
    assert found["torch"] == Finding("torch", BROKEN, line)
    assert found["timm"] == Finding("timm", ABSENT, "pip install 'vtr[vision]'")
    pytest.importorskip("accelerate")
    assert found["accelerate"].status == GOOD


# ---- the command ----------------------------------------------------------------------------

HEALTHY = Diagnosis(
    {
        "versions": [Finding("torch", GOOD, "2.15.0 (tested: [2.11] to 2.15)")],
        "video": [Finding("decord", ABSENT, "pip install 'vtr[video]'")],
        "contract": [Finding("timm", UNTESTED, "newer")],
    }
)
ILL = Diagnosis({"video": [Finding("pyav", BROKEN, "cannot write a video")]})


@pytest.mark.parametrize(("diagnosis", "status"), [(HEALTHY, 0), (ILL, 1)])
def test_the_command(
    diagnosis: Diagnosis, status: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from vtr.cli import commands as cli

    def examine() -> Diagnosis:
        print("what a library prints")
        return diagnosis

    monkeypatch.setattr(doctor, "examine", examine)
    for options in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["vtr", "doctor", *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert (stop.value.code or 0) == status
        assert "what a library prints" not in out
        assert ("broken: video: pyav: cannot write a video" in err) == bool(status)
        if options:
            told = json.loads(out)
            assert told.pop("ok") == (not status)
            assert list(told) == list(diagnosis.parts)
            assert all(f["status"] in out for part in told.values() for f in part)
        else:
            for found in diagnosis.parts.values():
                assert all(f.name in out and f.detail in out for f in found)


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vtr", "--version"], capture_output=True, text=True, check=True
    )
    import vtr

    assert done.stdout.strip() == f"vtr {vtr.__version__}"
