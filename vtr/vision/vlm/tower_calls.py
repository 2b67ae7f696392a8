"""``get_image_features`` and ``get_video_features`` of a wrapped model: what its towers do for a prompt."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtr.compat.transformers import GIVEN_PIXELS, MODALITIES
from vtr.core.trace import Trace
from vtr.core.wrapping import Bound, PerThread, Threaded
from vtr.errors import UnsupportedMethodError
from vtr.vision.encoders.image import ask, at_any_size, entry_of
from vtr.vision.vlm.features import Capture, Captures, first_token, visual_features
from vtr.vision.vlm.pictures import Shrunk
from vtr.vision.vlm.pixels import PixelCalls

if TYPE_CHECKING:
    from vtr.vision.vlm.wrapping import VLMWrapping


class TowerCalls(Threaded):
    """Notes for each modality what becomes of the tower's tokens, and gives the tower smaller pictures or fewer patches.

    Attributes:
        running: arguments of steps between tower and language model, while features are computed; else None.
        resizing: whether the tower is given pictures of another size.
    """

    running = PerThread[dict[str, Any] | None]()
    resizing = PerThread[bool](False)

    def __init__(self, owner: VLMWrapping) -> None:
        super().__init__()
        self.owner = owner
        self.pixels = PixelCalls(owner)

    def install(self) -> None:
        """Set the patches, and what lets embeddings take pictures of any size."""
        owner = self.owner
        inner: Any = owner.inner
        if entry_of(owner) is not None:
            for tower in {owner.family.tower(inner, kind) for kind in MODALITIES.values()}:
                embeddings = getattr(tower, GIVEN_PIXELS[0], None)
                if isinstance(embeddings, nn.Module):
                    hook = Bound(self, "at_any_size")
                    owner.hook(embeddings.register_forward_pre_hook(hook, with_kwargs=True))
        self.pixels.install()
        for name, modality in MODALITIES.items():
            if hasattr(inner, name):
                bound = Bound(self, "features", name, modality)
                # generate reads the signature to know which inputs to pass.
                bound.__dict__["__signature__"] = inspect.signature(getattr(inner, name))
                owner.patch(inner, name, bound)
        watched = owner.family.watch(inner)
        if watched is not None:
            owner.patch(inner, watched, Bound(self, "watched", watched))

    def features(self, name: str, modality: str, *args: Any, **kwargs: Any) -> Any:
        """``get_image_features``: remember what becomes of the tower's tokens."""
        method = getattr(type(self.owner.inner), name)
        if self.running is not None:  # one modality made by way of the other
            return method(self.owner.inner, *args, **kwargs)
        return self._capture(method, modality, args, kwargs)

    def _capture(
        self, method: Any, modality: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if modality in self.owner.captures.of:
            self.owner.captures = Captures()
        if not self.owner.captures.of:
            self.owner.captures.trace = Trace()
        self.owner.begin(self.owner.captures.trace)
        capture = Capture(modality)
        running = self.running = {}
        bound = inspect.signature(method).bind(self.owner.inner, *args, **kwargs)
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        capture.numbers = partial(self.owner.family.crops, self.owner.inner, capture, given)
        tower = self.owner.towers.get(modality)
        if tower is not None:
            tower.capture = capture
        try:
            shrunk = self._shrunk(modality, given)
            capture.coarse = self.pixels.begin(modality, given)
            if shrunk is None:
                out = method(self.owner.inner, *args, **kwargs)
            else:
                out = self._smaller(method, shrunk, args, kwargs)
            found = visual_features(out)
            if found is not None:
                if shrunk is not None:
                    capture.coarse = shrunk.widen(out)
                    found = out.pooler_output
                given |= running
                capture.lengths = [x.shape[:-1].numel() for x in found]
                first = first_token(out)
                capture.first = None if first is None else first.clone()
                self.owner.family.describe(self.owner.inner, capture, given)
                self.owner.captures.of[modality] = capture
        finally:
            self.running = self.pixels.fewer = None
            if tower is not None:
                tower.capture = None
        return out

    def _shrunk(self, modality: str, given: dict[str, Any]) -> Shrunk | None:
        """Ask a method about the pictures of a call; None if it leaves all of them."""
        entry = entry_of(self.owner)
        pictures = (
            None if entry is None else self.owner.family.pictures(self.owner.inner, modality, given)
        )
        if entry is None or pictures is None:
            return None
        blank, memory = torch.empty(0, device="cpu"), dict[str, Any]()
        notes = self.owner.tracing.notes
        shrunk = Shrunk(
            pictures, lambda grid: ask(self.owner, entry, 1, grid, blank, memory, notes)
        )
        return None if shrunk.entry is None else shrunk

    def _smaller(
        self, method: Any, shrunk: Shrunk, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make the features of smaller pictures."""
        new = shrunk.arguments()
        names = [n for n in inspect.signature(method).parameters if n != "self"]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in given.keys() - set(names) - new.keys():
            if name.startswith(("image_", "video_")) and isinstance(given[name], Tensor):
                raise UnsupportedMethodError(
                    f"a method makes the pictures smaller, and {name} was computed for the larger "
                    "ones: leave it out"
                )
        self.resizing = True
        try:
            return method(self.owner.inner, **{**given, **new})
        finally:
            self.resizing = False

    def at_any_size(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tower's embedding is given pictures of another size."""
        return at_any_size(module, args, kwargs) if self.resizing else None

    def watched(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Remember the arguments of a step between tower and language model."""
        if self.running is not None:
            self.running[name] = (args, kwargs)
        return getattr(type(self.owner.inner), name)(self.owner.inner, *args, **kwargs)
