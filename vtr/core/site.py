"""The view of a method: a :class:`Site` shows one place of one model during one call.

Nothing is computed before a method asks. Attention is only ever computed for a few query rows, or
in chunks of rows: the N x N map is never materialised for a score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtr.core.budget import Keep, spread
from vtr.core.tokens import TokenMap

QKV = tuple[Tensor, Tensor, Tensor]

_ATTENTION = frozenset({"queries", "keys", "values", "attention_received"})

SIGNALS: dict[str, frozenset[str]] = {
    "image": frozenset({"hidden"}),
    "pixels": frozenset({"hidden"}),
    "encoder": _ATTENTION
    | {"hidden", "pixels", "cls_attention", "head_outputs", "keys_of", "pooling"},
    "detector": frozenset({"hidden", "class_logits", "sampling"}),
    "windows": frozenset({"hidden", "whole_windows", "window_tokens"}),
    "prompt": frozenset({"hidden", "text", "encoder_scores"}),
    "decoder": _ATTENTION | {"hidden", "text", "text_attention", "encoder_scores"},
    "attention": frozenset({"qkv", "denoising", "frames", "prompt", "patches", "hidden"}),
    "kv": frozenset({"entries", "hidden"}),
    "block": frozenset({"hidden"}),
    "logits": frozenset({"hidden", "encoder_scores"}),
}
"""The signals of each site; a model shows those in ``info.signals``, and a method asks for them in ``needs``.

