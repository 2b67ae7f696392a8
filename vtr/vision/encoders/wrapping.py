"""The base of all encoder adapters: the parts around the blocks that they share.

An adapter gives one :class:`~vtr.vision.encoders.blocks.BlockRunner` per block and the facts of its model.
:class:`EncoderWrapping` runs methods in the blocks, gives outputs their length, weighs merged tokens in
the model's pooling, and counts FLOPs. Each adapter adds the peculiarities of its library.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtr.core.calibration import Fingerprint
from vtr.core.wrapping import Bound, Wrapping
from vtr.vision.encoders.attending import check_attention, open_attention
from vtr.vision.encoders.blocks import BlockRunner, place_forward
from vtr.vision.encoders.facts import encoder_info, square_grid
from vtr.vision.encoders.image import open_image
from vtr.vision.encoders.pooling import log_sizes, weighted_mean
from vtr.vision.encoders.session import EncoderSession


class EncoderWrapping(Wrapping):
    """A wrapped encoder whose blocks hold one sequence (batch, prefix + tokens, channels).

    Options of ``vtr.apply``:
        output: ``"reduced"`` (outputs have the tokens that are left) or ``"restored"`` (full length:
            merged tokens are copied back, dropped ones have the value they had last).

    Args:
        root: the module that is patched, and that users call.
        family: name for messages, such as ``"timm VisionTransformer"``.
        runners: one per block, in order.
        prefix: number of protected tokens in front of the visual ones (class token, registers).
        has_cls: whether the first of them is a class token.
        dim, heads: width and number of heads of the blocks, if all have the same.
        tokens: visual tokens of an image of the model's own size, if it has one.
        tower: the module that is given the images (B, C, H, W), if methods may look at their pixels.
        fixed_size: why the model takes no images of another size, empty if the adapter makes them
            smaller (:meth:`EncoderSession.shrink`), None if it makes no statement.

    Raises:
        UnsupportedModelError: one block is used at several depths.
    """

    options = {"output": "reduced"}

    def __init__(
        self,
        root: nn.Module,
        family: str,
        runners: Sequence[BlockRunner],
        *,
        prefix: int = 0,
        has_cls: bool = False,
        dim: int | None = None,
        heads: int | None = None,
        tokens: int | None = None,
        tower: nn.Module | None = None,
        fixed_size: str | None = None,
    ) -> None:
        info = encoder_info(
            family,
            runners,
            prefix=prefix,
            has_cls=has_cls,
            dim=dim,
            heads=heads,
            tokens=tokens,
            pixels=tower is not None,
        )
        open_attention(info, runners)
        if fixed_size is not None:
            open_image(info, fixed_size)
        super().__init__(root, info)
        self.session = EncoderSession(self, runners, prefix, self.grid, tower)

    def fingerprint(self) -> Fingerprint:
        """The identity of the encoder; its sizes are those of its blocks, because timm has no configuration."""
        info = self.info
        sizes = {
            "depth": info.depth["encoder"],
            "embed_dim": info.dim,
            "num_heads": info.heads,
            "tokens": info.tokens,
        }
        found = super().fingerprint()
        known = {name: size for name, size in sizes.items() if size is not None}
        return dataclasses.replace(found, sizes={**known, **found.sizes})

    # ---- for adapters to extend -------------------------------------------------------------

    def grid(self, tokens: int) -> tuple[int, ...] | None:
        """Rows and columns (of a video: frames, rows and columns) of the running call's ``tokens``; None
        if they are unknown. By default that of ``session.shape``, or a square."""
        shape = self.session.shape
        if shape is not None and math.prod(shape) == tokens:
            return shape
        return square_grid(tokens)

    def restores(self) -> bool:
        """Tell whether block outputs have full length in every call."""
        return any(e.options.get("output") == "restored" for e in self.active)

    def install(self) -> None:
        """Put the runners in place of the blocks. An adapter extends it with its pooling and its inputs."""
        self.session.install()
        self.session.restoring = self.restores()

    # ---- pooling: merged tokens count by their size ------------------------------------------

    def sizes(self, x: Tensor) -> Tensor | None:
        """(B, prefix + N) float32 weights of the tokens of x (B, prefix + N, C) in a pooling, or None if
        all count alike. A prefix token counts once."""
        sizes = self.session.pool_sizes(x)
        if sizes is None:
            return None
        return torch.cat([sizes.new_ones(sizes.shape[0], self.info.prefix), sizes], 1)

    def weighted_mean(self, x: Tensor) -> Tensor | None:
        """Mean (B, C) of the visual tokens of x (B, prefix + N, C), each counted as often as it was
        merged; None if the model's own mean is right."""
        sizes = self.session.pool_sizes(x)
        return None if sizes is None else weighted_mean(x[:, self.info.prefix :], sizes)

    def weigh_mean(self, sequence: nn.Module, head: nn.Module) -> None:
        """Weigh the mean over tokens that a model takes between two of its modules.

        Args:
            sequence: the module whose output, or its first item, is the sequence that is averaged.
            head: the module that is given the mean, as the last channels of its input.
        """
        self.hook(sequence.register_forward_hook(Bound(self, "take_mean")))
        self.hook(head.register_forward_pre_hook(Bound(self, "give_mean")))

    def take_mean(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self.session.mean = self.weighted_mean(output if isinstance(output, Tensor) else output[0])

    def give_mean(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.session.mean is None:
            return None
        mean, self.session.mean = self.session.mean, None
        given = args[0]
        return (torch.cat([given[:, : -mean.shape[1]], mean.to(given.dtype)], 1), *args[1:])

    def weigh_pooling(self, attention: nn.Module) -> None:
        """Weigh the keys of an ``nn.MultiheadAttention`` whose queries pool the sequence."""
        place_forward(self, attention, Bound(self, "pool_attention", attention))

    def pool_attention(
        self, attention: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
    ) -> Any:
        sizes = self.sizes(key)
        if sizes is not None:
            kwargs["key_padding_mask"] = log_sizes(sizes).to(query.dtype)
        return type(attention).forward(attention, query, key, value, **kwargs)

    # ---- the grid ---------------------------------------------------------------------------

    def note_grid(self, patches: nn.Module) -> None:
        """Take the grid of every call from a module's output (B, C, rows, columns), such as that of the
        convolution that makes patches. For images that are not square."""
        self.hook(patches.register_forward_hook(Bound(self, "take_grid")))

    def take_grid(self, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        self.session.shape = tuple(output.shape[2:])

    # ---- outputs that need every token -------------------------------------------------------

    def whole(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the model with block outputs of full length, because it makes grids of them."""
        self.session.whole = True
        try:
            return getattr(type(self.root), name)(self.root, *args, **kwargs)
        finally:
            self.session.whole = False

    # ---- options and costs -------------------------------------------------------------------

    def check(self, method: Any, options: dict[str, Any]) -> None:
        if options.get("output", "reduced") not in ("reduced", "restored"):
            raise ValueError(f"output must be 'reduced' or 'restored', got {options['output']!r}")
        super().check(method, options)
        check_attention(method, self.info)

    @property
    def identified(self) -> nn.Module:
        """The last block: fine-tuning changes it."""
        return self.session.runners[-1].block

    def costs(self) -> dict[str, Any] | None:
        return {"encoder": self.session.flops()} if self.trace.tokens else None
