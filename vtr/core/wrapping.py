"""The life of a wrapped model: which methods are on, when patches are set, and how they come off.

All methods applied to one model share one :class:`Wrapping`, which lives in the model's ``__dict__``
(so that ``copy.deepcopy`` copies it together with the model, and ``state_dict`` never sees it).
Patches exist exactly while at least one method is active. An adapter subclasses it and says how to
set the patches; it sets them only through :meth:`patch` and :meth:`hook`, so that they always come off.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from vtr.compat import accelerate
from vtr.compat.torch import is_replica
from vtr.core.calibration import Fingerprint, Table, fingerprint
from vtr.core.checks import check_method
from vtr.core.method import Method, Stage, TokenMethod
from vtr.core.site import ModelInfo
from vtr.core.trace import Trace
from vtr.errors import UnsupportedModelError

ATTRIBUTE = "_vtr_wrapping"
Value = TypeVar("Value")


class _Absent:
    """Marks an attribute that was not there. A class, because copies of a class are the class itself."""


class Removable(Protocol):
    """A hook's handle, or another thing that ends when methods change."""

    def remove(self) -> None: ...


class Threaded:
    """Base of classes with :class:`PerThread` attributes. They are left out of copies: what belongs to a
    running call may be part of an autograd graph, and the copy is not being called."""

    def __init__(self) -> None:
        self.own = threading.local()

    def forget(self) -> None:
        """Give all attributes their defaults, in every thread."""
        self.own = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.own = threading.local()


class PerThread(Generic[Value]):
    """An attribute that has another value in every thread, so that several threads may call one model
    at a time, as they may without a method. The values are in ``own`` of the :class:`Threaded` owner.

    Args:
        default: the value if none was set.
        make: makes that value instead, once in every thread.
    """

    def __init__(self, default: Any = None, make: Callable[[], Value] | None = None) -> None:
        self.default = default
        self.make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: type | None = None) -> Value:
        if self.make is not None and not hasattr(owner.own, self.name):
            setattr(owner.own, self.name, self.make())
        return getattr(owner.own, self.name, self.default)  # type: ignore[no-any-return]

    def __set__(self, owner: Any, value: Value) -> None:
        setattr(owner.own, self.name, value)


class Entry:
    """One applied method, with its learned modules and its calibrated numbers."""

    def __init__(
        self,
        method: Method,
        options: dict[str, Any],
        modules: nn.Module | None,
        table: Table | None = None,
    ) -> None:
        self.method = method
        self.options = options
        self.modules = modules
        self.table: Table = {} if table is None else dict(table)
        self.paused = False

    @property
    def token_method(self) -> TokenMethod:
        """The method, which has been checked to be one that acts on tokens."""
        assert isinstance(self.method, TokenMethod)
        return self.method

    def modules_like(self, x: torch.Tensor) -> nn.Module | None:
        """The learned modules on the device of ``x`` (they follow the model lazily)."""
        if self.modules is not None:
            first = next(self.modules.parameters(), None)
            if first is not None and first.device != x.device:
                self.modules.to(x.device)
        return self.modules

    def table_like(self, x: torch.Tensor) -> Table:
        """The calibrated numbers on the device of ``x`` (they follow the model lazily)."""
        if any(tensor.device != x.device for tensor in self.table.values()):
            self.table = {name: tensor.to(x.device) for name, tensor in self.table.items()}
        return self.table


