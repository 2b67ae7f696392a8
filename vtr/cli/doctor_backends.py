"""Try each backend on an input of a few tokens, or a video of a few frames."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtr.cli.diagnosis import ABSENT, BROKEN, GOOD, Finding

TOKENS, BLOCK, DIM = 192, 64, 64
FRAMES, GREY = 6, 30  # frame i is grey of 30 i


def attention() -> Iterator[Finding]:
    """Attention backends on every kind of device, and token matching on the GPU."""
    import torch

    from vtr.kernels import available_backends

    for kind in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for backend, why in available_backends(kind).items():
            name = f"{backend} on {kind}"
            if why:
                yield Finding(name, ABSENT, why)
            else:
                yield _tried(name, lambda b=backend, k=kind: _attend(b, k))
        if kind == "cuda":
            yield _tried("bipartite_match on cuda", _match)
            if not available_backends(kind)["triton"]:
                yield from _hopper()


def _hopper() -> Iterator[Finding]:
    """The verdict on the Hopper kernel, for each device of compute capability 9.x; checks it if needed."""
    import torch

    from vtr.kernels import hopper_verdict
    from vtr.kernels.triton_common import on_hopper

    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        if not on_hopper(device):
            continue
        verdict, name = (
            hopper_verdict.known(device) or hopper_verdict.check(device),
            f"Hopper kernel on cuda:{i}",
        )
        if verdict == hopper_verdict.WORKS:
            yield Finding(name, GOOD, "equals the reference on this machine")
        else:
            yield Finding(name, ABSENT, f"the Triton kernel runs instead: {verdict}")


def _tried(name: str, run: Any) -> Finding:
    start = time.perf_counter()
    try:
        detail = run()
    except Exception as error:  # whatever a compiler or a driver may say
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding(name, BROKEN, reason[:300])
    return Finding(name, GOOD, f"{detail}, {time.perf_counter() - start:.1f} s")


def _attend(backend: str, kind: str) -> str:
    """Run a backend and compare it with attention written out in float64.

    Raises:
        ArithmeticError: the results are not those of attention.
    """
    import torch

    from vtr.kernels import BlockMask, block_sparse_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, TOKENS, DIM, generator=generator) for _ in range(3))
    row, column = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    seen = (column <= row) & (column > row - 100)
    logits = (q.double() @ k.double().mT / math.sqrt(DIM)).masked_fill(~seen, -math.inf)
    wanted = logits.softmax(-1) @ v.double()
    mask = BlockMask.from_dense(seen, block=BLOCK).to(kind)
    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    q, k, v = (x.to(kind, dtype) for x in (q, k, v))
    with torch.no_grad():
        out = block_sparse_attention(q, k, v, mask, backend=backend)
    return _error(out, wanted, 1e-4 if kind == "cpu" else 5e-2)


def _error(out: Any, wanted: Any, limit: float) -> str:
    error = float((out.cpu().double() - wanted).abs().max())
    if not error < limit:  # also for NaN
        raise ArithmeticError(f"its result is off by {error:.2g}")
    return f"runs, largest error {error:.0e}"


def _match() -> str:
    import torch

    from vtr.kernels import bipartite_match

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 64, 32, generator=generator) for _ in range(2))
    score, _ = bipartite_match(a.cuda(), b.cuda())
    return _error(score, (a.double() @ b.double().mT).amax(-1), 1e-3)


def video() -> Iterator[Finding]:
    """Backends that decode video: each reads a few frames that PyAV has written."""
    from vtr.video.decord import installed

    try:
        import av  # noqa: F401
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "av"
        status = ABSENT if absent else BROKEN
        detail = "pip install 'vtr[video]'" if absent else str(error)
        yield Finding("pyav", status, detail)
        yield Finding("decord", ABSENT, "needs PyAV beside it")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "greys.mp4"
        try:
            _write(path)
        except Exception as error:
            yield Finding("pyav", BROKEN, f"cannot write a video: {type(error).__name__}: {error}")
            return
        yield _tried("pyav", lambda: _read(path, "pyav"))
        if installed():
            yield _tried("decord", lambda: _read(path, "decord"))
        else:
            yield Finding("decord", ABSENT, "optional: pip install 'vtr[video]' (Linux on x86-64)")


def _write(path: Path) -> None:
    import av
    import numpy as np

    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(FRAMES):
            picture = np.full((48, 64, 3), GREY * i, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())


def _read(path: Path, backend: Any) -> str:
    """Decode the frames and look at their brightness.

    Raises:
        ArithmeticError: they are not those that were written.
    """
    from vtr.video import load

    read = load(path, frames=FRAMES, backend=backend, time_limit=60)
    greys = [round(float(frame.mean())) for frame in read.frames]
    if len(greys) != FRAMES or any(abs(grey - GREY * i) > 4 for i, grey in enumerate(greys)):
        raise ArithmeticError(f"it reads frames of grey {greys} where {GREY} i was written")
    return f"reads {FRAMES} frames"
