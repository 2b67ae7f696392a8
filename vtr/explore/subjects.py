"""Models that can be explored: loaded when they are first asked for, and shared by all sessions."""

from __future__ import annotations

import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import vtr
from vtr.core.method import Method
from vtr.core.registry import registry
from vtr.explore.choices import method_at
from vtr.zoo import inputs, loading

Kind = Literal["encoder", "vlm", "generator"]
BUILT_IN = (
    *("digits-vit", "digits-llava", "digits-chat", "digits-video", "digits-long", "digits-wan"),
)
FRAMES = {"digits-long": 64}
TYPED = re.compile(r"(timm|open_clip):[\w.-]+|[\w-][\w.-]*/[\w-][\w.-]*")
"""Names that may be typed into the page: of a library, or an id of the Hugging Face hub; never a path."""


@dataclass(eq=False)
class Subject:
    """A loaded model.

    Attributes:
        name: as it was asked for.
        kind: what it takes: pictures, pictures with a question, or a prompt.
        model: what :func:`vtr.apply` takes.
        processor: of a vision-language model.
        options: of :func:`vtr.apply`.
        tokens: visual tokens of a picture, if that is a fixed number.
        lock: held by a run; a model serves one at a time.
        offered: methods that work on it.
        refused: the others, with the reason.
        lines: Python lines that load it, which define ``model`` (and ``processor``).
    """

    name: str
    kind: Kind
    model: Any
    processor: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    offered: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    @property
    def frames(self) -> int:
        """Frames that are sampled from a clip."""
        return FRAMES.get(self.name, 8)

    @property
    def takes_clips(self) -> bool:
        """Tell whether its processor takes videos."""
        return getattr(self.processor, "video_processor", None) is not None

    def method(self, name: str, keep: float) -> Method:
        """Return a method that is offered at a budget.

        Raises:
            ValueError: it is not offered; the message has the reason.
        """
        if name not in self.offered:
            why = self.refused.get(name, "there is no such method")
            raise ValueError(f"{name} does not work on {self.name}: {why}")
        return method_at(name, keep, self.name, self.tokens)


class Subjects:
    """The models of one server.

    Args:
        names: those that may be chosen.
        typed: whether other names may be given, of timm, open_clip and the hub.
        pretrained: load pretrained weights of an encoder of a library.
        device: of the models.
        most: models that are in memory at once; the one that was not used for the longest time is left out.
    """

    def __init__(
        self,
        names: Sequence[str] = BUILT_IN,
        *,
        typed: bool = False,
        pretrained: bool = False,
        device: str = "cpu",
        most: int = 6,
    ) -> None:
        if not names:
            raise ValueError("names must hold at least one model")
        self.names = tuple(dict.fromkeys(names))
        self.typed, self.pretrained, self.device, self.most = typed, pretrained, device, most
        self._loaded: OrderedDict[str, Subject] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> Subject:
        """Return a model, loaded if need be.

        Raises:
            ValueError: the name is not allowed, or the model cannot be loaded.
            VtrError: it is not supported, or its library is not installed.
        """
        if name not in self.names and not (self.typed and TYPED.fullmatch(name)):
            more = ", timm:NAME, open_clip:NAME or an id of the hub" if self.typed else ""
            raise ValueError(f"the model must be one of {', '.join(self.names)}{more}")
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = load(name, self.pretrained, self.device)
            self._loaded.move_to_end(name)
            while len(self._loaded) > self.most:
                self._loaded.popitem(last=False)
            return self._loaded[name]


def load(name: str, pretrained: bool = False, device: str = "cpu") -> Subject:
    """Load a model by its name, as ``vtr draw`` and ``vtr profile`` do, and try every method on it.

    Raises:
        ValueError: there is no such model, or it cannot be loaded.
        VtrError: it is not supported, or its library is not installed.
    """
    make: Callable[..., Subject] = _encoder
    if name == "digits-wan":
        make = _generator
    elif loading.is_vlm(name):
        make = _vlm
    subject = make(name, pretrained, device)
    for found in vtr.supported(subject.model):
        reason = found.reason or _refusal(subject, found.name)
        if reason:
            subject.refused[found.name] = reason
        else:
            subject.offered += (found.name,)
    return subject


def _refusal(subject: Subject, name: str) -> str:
    """Say why a method that the model supports cannot be applied here; empty if it can."""
    try:
        method = method_at(name, 0.5, subject.name, subject.tokens)
        if registry()[name].training == "required" and not getattr(method, "weights", None):
            return f"{name} needs weights that are trained for this model (vtr.train)"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vtr.apply(subject.model, method, **subject.options).remove()
    except ValueError as error:
        return str(error).partition(". Methods that work on it")[0]
    return ""


def _encoder(name: str, pretrained: bool, device: str) -> Subject:
    model = loading.load_encoder(name, pretrained).to(device)
    more = ", pretrained=True" if pretrained else ""
    lines = (
        "from vtr.zoo.loading import load_encoder",
        f"model = load_encoder({name!r}{more})",
    )
    embed = getattr(model, "patch_embed", None)
    return Subject(name, "encoder", model, tokens=getattr(embed, "num_patches", None), lines=lines)


def _vlm(name: str, pretrained: bool, device: str) -> Subject:
    ref = loading.find_vlm(name)
    model, processor = loading.load_found(ref, device)
    lines = (
        "from vtr.zoo.loading import find_vlm, load_found",
        f"ref = find_vlm({name!r})",
        "model, processor = load_found(ref)",
    )
    return Subject(
        name, "vlm", model, processor, dict(ref.options), 144 if name == "digits-llava" else None,
        lines=lines,
    )  # fmt: skip


def _generator(name: str, pretrained: bool, device: str) -> Subject:
    pipe = loading.load_pipeline(name).to(device)
    pipe.set_progress_bar_config(disable=True)
    lines = ("import vtr.zoo", f"model = vtr.zoo.load_pipeline({name!r})")
    return Subject(name, "generator", pipe, lines=lines)


def labels(subject: Subject) -> Callable[[int], str]:
    """Return what names a class of an encoder by its number."""
    if subject.name.startswith("timm:"):
        from timm.data import ImageNetInfo, infer_imagenet_subset

        subset = infer_imagenet_subset(subject.model)
        if subset:
            return ImageNetInfo(subset).index_to_description
    return lambda index: str(index)


def question_of(subject: Subject) -> str:
    """Return the question that is asked without another one."""
    return inputs.QUESTIONS.get(subject.name, "What is in this picture?")
