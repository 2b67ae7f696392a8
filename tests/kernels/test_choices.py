"""Tuned tile sizes on disk: found by the next process, and never in the way."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import logging
import os
import threading
import time

import pytest
import torch

from vtr.kernels import choices

CHOICE = (128, 64, 8, 3, 0)
OTHER = (64, 64, 4, 3, 2)
BOTH = [CHOICE, OTHER]


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.setenv("VTR_CACHE", str(tmp_path / "made" / "later"))


def test_what_was_kept_is_found_and_printed():
    assert choices.find("H, torch 2", "forward 128") is None and not choices.load()
    assert choices.keep("H, torch 2", "forward 128", CHOICE, BOTH) == CHOICE
    choices.keep("H, torch 3", "forward 128", OTHER, BOTH)
    assert choices.find("H, torch 2", "forward 128") == CHOICE
    assert choices.find("H, torch 2", "forward 64") is None
    assert choices.report().splitlines() == [
        str(choices.path()),
        "H, torch 2",
        "  forward 128: 128 x 64, 8 warps, 3 stages",
        "H, torch 3",
        "  forward 128: 64 x 64, 4 warps, 3 stages, 2 persistent a multiprocessor",
    ]
    names = sorted(file.name for file in choices.path().parent.iterdir())
    assert names in (["kernels-2.json"], ["kernels-2.json", "kernels-2.lock"])


def test_the_first_process_wins():
    choices.keep("H", "dq", CHOICE, BOTH)
    assert choices.keep("H", "dq", OTHER, BOTH) == choices.find("H", "dq") == CHOICE
    # Unless what it chose is no candidate any more.
    assert choices.keep("H", "dq", OTHER, [OTHER]) == choices.find("H", "dq") == OTHER


def test_processes_that_choose_at_once_agree(monkeypatch):
    """One has read the file and not yet written it when the other comes."""
    pytest.importorskip("fcntl")
    started, write, found = threading.Event(), choices.write, []

    def slow(file, content):
        started.set()
        time.sleep(0.3)
        write(file, content)

    monkeypatch.setattr(choices, "write", slow)
    other = threading.Thread(target=lambda: found.append(choices.keep("H", "dq", CHOICE, BOTH)))
    other.start()
    started.wait(30)
    found.append(choices.keep("H", "dq", OTHER, BOTH))
    other.join()
    assert found[0] == found[1] == choices.find("H", "dq")


def test_a_file_system_without_locks_is_no_obstacle(monkeypatch):
    """Such as that of a cluster, on which the user's folder often lies."""
    fcntl = pytest.importorskip("fcntl")

    def refused(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refused)
    assert choices.keep("H", "dq", CHOICE, BOTH) == choices.find("H", "dq") == CHOICE
    with choices.alone(choices.verdict_path()):
        choices.keep_verdict("H", "kernel", "works")
    assert choices.verdicts() == {"H": {"kernel": "works"}}


def test_a_machine_is_named_whatever_triton_is_distributed_as(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    name = f"H200, torch {torch.__version__}, triton {triton.__version__}"
    assert choices.machine(torch.device("cuda")) == name


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", '{"H": 3}', '{"H": {"dq": [1, 2, 3, 4]}}', '{"H": {"dq": [1, 2, 3, "4", 5]}}'],
)
def test_a_broken_file_is_said_and_replaced(text, caplog):
    choices.path().parent.mkdir(parents=True)
    choices.path().write_text(text)
    with caplog.at_level(logging.WARNING):
        assert choices.find("H", "dq") is None
    assert "are ignored" in caplog.text and str(choices.path()) in caplog.text
    assert choices.keep("H", "dq", CHOICE, BOTH) == CHOICE
    assert json.loads(choices.path().read_text()) == {"H": {"dq": list(CHOICE)}}


def test_a_folder_that_cannot_be_written_is_said(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VTR_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert choices.keep("H", "dq", CHOICE, BOTH) == CHOICE
    assert "cannot be written" in caplog.text


def test_tuning_measures_once_for_all_processes(monkeypatch):
    pytest.importorskip("triton")
    from vtr.kernels import triton_common
    from vtr.kernels.triton_common import Config

    configs = [Config(64, 64, 4, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 4)]
    ran, measured = [], []

    def measure(given, launch):
        measured.append(given)
        return given[1]

    def process(key, given=configs):
        monkeypatch.setattr(triton_common, "_best", {})
        for _ in range(2):
            triton_common.tuned(key, given, ran.append)
        return ran[-1]

    monkeypatch.setattr(triton_common, "_measure", measure)
    monkeypatch.setattr(triton_common, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    key = ("forward", torch.device("cuda", 1), torch.bfloat16, "half", 128, 128, 128, "many")
    assert process(key) == process(key) == configs[1] and len(measured) == 1
    assert process((*key[:-1], "few")) == configs[1] and len(measured) == 2
    # A choice that is no candidate any more is measured again, and one is made in no capture.
    for _ in range(2):
        assert process(key, configs[::2]) == configs[2] and len(measured) == 3
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert process(key) == configs[2]
    assert process(("dq", *key[1:])) == configs[0] and len(measured) == 3
    assert choices.load().popitem()[1].keys() == {
        "forward torch.bfloat16 half 128 128 128 many",
        "forward torch.bfloat16 half 128 128 128 few",
    }


def test_a_small_call_does_not_choose_for_a_large_one(monkeypatch):
    pytest.importorskip("triton")
    from vtr.kernels import triton_common
    from vtr.kernels.triton_common import amount

    monkeypatch.setattr(triton_common, "interpreting", lambda: False)
    monkeypatch.setattr(triton_common, "multiprocessors", lambda device: 132)  # of an H200
    device = torch.device("cuda")
    assert [amount(device, n) for n in (8, 263, 264, 2111, 2112, 12_288)] == [
        "few", "few", "some", "some", "many", "many",
    ]  # fmt: skip
