"""Peak memory of a call: the tensors that its operations allocate, on any device."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vtr.compat.torch import TorchDispatchMode, tree_iter


class PeakMemory(TorchDispatchMode):
    """Count the bytes of tensors that operations allocate inside the context, and their peak.

    Works on any device. Storages are followed until they are freed; views cost nothing. Scratch space
    that an operator allocates and frees internally is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._known.setdefault(tensor.untyped_storage(), True)  # made before, elsewhere
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage in self._known:
                continue
            self._known[storage] = True
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, size).atexit = False
        return out

    def _free(self, size: int) -> None:
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_iter(tree) if isinstance(t, Tensor)]
