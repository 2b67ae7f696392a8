"""timm: SwinTransformer, SwinTransformerV2 (whole windows skip blocks) and VisionTransformerSAM (the tokens of
every window are merged)."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtr.compat.timm import SAMS, SWINS, classes
from vtr.core.wrapping import Bound
from vtr.errors import UnsupportedMethodError, UnsupportedModelError
from vtr.vision.windows import reasons
from vtr.vision.windows.sam import SamRunner
from vtr.vision.windows.swin import SwinRunner
from vtr.vision.windows.wrapping import WindowWrapping

FAMILIES = tuple(f"timm {name}" for name in (*SWINS, *SAMS))

_SWINS = classes(tuple(SWINS.values()))
_SAMS = classes(tuple(SAMS.values()))


class TimmSam(WindowWrapping):
    """A wrapped SAM encoder of timm."""

    def install(self) -> None:
        super().install()
        self.patch(self.root, "forward_intermediates", Bound(self, "refuse_intermediates"))

    def refuse_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse outputs of blocks, which hold merged tokens."""
        raise UnsupportedMethodError(
            "forward_intermediates of a timm VisionTransformerSAM gives outputs of blocks, which hold merged tokens: "
            "take the output of the model, or remove the method"
        )


def locate(target: Any) -> nn.Module | None:
    """The encoder in ``target``, if it is one of :data:`FAMILIES`."""
    known = isinstance(target, nn.Module) and isinstance(target, (*_SWINS, *_SAMS))
    return target if known else None


def wrap(root: Any) -> WindowWrapping:
    family = f"timm {type(root).__name__}"
    if isinstance(root, _SAMS):
        if any(block.attn.rope is not None for block in root.blocks):
            raise UnsupportedModelError(
                f"{family} has rotary positions that are computed for one grid: merged tokens have none"
            )
        side = max(block.window_size for block in root.blocks)
        if side < 1:
            raise UnsupportedModelError(f"{family} has no windows: its blocks see all tokens")
        last = len(root.blocks) - 1
        runners = [SamRunner(block, side, i == last) for i, block in enumerate(root.blocks)]
        return TimmSam(
            root,
            family,
            runners,
            signal="window_tokens",
            window=side,
            closed=reasons.closed(reasons.SAM),
        )
    v2 = isinstance(root, _SWINS[1])
    blocks = [SwinRunner(b, i, v2) for i, stage in enumerate(root.layers) for b in stage.blocks]
    return WindowWrapping(
        root, family, blocks, signal="whole_windows", closed=reasons.closed(reasons.SWIN)
    )
