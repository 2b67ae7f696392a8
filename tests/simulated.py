"""A CUDA device that does not exist: the mistakes that only show on a GPU, found on a CPU.

Inside :func:`gpu`, a tensor made on or moved to ``"cuda"`` is an :class:`OnDevice`: it says that it is
on that device and holds its values in a CPU tensor that nobody else sees. Every operator goes through
:class:`Machine`, which computes on the CPU, refuses what CUDA refuses (tensors of two devices, the
generator of another device, products of integers, ``numpy()``), and counts what makes the host wait.
Where CUDA promises nothing, it does not do what a CPU does: memory that is not written holds NaN,
``topk`` and unstable sorts take the last of equal values, the first of two values written to one
place stays, and a look at what a copy without waiting may not have brought yet is refused.

No kernel of a GPU runs, so nothing is said about CUDA's rounding, its kernels or its speed. There is
no backward pass: the autograd engine asks the driver for a device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

# Operators whose result's shape hangs on values, so that the host must have them.
_SHAPED_BY_VALUES = {
    "nonzero", "masked_select", "unique_dim", "unique_consecutive", "_unique2", "bincount",
    "unique_dim_consecutive", "argwhere", "repeat_interleave.Tensor", "_unique",
}  # fmt: skip
_EMPTY = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "empty_permuted",
}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot", "addmv", "addbmm"}
# Where CUDA takes a CPU tensor of no dimensions for a number, apart from pointwise operators.
_NUMBERS = {"fill", "fill_", "masked_fill", "masked_fill_", "index_put", "index_put_", "where",
            "_index_put_impl_", "index_fill", "index_fill_", "masked_scatter"}  # fmt: skip


class OnDevice(torch.Tensor):
    """A tensor of the simulated device: the values are in ``held``, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, layout=held.layout, device=device,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of the simulated device, outside of gpu()")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDevice:
        if id(self) not in memo:
            made = OnDevice(self.held.clone(), self.device)
            if isinstance(self, torch.nn.Parameter):
                made = torch.nn.Parameter(made, self.requires_grad)
            memo[id(self)] = made
        copied: OnDevice = memo[id(self)]
        return copied

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r}, device={self.device})"

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)


