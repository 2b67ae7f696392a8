"""The sites of a diffusion transformer, for methods: one attention call, or the input of one block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtr.core.attention_site import AttentionSite
from vtr.kernels import BlockMask, block_sparse_attention
from vtr.kernels.density import density
from vtr.kernels.keys import without_keys


@dataclass
class CallFacts:
    """Facts of one forward call of the transformer, the same for all its layers.

    Attributes:
        run: 0-based number of the generation since ``vtr.apply``. Rises when a new one starts.
        step: 0-based denoising step of this run.
        steps: denoising steps of this run, or None if their number is not known.
        timestep: what the scheduler gave, the largest of the batch (tokens of a condition have 0).
        branch: which call of the step this is: the name that the pipeline gives it (``"cond"``,
            ``"uncond"``, ``"cond_uncond"``), else its number in the step (``"0"``, ``"1"``).
        grid: (frames, height, width) in tokens; frames is 1 for an image.
        text_first: whether the text is before the image or video in the joint sequence.
        text_valid: (B, T) bool, False for padding of the text in the joint sequence; None if all
            of it is seen or the text is in cross attention.
        extra: tokens on the other side of the grid than the text (reference images of another size,
            frames of history). For methods they are part of the text, at its outer end.
        training: whether the transformer is in training mode: timesteps are random then, each call
            is a new run, and no step is dense for being early.
        expert: 0-based number of the transformer in its pipeline (Wan 2.2 has two).
        expert_step: 0-based step of this run counted from the first that this transformer had.
    """

    run: int
    step: int
    steps: int | None
    timestep: float
    branch: str
    grid: tuple[int, int, int]
    text_first: bool = False
    text_valid: Tensor | None = None
    extra: int = 0
    training: bool = False
    expert: int = 0
    expert_step: int = 0


class _InCall:
    """Shows the facts of its call as attributes."""

    call: CallFacts

    def __getattr__(self, name: str) -> Any:
        # Only reached for what the site itself lacks.
        if name == "call":
            raise AttributeError(name)
        return getattr(self.call, name)


class DiffusionAttentionSite(_InCall, AttentionSite):
    """One self- or joint-attention call of one layer of a diffusion transformer.

    Everything of :class:`CallFacts` (``run``, ``step``, ``steps``, ``timestep``, ``branch``, ``grid``,
    ``text_first``, ``text_valid``, ``training``, ``expert``, ``expert_step``) is an attribute here too.

    Attributes:
        layer, layers: 0-based number of the layer and how many there are (dual-stream blocks first,
            then single-stream blocks).
        q, k, v: (B, H, S, D) after norms and rotary embedding, in the model's own token order:
            S = frames * height * width + text, image or video tokens in raster order, frame by
            frame. k and v may have fewer heads. Views, not contiguous if the model has
            (B, S, H, D).
        text: text tokens in the joint sequence, 0 if the text is in cross attention. They are
            first if ``text_first``, else last. Reference images of another size and frames of history
            count as text.
        first_head, all_heads: number of the first head here, and of the heads of the layer. Under context
            parallelism each process has some of them.
        scale: factor of the scores.
        state: dict of this (method, transformer, branch, layer) for one run; empty when a run starts,
            and when the number of samples changes.
        shared: dict of this (method, transformer) that lives across runs, for masks.
        memory: dict of this method for one forward call, shared by all its layers.
        notes: dict that ends in ``trace.notes["attention"][layer]``: ``density`` of the mask used
            last, and ``work``, what was computed over what one dense call computes.
        modules: the learned modules of this method, or None.
        hidden: (B, N, C), what enters the attention module (after the block's norm) of the image or
            video tokens in raster order; None unless the method needs ``hidden``.
    """

    run: int
    step: int
    steps: int | None
    timestep: float
    branch: str
    grid: tuple[int, int, int]
    text_first: bool
    training: bool
    expert: int
    expert_step: int

    def __init__(
        self,
        *,
        call: CallFacts,
        shared: dict[Any, Any],
        hidden: Tensor | None = None,
        **common: Any,
    ) -> None:
        self.call = call
        super().__init__(**common)
        self.text = self.k.shape[2] - self.tokens
        if hidden is not None and hidden.shape[1] != self.tokens:
            hidden = hidden[:, self.first : self.first + self.tokens]
        self.hidden = hidden
        valid = call.text_valid
        self.text_valid = valid if valid is not None and self.text else None
        self.first_head, self.all_heads = 0, self.q.shape[1]
        self.shared = shared

    @property
    def tokens(self) -> int:
        """Image or video tokens: frames * height * width."""
        frames, height, width = self.call.grid
        return frames * height * width

    @property
    def first(self) -> int:
        """Index of the first image or video token in the sequence."""
        return self.text if self.call.text_first else 0

    @property
    def valid_mask(self) -> Tensor:
        """(B, S) bool, False for padding of the text in the joint sequence."""
        text = self.text_valid
        rest = torch.ones(self.q.shape[0], self.tokens, dtype=torch.bool, device=self.q.device)
        if text is None:
            text = rest.new_ones(self.q.shape[0], self.text)
        return torch.cat([text, rest] if self.call.text_first else [rest, text], 1)

    def dense(self, return_lse: bool = False) -> Any:
        """Compute what the unwrapped model does, (B, H, S, D): the same call on the same layout.

        With ``return_lse`` also the natural log-sum-exp of each row's scaled scores, (B, H, S)
        float32; the output then comes from the sparse kernel under a full mask and may differ from
        the other by rounding. Padding of text is never seen in either.
        """
        if not return_lse:
            self.count(1.0)
            return self._dense()

        def make() -> BlockMask:
            rows, columns = self.q.shape[2], self.k.shape[2]
            blocks = torch.ones(-(-rows // 128), -(-columns // 128), dtype=torch.bool, device="cpu")
            return BlockMask.from_blocks(blocks, q_len=rows, k_len=columns).to(self.q.device)

        full: BlockMask = self.for_size("vtr.full", make)
        return self._attend(full, None, True)

    def sparse(
        self,
        mask: BlockMask,
        row_scale: Tensor | None = None,
        return_lse: bool = False,
        **more: Any,
    ) -> Any:
        """Attention over what ``mask`` keeps, less the padding of text, which nobody sees.

        Args:
            mask: of S x S tokens in the model's order, on any device.
            row_scale: (B, H, S) factor of the output rows.
            return_lse: also return the LSE, (B, H, S) float32.
            more: other arguments of :func:`vtr.kernels.block_sparse_attention` (``added``).

        Returns:
            (B, H, S, D), or with the LSE a pair. A row that sees nothing is zero (LSE -inf).

        Raises:
            TypeError: it is no BlockMask.
            ValueError: the mask is for another number of tokens; the message has both.
        """
        length = self.q.shape[2]
        if not isinstance(mask, BlockMask):
            raise TypeError(
                f"site.sparse takes a BlockMask, got {type(mask).__name__}: "
                "BlockMask.from_dense(mask, block=...) makes one of a bool tensor, and the functions "
                "of vtr.kernels.masks build them for long sequences"
            )
        if (mask.q_len, mask.k_len) != (length, self.k.shape[2]):
            frames, height, width = self.call.grid
            raise ValueError(
                f"the mask is for {mask.q_len} x {mask.k_len} tokens, attention layer {self.layer} "
                f"has {length}: {frames} x {height} x {width} of the image or video and {self.text} "
                "of text. A method whose mask follows from the grid derives from MaskedAttention and "
                "writes grid_mask(grid): the base adds the text"
            )
        return self._attend(mask, row_scale, return_lse, **more)

    def for_size(self, key: object, make: Callable[[], Any]) -> Any:
        """Return ``make()``, called once per ``key``, grid, place and number of text tokens, and device.

        What belongs to the sizes of this run and, up to sixteen in all, of runs before is kept: in
        some families the text is as long as its prompt, so that a size may never come again.
        """
        held: dict[Any, tuple[int, dict[Any, Any]]] = self.shared.setdefault("vtr.size", {})
        call = self.call
        size = (call.grid, self.text, call.text_first, self.k.shape[2], str(self.q.device))
        of_size = held.pop(size, (call.run, {}))[1]
        held[size] = (call.run, of_size)  # before ``make``, which may raise, or ask in its turn
        if key not in of_size:
            # Training may come next, which cannot save tensors of inference mode.
            with torch.inference_mode(False):
                of_size[key] = make()
        for old in list(held)[: max(0, len(held) - 16)]:
            if held[old][0] != call.run:
                del held[old]
        return of_size[key]

    def for_text(self, key: object, make: Callable[[], Any]) -> Any:
        """Return ``make()``, called once per ``key`` and padding of the text; the last sixteen are kept."""
        held: dict[Any, Any] = self.shared.setdefault("vtr.text", {})
        full = (key, id(self.text_valid))
        found = held.pop(full, None)
        if found is None or found[0] is not self.text_valid:
            with torch.inference_mode(False):
                found = (self.text_valid, make())
        held[full] = found
        if len(held) > 16:
            del held[next(iter(held))]
        return found[1]

    def _local(self, mask: BlockMask) -> BlockMask:
        """The mask on the device of q and without the padding of text."""
        valid, device = self.text_valid, self.q.device
        if valid is None and mask.device == device:
            return mask

        def make() -> tuple[BlockMask, BlockMask]:
            here = mask.to(device)
            return mask, here if valid is None else without_keys(here, self.valid_mask)

        # The mask is kept beside the result: its number may be another's once it is gone.
        made: BlockMask = self.for_text(("vtr.local", int(mask.ident), str(device)), make)[1]
        return made

    def _attend(
        self, mask: BlockMask, row_scale: Tensor | None, return_lse: bool, **more: Any
    ) -> Any:
        mask = self._local(mask)
        out = block_sparse_attention(
            self.q, self.k, self.v, mask, scale=self.scale, row_scale=row_scale,
            return_lse=return_lse, backend=self.backend, **more,
        )  # fmt: skip
        self.count(density(mask))
        return out

    def count(self, share: Any) -> None:
        """Note an attention over ``share`` of the pairs (float or 0-dim tensor); :meth:`dense` and
        :meth:`sparse` do it themselves."""
        self.notes["density"] = share
        self.notes["work"] = self.notes.get("work", 0.0) + share


class BlockSite(_InCall):
    """The input of one block, before anything in it is computed.

    Everything of :class:`CallFacts` (``run``, ``step``, ``steps``, ``timestep``, ``branch``, ``grid``,
    ``training``, ``expert``, ``expert_step``) is an attribute here too.

    Attributes:
        site: ``"block"``.
        layer, layers: 0-based number of the block and how many there are.
        hidden: (B, N, C) hidden states of the image or video tokens, in raster order, frame by frame.
        state: dict of this (method, transformer, branch, block) for one run; as above.
        shared: dict of this (method, transformer) that lives across runs.
        memory: dict of this method for one forward call.
        notes: dict that ends in ``trace.notes["block"][layer]``.
    """

    site = "block"

    def __init__(
        self, *, call: CallFacts, layer: int, layers: int, hidden: Tensor, state: dict[str, Any],
        shared: dict[Any, Any], memory: dict[str, Any], notes: dict[str, Any],
    ) -> None:  # fmt: skip
        self.call = call
        self.layer, self.layers, self.hidden = layer, layers, hidden
        self.state, self.shared, self.memory, self.notes = state, shared, memory, notes
