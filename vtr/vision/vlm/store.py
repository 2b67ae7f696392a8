"""The layer of a KV cache that holds entries by KV head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.compat.transformers import cache_layer, cache_layer_base
from vtr.core.kv_site import Change
from vtr.core.language_attention import Marks
from vtr.core.packed_entries import BITS, PackedEntries

_Base: Any = cache_layer_base()
ROOM = 16  # a store that grows has room for a sixteenth of its entries more


class Aside:
    """Entries in CPU memory, which may take the places of others of them.

    Attributes:
        keys, values: (B0, Hk, M, D) in CPU memory.
        rows: (B,) int64 on the CPU, the row of ``keys`` and ``values`` that each row began as.
        columns: (B, Hk, M) int64, -1 for empty places.
        at: (B, Hk, M) int64, the place of each in the store's keys, -1 for those that it does not hold.
        entries: what a method has noted of them.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, columns: Tensor, at: Tensor, entries: dict[str, Tensor]
    ) -> None:
        self.keys, self.values = (_to_cpu(x) for x in (keys, values))
        self.rows = torch.arange(len(keys), device="cpu")
        self.columns, self.at, self.entries = columns, at, entries

    def take(self, rows: Tensor) -> Aside:
        """Row i becomes what row ``rows[i]`` was; what is in CPU memory stays as it is."""
        new = object.__new__(Aside)
        new.keys, new.values, new.rows = self.keys, self.values, self.rows[rows.cpu()]
        new.columns, new.at = self.columns[rows], self.at[rows]
        new.entries = {name: x[rows] for name, x in self.entries.items()}
        return new


