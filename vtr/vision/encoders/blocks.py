"""Blocks of sequence-shaped encoders: how one is run in two halves, and what a pass through them knows.

A family's adapter gives one :class:`BlockRunner` per block; :class:`vtr.vision.encoders.session.EncoderSession`
puts it in place of the block's ``forward``.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from vtr.compat import accelerate
from vtr.core.recompute import copied
from vtr.core.tokens import TokenMap, take
from vtr.core.trace import Trace
from vtr.core.wrapping import Entry, Wrapping
from vtr.errors import UnsupportedModelError
from vtr.vision.encoders.attention import Probe
from vtr.vision.encoders.image import Smaller


class BlockRunner:
    """Runs one block in two halves. Subclasses know one block class."""

    #: whether the block can be cut between attention and MLP, and shows q, k, v
    split = True
    #: protected tokens that the model puts in front of the sequence at a later block, and are there at this one
    more = 0

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def attend(self, x: Tensor, probe: Probe | None, kwargs: dict[str, Any]) -> Tensor:
        """x plus its attention branch; through ``probe`` if one is given."""
        raise NotImplementedError

    def feed(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """x plus its MLP branch."""
        raise NotImplementedError

    def narrow(self, kwargs: dict[str, Any], run: EncoderRun) -> dict[str, Any]:
        """The block's keyword arguments for the tokens that are left (positions, masks)."""
        return kwargs

    def returned(self, x: Tensor) -> Any:
        """The value that the block's ``forward`` returns for its output x."""
        return x

    def keys_of(self, x: Tensor, index: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Keys (B, H, M, D) of features x (B, M, C) with positions ``index`` (B, M) in the input.

        ``kwargs`` are the block's own, before narrowing.
        """
        raise NotImplementedError

    def mask(self, kwargs: dict[str, Any]) -> Tensor | None:
        """The mask or bias that the attention adds to its logits at full length, (B or 1, H or 1, T or 1, T) additive or
        bool (True is seen), or None. ``kwargs`` are the block's own, before narrowing."""
        return None

    def flops(self, before: int, after: int) -> int:
        """FLOPs of one sample with ``before`` tokens in the attention and ``after`` in the MLP."""
        raise NotImplementedError

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The block's keyword arguments, where its model gives ``args`` by position."""
        raise TypeError(f"vtr passes block arguments by name; got {len(args)} more by position")

    def install(self, owner: Wrapping) -> None:
        """Set patches inside the block that the runner needs (through ``owner``)."""

    def checkpointed(self) -> bool:
        """Tell whether the model runs the block again in the backward pass."""
        return False

    def checkpoints(self) -> Callable[..., Any] | None:
        """The function by which the block's own forward, which is not called here, would checkpoint what it
        does now; None if its model or its caller does so."""
        return None


class WholeBlock(BlockRunner):
    """A block that cannot be opened: its own forward, cuts at its end, hidden states only."""

    split = False

    def attend(self, x: Tensor, probe: Probe | None, kwargs: dict[str, Any]) -> Tensor:
        return type(self.block).forward(self.block, x, **kwargs)

    def feed(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return x

    def flops(self, before: int, after: int) -> int:
        return before * linear_flops(self.block)


class BlockEntry(NamedTuple):
    """The state of a run at the entry of a block."""

    map: TokenMap | None
    merged: bool
    policy: Tensor | None
    mass: Tensor | None
    memory: dict[int, dict[str, Any]]
    notes: dict[str, Any]


class EncoderRun:
    """The state of one forward pass, or of a block that runs again for the backward pass.

    ``map`` and ``tokens`` are of the sequence that enters the blocks.

    Attributes:
        mass: (B, N), by how much tokens count in place of their sizes; None if it is the sizes.
        image: map of the picture's tokens to those of the smaller picture, None if it was not resized.
        crops: rows of the batch that belong to each image (its crops) or video (its frames), in order;
            None if every row is an image.
        entered: per block, what was known at its entry, in passes that may have to be repeated.
        cuts: per (block, place, visit) the map of the cut there, None without a cut.
        first: the pass that this one repeats a part of, or None.
        late: whether it runs in a backward pass.
        output: the output of the last block that ran without gradients, to be guarded if methods change.
        after: the number of the block that comes next in a late run, and the storage of its input.
    """

    def __init__(self, batch: int, tokens: int, prefix: int, restoring: bool = False) -> None:
        self.trace = Trace(batch=batch)
        self.restoring = restoring
        self.batch = batch
        self.tokens = tokens
        self.prefix = prefix
        self.map: TokenMap | None = None
        self.merged = False
        self.policy: Tensor | None = None
        self.mass: Tensor | None = None
        self.memory: dict[int, dict[str, Any]] = {}
        self.crops: list[int] | None = None
        self.base: Tensor | None = None
        self.image: Smaller | None = None
        self.grid: tuple[int, ...] | None = None
        self.pixels: Tensor | None = None
        self.training = False
        self.checkpointed = False
        self.watched = False
        self.entries: list[Entry] = []
        self.entered: dict[int, BlockEntry] = {}
        self.cuts: dict[tuple[int, str, int], TokenMap | None] = {}
        self.first: EncoderRun | None = None
        self.late = False
        self.output: weakref.ref[Tensor] | None = None
        self.after: tuple[int, StorageWeakRef | None] | None = None
        self._narrowed: tuple[Any, TokenMap | None, Any] | None = None

    def enter(self, layer: int) -> None:
        """Remember the state at the entry of a block."""
        memory, notes = copied(self.memory), copied(self.trace.notes)
        self.entered[layer] = BlockEntry(
            self.map, self.merged, self.policy, self.mass, memory, notes
        )

    def again(self, layer: int) -> EncoderRun:
        """The run as it was at the entry of a block; what it finds there is not part of the call's trace."""
        made = copy.copy(self)
        made.map, made.merged, made.policy, made.mass, memory, notes = self.entered[layer]
        made.memory, made.trace = copied(memory), Trace(batch=self.batch, notes=copied(notes))
        made.first, made.late, made.base, made._narrowed = self, True, None, None
        return made

    def narrowed(self, key: Any, make: Callable[[TokenMap], Any]) -> Any:
        """``make(map)`` for an argument that all blocks share, computed once per map."""
        if key is None or self.map is None:
            return key
        if (
            self._narrowed is None
            or self._narrowed[0] is not key
            or self._narrowed[1] is not self.map
        ):
            self._narrowed = (key, self.map, make(self.map))
        return self._narrowed[2]

    def short(self, x: Tensor) -> Tensor:
        """The tokens that are left of an x at full length; see :meth:`full`."""
        if self.image is not None and x.shape[1] == self.image.map.n_in + self.prefix:
            x = self.image.map.with_prefix(self.prefix).gather(x)
        if self.map is None:
            return x
        self.base = x
        return self.map.with_prefix(self.prefix).gather(x)

    @property
    def counts(self) -> Tensor | None:
        """(B, N) by how much the tokens here count: masses, else sizes; None if every token counts once."""
        if self.mass is not None or self.map is None:
            return self.mass
        return self.map.size if self.merged else None

    @property
    def cut(self) -> bool:
        """Tell whether there are fewer tokens than the picture has."""
        return self.map is not None or self.image is not None

    def total(self, now: TokenMap) -> TokenMap:
        """From the tokens of the picture, for a map from those that entered the blocks."""
        return now if self.image is None else self.image.map.then(now)

    def widened(self, x: Tensor) -> Tensor:
        """x at the length that entered the blocks; tokens that are gone have the value they had when
        they went."""
        if self.map is None:
            return x
        whole = self.map.with_prefix(self.prefix)
        return whole.restore(x, "copy" if self.base is None else self.base)

    def full(self, x: Tensor) -> Tensor:
        """x at the length of the picture as it was given: as :meth:`widened`, and what a smaller picture
        has in one token is copied to all that it covers."""
        x = self.widened(x)
        return x if self.image is None else self.image.map.with_prefix(self.prefix).restore(x)


def place_forward(owner: Wrapping, module: nn.Module, forward: Any) -> None:
    """Put ``forward`` in place of a module's own, inside accelerate's device hook if it has one.

    Raises ``UnsupportedModelError`` if the instance carries another ``forward`` already.
    """
    held = vars(module)
    if accelerate.hooked(module):  # accelerate's forward calls it
        owner.patch(module, accelerate.FORWARD, forward)
    elif "forward" in held and not _is_own(module, held["forward"]):
        raise UnsupportedModelError(
            f"a {type(module).__name__} of {owner.info.family} carries its own forward "
            f"({held['forward']!r}): another library, or another vtr.apply on a part of this model, has "
            "patched it; take that off first"
        )
    else:
        owner.patch(module, "forward", forward)


def _is_own(module: nn.Module, forward: Any) -> bool:
    """Tell whether it is the forward of the class, which accelerate leaves on an instance when its hooks go."""
    return (
        getattr(forward, "__func__", None) is type(module).forward
        and getattr(forward, "__self__", None) is module
    )


def narrow_rope(rope: Tensor, kept: Tensor) -> Tensor:
    """Rotary rows of the tokens ``kept`` (B, N'): (N, D), (H, N, D) or (B, H, N, D) rows give
    (B, 1 or H, N', D). A merged token rotates by its representative's position."""
    kept = kept.clamp(min=0)
    if rope.dim() == 2:
        return rope[kept][:, None]
    if rope.dim() == 3:
        return rope[:, kept].transpose(0, 1)
    return take(rope.transpose(1, 2).expand(kept.shape[0], -1, -1, -1), kept).transpose(1, 2)


def narrow_bias(bias: Tensor, now: TokenMap, prefix: int) -> Tensor:
    """Rows and columns of the kept tokens of a (B or 1, H, T or 1, T) bias or mask."""
    kept = now.with_prefix(prefix).kept.clamp(min=0)
    while bias.dim() < 4:
        bias = bias[None]
    batch, heads, rows, columns = kept.shape[0], *bias.shape[1:]
    bias = bias.expand(batch, heads, rows, columns)
    if rows == columns:
        index = kept[:, None, :, None].expand(batch, heads, kept.shape[1], columns)
        bias = bias.gather(2, index)
    index = kept[:, None, None, :].expand(batch, heads, bias.shape[2], kept.shape[1])
    return bias.gather(3, index)


def block_flops(attention: nn.Module, mlp: nn.Module, width: int, before: int, after: int) -> int:
    """FLOPs of one sample in a block of attention and MLP (two per multiply-add).

    Args:
        width: channels of all heads together.
        before, after: tokens in the attention and in the MLP.
    """
    square = 4 * before * before * width
    return before * linear_flops(attention) + square + after * linear_flops(mlp)


def pair_flops(runner: BlockRunner, tokens: int) -> int:
    """FLOPs of one sample in the two products of a block's attention, which grow with the square of ``tokens``."""
    return (runner.flops(2, 2) - 2 * runner.flops(1, 1)) // 2 * tokens * tokens


def linear_flops(module: nn.Module) -> int:
    """FLOPs per token of all linear layers inside a module (two per multiply-add), also quantised ones."""
    total = 0
    for m in module.modules():
        given, made = getattr(m, "in_features", None), getattr(m, "out_features", None)
        # A layer around linear ones (LoRA) is counted by them; PyTorch's own quantised ones hold a module too.
        leaf = isinstance(m, nn.Linear) or not any(isinstance(x, nn.Linear) for x in m.modules())
        if leaf and isinstance(given, int) and isinstance(made, int):
            total += 2 * given * made
    return total