class Machine(TorchDispatchMode):
    """Runs every operator, as CUDA would have it.

    Attributes:
        waits: (kind, file:line) -> how often the host waited for the device there. The line is that of
            the innermost code outside of torch. Kinds: ``item``, ``download``, ``upload`` (a blocking
            copy from pageable memory waits as well), ``shape`` (an operator whose result's shape hangs
            on values), ``equal``, ``synchronize``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self._on_the_way: dict[int, Tensor] = {}
        self._inside = 0
        self.capturing = False

    def ours(self) -> dict[tuple[str, str], int]:
        """The waits of the package's own lines."""
        return {k: n for k, n in self.waits.items() if k[1].startswith("vtr/")}

    @contextmanager
    def capture(self) -> Iterator[None]:
        """A CUDA graph that is captured: nothing may wait, nor pass between the host and the device."""
        with mock.patch.multiple(
            torch.cuda, is_initialized=lambda: True, is_current_stream_capturing=lambda: True
        ):
            self.capturing = True
            try:
                yield
            finally:
                self.capturing = False

    def _in_order(self, what: str) -> None:
        if self.capturing:
            raise RuntimeError(
                f"operation not permitted when stream is capturing: {what}, {_line()}"
            )

    def wait(self, kind: str) -> None:
        self._in_order(kind)
        self.waits[kind, _line()] += 1
        if kind != "upload":
            self._on_the_way.clear()

    def synchronize(self, device: Any = None) -> None:
        self.wait("synchronize")

    # ---- operators --------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = [t for t in tensors if isinstance(t, OnDevice)]
        asked = kwargs.get("device")
        asked = None if asked is None else torch.device(asked)
        name = func._schema.name.partition("::")[2]
        if asked is not None and asked.type == "cuda" and asked.index is None:
            asked = torch.device("cuda", here[0].device.index if here else 0)
        if func.namespace == "vtr":  # an operator of ours runs as the code that it is
            self._inside += 1
            try:
                with self:
                    return torch._library.custom_ops.OPDEFS[f"vtr::{name}"]._init_fn(
                        *args, **kwargs
                    )
            finally:
                self._inside -= 1
        if self._inside:  # what autograd takes apart outside of an operator comes whole
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        self._check_arrived(func, tensors)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if not here and (asked is None or asked.type != "cuda"):
            return func(*args, **kwargs)
        if name in ("copy_", "_to_copy"):
            return self._copy(name, func, args, kwargs, asked)
        device = here[0].device if asked is None else asked
        self._check(func, name, args, kwargs, here, tensors, device)
        self._count(name, func, args, kwargs)
        return self._compute(func, name, args, kwargs, device)

    def _compute(self, func: Any, name: str, args: Any, kwargs: Any, device: torch.device) -> Any:
        if name == "_fused_sdp_choice":
            return int(torch.nn.attention.SDPBackend.MATH)
        back = {id(t.held): t for t in tree_leaves((args, kwargs)) if isinstance(t, OnDevice)}
        args, kwargs = tree_map(held_by, (args, kwargs))
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs["device"] = torch.device("cpu")
        if name in ("topk", "sort", "argsort") and not kwargs.get("stable"):
            made = _last_of_equals(func, name, args, kwargs)
        else:
            made = func(*_turned(func, name, args, kwargs), **kwargs)
        if name in _EMPTY:
            made = _garbage(made)
        if device.type != "cuda":
            return made

        def wrap(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            old = back.get(id(x))
            if old is None:
                return OnDevice(x, device)
            if old.shape != x.shape or old.stride() != x.stride():
                raise NotImplementedError(f"{func} changes a shape in place: not simulated")
            return old

        return tree_map(wrap, made)

    def _copy(self, name: str, func: Any, args: Any, kwargs: Any, asked: Any) -> Any:
        source = args[1] if name == "copy_" else args[0]
        target = args[0] if name == "copy_" else None
        to = target.device if target is not None else source.device if asked is None else asked
        free = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
        if source.device.type != to.type:
            self._in_order("copy")
        if source.device.type != to.type and not free:
            self.wait("upload" if to.type == "cuda" else "download")
        if target is not None:
            held_by(target).copy_(held_by(source))
            made = target
        else:
            settings = {**kwargs, "device": torch.device("cpu"), "non_blocking": False}
            plain = func(held_by(source), **settings)
            made = OnDevice(plain, to) if to.type == "cuda" else plain
        if free and to.type == "cpu" and source.device.type == "cuda":
            self._on_the_way[made.untyped_storage().data_ptr()] = made
        return made

    # ---- what CUDA refuses ------------------------------------------------------------------

    def _check_arrived(self, func: Any, tensors: list[Tensor]) -> None:
        if not self._on_the_way or func.namespace != "aten":
            return
        for t in tensors:
            if not isinstance(t, OnDevice) and t.untyped_storage().data_ptr() in self._on_the_way:
                if func._schema.name in ("aten::_to_copy", "aten::copy_"):
                    continue  # back to the device: in the order of the stream
                if any(r.alias_info is not None and not r.alias_info.is_write
                       for r in func._schema.returns):  # fmt: skip
                    continue  # a view reads nothing
                raise RuntimeError(
                    f"{func} reads a CPU tensor that a copy without waiting may not have filled yet"
                )

    def _check(
        self, func: Any, name: str, args: Any, kwargs: Any, here: list[OnDevice],
        tensors: list[Tensor], device: torch.device,
    ) -> None:  # fmt: skip
        devices = {t.device for t in here}
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != device.type:
            raise RuntimeError(
                f"Expected a '{device.type}' device type for generator but found '{generator.device.type}'"
            )
        strangers = [t for t in tensors if not isinstance(t, OnDevice)]
        if len(devices) > 1 or any(not self._admits(func, name, args, t) for t in strangers):
            found = ", ".join(sorted({str(t.device) for t in tensors}))
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {found}! "
                f"({func})"
            )
        if name in _PRODUCTS and here and not (here[0].is_floating_point() or here[0].is_complex()):
            raise RuntimeError(f'"{name}_cuda" not implemented for {here[0].dtype}')

    @staticmethod
    def _admits(func: Any, name: str, args: Any, t: Tensor) -> bool:
        """Whether an operator on tensors of the device takes this CPU tensor as well."""
        indexing = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        if indexing and args[0] is not t and any(t is i for i in args[1]):
            return isinstance(args[0], OnDevice)
        if t.dim():
            return False
        written = [a for a, s in zip(args, func._schema.arguments, strict=False)
                   if s.alias_info is not None and s.alias_info.is_write]  # fmt: skip
        if any(t is a for a in written):
            return False
        return torch.Tag.pointwise in func.tags or name in _NUMBERS

    # ---- what waits -------------------------------------------------------------------------

    def _count(self, name: str, func: Any, args: Any, kwargs: Any) -> None:
        full = func.__name__
        if name in ("_local_scalar_dense", "is_nonzero"):
            self.wait("item")
        elif name == "equal":
            self.wait("equal")
        elif name in _SHAPED_BY_VALUES or full in _SHAPED_BY_VALUES:
            if full != "repeat_interleave.Tensor" or kwargs.get("output_size") is None:
                self.wait("shape")
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            fills = name != "index" and len(args[1]) == 1 and args[2].numel() == 1
            if masks and not (fills and not (len(args) > 3 and args[3])):
                self.wait("shape")