class EntryStore(_Base):  # type: ignore[misc]
    """A layer of a KV cache of transformers that holds some of the entries.

    It says how long the sequence is, so that masks and positions are those of a cache that holds everything;
    which entries it holds is for the attention of a wrapped model to know. Entries are padded to the number
    of the head that holds most. Packed entries are first, then those in the model's dtype.

    Attributes:
        keys, values: (B, Hk, n, D) the entries in the model's dtype.
        packed: entries with fewer bits.
        length: columns of the sequence.
        held: (B, Hk, P) int32, the columns of the first P entries, -1 for empty places; later entries are
            the last columns, in order. None if all columns are held.
        ragged: whether there are empty places.
        chosen: columns of the sequence when entries were last chosen.
        open: whether a wrapped model is running with the cache, which attends to what is held.
        exact: whether it must have no room for entries to come, because a budget in bytes counts it.
        entries, state: of the method's site.
        aside: entries in CPU memory, or None.
        known: (B, Hk, n) marks of the first n columns, of which each head has its own since they were numbered
            anew; None before.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.packed: list[PackedEntries] = []
        self.length = keys.shape[2]
        self.held: Tensor | None = None
        self.ragged = False
        self.chosen = 0
        self.open = False
        self.exact = False
        self._room: tuple[Tensor, Tensor] | None = (
            None  # that ``keys`` and ``values`` are the beginning of
        )
        self.entries: dict[str, Tensor] = {}
        self.state: dict[str, Any] = {}
        self.aside: Aside | None = None
        self.known: Marks | None = None
        self.device, self.dtype = keys.device, keys.dtype
        self.is_initialized = True

    # ---- what it holds ----------------------------------------------------------------------

    @property
    def whole(self) -> bool:
        """Tell whether all entries are held as the model made them."""
        return self.held is None

    @property
    def number(self) -> int:
        """Entries of the head that holds most, empty places counted."""
        return sum(p.places for p in self.packed) + self.keys.shape[2]  # type: ignore[no-any-return]

    def columns(self) -> Tensor:
        """(B, Hk, K) int64 columns of the entries, -1 for empty places."""
        batch, heads = self.keys.shape[:2]
        known = 0 if self.held is None else self.held.shape[2]
        last = torch.arange(self.length - (self.number - known), self.length, device=self.device)
        last = last.expand(batch, heads, -1)
        return last if self.held is None else torch.cat([self.held.long(), last], 2)

    def bits(self) -> Tensor:
        """(B, Hk, K) int64, with how many bits each entry is stored."""
        batch, heads = self.keys.shape[:2]
        sizes = [(p.bits, p.places) for p in self.packed]
        sizes.append((8 * self.dtype.itemsize, self.keys.shape[2]))
        found = [torch.full((n,), bits, device=self.device) for bits, n in sizes]
        return torch.cat(found).expand(batch, heads, -1)

    def read(self) -> tuple[Tensor, Tensor]:
        """(B, Hk, K, D) keys and values of all entries, in the model's dtype."""
        if not self.packed:
            return self.keys, self.values
        made = [p.unpack() for p in self.packed]
        keys = torch.cat([*(k for k, _ in made), self.keys], 2)
        return keys, torch.cat([*(v for _, v in made), self.values], 2)

    def live(self, valid: Tensor) -> Tensor:
        """Tell which entries are tokens, (B, Hk, K) bool or (B, 1, K); ``valid`` (B, S) bool are the columns."""
        known = 0 if self.held is None else self.held.shape[2]
        last = valid[:, None, valid.shape[1] - (self.number - known) :]
        if self.held is None:
            return last
        return torch.cat([self.held >= 0, last.expand(-1, self.held.shape[1], -1)], 2)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that it holds on the model's device, with room for entries to come."""
        if self.keys is not None:  # it was not emptied
            yield from (self.keys, self.values) if self._room is None else self._room
        for packed in self.packed:
            yield from packed.tensors()
        if self.held is not None:
            yield self.held
        yield from self.entries.values()
        yield from self.known or ()
        if self.aside is not None:
            yield from (self.aside.columns, self.aside.at, *self.aside.entries.values())
        yield from (x for x in self.state.values() if isinstance(x, Tensor))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that it holds on the model's device."""
        return sum(x.nbytes for x in self.tensors())

    def noted(self) -> dict[str, Tensor]:
        """``entries``, with zeros for those that are new."""
        for name, x in self.entries.items():
            more = self.number - x.shape[2]
            if more:
                self.entries[name] = F.pad(x, (0, 0) * (x.ndim - 3) + (0, more))
        return self.entries

    # ---- what it keeps ----------------------------------------------------------------------

    def choose(self, change: Change) -> None:
        """Hold from now on what a method has decided."""
        self.chosen = self.length
        columns, bits, noted = self.columns(), self.bits(), self.noted()
        kept = change.kept & (columns >= 0)
        wanted = bits if change.bits is None else change.bits
        native = wanted > max(BITS)
        same = change.k is None and not self.packed and bool((native | ~kept).all())
        if same and self.whole and bool(kept.all()):
            return
        keys, values = self.read()
        if change.k is not None and change.v is not None:
            keys, values = change.k.to(keys), change.v.to(values)
        packed, order, at = [], [], 0
        as_stored = torch.zeros_like(kept)  # entries that are not rounded again
        for entries in self.packed if change.k is None else ():
            stop = at + entries.places
            stays = kept[..., at:stop] & (wanted[..., at:stop] == entries.bits)
            as_stored[..., at:stop] = stays
            if torch.equal(stays, entries.valid):
                index = torch.arange(stop - at, device=columns.device).expand_as(stays)
                index = torch.where(stays, index, -1)
            else:
                index = places(stays)
                entries = entries.gather(index)
            if index.shape[2]:
                packed.append(entries)
                order.append(torch.where(index < 0, -1, index + at))
            at = stop
        kept = kept & ~as_stored
        for size in BITS:
            index = places(kept & (wanted == size))
            if index.shape[2]:
                packed.append(
                    PackedEntries.pack(
                        _gather(keys, index), _gather(values, index), index >= 0, size
                    )
                )
                order.append(index)
        index = places(kept & native)
        self.keys, self.values, self.packed = _gather(keys, index), _gather(values, index), packed
        self._room = None
        whole_order = torch.cat([*order, index], 2)
        self.held = _look_up(columns, whole_order, -1).int()
        self.ragged = bool((self.held < 0).any())
        self.entries = {name: _look_up(x, whole_order, 0) for name, x in noted.items()}
        self.aside = None
        if change.aside is not None:
            self._set_aside(change.aside & (columns >= 0), keys, values, columns, index, noted)

    def _set_aside(
        self, mask: Tensor, keys: Tensor, values: Tensor, columns: Tensor, held: Tensor, noted: dict[str, Tensor]
    ) -> None:  # fmt: skip
        """Copy entries to CPU memory; ``held`` (B, Hk, n) are those that are in the store's keys now."""
        index = places(mask)
        number = torch.arange(held.shape[2], device=held.device).expand_as(held)
        at = torch.full((*held.shape[:2], columns.shape[2] + 1), -1, device=held.device)
        at.scatter_(2, torch.where(held < 0, columns.shape[2], held), number)
        at[..., -1] = -1
        self.aside = Aside(
            _gather(keys, index), _gather(values, index), _look_up(columns, index, -1),
            _look_up(at, index, -1), {name: _look_up(x, index, 0) for name, x in noted.items()},
        )  # fmt: skip

    def recall(self, wanted: Tensor) -> None:
        """Hold the ``wanted`` (B, Hk, M) bool entries of those in CPU memory, as far as others of them are held in
        whose places they can be put."""
        aside = self.aside
        assert aside is not None and self.held is not None
        held = aside.at >= 0
        incoming, outgoing = wanted & ~held & (aside.columns >= 0), held & ~wanted
        number = torch.minimum(incoming.sum(2), outgoing.sum(2))
        source, target = (
            places(x & (x.cumsum(2) <= number[..., None])) for x in (incoming, outgoing)
        )
        if not source.shape[2]:
            return
        row, head, slot = (source >= 0).nonzero(as_tuple=True)
        new, old = source[row, head, slot], target[row, head, slot]
        place = aside.at[row, head, old]
        origin, cpu_head, cpu_new = aside.rows[row.cpu()], head.cpu(), new.cpu()
        for name in ("keys", "values"):
            x = getattr(self, name)
            if x.is_inference() and not torch.is_inference_mode_enabled():
                x = x.clone()  # made in inference mode: it can only be written to there
                setattr(self, name, x)
                self._room = None
            chosen = getattr(aside, name)[origin, cpu_head, cpu_new]
            x[row, head, place] = chosen.to(x.device, non_blocking=True)
        behind = sum(p.places for p in self.packed)
        held_columns, at = self.held.clone(), aside.at.clone()
        held_columns[row, head, behind + place] = aside.columns[row, head, new].int()
        at[row, head, new] = place
        at[row, head, old] = -1
        self.held, aside.at = held_columns, at
        for name, x in self.entries.items():
            x = x.clone()
            x[row, head, behind + place] = aside.entries[name][row, head, new]
            self.entries[name] = x

    def renumber(self, turn: Callable[[Tensor, Tensor], Tensor], known: Marks) -> None:
        """Let the entries that are held be all columns of a shorter sequence.

        Args:
            turn: turns keys (B, Hk, K, D) by (B, Hk, K) positions.
            known: (B, Hk, K) marks of the entries.
        """
        number = torch.arange(self.number, device=self.device)
        self.keys, self._room = turn(self.keys, number - self.columns()), None
        self.held, self.length, self.known = None, self.number, known
        self.chosen = self.length

    # ---- a layer of a cache -----------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add entries, and return all that are in the model's dtype: the attention of a wrapped model reads packed
        ones itself."""
        if not self.open and not self.whole:
            raise RuntimeError(
                "entries of this KV cache were dropped or packed: it can only be continued while a method at "
                "the site kv is applied to this layer of the model. Apply it again, or start with a new cache"
            )
        if self.keys is None:
            self.keys, self.values = key_states, value_states
        elif self.exact or torch.is_grad_enabled():
            self._room = None
            self.keys = torch.cat([self.keys, key_states], 2)
            self.values = torch.cat([self.values, value_states], 2)
        else:
            self._append(key_states, value_states)
        self.length += key_states.shape[2]
        return self.keys, self.values

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Write behind the last entries: a decoding step would else copy all of them."""
        start = self.keys.shape[2]
        stop = start + key_states.shape[2]
        room = self._room
        # Tensors of inference mode can only be written to there.
        closed = (
            room is not None and room[0].is_inference() and not torch.is_inference_mode_enabled()
        )
        if room is None or closed or room[0].shape[2] < stop:
            more = stop + max(4, stop // ROOM)
            room = self._room = _enlarged(self.keys, more), _enlarged(self.values, more)
        keys, values = room
        keys[:, :, start:stop], values[:, :, start:stop] = key_states, value_states
        self.keys, self.values = keys[:, :, :stop], values[:, :, :stop]

    def get_seq_length(self) -> int:
        return self.length  # type: ignore[no-any-return]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of the sequence: a negative number of them, or (in older versions of
        transformers) the length that is left."""
        gone = -tokens_to_remove
        if tokens_to_remove > 0:
            gone = max(0, self.length - tokens_to_remove)
        if not gone or self.keys is None:
            return
        columns = self.columns()
        known = 0 if self.held is None else self.held.shape[2]
        last = self.number - known
        self.length -= gone
        self.chosen = min(self.chosen, self.length)
        stop = self.keys.shape[2] - min(gone, last)
        self.keys, self.values = self.keys[:, :, :stop], self.values[:, :, :stop]
        self.entries = {n: x[:, :, : self.number] for n, x in self.entries.items()}
        if gone > last:
            held = columns[:, :, :known]
            self.held = torch.where(held < self.length, held, -1).int()
            self.ragged, self.aside = True, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            rows = torch.arange(self.keys.shape[0], device=self.device)
            self._take(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(indices)

    def _take(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        if self.keys is None:
            return
        batch, rows = self.keys.shape[0], rows.to(self.device)
        self.keys, self.values, self._room = self.keys[rows], self.values[rows], None
        self.packed = [p.take(rows) for p in self.packed]
        self.held = None if self.held is None else self.held[rows]
        self.entries = {name: x[rows] for name, x in self.entries.items()}
        self.known = None if self.known is None else Marks(*(x[rows] for x in self.known))
        self.aside = None if self.aside is None else self.aside.take(rows)
        self.state = {
            name: x[rows] if isinstance(x, Tensor) and x.shape[:1] == (batch,) else x
            for name, x in self.state.items()
        }

    def reset(self) -> None:
        self.keys = self.values = None  # type: ignore[assignment]
        self.held = self.aside = self.known = self._room = None
        self.packed, self.entries, self.state = [], {}, {}
        self.length = self.chosen = 0

    def offload(self) -> None:
        """Move entries to CPU memory; which they are stays known on the device."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if self.keys is None or self.keys.device == device:
            return
        self.keys = self.keys.to(device, non_blocking=True)
        self.values = self.values.to(device, non_blocking=True)
        self.packed = [p.to(device) for p in self.packed]
        self._room = None


