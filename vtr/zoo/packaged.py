"""Packaged files of the built-in models: their cards and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

NAMES = ("digits-vit",)
"""Classifiers that :func:`vtr.zoo.load` takes."""
DETECTORS = ("digits-detr",)
"""Detectors that :func:`vtr.zoo.load` takes."""


@dataclass(frozen=True)
class ModelCard:
    """One built-in model, as its card states it.

    Attributes:
        name: what :func:`load` takes.
        task: what it does, in a few words.
        architecture: the class and its size.
        accuracy: of the dense model on held-out data, in [0, 1], as the card states it.
        bytes: size of the packaged weights.
    """

    name: str
    task: str
    architecture: str
    accuracy: float
    bytes: int


def models() -> list[ModelCard]:
    """The models of :func:`load` with what their cards state. Imports neither torch nor timm."""
    listed = []
    for name in NAMES:
        header = card(name).split("---\n")[1]
        fields = dict(line.split(": ", 1) for line in header.splitlines())
        weights = read("weights", name, ".safetensors")
        listed.append(
            ModelCard(
                name=name,
                task=fields["task"],
                architecture=fields["architecture"],
                accuracy=float(fields["accuracy"]),
                bytes=len(weights),
            )
        )
    return listed


def card(name: str) -> str:
    """The model card, Markdown with a header of ``key: value`` lines.

    Args:
        name: of anything with packaged weights, ``"digits-tofe"`` and ``"digits-llava"`` included.

    Raises:
        ValueError: there is no card of this name.
    """
    folder = resources.files("vtr.zoo").joinpath("cards")
    known = sorted(f.name.removesuffix(".md") for f in folder.iterdir() if f.name.endswith(".md"))
    if name not in known:
        raise ValueError(f"there is no model card {name!r}; there are: {', '.join(known)}")
    return read("cards", name, ".md").decode()


def read(folder: str, name: str, suffix: str) -> bytes:
    """The bytes of a packaged file."""
    return resources.files("vtr.zoo").joinpath(folder, name + suffix).read_bytes()


def check(name: str) -> None:
    """Raise ``ValueError`` for a name that is no built-in classifier, and say what takes it."""
    if name not in NAMES:
        hints = {
            "digits-llava": f" ({name} answers questions: vtr.zoo.load_vlm)",
            "digits-video": f" ({name} answers questions about videos: vtr.zoo.load_vlm)",
            "digits-long": f" ({name} answers questions about videos: vtr.zoo.load_vlm)",
            "digits-chat": f" ({name} answers questions in chats: vtr.zoo.load_vlm)",
            "digits-wan": f" ({name} makes videos: vtr.zoo.load_pipeline)",
            "digits-detr": f" ({name} is a detector: vtr.zoo.load, and examples/detect.py)",
        }
        hint = hints.get(name, "")
        raise ValueError(
            f"there is no built-in model {name!r}; there are: {', '.join(NAMES)}{hint}"
        )


def weights_path(name: str) -> Path:
    """A safetensors file: one of the package's by its name (``"digits-tofe"``), or any by its path or that of the
    folder of a training run, which has a ``modules.safetensors``.

    Raises:
        ValueError: it is neither.
    """
    folder = Path(str(resources.files("vtr.zoo").joinpath("weights")))
    packaged = folder / f"{name}.safetensors"
    if packaged.is_file():
        return packaged
    if name.endswith(".safetensors") and Path(name).is_file():
        return Path(name)
    trained = Path(name) / "modules.safetensors"
    if trained.is_file():
        return trained
    built_in = ", ".join(sorted(f.stem for f in folder.glob("*.safetensors"))) or "none"
    raise ValueError(
        f"no safetensors file at {name!r}, and no built-in one (there are: {built_in})"
    )


def detector_path(name: str) -> Path:
    """The folder of a built-in detector, for ``from_pretrained`` of transformers.

    Raises:
        ValueError: there is no detector of this name.
    """
    if name not in DETECTORS:
        raise ValueError(
            f"there is no built-in detector {name!r}; there are: {', '.join(DETECTORS)}"
        )
    return Path(str(resources.files("vtr.zoo").joinpath("weights", name)))


def vlm_path(name: str) -> Path:
    """The folder of a built-in vision-language model, or ``name`` itself if that is the folder of one.

    Raises:
        ValueError: it is neither.
    """
    weights = Path(str(resources.files("vtr.zoo").joinpath("weights")))
    folder = weights / name if (weights / name).is_dir() else Path(name)
    if not (folder / "config.json").is_file():
        known = ", ".join(sorted(f.parent.name for f in weights.glob("*/config.json")))
        raise ValueError(f"there is no built-in vision-language model {name!r}; there are: {known}")
    return folder
