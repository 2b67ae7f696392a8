"""Small trained models that ship with the package, with their data and recipes.

>>> import vtr.zoo
>>> model = vtr.zoo.load("digits-vit")  # doctest: +SKIP
>>> images, labels = vtr.zoo.samples("digits-vit", n=8, seed=0)  # doctest: +SKIP

They are real architectures of real libraries, trained on digits drawn over photographs
(:mod:`vtr.zoo.data`), and they are small: they show what a method does, not what it would do to a
model of a billion parameters. Every model has a card, ``vtr/zoo/cards/NAME.md``, that says how it
was trained and what it scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

    from vtr.zoo.questions import evaluate_vlm, vqa
    from vtr.zoo.video_questions import evaluate_video_vlm, video_qa

__all__ = [
    "ModelInfo",
    "card",
    "evaluate_video_vlm",
    "evaluate_vlm",
    "load",
    "load_pipeline",
    "load_vlm",
    "models",
    "samples",
    "video_qa",
    "vlm_path",
    "vqa",
    "weights_path",
]

_NAMES = ("digits-vit",)


def __getattr__(name: str) -> Any:
    # These need torch; importing this module must not.
    if name in ("evaluate_vlm", "vqa"):
        from vtr.zoo import questions

        return getattr(questions, name)
    if name in ("evaluate_video_vlm", "video_qa"):
        from vtr.zoo import video_questions

        return getattr(video_questions, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class ModelInfo:
    """One built-in model.

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


def _check(name: str) -> None:
    if name not in _NAMES:
        hints = {
            "digits-llava": f" ({name} answers questions: vtr.zoo.load_vlm)",
            "digits-video": f" ({name} answers questions about videos: vtr.zoo.load_vlm)",
            "digits-wan": f" ({name} makes videos: vtr.zoo.load_pipeline)",
        }
        hint = hints.get(name, "")
        raise ValueError(
            f"there is no built-in model {name!r}; there are: {', '.join(_NAMES)}{hint}"
        )


def _read(folder: str, name: str, suffix: str) -> bytes:
    return resources.files("vtr.zoo").joinpath(folder, name + suffix).read_bytes()


def weights_path(name: str) -> Path:
    """A safetensors file: one of the package's by its name (``"digits-tofe"``), or any by its path.

    Raises:
        ValueError: it is neither.
    """
    folder = Path(str(resources.files("vtr.zoo").joinpath("weights")))
    packaged = folder / f"{name}.safetensors"
    if packaged.is_file():
        return packaged
    if name.endswith(".safetensors") and Path(name).is_file():
        return Path(name)
    built_in = ", ".join(sorted(f.stem for f in folder.glob("*.safetensors"))) or "none"
    raise ValueError(
        f"no safetensors file at {name!r}, and no built-in one (there are: {built_in})"
    )


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
    return _read("cards", name, ".md").decode()


def models() -> list[ModelInfo]:
    """The models of :func:`load` with what their cards state. Imports neither torch nor timm."""
    listed = []
    for name in _NAMES:
        header = card(name).split("---\n")[1]
        fields = dict(line.split(": ", 1) for line in header.splitlines())
        weights = _read("weights", name, ".safetensors")
        listed.append(
            ModelInfo(
                name=name,
                task=fields["task"],
                architecture=fields["architecture"],
                accuracy=float(fields["accuracy"]),
                bytes=len(weights),
            )
        )
    return listed


def load(name: str, dtype: torch.dtype | None = None) -> VisionTransformer:
    """A built-in model with its trained weights, in eval mode, on the CPU.

    Args:
        name: one of the names of :func:`models`.
        dtype: of the parameters; None for float32. The weights are stored in bfloat16.

    Raises:
        ValueError: there is no model of this name, or ``dtype`` is not a floating-point type.
        ImportError: timm is not installed.
    """
    import torch
    from safetensors.torch import load as parse

    from vtr.zoo import vit

    _check(name)
    dtype = torch.float32 if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type such as torch.float32, got {dtype}")
    # The random start is overwritten at once; it must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        model = vit.build()
    model.load_state_dict(parse(_read("weights", name, ".safetensors")))
    return model.to(dtype).eval()


def load_vlm(name: str = "digits-llava", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """A built-in vision-language model and its processor, in eval mode, on the CPU.

    Args:
        name: ``"digits-llava"`` (a transformers ``LlavaForConditionalGeneration``),
            ``"digits-video"`` (a ``LlavaOnevisionForConditionalGeneration``), or the folder of a
            training run.
        dtype: of the parameters; None for float32. The weights are stored in bfloat16.

    Raises:
        ValueError: there is no vision-language model of this name.
        MissingDependencyError: transformers is not installed.
    """
    import torch

    from vtr.errors import missing

    folder = vlm_path(name)
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise missing("transformers", "vlm", f"the built-in model {name}") from error
    chosen = torch.float32 if dtype is None else dtype
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=chosen).eval()
    return model, AutoProcessor.from_pretrained(folder)


def vlm_path(name: str) -> Path:
    """The folder of a built-in vision-language model, or ``name`` itself where that is one's.

    Raises:
        ValueError: it is neither.
    """
    weights = Path(str(resources.files("vtr.zoo").joinpath("weights")))
    folder = weights / name if (weights / name).is_dir() else Path(name)
    if not (folder / "config.json").is_file():
        known = ", ".join(sorted(f.parent.name for f in weights.glob("*/config.json")))
        raise ValueError(f"there is no built-in vision-language model {name!r}; there are: {known}")
    return folder


def load_pipeline(name: str = "digits-wan", dtype: torch.dtype | None = None) -> Any:
    """A built-in generator as a diffusers pipeline, in eval mode, on the CPU.

    Args:
        name: ``"digits-wan"``, a ``WanPipeline`` (:mod:`vtr.zoo.wan` says what in it is not Wan's),
            or the folder of a training run.
        dtype: of the transformer; None for float32. The weights are stored in bfloat16.

    Raises:
        ValueError: there is no generator of this name.
        MissingDependencyError: diffusers is not installed.
    """
    folder = Path(str(resources.files("vtr.zoo").joinpath("weights", name)))
    folder = folder if folder.is_dir() else Path(name)
    if not (folder / "config.json").is_file() or name in ("digits-llava", "digits-video"):
        raise ValueError(f"there is no built-in generator {name!r}; there is: digits-wan")
    from vtr.zoo import wan

    return wan.load(folder, dtype)


def samples(name: str, n: int, seed: int = 0, split: str = "heldout") -> tuple[Tensor, Tensor]:
    """Inputs that a built-in model understands, with the right answers.

    Args:
        name: one of the names of :func:`models`.
        n: how many.
        seed: the same seed gives the same samples.
        split: ``"heldout"`` draws from digits that training never showed, ``"train"`` from the
            others.

    Returns:
        images ``(n, 3, 96, 96)`` float32, normalised, and labels ``(n,)`` int64. For
        ``"digits-vit"``, :func:`vtr.zoo.data.digits` gives the place of the digit as well.

    Raises:
        ValueError: there is no model of this name, or ``n`` or ``split`` is out of range.
        ImportError: scikit-learn is not installed.
    """
    import torch

    from vtr.zoo import data

    _check(name)
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    batch = data.digits(n, torch.Generator().manual_seed(seed), split)  # type: ignore[arg-type]
    return batch.images, batch.labels
