"""``vtr doctor``: what is installed, what of it was tested, and what runs on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated

import typer

from vtr.cli.diagnosis import ABSENT, BROKEN, GOOD, UNTESTED, Diagnosis, Finding
from vtr.compat import contract
from vtr.compat.tested import TESTED, installed

#: Packages whose internals are not used: package -> (distribution, extra that installs it).
OTHERS = {
    "numpy": ("numpy", ""),
    "PIL": ("pillow", ""),
    "rich": ("rich", ""),
    "safetensors": ("safetensors", ""),
    "typer": ("typer", ""),
    "torchvision": ("torchvision", "vlm"),
    "sklearn": ("scikit-learn", "vlm"),
    "decord": ("decord", "video"),
    "ftfy": ("ftfy", "diffusion"),
    "matplotlib": ("matplotlib", "plots"),
    "gradio": ("gradio", "ui"),
}


def examine() -> Diagnosis:
    """Look at everything; takes as long as importing the libraries that are installed."""
    from vtr.cli.doctor_backends import attention, video

    diagnosis = Diagnosis()
    found = diagnosis.parts["versions"] = list(versions())
    if any(f.name == "torch" and f.status == BROKEN for f in found):
        return diagnosis  # nothing else can be looked at
    diagnosis.parts["devices"] = list(devices())
    diagnosis.parts["attention"] = list(attention())
    diagnosis.parts["video"] = list(video())
    diagnosis.parts["contract"] = list(contracts())
    return diagnosis


def versions() -> Iterator[Finding]:
    """Python, vtr, and every library: installed version, tested range, and a verdict."""
    from vtr import __version__

    yield Finding("python", GOOD, f"{platform.python_version()}, {platform.platform()}")
    yield Finding("vtr", GOOD, __version__)
    for package, tested in TESTED.items():
        version = installed(package)
        if version is None:
            yield _absent(tested.name, tested.extra)
            continue
        place = tested.place(version)
        detail = f"{version} (tested: {tested.versions})"
        if place != "tested":
            todo = f"{place} than what was tested: if something fails, install {tested.requirement}"
            yield Finding(tested.name, UNTESTED, f"{detail}, {todo}")
        elif package in contract.LIBRARIES and package != "torch":  # imported there
            yield Finding(tested.name, GOOD, detail)
        else:
            yield _imports(package, tested.name, detail)
    for package, (name, extra) in OTHERS.items():
        version = installed(name)
        if version is None:
            yield _absent(name, extra)
        elif package == "decord":  # runs in another process, see the videos
            yield Finding(name, GOOD, version)
        else:
            yield _imports(package, name, version)


def _absent(name: str, extra: str) -> Finding:
    if name == "triton":
        return Finding(name, ABSENT, "comes with torch for CUDA on Linux; not needed on the CPU")
    if extra:
        return Finding(name, ABSENT, f"pip install 'vtr[{extra}]'")
    return Finding(name, BROKEN, f"vtr needs it: pip install {name}")


def _imports(package: str, name: str, detail: str) -> Finding:
    try:
        contract.find(package)
    except contract.Gone as error:
        return Finding(name, BROKEN, f"{detail}: {error}")
    return Finding(name, GOOD, detail)


def devices() -> Iterator[Finding]:
    """The CPU and the GPUs as torch sees them."""
    import torch

    threads = f"torch uses {torch.get_num_threads()} of {os.cpu_count()} processors"
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("cpu", GOOD, f"{platform.machine()}, {capability}, {threads}")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"built for {built}, and no driver or GPU was found" if built else "built for the CPU"
        yield Finding("cuda", ABSENT, f"torch sees no GPU ({why})")
        return
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        memory = f"{facts.total_memory / 2**30:.0f} GiB"
        name = f"{facts.name}, compute capability {facts.major}.{facts.minor}, {memory}"
        yield Finding(f"cuda:{i}", GOOD, name)


def contracts() -> Iterator[Finding]:
    """The import part of the contract with each library."""
    for library in contract.LIBRARIES:
        name = TESTED[library].name
        if installed(library) is None:
            yield _absent(name, TESTED[library].extra)
            continue
        expected = contract.contract(library)
        lines = contract.moved(expected)
        for line in lines:
            yield Finding(name, BROKEN, line)
        if not lines:
            yield Finding(name, GOOD, f"{len(expected)} places are as vtr expects them")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> int:
    """Show versions, devices and backends: what is installed, what was tested, and what runs here.

    Ends with status 1 if something that vtr needs is broken.
    """
    from rich.console import Console

    console = Console()
    with Console(stderr=True).status("importing libraries, running each backend (a minute) ..."):
        diagnosis = _quietly()
    if as_json:
        print(diagnosis.to_json())
    else:
        # In a pipe a table is as wide as it needs to be.
        (console if console.is_terminal else Console(width=200)).print(diagnosis)
    for line in diagnosis.broken:
        print(f"broken: {line}", file=sys.stderr)
    return 1 if diagnosis.broken else 0


def _quietly() -> Diagnosis:
    """:func:`examine` without what libraries print and warn of when they are imported."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            return examine()
    finally:
        logging.disable(logging.NOTSET)
