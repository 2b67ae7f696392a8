"""What a method may look at: a :class:`Site` shows one place of one model during one call.

Nothing is computed before a method asks. Attention is only ever computed for a few query rows, or
in chunks of rows: the N x N map is never materialised for a score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtr.tokens import TokenMap, take

QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class ModelInfo:
    """What a method may know of the model before a call.

    Attributes:
        family: name of the adapter's family, for messages.
        depth: number of layers per site, e.g. ``{"encoder": 12}``.
        signals: names of the signals per site.
        prefix: number of protected tokens in front (CLS, distillation, registers).
        has_cls: whether the first token is a class token.
        dim, heads: width and number of heads of the encoder (None where there is none).
        tokens: visual tokens per image at the model's own resolution, if fixed.
        extra: family-specific facts.
    """

    family: str
    depth: dict[str, int]
    signals: dict[str, frozenset[str]]
    prefix: int = 0
    has_cls: bool = False
    dim: int | None = None
    heads: int | None = None
    tokens: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Site:
    """One place of the model during one call. All tensors hold visual tokens only.

    Attributes:
        site, layer: where this is.
        info: the model.
        hidden: (B, N, C) hidden states of the visual tokens here (after the attention residual at
            the ``middle`` of an encoder block, the block's output at its ``end``).
        n, batch, device: sizes.
        map: TokenMap from the tokens of the model's input to the tokens here.
        size: (B, N) float32, how many input tokens each one stands for.
        valid: (B, N) bool or None (all), False for padding.
        grid: (height, width) of the model's input in tokens, or None.
        memory: a dict of this method's own for this call, shared by all its stages.
        training: whether the model is in training mode.
        modules: the learned modules of this method, or None.
        keys_of: (features (B, M, C) at the layer's input, their indices (B, M) in the model's input)
            -> keys (B, H, M, D) of this layer, for tokens that did not go through it; or None.
        notes: a dict that ends in ``trace.notes``.
        mask: () -> mask or bias that this layer's attention adds for the model's input, (B or 1, H or 1,
            T or 1, T) with T prefix and visual tokens, additive or bool (True is seen); or None.
    """

    def __init__(
        self,
        *,
        site: str,
        layer: int,
        info: ModelInfo,
        hidden: Tensor,
        map: TokenMap,
        memory: dict[str, Any],
        valid: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        qkv: Callable[[], QKV] | None = None,
        scale: float | None = None,
        prefix: int = 0,
        key_bias: Tensor | None = None,
        training: bool = False,
        modules: torch.nn.Module | None = None,
        keys_of: Callable[[Tensor, Tensor], Tensor] | None = None,
        notes: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
        mask: Callable[[], Tensor | None] | None = None,
    ) -> None:
        self.site = site
        self.layer = layer
        self.info = info
        self.hidden = hidden
        self.map = map
        self.memory = memory
        self.valid = valid
        self.grid = grid
        self.scale = scale
        self.prefix = prefix
        self.key_bias = key_bias
        self.training = training
        self.modules = modules
        self.keys_of = keys_of
        self.notes = {} if notes is None else notes
        self.extra = extra or {}
        self._make_qkv = qkv
        self._make_mask = mask
        self._qkv: QKV | None = None

    @property
    def n(self) -> int:
        return self.hidden.shape[1]

    @property
    def batch(self) -> int:
        return self.hidden.shape[0]

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def size(self) -> Tensor:
        return self.map.size

    @property
    def index(self) -> Tensor:
        """(B, N) int64: index of each token in the model's input (its representative's, if merged)."""
        return self.map.kept

    # ---- attention of this layer ------------------------------------------------------------

    @property
    def qkv(self) -> QKV:
        """q, k, v of the layer's attention, (B, H, prefix + N, D), after norms and rotary embedding."""
        if self._qkv is None:
            if self._make_qkv is None:
                raise RuntimeError(f"site {self.site}[{self.layer}] shows no q, k, v")
            self._qkv = self._make_qkv()
        return self._qkv

    @property
    def keys(self) -> Tensor:
        """(B, H, N, D) keys of the visual tokens."""
        return self.qkv[1][:, :, self.prefix :]

    @property
    def values(self) -> Tensor:
        """(B, H, N, D) values of the visual tokens."""
        return self.qkv[2][:, :, self.prefix :]

    def attention_from(self, queries: Tensor, mask: Tensor | None = None) -> Tensor:
        """Softmax rows of ``queries`` (B, H, R, D) over all keys: (B, H, R, prefix + N) float32.

        ``mask``: what the layer adds to these rows, from :meth:`mask_rows`.
        """
        from vtr.kernels import attention_rows

        bias, padding = self.key_bias, self.padding_bias
        if padding is not None:
            bias = padding if bias is None else bias + padding
        if mask is not None:
            bias = mask if bias is None else mask + bias[:, None, None]
        return attention_rows(queries, self.qkv[1], scale=self.scale, bias=bias)

    def mask_rows(self, rows: Tensor, index: Tensor | None = None) -> Tensor | None:
        """What the layer's attention adds to the logits of some rows: relative positions, or a mask of
        the caller's.

        Args:
            rows: (B, R) int64, the queries' places in the model's input, prefix included.
            index: (B, M) int64, visual tokens of the input as keys behind the prefix; None is those here.

        Returns:
            (B, H or 1, R, prefix + M) float32, -inf where a key is not seen; None where nothing is added.
        """
        mask = None if self._make_mask is None else self._make_mask()
        if mask is None:
            return None
        index = self.index if index is None else index
        head = torch.arange(self.prefix, device=self.device).expand(self.batch, -1)
        columns = torch.cat([head, index.clamp(min=0) + self.prefix], 1)[:, None, None]
        heads, places = mask.shape[1], mask.shape[3]
        mask = mask.expand(self.batch, -1, -1, -1)
        if mask.shape[2] > 1:
            picked = rows.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, places)
            mask = mask.gather(2, picked)
        mask = mask.gather(3, columns.expand(-1, heads, mask.shape[2], -1))
        if mask.dtype == torch.bool:
            hidden = ~mask
            mask = torch.zeros_like(mask, dtype=torch.float32)
        else:
            hidden = mask <= torch.finfo(mask.dtype).min  # of its own dtype, in transformers
        mask = mask.float().masked_fill(hidden, -float("inf"))
        return mask.expand(-1, -1, rows.shape[1], -1)

    @property
    def padding_bias(self) -> Tensor | None:
        """(B, prefix + N) float32, -inf for padding, or None where there is none."""
        if self.valid is None:
            return None
        mask = torch.zeros(self.batch, self.n, device=self.device).masked_fill(
            ~self.valid, -float("inf")
        )
        return torch.cat([mask.new_zeros(self.batch, self.prefix), mask], 1)

    def cls_attention(self, per_head: bool = False) -> Tensor:
        """Attention of the class token to the visual tokens, float32, (B, N) or (B, H, N).

        The row is normalised over all keys, the class token's own included (EViT, section 3.1 of
        arXiv 2202.07800); it is not normalised again. One row per head: O(N).
        """
        first = torch.zeros(self.batch, 1, dtype=torch.long, device=self.device)
        row = self.attention_from(self.qkv[0][:, :, :1], self.mask_rows(first))
        row = row[:, :, 0, self.prefix :]
        return row if per_head else row.mean(1)

    def attention_received(self, chunk: int | None = None) -> Tensor:
        """Mean attention that each visual token receives from the visual tokens, (B, N) float32.

        Exact; computed for ``chunk`` query rows of every sample at a time. None is 256, and fewer where
        there are more than 16 samples (the frames of a video): memory stays O(N) beside the model's.
        """
        chunk = chunk or min(256, max(16, 4096 // max(1, self.batch)))
        q = self.qkv[0][:, :, self.prefix :]
        total = torch.zeros(self.batch, self.n, device=self.device)
        number = (
            torch.full((self.batch, 1), float(self.n), device=self.device)
            if self.valid is None
            else self.valid.sum(1, keepdim=True).float()
        )
        for start in range(0, self.n, chunk):
            mask = self.mask_rows(self.index[:, start : start + chunk] + self.prefix)
            rows = self.attention_from(q[:, :, start : start + chunk], mask)
            rows = rows[..., self.prefix :].mean(1)
            if self.valid is not None:
                rows = rows * self.valid[:, start : start + chunk, None]
            total = total + rows.sum(1)
        return total / number.clamp(min=1)

    def pooling(self) -> tuple[Tensor, Tensor]:
        """What the pooling head of a tower makes of the visual tokens (SigLIP's probe).

        Returns:
            its attention to them, mean over heads, (B, N) float32, and its output (B, C).
        """
        if "pooling" not in self.extra:
            raise RuntimeError(f"the tower at site {self.site}[{self.layer}] has no pooling head")
        attention, pooled = self.extra["pooling"](self.hidden)
        return attention, pooled

    def value_norm(self) -> Tensor:
        """L2 norm of each token's value over the concatenated heads, (B, N) float32."""
        return torch.linalg.vector_norm(self.values.float(), dim=(1, 3))

    def key_mean(self) -> Tensor:
        """Keys averaged over heads, (B, N, D): ToMe's metric (arXiv 2210.09461, section 3)."""
        return self.keys.mean(1)


class View(NamedTuple):
    """A part of an image's tokens that is a grid, or several grids of the same size (tiles).

    The token at (row, column) is the ``start + row * stride + column``-th of the image's tokens; of
    tile t there come ``t * rows * stride`` before it.

    Attributes:
        name: for titles.
        grid: (rows, columns) of it, or of each tile.
        start, stride: where its tokens stand.
        tiles: number of tiles.
        raster: whether they show the whole image together, row by row of tiles. How many make a row is
            decided by processors from the image's size, and models are not told.
    """

    name: str
    grid: tuple[int, int]
    start: int
    stride: int
    tiles: int = 1
    raster: bool = True


class VisualSpan(NamedTuple):
    """One image or video of a prompt.

    Attributes:
        start, length: its span among the sample's visual tokens at the entry of the language model.
        kind: ``"image"`` or ``"video"``.
        frames: number of its frames; 1 for an image. What the model makes of several frames together
            counts as one (Qwen's temporal patches of two). 0 where the structure is not known.
        grid: (rows, columns) of each frame, None where it is no plain grid (packed crops).
        times: seconds of each frame in the video, where the model is told them; else None.
        views: for an image without a grid, parts of it that have one (its base crop, its crops put
            together, tiles, a thumbnail).
    """

    start: int
    length: int
    kind: str
    frames: int
    grid: tuple[int, int] | None
    times: tuple[float, ...] | None = None
    views: tuple[View, ...] = ()


class Frames(NamedTuple):
    """Where and when the visual tokens of a prompt are, as :class:`LanguageSite` explains.

    Attributes:
        frame, place, video: (B, N) int64 over the visual tokens at the entry of the language model.
        videos: per sample, its images and videos.
    """

    frame: Tensor
    place: Tensor
    video: Tensor
    videos: list[list[VisualSpan]]


class LanguageSite(Site):
    """A place of a vision-language model: ``prompt`` (entry of the language model) or ``decoder``.

    Everything that :class:`Site` says of visual tokens holds: ``hidden`` (B, N, C) are the visual
    tokens of each sample in the order of the prompt, padded at the end to the largest N, with
    ``valid`` where counts differ; ``map`` starts at the visual tokens of the prompt. ``qkv`` at a
    decoder site are those of the visual tokens (B, H, N, D), rotated, key heads repeated to H.

    Attributes:
        text: (B, T, C) hidden states of the text tokens here, padded at the end.
        text_valid: (B, T) bool, False for padding.
        text_after: (B, T) bool, text tokens that come after the sample's first visual token.
        images: per sample the images of the prompt, in order, as (start, length, grid): the span of
            the image among the sample's visual tokens at the entry of the language model, and its
            (rows, columns) or (frames, rows, columns) there, None where it is no plain grid.

    Where and when a token is (:attr:`frame`, :attr:`place`, :attr:`video`, :attr:`videos`) holds for
    the tokens here, also after earlier cuts; a merged token is where its representative is.
    """

    def __init__(
        self,
        *,
        text: Tensor,
        text_valid: Tensor,
        text_after: Tensor,
        images: list[list[tuple[int, int, tuple[int, ...] | None]]],
        frames: Callable[[], Frames],
        spread: Callable[[Tensor, float | None], Tensor],
        rows: Any,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.text = text
        self.text_valid = text_valid
        self.text_after = text_after
        self.images = images
        self._frames = frames
        self._spread = spread
        self._rows = rows

    @property
    def frame(self) -> Tensor:
        """(B, N) int64: the frame that each token belongs to, counted through the prompt in order.

        A still image is one frame. -1 for padding and for separators (newline tokens).
        """
        return self._here(self._frames().frame)

    @property
    def place(self) -> Tensor:
        """(B, N) int64: row * columns + column of each token in its frame's grid.

        -1 for padding, for separators, and where the frame is no plain grid (packed crops, tiles).
        """
        return self._here(self._frames().place)

    @property
    def video(self) -> Tensor:
        """(B, N) int64: the image or video of each token, an index into ``videos[b]``; -1 for padding.

        Separators belong to the image or video that they close.
        """
        return self._here(self._frames().video)

    @property
    def videos(self) -> list[list[VisualSpan]]:
        """Per sample the images and videos of the prompt, in order, as they were before any cut."""
        return self._frames().videos

    def _here(self, values: Tensor) -> Tensor:
        out = values.gather(1, self.index.clamp(min=0))
        return out if self.valid is None else out.masked_fill(~self.valid, -1)

    def spread(self, scores: Tensor, newline: float | None = None) -> Tensor:
        """Scores of the encoder's tokens at the visual tokens here.

        The scores take the way of the features: crops are put together, padding is cut off, a
        visual token made of several patches gets their mean.

        Args:
            scores: (crops, patches), without prefix tokens, in the order of the encoder's batch; or
                features (crops, patches, D), for which ``newline`` is given.
            newline: score of separator tokens, which no patch stands behind. None is the lowest
                score of the sample, so that they go first and a budget counts image content;
                ``inf`` keeps them always.

        Returns:
            (B, N) float32, or (B, N, D); padding is -inf.
        """
        if scores.dim() == 3 and newline is None:
            raise ValueError("spread needs newline= for features: what separator tokens get")
        out = take(self._spread(scores, newline), self.index.clamp(min=0))
        if self.valid is None:
            return out
        gone = ~self.valid if out.dim() == 2 else ~self.valid[..., None]
        return out.masked_fill(gone, -float("inf"))

    def attention_received(self, chunk: int | None = None) -> Tensor:
        """Mean attention that each visual token receives in this layer, (B, N) float32.

        Over heads, and over all tokens of the prompt as queries, text too; those before a token pay it
        none. Softmax over all keys that a query sees. Exact; ``chunk`` query rows at a time (64).
        """
        if self._rows is None:
            raise RuntimeError(f"site {self.site}[{self.layer}] shows no attention")
        return self._rows.received(chunk or 64)

    @property
    def last_text(self) -> Tensor:
        """(B, 1) int64: each sample's last text token, as an index into :attr:`text`."""
        return self.text_valid.sum(1, keepdim=True) - 1

    def attention_rows_from_text(self, rows: Tensor | None = None) -> Tensor:
        """Attention that text tokens pay to the visual tokens in this layer.

        Softmax over all keys that the row sees (text included), float32; computed from q and k of
        these rows only, under any attention backend and with grouped-query attention.

        Args:
            rows: (B, R) int64 indices into :attr:`text`, -1 for no row (which gives zeros); None is
                the last text token.

        Returns:
            (B, H, R, N); padding gets zeros.
        """
        return self._text_rows(rows)[1]

    def text_qkv(self, rows: Tensor | None = None) -> QKV:
        """q, k, v (B, H, R, D) of text tokens in this layer; ``rows`` as above."""
        return self._text_rows(rows)[0]

    def _text_rows(self, rows: Tensor | None) -> tuple[QKV, Tensor]:
        if self._rows is None:
            raise RuntimeError(f"site {self.site}[{self.layer}] shows no attention of the text")
        return self._rows(self.last_text if rows is None else rows)


class CacheSite(LanguageSite):
    """What a method sees of a cache. ``hidden`` is empty (B, N, 0): N are the visual tokens that are alive
    in the last layer after the prompt, and ``map`` leads to them from those of the prompt.

    Attributes:
        step: 0 after the prompt, then the number of the decoding step.
        kept: (B, K) int64, the tokens chosen last, indices into N, -1 for padding; None at step 0.
        state: a dict of the method's own that lives as long as the cache.

    :attr:`frame`, :attr:`place`, :attr:`video` and :attr:`videos` are known at step 0 only.
    """

    def __init__(
        self,
        *,
        step: int,
        kept: Tensor | None,
        state: dict[str, Any],
        newest: Callable[[], Tensor],
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.step, self.kept, self.state = step, kept, state
        self._newest = newest

    def newest_attention(self) -> Tensor:
        """Attention that the newest token pays to the N tokens in layer ``layer - 1``, which holds all
        of them: mean over heads, softmax over all that it sees, (B, N) float32; padding gets zeros."""
        return self._newest()
