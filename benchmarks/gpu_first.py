"""Measure the most important things on a new GPU in at most five minutes.

    make gpu-first                                   # PYTHON=python3, results under gpu_first/
    make gpu-first DRY=1                             # every part on the CPU: Triton's interpreter, tiny inputs
    python benchmarks/gpu_first.py all --out FOLDER
    python benchmarks/gpu_first.py sweep --dry --out FOLDER        # one part

Needs torch, triton and transformers (timm for one part, pytest for another); a part whose library is missing is left
out and named. Every part runs in its own process group with a time limit, and is killed with all its children when
that ends. While kernels are compiled, the Hopper kernel is checked as its first use would (vtr/kernels/hopper_verdict.py).
Results are written at once, so that an early end loses nothing, into eight files:

- env.json: device, versions, and the measured ceilings (matrix product, copy);
- sweep.jsonl: one attention layer, dense (cuDNN, FlashAttention) and block-sparse: first the Triton kernel's
  candidates and FlexAttention, then what has never run: the Hopper kernel, the persistent ones, flash-attn-4 if it is
  installed, training, and a small call with its cost on the host, eager and as a CUDA graph;
- vlm-*.csv, vit-*.csv: whole models of real shapes with random weights;
- layers.jsonl: a 7B language model that reads 16k visual tokens, and one attention site of Wan-1.3B at 480p;
- predictions.md: which of ``predictions.toml`` held;
- log.txt: what every part printed, the tests that need a GPU among it; summary.txt: how each part ended.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import predictions  # beside this script

HERE = Path(__file__).resolve().parent
FILES = (
    "env.json", "sweep.jsonl", "vlm-*.csv", "vit-*.csv", "layers.jsonl", "predictions.md", "log.txt", "summary.txt",
)  # fmt: skip
LIMIT = 300
WARMERS = 14  # processes that compile
# Set by a signal. An exception instead could come while a part is being started, and would leave it behind.
STOP = threading.Event()
WORKS = "Hopper kernel: works"  # printed by gpu_parts.check


@dataclass(frozen=True)
class Part:
    """A command of bash with its time limit in seconds, the libraries that it needs, and why it cannot run."""

    name: str
    seconds: float
    command: str
    needs: tuple[str, ...] = ()
    refused: str = ""


def parts(out: Path, dry: bool) -> list[Part]:
    """The parts, the most important first."""
    run = f"{shlex.quote(sys.executable)} {shlex.quote(str(HERE))}"
    to = f"--out {shlex.quote(str(out))}"
    own = f"{run}/gpu_first.py"
    warmers = 1 if dry else WARMERS
    vlm = "--models tiny --batches 2 --repeats 1 --steps 1" if dry else (
        "--models llava-1.5-7b --batches 8 --repeats 3 --steps 8"
    )  # fmt: skip
    vit = "--models tiny --batches 2 --repeats 1" if dry else (
        "--models vit-l-512 --batches 32 --repeats 4"
    )  # fmt: skip
    return [
        Part("env", 15, f"{own} env {to}"),
        Part(
            "warm",
            50,
            ("" if dry else f"{own} check {to} & ")
            + f"for i in $(seq 0 {warmers - 1}); do {own} warm {to} --share $i & done; wait",
        ),
        Part("sweep", 35, f"{own} sweep {to}"),
        Part("hopper", 20, f"{own} hopper {to}", (), "Gluon has no interpreter" if dry else ""),
        Part("further", 20, f"{own} further {to}"),
        Part("flash", 20, f"{own} flash {to}", ("flash_attn",)),
        Part("tests", 55, tests(dry), ("pytest",)),
        Part("vlm", 30, f"{run}/vlm.py {vlm} {to} --methods visionzip,fastv,flowcut"),
        Part(
            "vit", 15, f"{run}/vit.py {vit} {to} --encoders --methods evit,tome,cls-attention", ("timm",)
        ),
        Part("prefill", 25, f"{own} prefill {to}"),
        Part("wan", 15, f"{own} wan {to}"),
    ]  # fmt: skip


def tests(dry: bool) -> str:
    """The command of the tests on the device, with those plugins of pytest that are installed."""
    command = f"{shlex.quote(sys.executable)} -m pytest -m gpu -p no:cacheprovider --tb=short"
    if dry:
        return f"{command} -q --collect-only tests/kernels/test_triton.py"
    if importlib.util.find_spec("pytest_timeout"):
        command += " --timeout 50"
    if importlib.util.find_spec("xdist"):
        command += f" -n {WARMERS}"
    return f"{command} -v --show-capture=no tests/kernels tests/vision"


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and theirs, whatever group they are in; empty without /proc."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue  # it has ended
        parents.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a part: its process group, and children that left the group."""
    others = descendants(process.pid)
    for end, number in [(os.killpg, process.pid), *((os.kill, pid) for pid in others)]:
        try:
            end(number, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue  # it has ended
    process.wait()


def wait(process: subprocess.Popen[bytes], box: float) -> str:
    """Wait for the end of a part, of its time, or of this script, and tell which it was."""
    limit = time.monotonic() + box
    while not STOP.is_set():
        left = limit - time.monotonic()
        if left <= 0:
            return "stopped by its time limit"
        try:
            return f"status {process.wait(min(left, 0.2))}"
        except subprocess.TimeoutExpired:
            continue
    return "stopped with the script"


def run(part: Part, box: float, log: Path, environment: dict[str, str]) -> str:
    """Run a part for at most ``box`` seconds, and tell how it ended."""
    with log.open("ab") as file:
        file.write(f"==== {part.name}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            ["bash", "-c", part.command],
            start_new_session=True,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=HERE.parent,
        )
        try:
            end = wait(process, box)
        finally:
            kill(process)
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    print(text[-4000:], flush=True)
    if part.name == "tests":
        last = [line for line in text.splitlines() if " in " in line and line[-1:] in "s=)"]
        end += f" ({last[-1].strip('= ')})" if last else ""
    return end


def boxes(todo: Sequence[Part], limit: float) -> Iterator[tuple[Part, float]]:
    """Each part with its time: its own seconds, up to as many again of what earlier parts left, and never
    those of the parts behind it."""
    start = time.time()
    for i, part in enumerate(todo):
        later = sum(other.seconds for other in todo[i + 1 :])
        left = limit - (time.time() - start)
        yield part, min(left, max(part.seconds, min(2 * part.seconds, left - later)))


def everything(out: Path, todo: Sequence[Part], limit: float, dry: bool = False) -> list[str]:
    """Run parts within a limit in seconds; write summary.txt after each of them."""
    for pattern in FILES:
        for old in out.glob(pattern):
            old.unlink()
    lines: list[str] = []
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else each process starts as many as there are cores
    }
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [os.environ.get("PYTHONPATH"), str(HERE.parent)])
    )
    if dry:
        environment |= {"DRY": "1", "CUDA_VISIBLE_DEVICES": ""}
    for part, box in boxes(todo, limit):
        before = time.time()
        absent = [name for name in part.needs if importlib.util.find_spec(name) is None]
        if part.refused:
            end = f"left out, {part.refused}"
        elif absent:
            end = f"left out, needs {', '.join(absent)}, which is not installed"
        elif box < min(10, part.seconds):
            end = "left out, no time"
        else:
            end = f"{run(part, box, out / 'log.txt', environment)}, {time.time() - before:.0f} s"
        if part.name == "warm" and not dry and WORKS not in (out / "log.txt").read_text():
            # Else the first of the later parts that may use it would check it, for a minute or two.
            environment["VTR_FORWARD_KERNEL"] = "triton"
            end += "; the check of the Hopper kernel failed or did not end, and layers, models and tests do without it"
        lines.append(f"{part.name}: {end}")
        print("==", lines[-1], flush=True)
        (out / "summary.txt").write_text("\n".join(lines) + "\n")
        if (out / "sweep.jsonl").exists():
            predictions.report(out)
        if STOP.is_set():
            raise SystemExit(143)
    return lines