class Wrapping(Threaded):
    """Base of the adapters' wrappings.

    Attributes:
        root: the module that is patched.
        info: what methods may know of it.
        entries: the applied methods, in order of application.
        trace: what the last call did.
    """

    #: options of ``apply`` that this adapter knows, with their defaults
    options: dict[str, Any] = {}

    def __init__(self, root: nn.Module, info: ModelInfo) -> None:
        super().__init__()
        self.root = root
        self.info = info
        self.entries: list[Entry] = []
        self.trace = Trace()
        self._patched: list[tuple[Any, str, Any]] = []
        self._hooks: list[Removable] = []

    # ---- for subclasses ---------------------------------------------------------------------

    @property
    def identified(self) -> nn.Module:
        """The part of the model by one of whose weights it is told from others."""
        return self.root

    def install(self) -> None:
        """Set the patches for :attr:`active` entries."""
        raise NotImplementedError

    def check(self, method: Method, options: dict[str, Any]) -> None:
        """Raise if the method cannot work on this model. Extend it for adapter-specific limits."""
        check_method(method, self.info)

    def note(self, method: Method) -> str:
        """Say for which inputs of this model a method works, if not for all; else empty."""
        return ""

    def attach(self, target: Any) -> None:
        """Look at the object that ``apply`` was given, which may be more than :attr:`root`."""

    def check_together(self, entries: Sequence[Entry]) -> None:
        """Raise ``ValueError`` if a combination has no meaning."""
        seen: dict[tuple[str, int], Entry] = {}
        for entry in entries:
            sites = {s.site for s in entry.method.stages(self.info)}
            for other in entries if entry.method.alone else ():
                shared = sites & {s.site for s in other.method.stages(self.info)}
                if other is not entry and shared:
                    raise ValueError(
                        f"{entry.method.name} counts all tokens of the {', '.join(sorted(shared))}: "
                        f"it cannot be combined with {other.method.name} there"
                    )
            for stage in dict.fromkeys(entry.method.stages(self.info)):
                if not stage.cuts:
                    continue
                first = seen.setdefault((stage.site, stage.layer), entry)
                if first is not entry:
                    raise ValueError(
                        f"{first.method.name} and {entry.method.name} both reduce at "
                        f"{stage.site}[{stage.layer}]: give them different layers, or apply one of them"
                    )

    def patch(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute; :meth:`uninstall` puts back what was there.

        Raises:
            UnsupportedModelError: another wrapping has patched it (a model and a part of it, each with
                its own wrapping: their patches would undo each other).
        """
        held = owner.__dict__.get(name)
        if isinstance(held, Bound) and not any(
            o is owner and n == name for o, n, _ in self._patched
        ):
            raise UnsupportedModelError(
                f"{name} of a {type(owner).__name__} is patched by another vtr.apply on a part of this "
                "model, or on a model that it is part of: give all methods to one of them, the outer one"
            )
        self._patched.append((owner, name, owner.__dict__.get(name, _Absent)))
        owner.__dict__[name] = value

    def hook(self, handle: Removable) -> None:
        """Remember a hook for :meth:`uninstall`."""
        self._hooks.append(handle)

    # ---- life -------------------------------------------------------------------------------

    @property
    def active(self) -> list[Entry]:
        return [e for e in self.entries if not e.paused]

    def stages(self) -> list[tuple[Entry, Stage]]:
        """Every visit of every active method."""
        return [(e, s) for e in self.active for s in e.method.stages(self.info)]

    def add(self, entries: Sequence[Entry]) -> None:
        """Apply more methods; nothing changes if they are refused."""
        for entry in entries:
            self.check(entry.method, entry.options)
        self.check_together([*self.active, *entries])
        before = list(self.entries)
        self.entries.extend(entries)
        try:
            self.refresh()
        except BaseException:
            self.entries = before
            self.refresh()
            raise

    def drop(self, entries: Sequence[Entry]) -> None:
        """Take methods off; the last one takes the wrapping with it."""
        self.entries = [e for e in self.entries if e not in entries]
        self.refresh()

    def refresh(self) -> None:
        self.uninstall()
        if self.active:
            try:
                self.hook(self.root.register_forward_pre_hook(_no_replica))
                self.install()
            except BaseException:
                self.uninstall()
                raise
        if self.entries:
            self.root.__dict__[ATTRIBUTE] = self
        else:
            self.root.__dict__.pop(ATTRIBUTE, None)

    def uninstall(self) -> None:
        for handle in self._hooks:
            handle.remove()
        for owner, name, before in reversed(self._patched):
            if _moved(owner, name):
                _restore_forward(owner, before)
            elif before is _Absent:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = before
        self._hooks, self._patched = [], []

    def __getstate__(self) -> dict[str, Any]:
        # The trace of the last call may hold tensors of an autograd graph, which cannot be copied.
        return {**super().__getstate__(), "trace": Trace()}

    def columns(self) -> torch.Tensor:
        """See :attr:`vtr.api.Handle.columns`."""
        raise UnsupportedModelError(
            f"columns are those of a language model's prompt, and {self.info.family} has none: use "
            "handle.trace, whose maps say where each token went"
        )

    def fingerprint(self) -> Fingerprint:
        """The identity of the model, which calibrated numbers belong to."""
        return fingerprint(self.root, self.identified)

    def costs(self) -> dict[str, Any] | None:
        """Dense and reduced FLOPs of the last call, per site; None if nothing was counted."""
        return None


class Bound:
    """A callable that survives ``copy.deepcopy``: ``owner.method(*bound, *args, **kwargs)``.

    Closures are copied by reference, so that the copy of a wrapped model would call into the
    original; an instance is copied together with the owner it points to.
    """

    def __init__(self, owner: Any, method: str, *bound: Any) -> None:
        self.owner = owner
        self.method = method
        self.bound = bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function: Callable[..., Any] = getattr(self.owner, self.method)
        return function(*self.bound, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # torch.jit.script asks a function for these; others find that there is no such attribute.
        if name in ("__globals__", "__name__"):
            raise _NotScripted(
                f"{self.method} of a wrapped model has no {name}: torch.jit.script cannot compile methods. Use "
                "torch.jit.trace or torch.export, or script the model without a method"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class _NotScripted(UnsupportedModelError, AttributeError):
    """A wrapped model was given to ``torch.jit.script``."""


_FORWARDS = {"forward": accelerate.FORWARD, accelerate.FORWARD: "forward"}


def _moved(owner: Any, name: str) -> bool:
    """Tell whether a patched forward is elsewhere now: accelerate moves it when it sets or takes off its hooks."""
    held, other = owner.__dict__, _FORWARDS.get(name, "")
    return isinstance(held.get(other), Bound) and not isinstance(held.get(name), Bound)


def _restore_forward(owner: Any, before: Any) -> None:
    held = owner.__dict__
    if isinstance(held.get(accelerate.FORWARD), Bound):  # hooks were set since: they call it
        own = MethodType(type(owner).forward, owner)
        held[accelerate.FORWARD] = own if before is _Absent else before
    else:
        held.pop("forward", None)


def _no_replica(module: nn.Module, args: Any) -> None:
    """Refuse the replicas of ``nn.DataParallel``: their patches lead to the first one's weights."""
    if is_replica(module):
        raise UnsupportedModelError(
            f"a wrapped {type(module).__name__} cannot be replicated by nn.DataParallel (Trainer does so "
            "if it sees several GPUs): use DistributedDataParallel, one process per GPU (torchrun)"
        )


def wrapping_of(root: Any) -> Wrapping | None:
    """The wrapping that a module carries."""
    found = getattr(root, "__dict__", {}).get(ATTRIBUTE)
    return found if isinstance(found, Wrapping) else None
