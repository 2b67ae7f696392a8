"""BlockMask: the key blocks that each query block attends to, exact to the token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.kernels import csr as _csr
from vtr.kernels.capture import refuse_captured_mask
from vtr.kernels.csr import Csr

if TYPE_CHECKING:
    from PIL import Image

_serial = itertools.count()


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """A sparse attention mask in blocks of ``block = (bm, bn)`` tokens, any lengths.

    It stores the live key blocks of every query block in compressed rows, full and partial blocks
    separately. A pattern that several heads or samples share is stored once. Create one with
    :meth:`from_dense`, :meth:`from_blocks`, :meth:`from_flex` or a function of
    :mod:`vtr.kernels.masks`.

    Attributes:
        q_len, k_len: numbers of tokens; the last block may have fewer tokens than the others.
        block: (query tokens, key tokens) per block.
        pattern: (Bp, Hp) int32, the pattern of each sample and head; Bp and Hp are 1 (shared) or
            the batch and head counts.
        row_ptr: (P NQ + 1,) int32, the start of each (pattern, query block) row in ``col``.
        split: (P NQ,) int32, the start of its partial blocks.
        col: (nnz,) int32 key block indices.
        tile: (nnz,) int32, -1 for a full block, else its entry of ``tiles``.
        tiles: (T, bm, bn) bool, the pairs that a partial block keeps (True: attended). If the last
            key column is shorter than a block, its blocks are partial, so that full blocks never
            need a bounds check.
    """

    q_len: int
    k_len: int
    block: tuple[int, int]
    pattern: Tensor
    row_ptr: Tensor
    split: Tensor
    col: Tensor
    tile: Tensor
    tiles: Tensor
    # Names this mask in caches of what kernels derive from it; a tensor, so that a compiled graph
    # carries it as data and does not specialise on it.
    # On the CPU whatever the default device is: it is read at every call.
    ident: Tensor = field(
        init=False,
        default_factory=lambda: torch.tensor(next(_serial), dtype=torch.int64, device="cpu"),
    )

    # What calls with this mask keep for the next one of their kind, see :mod:`vtr.kernels.kept`.
    kept: dict[Any, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        # A mask made in inference mode (a validation step) has to serve training too, which may
        # not save inference tensors for the backward.
        if any(t.is_inference() for t in self.tensors()):
            with torch.inference_mode(False):
                for name in ("pattern", "row_ptr", "split", "col", "tile", "tiles", "ident"):
                    object.__setattr__(self, name, getattr(self, name).clone())

    def __reduce__(self) -> tuple[Any, ...]:
        # Without ``ident``: what another process named so here would be taken for another mask.
        return BlockMask, (self.q_len, self.k_len, self.block, *self.tensors()[:-1])

    # ---- construction ---------------------------------------------------------------------

    @classmethod
    def from_blocks(
        cls,
        blocks: Tensor,
        *,
        q_len: int,
        k_len: int,
        block: int | tuple[int, int] = 128,
        share: bool = True,
    ) -> BlockMask:
        """Build a mask from a block-level map: every live block is attended whole.

        Args:
            blocks: bool, (NQ, NK), (H, NQ, NK) or (B, H, NQ, NK), NQ = ceil(q_len / bm) and
                NK = ceil(k_len / bn).
            share: look for equal patterns and store them once (reads the map on the CPU; pass
                False for a mask that is computed in every step on a GPU).

        Raises:
            ValueError: the map's size does not match the lengths, or it is not bool.
        """
        bm, bn = _block_pair(block)
        nq, nk = -(-q_len // bm), -(-k_len // bn)
        blocks = _four_dims(blocks, "blocks")
        refuse_captured_mask(blocks.device)
        if blocks.shape[2:] != (nq, nk):
            raise ValueError(
                f"a block map for {q_len} x {k_len} tokens in blocks of {bm} x {bn} is "
                f"({nq}, {nk}); got {tuple(blocks.shape[2:])}"
            )
        flat, pattern = _share(blocks, share)
        maps = flat.view(-1, nq, nk)
        p, r, c = maps.nonzero(as_tuple=True)
        tile = torch.full_like(c, -1)
        return cls.from_entries(
            q_len, k_len, (bm, bn), pattern, maps.shape[0], p * nq + r, c, tile,
            torch.zeros(0, bm, bn, dtype=torch.bool, device=blocks.device),
        )  # fmt: skip

    @classmethod
    def from_dense(cls, mask: Tensor, *, block: int | tuple[int, int] = 128) -> BlockMask:
        """Build a mask from a token-level bool mask (Sq, Sk), (H, Sq, Sk) or (B, H, Sq, Sk).

        True: attended. Exact: blocks that are neither empty nor whole keep their tokens as tiles,
        equal tiles stored once. The memory is that of the given mask; for long sequences use the
        functions of :mod:`vtr.kernels.masks`, which never build token-level tensors.
        """
        bm, bn = _block_pair(block)
        mask = _four_dims(mask, "mask")
        refuse_captured_mask(mask.device)
        q_len, k_len = mask.shape[2:]
        flat, pattern = _share(mask, True)
        maps = flat.view(-1, q_len, k_len)
        count = maps.shape[0]
        nq, nk = -(-q_len // bm), -(-k_len // bn)

        def cut(fill: bool) -> Tensor:
            padded = torch.full(
                (count, nq * bm, nk * bn), fill, dtype=torch.bool, device=mask.device
            )
            padded[:, :q_len, :k_len] = maps
            return padded.view(count, nq, bm, nk, bn).transpose(2, 3)

        tokens = cut(False)
        live = tokens.flatten(3).any(-1)
        whole = cut(True).flatten(3).all(-1)
        p, r, c = live.nonzero(as_tuple=True)
        tile = torch.full_like(c, -1)
        part = ~whole[p, r, c]
        cut_out = tokens[p[part], r[part], c[part]]
        first, classes = _csr.unique_rows(cut_out.flatten(1))
        tile[part] = classes
        return cls.from_entries(
            q_len, k_len, (bm, bn), pattern, count, p * nq + r, c, tile, cut_out[first]
        )

    @classmethod
    def from_flex(cls, flex: Any) -> BlockMask:
        """Convert a ``torch.nn.attention.flex_attention.BlockMask``.

        Its ``mask_mod`` is evaluated on the partial blocks only.
        """
        refuse_captured_mask(flex.kv_num_blocks.device)
        bm, bn = flex.BLOCK_SIZE
        q_len, k_len = flex.seq_lengths
        num, index = flex.kv_num_blocks, flex.kv_indices
        batch, heads, nq = num.shape
        rows, cols, part = [], [], []
        kinds = [(num, index, True)]
        if flex.full_kv_num_blocks is not None:
            kinds.append((flex.full_kv_num_blocks, flex.full_kv_indices, False))
        for counts, indices, is_partial in kinds:
            live = torch.arange(indices.shape[-1], device=num.device) < counts.unsqueeze(-1)
            b, h, r, slot = live.nonzero(as_tuple=True)
            rows.append((b * heads + h) * nq + r)
            cols.append(indices[b, h, r, slot].long())
            part.append(torch.full_like(r, is_partial, dtype=torch.bool))
        row, col, partial = torch.cat(rows), torch.cat(cols), torch.cat(part)
        # Blocks past the end of a sequence carry nothing.
        inside = (row % nq * bm < q_len) & (col * bn < k_len)
        row, col, partial = row[inside], col[inside], partial[inside]
        nq_true = -(-q_len // bm)
        row = row // nq * nq_true + row % nq
        tokens = _evaluate(
            flex.mask_mod, row[partial], col[partial], heads, nq_true, (bm, bn), (q_len, k_len)
        )
        first, classes = _csr.unique_rows(tokens.flatten(1))
        tile = torch.full_like(col, -1)
        tile[partial] = classes
        keep = torch.ones_like(partial)
        keep[partial] = tokens.flatten(1).any(1)
        pattern = torch.arange(batch * heads, device=num.device, dtype=torch.int32)
        return cls.from_entries(
            q_len, k_len, (bm, bn), pattern.view(batch, heads), batch * heads,
            row[keep], col[keep], tile[keep], tokens[first],
        )  # fmt: skip

    @classmethod
    def from_entries(
        cls, q_len: int, k_len: int, block: tuple[int, int], pattern: Tensor, patterns: int,
        row: Tensor, col: Tensor, tile: Tensor, tiles: Tensor,
    ) -> BlockMask:  # fmt: skip
        """Build a mask in its normal form from entries in any order: tiles are False past the ends,
        blocks that are whole as far as they reach are full, and full blocks of a last key column
        that is shorter than a block get a tile that ends with the keys."""
        (bm, bn), device = block, tiles.device
        refuse_captured_mask(device)
        nq, nk = -(-q_len // bm), -(-k_len // bn)
        rows, cols = q_len - (nq - 1) * bm, k_len - (nk - 1) * bn
        last_row, last_col = row % nq == nq - 1, col == nk - 1
        if tiles.shape[0]:
            # By (last row, last column): whether a tile is whole as far as blocks reach there.
            reach = [(h, w) for h in (bm, rows) for w in (bn, cols)]
            whole = torch.stack([tiles[:, :h, :w].flatten(1).all(1) for h, w in reach])
            found = whole[last_row.long() * 2 + last_col.long(), tile.clamp(min=0)]
            tile = torch.where(found, -1, tile)
        if cols < bn:
            ends = torch.zeros(2, bm, bn, dtype=torch.bool, device=device)
            ends[0, :, :cols] = True
            ends[1, :rows, :cols] = True
            full = last_col & (tile < 0)
            tile = torch.where(full, tiles.shape[0] + (last_row & (rows < bm)).long(), tile)
            tiles = torch.cat([tiles, ends])
        # Tiles that no entry uses are dropped; this is the only read from the device.
        number = tiles.shape[0]
        live = torch.zeros(number + 1, dtype=torch.bool, device=device)
        live = live.scatter(0, torch.where(tile < 0, number, tile), True)[:number]
        if number:
            place = live.long().cumsum(0) - 1
            tile = torch.where(tile < 0, -1, place[tile.clamp(min=0)])
        made = _csr.build(patterns * nq, nk, row, col, tile)
        kept = tiles[live.nonzero().squeeze(1)].contiguous()
        return cls(q_len, k_len, block, pattern.to(torch.int32), *made, kept)

    # ---- what it is -----------------------------------------------------------------------

    @property
    def grid(self) -> tuple[int, int]:
        """(query blocks, key blocks)."""
        return -(-self.q_len // self.block[0]), -(-self.k_len // self.block[1])

    @property
    def patterns(self) -> int:
        """Number of distinct patterns that are stored."""
        return self.split.numel() // self.grid[0]

    @property
    def device(self) -> torch.device:
        return self.col.device

    @property
    def csr(self) -> Csr:
        return Csr(self.row_ptr, self.split, self.col, self.tile)

    @property
    def density(self) -> float:
        """Share of the query-key pairs that lie in live blocks: the share of dense attention's
        work that a block-sparse kernel has to do (0 to 1), averaged over samples and heads."""
        nq = self.grid[0]
        row = _csr.row_of(self.csr)
        area = _sizes(row % nq, self.q_len, self.block[0])
        area = area * _sizes(self.col.long(), self.k_len, self.block[1])
        share = torch.zeros(self.patterns, dtype=torch.float64, device=self.device)
        share.index_add_(0, row // nq, area.double())
        return float(share[self.pattern.long()].mean()) / (self.q_len * self.k_len)

    def tensors(self) -> list[Tensor]:
        """The tensors that a kernel call carries."""
        return [self.pattern, self.row_ptr, self.split, self.col, self.tile, self.tiles, self.ident]

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device; itself if it is there already."""
        here = self.tensors()[:-1]
        if torch.device(device).type != self.device.type:
            for end in (self.device, torch.device(device)):
                refuse_captured_mask(end, "a mask is moved")
        moved = [t.to(device, non_blocking=torch.device(device).type == "cuda") for t in here]
        if all(a is b for a, b in zip(here, moved, strict=True)):
            return self
        return BlockMask(self.q_len, self.k_len, self.block, *moved)

    def __repr__(self) -> str:
        nq, nk = self.grid
        partial = int((self.tile >= 0).sum())
        return (
            f"BlockMask({self.q_len} x {self.k_len} tokens, {nq} x {nk} blocks of "
            f"{self.block[0]} x {self.block[1]}, density {self.density:.3f}, "
            f"{self.patterns} pattern(s) for {tuple(self.pattern.shape)} samples and heads, "
            f"{partial} of {self.col.numel()} live blocks partial, on {self.device})"
        )

    # ---- other forms ----------------------------------------------------------------------

    def to_dense(self, *, blocks: bool = False) -> Tensor:
        """The mask as a bool tensor: token level (Sq, Sk), or with ``blocks=True`` the live
        blocks (NQ, NK). A mask with more than one sample or head has (Bp, Hp) in front."""
        (nq, nk), (bm, bn) = self.grid, self.block
        row = _csr.row_of(self.csr)
        live = torch.zeros(self.patterns * nq, nk, dtype=torch.bool, device=self.device)
        live[row, self.col.long()] = True
        if blocks:
            return self._by_head(live.view(self.patterns, nq, nk))
        out = torch.zeros(self.patterns * nq, nk, bm, bn, dtype=torch.bool, device=self.device)
        out[row, self.col.long()] = True
        part = self.tile >= 0
        out[row[part], self.col[part].long()] = self.tiles[self.tile[part].long()]
        out = out.view(self.patterns, nq, nk, bm, bn).transpose(2, 3)
        return self._by_head(
            out.reshape(self.patterns, nq * bm, nk * bn)[:, : self.q_len, : self.k_len]
        )

    def _by_head(self, maps: Tensor) -> Tensor:
        if self.pattern.numel() == 1:
            return maps[int(self.pattern)]
        return maps[self.pattern.long()]

    def to_flex(self) -> Any:
        """Convert to a ``torch.nn.attention.flex_attention.BlockMask``; partial blocks keep their
        exact tokens through a ``mask_mod`` that looks them up."""
        from vtr.kernels.flex_mask import to_flex

        return to_flex(self)

    def transpose(self) -> BlockMask:
        """Exchange queries and keys: ``mask.transpose().to_dense() == mask.to_dense().mT``."""
        nq, nk = self.grid
        made = _csr.transpose(self.csr, self.patterns, nq, nk)
        return BlockMask.from_entries(
            self.k_len, self.q_len, self.block[::-1], self.pattern, self.patterns,
            _csr.row_of(made), made.col.long(), made.tile.long(), self.tiles.transpose(1, 2),
        )  # fmt: skip

    def with_block(self, block: int | tuple[int, int]) -> BlockMask:
        """Return the same token mask in other blocks: ``mask.with_block(b).to_dense() == mask.to_dense()``.

        Whole blocks are full, all others keep their tokens, equal ones stored once. Blocks that cut
        through the old ones make more of the map live: compare ``density``. Time and memory grow with the
        number of overlapping blocks, and with the distinct partial ones (bm bn bytes each), never with
        q_len k_len.

        Args:
            block: (query tokens, key tokens) per block, or one number for both.

        Returns:
            The mask; itself if the blocks are these already.
        """
        from vtr.kernels.retile import retile

        pair = _block_pair(block)
        # Much larger blocks in two steps, so that a new block is cut out of 81 old ones at most.
        step = (min(pair[0], 8 * self.block[0]), min(pair[1], 8 * self.block[1]))
        if step != pair:
            return self.with_block(step).with_block(pair)
        if pair == self.block:
            return self
        made = retile(self, pair)
        return BlockMask.from_entries(
            self.q_len, self.k_len, pair, self.pattern, self.patterns, *made
        )

    def permute(self, order: Tensor, k_order: Tensor | None = None) -> BlockMask:
        """Return the mask of reordered tokens: ``new[i, j] = old[order[i], k_order[j]]``.

        It is computed one row of blocks at a time: memory O(bm k_len), time O(q_len k_len) per
        pattern.

        Args:
            order: (q_len,) int64 permutation of the query tokens.
            k_order: (k_len,) int64 permutation of the key tokens; ``order`` when None.

        Raises:
            ValueError: an index is negative, out of range or repeated.
        """
        k_order = _permutation(order if k_order is None else k_order, self.k_len, "k_order")
        order = _permutation(order, self.q_len, "order").to(self.device)
        k_order = k_order.to(self.device)
        (nq, nk), (bm, bn) = self.grid, self.block
        kind = torch.full((self.patterns * nq, nk), -2, dtype=torch.int64, device=self.device)
        kind[_csr.row_of(self.csr), self.col.long()] = self.tile.long()
        rows: list[Tensor] = []
        cols: list[Tensor] = []
        ids: list[Tensor] = []
        tiles: list[Tensor] = []
        for p in range(self.patterns):
            for r in range(nq):
                old = order[r * bm : (r + 1) * bm]
                kinds = kind[p * nq + old // bm]
                tokens = (kinds == -1)[:, :, None].repeat(1, 1, bn)
                i, j = (kinds >= 0).nonzero(as_tuple=True)
                tokens[i, j] = self.tiles[kinds[i, j], old[i] % bm]
                line = torch.zeros(bm, nk * bn, dtype=torch.bool, device=self.device)
                line[: old.numel(), : self.k_len] = tokens.view(old.numel(), -1)[:, k_order]
                cut = line.view(bm, nk, bn).transpose(0, 1)
                live = cut.flatten(1).any(1).nonzero().squeeze(1)
                first, classes = _csr.unique_rows(cut[live].flatten(1))
                ids.append(classes + sum(t.shape[0] for t in tiles))
                tiles.append(cut[live][first])
                cols.append(live)
                rows.append(torch.full_like(live, p * nq + r))
        every = torch.cat(tiles)
        first, classes = _csr.unique_rows(every.flatten(1))
        return BlockMask.from_entries(
            self.q_len, self.k_len, self.block, self.pattern, self.patterns,
            torch.cat(rows), torch.cat(cols), classes[torch.cat(ids)], every[first],
        )  # fmt: skip

    def picture(self, *, sample: int = 0, head: int = 0, size: int = 512) -> Image.Image:
        """Draw the block map of one head as a PIL image: queries down, keys across.

        Full blocks are dark, partial blocks lighter, empty ones white. The longer side has at
        least ``size`` pixels, unless there are more blocks than that: then one pixel per block.
        """
        import numpy as np
        from PIL import Image

        samples, heads = self.pattern.shape
        if not (0 <= sample < max(samples, 1) and 0 <= head < max(heads, 1)):
            raise ValueError(
                f"sample {sample}, head {head}: this mask has {samples} sample(s) and {heads} "
                "separate head(s); choose an index below that (a shared mask has one of each)"
            )
        nq, nk = self.grid
        which = int(self.pattern[sample, head])
        row = _csr.row_of(self.csr)
        mine = row // nq == which
        canvas = torch.zeros(nq, nk, dtype=torch.int64, device="cpu")
        canvas[(row[mine] % nq).cpu(), self.col[mine].long().cpu()] = torch.where(
            self.tile[mine] < 0, 1, 2
        ).cpu()
        colours = np.array([[255, 255, 255], [31, 58, 95], [122, 162, 200]], dtype=np.uint8)
        image = Image.fromarray(colours[canvas.numpy()])
        zoom = max(1, math.ceil(size / max(nq, nk)))
        return image.resize((nk * zoom, nq * zoom), Image.Resampling.NEAREST)


def _block_pair(block: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(block) if isinstance(block, Sequence) else (block, block)
    if len(pair) != 2 or any(not isinstance(n, int) or n < 1 for n in pair):
        raise ValueError(f"block must be a positive int or a pair of them, got {block!r}")
    return pair[0], pair[1]


def _four_dims(mask: Tensor, name: str) -> Tensor:
    if mask.dtype != torch.bool:
        raise ValueError(
            f"{name} must be bool (True: attended), got {mask.dtype}; for an additive mask pass "
            "mask == 0"
        )
    if not 2 <= mask.ndim <= 4 or 0 in mask.shape:
        raise ValueError(
            f"{name} must be (queries, keys) with up to (batch, heads) in front and no empty "
            f"axis, got {tuple(mask.shape)}"
        )
    return mask[(None,) * (4 - mask.ndim)]


def _share(maps: Tensor, share: bool) -> tuple[Tensor, Tensor]:
    """Reduce (B, H, ...) maps to the distinct ones, flat, and the pattern (Bp, Hp) of each head."""
    batch, heads = maps.shape[:2]
    flat = maps.reshape(batch * heads, -1)
    if not share or batch * heads == 1:
        return flat, torch.arange(batch * heads, device=maps.device).view(batch, heads)
    first, classes = _csr.unique_rows(flat)
    return flat[first], classes.view(batch, heads)


def _sizes(index: Tensor, length: int, block: int) -> Tensor:
    return (length - index * block).clamp(max=block)


def _permutation(order: Tensor, length: int, name: str) -> Tensor:
    if order.shape != (length,) or order.is_floating_point():
        raise ValueError(
            f"{name} must be ({length},) integers, got {tuple(order.shape)} {order.dtype}"
        )
    order = order.long()
    if not torch.equal(order.sort().values, torch.arange(length, device=order.device)):
        raise ValueError(
            f"{name} must name every token from 0 to {length - 1} once; it has negative, too "
            "large or repeated indices"
        )
    return order


def _evaluate(
    mask_mod: Callable[..., Tensor], row: Tensor, col: Tensor, heads: int, nq: int,
    block: tuple[int, int], lengths: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Evaluate a FlexAttention ``mask_mod`` on some blocks: (n, bm, bn) bool, False past the ends."""
    (bm, bn), device = block, row.device
    head = row // nq
    q = (row % nq)[:, None, None] * bm + torch.arange(bm, device=device)[None, :, None]
    k = col[:, None, None] * bn + torch.arange(bn, device=device)[None, None, :]
    shape = (row.numel(), bm, bn)
    inside = (q < lengths[0]) & (k < lengths[1])
    if row.numel() == 0:
        return torch.zeros(shape, dtype=torch.bool, device=device)
    # Past the ends the function might index outside its tables, so it gets the last token there.
    flat = [
        t.expand(shape).reshape(-1)
        for t in (
            (head // heads)[:, None, None],
            (head % heads)[:, None, None],
            q.clamp(max=lengths[0] - 1),
            k.clamp(max=lengths[1] - 1),
        )
    ]
    return torch.vmap(mask_mod, chunk_size=1 << 20)(*flat).view(shape) & inside