``hidden``: the hidden states (at ``pixels``: the pixels of each token; of an attention call: those that enter its
layer; of a KV cache: those that enter the attention module). ``pixels``: :attr:`Site.pixels`. ``queries``, ``keys``, ``values``, ``qkv``: those of
the layer's attention. ``cls_attention``, ``attention_received``, ``pooling``: the methods of :class:`Site` of these
names. ``head_outputs``: :attr:`Site.head_outputs`. ``keys_of``: :attr:`Site.keys_of`. ``text``: the hidden states of the text. ``text_attention``: attention
of text to visual tokens. ``encoder_scores``: :meth:`LanguageSite.spread` works. ``frames``: the tokens have a time axis of several frames. ``denoising``: the attention is
that of a diffusion transformer, in steps. ``prompt``: it is that of a language model, whose text and visual tokens
are told apart. ``patches``: it is that of a vision encoder, over its protected and its visual tokens.
``class_logits``: :meth:`DetectorSite.class_logits` works. ``sampling``: the decoder's cross-attention
samples the tokens of the encoder at points, which training calls record. ``entries``: keys and values of each KV head, which may be dropped, merged or stored with fewer
bits.
``whole_windows``: whole windows may skip a block. ``window_tokens``: the tokens of every window may be merged.
"""


def rows_at_once(batch: int) -> int:
    """Choose the number of query rows of every sample that are computed at a time.

    256, and fewer with more than 16 samples (the frames of a video), so that the rows of all samples
    together are 4096 at most, or one of each sample.
    """
    return min(256, max(1, 4096 // max(1, batch)))


class LanguageSizes(NamedTuple):
    """Sizes of a language model: channels, query heads, key heads, and channels per head."""

    dim: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class ModelInfo:
    """The facts of a model that a method may know before a call.

    Attributes:
        family: name of the adapter's family, for messages.
        depth: number of layers per site, e.g. ``{"encoder": 12}``.
        signals: names of the signals per site.
        prefix: number of protected tokens in front (CLS, distillation, registers).
        has_cls: whether the first token is a class token.
        dim, heads: width of the hidden states and number of heads of the encoder, or of a diffusion
            transformer (None without either).
        tokens: visual tokens per image at the model's own resolution, if fixed.
        last_layer: 0-based encoder layer whose output the model uses (the projector's input in a
            vision-language model); by default the last one.
        tower_cuts: whether the encoder can be cut, not only looked into.
        decoder_middle: whether layers of the language model open between attention and MLP.
        mrope: whether the language model's positions are two-dimensional, and so are always kept.
        language: sizes of the language model, None without one.
        experts: number of a diffusion pipeline's transformers.
        head_dim: channels per head of a diffusion transformer.
        levels: feature levels whose tokens the encoder of a detector holds (0 without one).
        stage_depths: blocks of each stage of a windowed encoder, in order.
        window: side of its windows in tokens, if all have the same.
        downsample: for each block of a UNet, rows of the latents for one row of its grid of tokens (1, 2,
            4...); empty for models with one grid.
        closed: sites that methods cannot use in this model, with the reason.
    """

    family: str
    depth: dict[str, int]
    signals: dict[str, frozenset[str]]
    prefix: int = 0
    has_cls: bool = False
    dim: int | None = None
    heads: int | None = None
    tokens: int | None = None
    last_layer: int = -1
    tower_cuts: bool = True
    decoder_middle: bool = False
    mrope: bool = False
    language: LanguageSizes | None = None
    experts: int = 1
    head_dim: int | None = None
    levels: int = 0
    stage_depths: tuple[int, ...] = ()
    window: int | None = None
    downsample: tuple[int, ...] = ()
    closed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.last_layer < 0:
            object.__setattr__(self, "last_layer", self.depth.get("encoder", 0) - 1)


class Site:
    """One place of the model during one call. All tensors hold visual tokens only.

    Attributes:
        site, layer: the place in the model.
        info: the model.
        hidden: (B, N, C) hidden states of the visual tokens here (after the attention residual at
            the ``middle`` of an encoder block, the block's output at its ``end``; C is 0 at the site
            ``image``, which has no features yet; the pixels of each token at ``pixels``, the channels one behind
            the other).
        front: (B, prefix, C) hidden states of the protected tokens in front of them (class token, registers)
            in an encoder, else None. A method that computes new ones returns them as ``Reduction.front``.
        n, batch, device: sizes.
        map: TokenMap from the tokens of the model's input to the tokens here.
        size: (B, N) float32, number of input tokens in each one.
        mass: (B, N) float32, by how much each one counts as a key and in a pooling if sizes count: the size, or
            what a method gave in its place (:attr:`vtr.Reduction.mass`).
        valid: (B, N) bool or None (all), False for padding.
        grid: (height, width) of the model's input in tokens, or None.
        memory: this method's own dict for this call, shared by all its stages.
        training: whether the model is in training mode.
        modules: the learned modules of this method, or None.
        keys_of: (features (B, M, C) at the layer's input, their indices (B, M) in the model's input)
            -> keys (B, H, M, D) of this layer, for tokens that did not go through it; or None.
        notes: a dict that ends in ``trace.notes``.
        pixels: (B, 3, height, width), the images as the encoder is given them, for methods that need the
            signal ``pixels``; else None.
        crops: in a vision tower the number of rows of the batch that each image (its crops) or video (its
            frames) has, in order; else None.
        cls: place of the class token among the protected tokens.
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
        pixels: Tensor | None = None,
        crops: list[int] | None = None,
        pool: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        mask: Callable[[], Tensor | None] | None = None,
        outputs: Callable[[], Tensor] | None = None,
        front: Tensor | None = None,
        cls: int = 0,
        mass: Tensor | None = None,
    ) -> None:
        self.site = site
        self.layer = layer
        self.info = info
        self.hidden = hidden
        self.front = front
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
        self.pixels = pixels
        self.crops = crops
        self.mass = map.size if mass is None else mass
        self._pool = pool
        self._make_qkv = qkv
        self._make_mask = mask
        self._make_outputs = outputs
        self.cls = cls
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
    def valid_mask(self) -> Tensor:
        """(B, N) bool: :attr:`valid` with None written out."""
        if self.valid is not None:
            return self.valid
        return torch.ones(self.batch, self.n, dtype=torch.bool, device=self.device)

    @property
    def counts(self) -> Tensor:
        """(B,) int64: the tokens of each sample here, without padding."""
        if self.valid is None:
            return torch.full((self.batch,), self.n, dtype=torch.long, device=self.device)
        return self.valid.sum(1)

    def budget(
        self, keep: Keep | tuple[Keep, ...], stage: int = 0, stages: int = 1
    ) -> int | Tensor:
        """Count the tokens that a budget leaves at stage number ``stage`` of ``stages``.

        Args:
            keep: one budget per stage, all of the tokens at the model's input, or one for the last
                stage, reached by one ratio per stage.

        Returns:
            One number for all samples, or (B,) int64 if the samples have separate budgets.
        """
        return min(spread(keep, stages, self.map.n_in)[stage], self.n)

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

    @property
    def head_outputs(self) -> Tensor:
        """(B, H, N, D), what each head of the layer's attention returns for the visual tokens, before the
        projection that joins the heads."""
        if self._make_outputs is None:
            raise RuntimeError(f"site {self.site}[{self.layer}] shows no outputs of heads")
        return self._make_outputs()[:, :, self.prefix :]

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
        """Return what the layer's attention adds to the logits of some rows: relative positions, or the
        caller's mask.

        Args:
            rows: (B, R) int64, the queries' places in the model's input, prefix included.
            index: (B, M) int64, visual tokens of the input as keys behind the prefix; None is those here.

        Returns:
            (B, H or 1, R, prefix + M) float32, -inf for a key that is not seen; None if nothing is added.
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
        """Return (B, prefix + N) float32, -inf for padding, or None without padding."""
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
        first = torch.full((self.batch, 1), self.cls, device=self.device)
        query = self.qkv[0][:, :, self.cls : self.cls + 1]
        row = self.attention_from(query, self.mask_rows(first))
        row = row[:, :, 0, self.prefix :]
        return row if per_head else row.mean(1)

    def attention_received(self, chunk: int | None = None) -> Tensor:
        """Mean attention that each visual token receives from the visual tokens, (B, N) float32.

        Exact; computed for ``chunk`` query rows of every sample at a time. None is :func:`rows_at_once`:
        memory stays O(N) beside the model's.
        """
        chunk = chunk or rows_at_once(self.batch)
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
        """Run the pooling head of a tower on the visual tokens (SigLIP's probe).

        Returns:
            its attention to them, mean over heads, (B, N) float32, and its output (B, C).
        """
        if self._pool is None:
            raise RuntimeError(f"the tower at site {self.site}[{self.layer}] has no pooling head")
        return self._pool(self.hidden)

    def value_norm(self) -> Tensor:
        """L2 norm of each token's value over the concatenated heads, (B, N) float32."""
        return torch.linalg.vector_norm(self.values.float(), dim=(1, 3))

    def key_mean(self) -> Tensor:
        """Keys averaged over heads, (B, N, D): ToMe's metric (arXiv 2210.09461, section 3)."""
        return self.keys.mean(1)