def held_by(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


def _garbage(x: Tensor) -> Tensor:
    if x.is_floating_point() or x.is_complex():
        return x.fill_(float("nan"))
    return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max // 3)


def _last_of_equals(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Sorts and the like with the order of equal values turned round, as CUDA may have it."""
    bound = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    x = bound["self"]
    if x.dim() == 0:
        return func(*args, **kwargs)
    dim = bound.get("dim", -1)
    bound["self"] = x.flip(dim)
    if name == "topk":
        # The CPU's own choice among equals is free, too: a stable sort settles it.
        values, index = torch.sort(
            bound["self"], dim=dim, descending=bound.get("largest", True), stable=True
        )
        values, index = (t.narrow(dim, 0, bound["k"]) for t in (values, index))
        return values, x.shape[dim] - 1 - index
    down = bound.get("descending", False)
    values, index = torch.sort(bound["self"], dim=dim, descending=down, stable=True)
    index = x.shape[dim] - 1 - index
    return index if name == "argsort" else (values, index)


def _turned(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A write turned round, so that the first of two values for one place stays and not the last:
    nobody knows which stays on a GPU."""
    if name in ("scatter", "scatter_") and func._overloadname == "src":
        x, dim, index, source = args
        if index.dim() and index.numel():
            source = source[tuple(slice(0, n) for n in index.shape)]
            return x, dim, index.flip(dim), source.flip(dim)
    if name in ("index_put", "index_put_") and not (len(args) > 3 and args[3]):
        x, indices, values = args[:3]
        if any(i is None or i.dtype == torch.bool for i in indices) or values.numel() <= 1:
            return args
        places = torch.broadcast_tensors(*indices)
        shape = places[0].shape
        values = values.expand(*shape, *x.shape[len(indices) :])
        axes = list(range(len(shape)))
        return x, [p.flip(axes) for p in places], values.flip(axes)
    return args


def _line() -> str:
    """file:line of the innermost code outside of torch and of this file."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if file != __file__ and "/torch/" not in file and not file.startswith("<"):
            for root in ("/vtr/", "/tests/", "/site-packages/"):
                if root in file:
                    return f"{(root + file.rpartition(root)[2]).strip('/')}:{frame.f_lineno}"
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "nowhere"


def _of_numbers(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.tensor`` reads tensors inside of a list where no mode sees it: they are read before."""

    def made(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(data, (list, tuple)):
            data = tree_map(lambda x: x.tolist() if isinstance(x, OnDevice) else x, data)
        return make(data, *args, **kwargs)

    return made


class _Event:
    """A stand-in for ``torch.cuda.Event`` on a device where everything is done at once."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        self.machine.synchronize()

    def elapsed_time(self, later: _Event) -> float:
        return 0.0


@contextmanager
def gpu() -> Iterator[Machine]:
    """A simulated CUDA device for the time of a block; ``torch.cuda.is_available()`` stays False.

    Modules keep their parameters' identity when they move, as on CUDA; their old values are gone.
    """
    from tests import simulated_kernels

    # torch keeps the functions that a default device applies to from the first time that it needs them.
    # Inside the block these would be the stand-ins below, and torch.device("meta") would miss the real ones.
    _device_constructors()
    torch._C._ensureCUDADeviceGuardSet()  # else indexing asks a driver for the current device
    machine = Machine()
    lifts = torch._C._only_lift_cpu_tensors()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    patches = {
        "_lazy_init": lambda: None,
        "synchronize": machine.synchronize,
        "Event": lambda **_: _Event(machine),
        "get_device_name": lambda device=None: "simulated",
        "get_device_capability": lambda device=None: (8, 0),
        "mem_get_info": lambda device=None: (1 << 40, 1 << 40),
        "is_current_stream_capturing": lambda: False,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **patches))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, _of_numbers(getattr(torch, name))))
        for stand_in in simulated_kernels.stand_ins():
            stack.enter_context(stand_in)
        stack.enter_context(machine)
        # torch.tensor(..., device=...) then makes its values on the CPU and moves them by an operator.
        torch._C._set_only_lift_cpu_tensors(True)
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            yield machine
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)
            torch.__future__.set_swap_module_params_on_conversion(swaps)


def moved(tree: Any, device: str = "cuda") -> Any:
    """Tensors of a nested structure on a device."""
    return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, tree)
