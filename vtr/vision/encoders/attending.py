"""Methods that compute the attention of an encoder's block: the site that they are given, and what is noted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.core.encoder_attention import EncoderAttentionSite
from vtr.core.method import Method
from vtr.core.site import ModelInfo
from vtr.core.tokens import TokenMap
from vtr.core.wrapping import Entry
from vtr.errors import UnsupportedMethodError
from vtr.vision.encoders.attention import AttentionCall
from vtr.vision.encoders.blocks import BlockRunner, EncoderRun, pair_flops

if TYPE_CHECKING:
    from vtr.vision.encoders.session import EncoderSession

SIGNALS = frozenset({"qkv", "hidden", "patches"})


def open_attention(info: ModelInfo, runners: Sequence[BlockRunner]) -> None:
    """Give an encoder the site ``attention``, or the reason why it has none."""
    if all(runner.split for runner in runners):
        info.depth["attention"] = len(runners)
        info.signals["attention"] = SIGNALS
    else:
        info.closed["attention"] = (
            "its blocks are run whole, so that their attention cannot be reached"
        )


def check_attention(method: Method, info: ModelInfo) -> None:
    """Raise ``UnsupportedMethodError`` for a method that computes the attention of other models."""
    visits = {s.site for s in method.stages(info)}
    if "attention" in visits and "patches" not in method.requirements(info).get("attention", ()):
        raise UnsupportedMethodError(
            f"{method.name} computes the attention of other models: one for encoders reads the signal 'patches' "
            "of the site 'attention' (vtr.methods.base.EncoderAttentionMethod)"
        )


class Attending:
    """Computes the attention of one block in one call by a method.

    Args:
        x: (B, T, C), what enters the block.
        key_bias, policy: (B, T), as the block's probe has them.
    """

    def __init__(
        self, session: EncoderSession, run: EncoderRun, layer: int, entry: Entry, x: Tensor,
        key_bias: Tensor | None, policy: Tensor | None,
    ) -> None:  # fmt: skip
        self.session, self.run, self.layer, self.entry, self.x = session, run, layer, entry, x
        self.key_bias, self.policy = key_bias, policy

    def __call__(self, call: AttentionCall) -> Tensor:
        method: Any = self.entry.method
        out: Tensor = method.attend(self.site(call))
        if out.shape != call.q.shape or out.dtype != call.v.dtype:
            raise RuntimeError(
                f"{method.name}: attend() returned {out.dtype} {tuple(out.shape)}, and the attention of block "
                f"{self.layer} is {call.v.dtype} {tuple(call.q.shape)} (batch, heads, tokens, head dim)"
            )
        tokens = call.q.shape[2]
        self.run.trace.count("attention", self.layer, tokens, tokens)
        return out

    def site(self, call: AttentionCall) -> EncoderAttentionSite:
        """Make the site that the method is given."""
        session, run, entry, method = self.session, self.run, self.entry, self.entry.method
        now = run.map
        if now is None:
            now = TokenMap.identity(run.batch, run.tokens, self.x.device)
        notes = run.trace.notes.setdefault("attention", {})
        return EncoderAttentionSite(
            info=session.owner.info, hidden=self.x, prefix=run.prefix, grid=run.grid, map=now,
            bias=lambda: self.bias(call), policy=self.policy is not None, dropout=call.dropout,
            training=run.training, layer=self.layer, layers=len(session.runners),
            q=call.q, k=call.k, v=call.v,
            scale=call.q.shape[-1] ** -0.5 if call.scale is None else call.scale, dense=call.dense,
            memory=run.memory.setdefault(session.owner.entries.index(entry), {}),
            notes=notes.setdefault(self.layer, {}), table=entry.table_like(self.x),
            modules=entry.modules_like(self.x), backend=getattr(method, "backend", "auto"),
        )  # fmt: skip

    def bias(self, call: AttentionCall) -> Tensor | None:
        """Join all that is added to the logits: (B or 1, H or 1, T or 1, T) float32, -inf for keys that are not seen."""
        mask = call.mask
        if mask is not None:
            while mask.dim() < 4:
                mask = mask[None]
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -float("inf"))
            else:
                hidden = mask <= torch.finfo(mask.dtype).min  # of its own dtype, in transformers
                mask = mask.float().masked_fill(hidden, -float("inf"))
        if self.key_bias is None:
            return mask
        keys = self.key_bias[:, None, None, :]
        return keys if mask is None else mask + keys


def saved_flops(runner: BlockRunner, note: dict[str, Any], tokens: int) -> int:
    """FLOPs of one sample that a method has saved in the attention of a block of ``tokens`` tokens."""
    share = float(note.get("density", 1.0))
    return round(pair_flops(runner, tokens) * (1.0 - share) - float(note.get("flops", 0.0)))
