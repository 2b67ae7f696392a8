"""The loop: kills, resuming bit for bit, accumulation, precisions, logs, settings and refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.tiny_run import FAST, METHOD, batch, classifier, tuner
from vtr.train.losses import TokenLoss
from vtr.train.settings import LoopSettings
from vtr.train.state import load_state
from vtr.train.tokens import TokenSettings

ROOT = Path(__file__).parents[2]


def numbers(run):
    return {name: p.detach().clone() for name, p in run.weights.items()}


def curve(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def start(out: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    command = [sys.executable, "-m", "tests.train.tiny_run", str(out), *arguments]
    environment["ACCELERATE_USE_CPU"] = "true"
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_a_run_that_is_killed_continues_bit_for_bit(tmp_path):
    """``kill -9`` between two checkpoints; dropout, decisions, averages and the log are those of one run."""
    killed = start(tmp_path / "killed", "slow")
    try:
        until = time.monotonic() + 400
        log = tmp_path / "killed/log.jsonl"
        # The checkpoint is of step 4, and the log has gone further.
        while not log.exists() or len(log.read_text().splitlines()) < 5:
            assert time.monotonic() < until and killed.poll() is None, killed.communicate()[0]
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    finally:
        killed.kill()
    _, about = load_state(tmp_path / "killed/state.safetensors")
    assert 4 <= about["step"] < len(curve(tmp_path / "killed")) < 12
    with open(tmp_path / "killed/log.jsonl", "a") as half:
        half.write('{"step": 6, "lo')
    with tuner(tmp_path / "killed", resume=True) as run:
        assert run.position == about["step"]
        assert run.run()
    with tuner(tmp_path / "whole") as run:
        assert run.run()
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "state.safetensors") for name in ("killed", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    files = {
        name: sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("killed", "whole")
    }
    assert files["killed"] == files["whole"]


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_two_processes_are_one_that_accumulates(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if "lo" in dict(socket.if_nameindex()).values():
        together["GLOO_SOCKET_IFNAME"] = "lo"
    runs = [start(tmp_path / "two", "two", **together, RANK=r, LOCAL_RANK=r) for r in ("0", "1")]
    try:
        for run in runs:
            said, _ = run.communicate(timeout=400)
            assert run.returncode == 0, said[-3000:]
    finally:
        for run in runs:
            run.kill()
    settings = dataclasses.replace(FAST, steps=3, accumulate=2)
    with tuner(tmp_path / "one", settings=settings) as run:
        run.run()
    one, two = (load_file(tmp_path / name / "state.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4)
    for a, b in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert b == pytest.approx(a, rel=1e-4)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    """Without anything random, and with terms that are means over images."""
    loss = TokenLoss(logits=0.5, tokens=0.5)
    plain = {"ema": None, "steps": 2, "loss": loss}
    small = dataclasses.replace(FAST, accumulate=2, **plain)
    method = METHOD.replace(layers=(1, 2), trained=False)

    def large(number):
        parts = [batch(2 * number), batch(2 * number + 1)]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def run(out, settings, data):
        with tuner(out, method, settings, model=classifier(drop=0.0), data=data) as one:
            return [one.step(), one.step()], numbers(one)

    first, weights = run(tmp_path / "small", small, batch)
    second, others = run(tmp_path / "large", dataclasses.replace(FAST, **plain), large)
    for a, b in zip(first, second, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, atol=2e-5, rtol=1e-3)


def test_the_log_of_a_stopped_run_has_the_means_of_all_its_steps(tmp_path):
    settings = dataclasses.replace(FAST, steps=6, log_every=3, save_every=5)
    seen = []
    with tuner(tmp_path / "whole", settings=settings) as run:
        step = run.step
        run.step = lambda: seen.append(step()) or seen[-1]
        assert not run.run(minutes=0) and run.position == 0
        assert run.run()
    losses = [news["loss"] for news in seen]
    lines = curve(tmp_path / "whole")
    assert [line["step"] for line in lines] == [3, 6]
    assert lines[1]["loss"] == sum(losses[3:]) / 3
    assert set(lines[0]) == {"step", "loss", "norm", "rate", "accuracy", "cost"}
    with tuner(tmp_path / "parts", settings=settings) as run, pytest.raises(KeyboardInterrupt):
        run.moved = lambda batch, device: stop(run, batch)
        run.run()
    assert len(curve(tmp_path / "parts")) == 1
    with tuner(tmp_path / "parts", settings=settings, resume=True) as run:
        assert run.position == 5, "between two lines of the log"
        assert run.run()
    assert curve(tmp_path / "parts") == lines


def stop(run, batch):
    if run.position == 5:
        raise KeyboardInterrupt
    return batch


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_train_and_resume(precision, tmp_path):
    settings = dataclasses.replace(FAST, steps=4, precision=precision)
    with tuner(tmp_path / "whole", settings=settings) as run:
        losses = [run.step()["loss"] for _ in range(4)]
        whole = numbers(run)
        assert all(p.dtype == torch.float32 for p in whole.values())
    with tuner(tmp_path / "parts", settings=settings) as run:
        run.step()
        run.step()
        run.save()
    _, about = load_state(tmp_path / "parts/state.safetensors")
    assert ("scaler" in about) == (precision == "fp16")
    with tuner(tmp_path / "parts", settings=settings, resume=True) as run:
        assert [run.step()["loss"] for _ in range(2)] == losses[2:]
        assert all(torch.equal(p, whole[n]) for n, p in numbers(run).items())
    with tuner(tmp_path / "full", settings=dataclasses.replace(FAST, steps=4)) as run:
        assert losses[0] == pytest.approx(run.step()["loss"], rel=0.05)


def test_buffers_of_modules_belong_to_the_state(tmp_path):
    with tuner(tmp_path) as run:
        run.modules.register_buffer("count", torch.tensor(3.0))
        run.save()
    assert load_file(tmp_path / "state.safetensors")["buffers.learned.count"].item() == 3
    with pytest.raises(FileExistsError):
        tuner(tmp_path)


def test_a_checkpoint_without_a_tensor_is_refused(tmp_path):
    with tuner(tmp_path) as run:
        tensors = run.state()
        gone = next(name for name in tensors if name.startswith("averages."))
        del tensors[gone]
        with pytest.raises(ValueError, match=f"has no {gone}"):
            run.load_tensors(tensors, 1)


def test_metrics_go_to_a_tracker(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = dataclasses.replace(FAST, steps=4, log_every=2, log_with="tensorboard")
    with tuner(tmp_path, settings=settings) as run:
        run.run()
    found = EventAccumulator(str(tmp_path / "vtr"))
    found.Reload()
    wanted = [(line["step"], line["loss"]) for line in curve(tmp_path)]
    got = [(event.step, event.value) for event in found.Scalars("loss")]
    assert got == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in wanted]


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    import accelerate.tracking

    import vtr

    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [])
    with pytest.raises(vtr.MissingDependencyError, match='log_with="tensorboard" needs'):
        tuner(tmp_path, settings=dataclasses.replace(FAST, log_with="tensorboard"))


def test_accelerate_is_needed(monkeypatch):
    import vtr

    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(vtr.MissingDependencyError, match=r"training needs.*vtr\[train\]"):
        tuner(None)


def test_a_run_without_a_folder_takes_steps_alone(tmp_path):
    with tuner(None) as run:
        run.step()
        tensors = {name: tensor.clone() for name, tensor in run.state().items()}
        second = run.step()["loss"]
        run.load_tensors(tensors, 1)
        assert run.step()["loss"] == second
        for call in (run.save, run.run, run.export):
            with pytest.raises(ValueError, match=r"no folder \(out=None\)"):
                call()
    with pytest.raises(ValueError, match="resume=True needs the folder"):
        tuner(None, resume=True)
    with pytest.raises(ValueError, match="log_with needs a folder"):
        tuner(None, settings=dataclasses.replace(FAST, log_with="tensorboard"))


def test_other_arguments_are_refused_on_resuming(tmp_path):
    with pytest.raises(FileNotFoundError, match="to resume"):
        tuner(tmp_path, resume=True)
    with tuner(tmp_path) as run:
        run.step()
        run.save()
    with pytest.raises(FileExistsError, match="resume=True continues it"):
        tuner(tmp_path)
    other = dataclasses.replace(FAST, rate=1.0)
    with pytest.raises(ValueError, match=r"another setting \(rate differ\)"):
        tuner(tmp_path, settings=other, resume=True)
    other = dataclasses.replace(FAST, loss=TokenLoss(target=0.9))
    with pytest.raises(ValueError, match=r"another setting \(loss differ\)"):
        tuner(tmp_path, settings=other, resume=True)
    with pytest.raises(ValueError, match=r"another method \(layers differ\)"):
        tuner(tmp_path, METHOD.replace(layers=(1, 3)), resume=True)
    model = classifier()
    with torch.no_grad():
        for p in model.parameters():
            p.neg_()
    import vtr

    with pytest.raises(vtr.UnsupportedModelError, match="began with another model"):
        tuner(tmp_path, model=model, resume=True)
    assert vtr.handles(model) == []


def test_an_accelerator_of_another_precision_is_refused(tmp_path):
    class Other:
        distributed_type, mixed_precision = "DistributedType.NO", "bf16"

    with pytest.raises(ValueError, match="mixed_precision='bf16'"):
        tuner(tmp_path, accelerator=Other())
    Other.distributed_type = "DistributedType.FSDP"
    with pytest.raises(ValueError, match="not FSDP: its checkpoints hold whole weights"):
        tuner(tmp_path, accelerator=Other())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an int of at least 1"),
        ({"warmup": -1}, "warmup must be an int of at least 0"),
        ({"rate": float("inf")}, "rate must be a number above 0"),
        ({"clip": 0}, "clip must be a number above 0, or None"),
        ({"ema": 1}, "ema must be between 0 and 1"),
        ({"precision": "fp8"}, "precision must be one of no, bf16, fp16"),
        ({"schedule": "sine"}, "schedule must be one of constant, cosine, linear"),
    ],
)
def test_bad_settings_of_the_loop(options, message):
    for kind in (LoopSettings, TokenSettings):
        with pytest.raises(ValueError, match=message):
            kind(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone_factor": -1}, "backbone_factor must be a number >= 0"),
        ({"loss": 0.5}, "loss must be a TokenLoss"),
        ({"shrink": "cosine"}, "shrink must be a Shrink or None"),
    ],
)
def test_bad_settings_of_tokens(options, message):
    with pytest.raises(ValueError, match=message):
        TokenSettings(**options)