def store_of(cache: Any, layer: int) -> EntryStore | None:
    """The store at a layer of a cache."""
    layers = getattr(cache, "layers", ())
    found = layers[layer] if layer < len(layers) else None
    return found if isinstance(found, EntryStore) else None


def make_store(cache: Any, layer: int, length: int) -> EntryStore | None:
    """Put a store in the place of a layer that holds ``length`` columns plainly; None if it does not."""
    plain = cache_layer(cache, layer)
    if plain is None:
        return None
    plain.prefetch()  # an offloaded layer
    keys, values = plain.keys, plain.values
    if keys.shape[2] != length:  # a static layer has room for more
        keys, values = (x[:, :, :length].clone() for x in (keys, values))
    cache.layers[layer] = store = EntryStore(keys, values)
    return store


def places(mask: Tensor) -> Tensor:
    """List the True places of a mask (B, Hk, K), ascending: (B, Hk, n) int64 with n the most of a head, -1
    behind them."""
    number = int(mask.sum(2).max()) if mask.numel() else 0
    index = torch.arange(mask.shape[2], device=mask.device).expand_as(mask)
    rank = torch.where(mask, mask.cumsum(2) - 1, number)
    found = torch.full((*mask.shape[:2], number + 1), -1, device=mask.device)
    return found.scatter(2, rank, torch.where(mask, index, -1))[..., :number]


def _to_cpu(x: Tensor) -> Tensor:
    """A copy in CPU memory, pinned if x is on a GPU."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda, device="cpu").copy_(x)


def _enlarged(x: Tensor, number: int) -> Tensor:
    """A tensor (B, Hk, number, D) that begins as x."""
    made = x.new_empty(*x.shape[:2], number, x.shape[3])
    made[:, :, : x.shape[2]] = x
    return made


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Entries (B, Hk, n) of x (B, Hk, K, D), a new tensor; those of -1 are zero."""
    found = x.gather(2, index.clamp(min=0)[..., None].expand(-1, -1, -1, x.shape[3]))
    return found.masked_fill_((index < 0)[..., None], 0)


def _look_up(x: Tensor, index: Tensor, nothing: int) -> Tensor:
    """Values (B, Hk, n, ...) of x (B, Hk, K, ...) at an index, ``nothing`` for -1."""
    more = (1,) * (x.ndim - 3)
    where = index.clamp(min=0).view(*index.shape, *more).expand(*index.shape, *x.shape[3:])
    return x.gather(2, where).masked_fill((index < 0).view(*index.shape, *more), nothing)