def stop_on_signals() -> None:
    """End the running part with this script."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: STOP.set())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = [part.name for part in parts(Path("."), False)]
    alone = ["check", *(name for name in names if name not in ("tests", "vlm", "vit"))]
    parser.add_argument("part", choices=["all", *alone])
    parser.add_argument("--out", type=Path, default=Path("gpu_first"))
    parser.add_argument("--limit", type=float, help=f"seconds in all (default: {LIMIT})")
    parser.add_argument("--parts", help="with all: some of the parts, by comma")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny inputs (or DRY=1)")
    parser.add_argument(
        "--share", type=int, default=0, help="which share of the kernels to compile"
    )
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    dry = options.dry or os.environ.get("DRY") == "1"
    if options.part != "all":
        if dry:  # read by gpu_parts, and by Triton when a kernel is defined
            os.environ |= {"DRY": "1", "TRITON_INTERPRET": "1"}
        import gpu_parts  # beside this script

        if options.part == "warm":
            gpu_parts.warm(options.share)
        else:
            gpu_parts.PARTS[options.part](out)
        return
    todo = parts(out, dry)
    if options.parts:
        from options import named  # beside this script

        wanted = named("--parts", options.parts, names)
        todo = [part for part in todo if part.name in wanted]
    if dry:  # no times are measured, and a CPU may be slow
        todo = [replace(part, seconds=10 * part.seconds) for part in todo]
    stop_on_signals()
    lines = everything(out, todo, options.limit or (10 * LIMIT if dry else LIMIT), dry)
    print(predictions.sweep_table(out))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
