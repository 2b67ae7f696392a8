"""Runners of transformers' vision layers, one per layout of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtr.compat.tested import explain
from vtr.compat.transformers import (
    CHECKPOINTED,
    CLIP_LAYER,
    DINO_LAYER,
    DROPOUTS,
    OUTPUTS,
    QKV,
    QKV_NORMS,
    VIDEOMAE_MLP,
    VIT_LAYER,
    attention_function,
    attention_implementation,
    checkpoint_within,
)
from vtr.core.wrapping import Bound, Wrapping
from vtr.errors import UnsupportedMethodError, UnsupportedModelError
from vtr.vision.encoders.attention import AttentionCall, Probe
from vtr.vision.encoders.blocks import (
    BlockRunner,
    EncoderRun,
    linear_flops,
    narrow_bias,
    place_forward,
)


class LayerRunner(BlockRunner):
    """A pre-norm layer: x + branch1(attention(norm1(x))), then x + branch2(mlp(norm2(x))).

    The attention module's ``forward`` is patched too, so that it is still called as a module if a
    method looks inside: its hooks fire and ``output_attentions`` keeps working. The model's own
    attention implementation is called as long as no key has a weight; weighed keys go through SDPA
    (or the eager one with a mask, where the model is set to eager).
    """

    norm1 = norm2 = attention_name = ""
    #: the modules of the MLP
    mlp_names: tuple[str, ...] = ("mlp",)
    #: whether the eager attention function of this family adds the mask that it is given
    eager_takes_mask = True

    def __init__(self, block: nn.Module, prefix: int) -> None:
        super().__init__(block)
        self.prefix = prefix
        outer = getattr(block, self.attention_name)
        #: the module that makes q, k, v; before 5.23 DINOv2 nests it in the one with the projection
        inner = getattr(outer, "attention", None)
        self.core: Any = inner if hasattr(inner, "query") else outer
        self.names = next((n for n in QKV if all(hasattr(self.core, part) for part in n)), None)
        missing = [n for n in (self.norm1, self.norm2, *self.mlp_names) if not hasattr(block, n)]
        if self.names is None or missing:
            lacking = ", ".join(missing) or "q, k and v projections"
            raise UnsupportedModelError(
                explain("transformers", f"{type(block).__name__} has no {lacking}")
            )

    # ---- the two halves ---------------------------------------------------------------------

    def attend(self, x: Tensor, probe: Probe | None, kwargs: dict[str, Any]) -> Tensor:
        block: Any = self.block
        if probe is not None:
            kwargs = {**kwargs, "probe": probe}
        y = getattr(block, self.attention_name)(getattr(block, self.norm1)(x), **kwargs)
        return self.branch1(y[0] if isinstance(y, tuple) else y) + x

    def feed(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        block: Any = self.block
        return self.branch2(block.mlp(getattr(block, self.norm2)(x))) + x

    def branch1(self, y: Tensor) -> Tensor:
        return y

    def branch2(self, y: Tensor) -> Tensor:
        return y

    # ---- the attention ----------------------------------------------------------------------

    def attention(
        self, x: Tensor, *args: Any, probe: Probe | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The attention module's forward; with a probe its q, k, v are shown and its keys weighed."""
        core = self.core
        if probe is None:
            return type(core).forward(core, x, *args, **kwargs)
        mask = kwargs.pop("attention_mask", None)
        q, k, v = (self._heads(x, which) for which in range(3))
        q, k = self.turn(x, q, k, kwargs)
        implementation = attention_implementation(core)
        scale = getattr(core, "scaling", None) or core.scale
        dropout = _dropout(core) if core.training else 0.0
        eager_bias = implementation == "eager" and self.eager_takes_mask
        by_model = probe.policy is None and (probe.key_bias is None or eager_bias)
        weights: Tensor | None = None
        wide = mask
        if mask is not None and mask.dim() == 2:  # flash attention's (B, T) of valid keys
            wide = mask[:, None, None, :].bool()

        def dense() -> Tensor:
            nonlocal weights
            if not by_model:
                return probe.compute(q, k, v, wide, dropout, scale)
            added = mask
            if probe.key_bias is not None:
                bias = probe.key_bias[:, None, None, :].to(q.dtype)
                added = bias if mask is None else bias + _additive(mask, q.dtype)
            call = attention_function(core, implementation)
            out, weights = call(core, q, k, v, added, scaling=scale, dropout=dropout, **kwargs)
            return out.transpose(1, 2)

        call = AttentionCall(q, k, v, scale, wide, dropout, dense)
        out = probe.through(call).transpose(1, 2)
        out = out.reshape(x.shape[0], x.shape[1], -1).contiguous()
        for name in OUTPUTS:
            if hasattr(core, name):
                out = getattr(core, name)(out)
        return out, weights

    def turn(
        self, x: Tensor, q: Tensor, k: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """q and k (B, H, T, D) after the rotary embedding; takes its arguments out of ``kwargs``."""
        positions = kwargs.pop("position_embeddings", None)
        if positions is None:
            return q, k
        prefix = q.shape[2] - positions[0].shape[-2]
        return _rotate(q, positions, prefix), _rotate(k, positions, prefix)

    def _heads(self, x: Tensor, which: int) -> Tensor:
        """q, k or v (0, 1, 2) of x (B, T, C), after the norm over all heads if there is one."""
        core = self.core
        assert self.names is not None
        y = getattr(core, self.names[which])(x)
        norm = getattr(core, QKV_NORMS[which], None)
        y = y if norm is None else norm(y)
        size = getattr(core, "head_dim", None) or core.attention_head_size
        return y.view(x.shape[0], x.shape[1], -1, size).transpose(1, 2)

    def keys_of(self, x: Tensor, index: Tensor, kwargs: dict[str, Any]) -> Tensor:
        k = self._heads(getattr(self.block, self.norm1)(x), 1)
        positions = kwargs.get("position_embeddings")
        return k if positions is None else _rotate(k, _rows(positions, index), 0)

    # ---- what the session asks --------------------------------------------------------------

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) > 1 or "attention_mask" in kwargs:
            return super().named(args, kwargs)
        return {"attention_mask": args[0], **kwargs}

    def install(self, owner: Wrapping) -> None:
        place_forward(owner, self.core, Bound(self, "attention"))

    def checkpointed(self) -> bool:
        return bool(self.block.training and getattr(self.block, CHECKPOINTED, False))

    def checkpoints(self) -> Callable[..., Any] | None:
        return checkpoint_within(self.block) if torch.is_grad_enabled() else None

    def narrow(self, kwargs: dict[str, Any], run: EncoderRun) -> dict[str, Any]:
        if run.map is None:
            return kwargs
        kwargs = dict(kwargs)
        positions, mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")
        if positions is not None:
            kwargs["position_embeddings"] = run.narrowed(
                positions, lambda now: _rows(positions, now.kept)
            )
        if mask is not None:
            if _tensor(mask).dim() == 2:
                whole = run.map.with_prefix(self.prefix).kept.clamp(min=0)
                kwargs["attention_mask"] = mask.expand(run.batch, -1).gather(1, whole)
            else:
                kwargs["attention_mask"] = run.narrowed(
                    mask, lambda now: narrow_bias(mask, now, self.prefix)
                )
        return kwargs

    def mask(self, kwargs: dict[str, Any]) -> Tensor | None:
        mask = kwargs.get("attention_mask")
        if mask is None:
            return None
        mask = _tensor(mask)
        return mask if mask.dim() == 4 else mask[:, None, None, :].bool()

    def flops(self, before: int, after: int) -> int:
        block: Any = self.block
        attention = getattr(block, self.attention_name)
        assert self.names is not None
        width = getattr(self.core, self.names[0]).out_features
        return (
            before * linear_flops(attention)
            + 4 * before * before * width
            + after * sum(linear_flops(getattr(block, name)) for name in self.mlp_names)
        )

    @property
    def heads(self) -> int | None:
        return getattr(self.core, "num_heads", None) or getattr(
            self.core, "num_attention_heads", None
        )


class ClipLayer(LayerRunner):
    norm1, norm2, attention_name = CLIP_LAYER


class ViTLayer(LayerRunner):
    norm1, norm2, attention_name = VIT_LAYER

    def branch1(self, y: Tensor) -> Tensor:
        return self.block.dropout(y)  # type: ignore[operator]

    branch2 = branch1


class DinoLayer(LayerRunner):
    norm1, norm2, attention_name = DINO_LAYER

    def branch1(self, y: Tensor) -> Tensor:
        block: Any = self.block
        return block.drop_path(block.layer_scale1(y))

    def branch2(self, y: Tensor) -> Tensor:
        block: Any = self.block
        return block.drop_path(block.layer_scale2(y))


class VideoMAELayer(LayerRunner):
    norm1, norm2, attention_name = VIT_LAYER
    mlp_names = VIDEOMAE_MLP

    def feed(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        block: Any = self.block
        return block.output(block.intermediate(block.layernorm_after(x)), x)


class VJEPA2Layer(LayerRunner):
    """Rotary embedding by frame, row and column, from each token's number in the input."""

    norm1, norm2, attention_name = DINO_LAYER
    eager_takes_mask = False

    def branch1(self, y: Tensor) -> Tensor:
        return self.block.drop_path(y)  # type: ignore[operator]

    branch2 = branch1

    def turn(
        self, x: Tensor, q: Tensor, k: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        numbers = self.core.get_position_ids(x, masks=kwargs.pop("position_mask", None))
        return (
            self.core.apply_rotary_embeddings(q, numbers),
            self.core.apply_rotary_embeddings(k, numbers),
        )

    def keys_of(self, x: Tensor, index: Tensor, kwargs: dict[str, Any]) -> Tensor:
        k = self._heads(getattr(self.block, self.norm1)(x), 1)
        return self.core.apply_rotary_embeddings(
            k, self.core.get_position_ids(x, masks=index.clamp(min=0))
        )

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) > 1 or "position_mask" in kwargs:
            return BlockRunner.named(self, args, kwargs)
        return {"position_mask": args[0], **kwargs}

    def mask(self, kwargs: dict[str, Any]) -> Tensor | None:
        return None  # as in narrow: the attention is given no mask

    def narrow(self, kwargs: dict[str, Any], run: EncoderRun) -> dict[str, Any]:
        # The layer gives its attention the numbers of the tokens and nothing else.
        kwargs = {"position_mask": kwargs.get("position_mask")}
        if run.map is not None:
            kwargs["position_mask"] = run.map.kept.clamp(min=0)
        return kwargs

    def returned(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


class InternVLLayer(LayerRunner):
    norm1, norm2, attention_name = VIT_LAYER

    def branch1(self, y: Tensor) -> Tensor:
        return self.block.lambda_1 * y  # type: ignore[operator,return-value]

    def branch2(self, y: Tensor) -> Tensor:
        block: Any = self.block
        y = block.dropout(y)
        return y if block.lambda_2 is None else block.lambda_2 * y


#: layer class -> its runner
LAYERS: dict[str, type[LayerRunner]] = {
    "CLIPEncoderLayer": ClipLayer,
    "MetaClip2EncoderLayer": ClipLayer,
    "SiglipEncoderLayer": ClipLayer,
    "Siglip2EncoderLayer": ClipLayer,
    "ViTLayer": ViTLayer,
    "DeiTLayer": ViTLayer,
    "IJepaLayer": ViTLayer,
    "ViTMSNLayer": ViTLayer,
    "Dinov2Layer": DinoLayer,
    "Dinov2WithRegistersLayer": DinoLayer,
    "DINOv3ViTLayer": DinoLayer,
    "EomtLayer": DinoLayer,
    "EomtDinov3Layer": DinoLayer,
    "InternVLVisionLayer": InternVLLayer,
    "VideoMAELayer": VideoMAELayer,
    "VivitLayer": ViTLayer,
    "VJEPA2Layer": VJEPA2Layer,
}


def _rows(positions: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) rows (N, D) at ``index`` (B, M): (B, 1, M, D) each."""
    cos, sin = positions
    index = index.clamp(min=0)
    return cos[index][:, None], sin[index][:, None]


def _rotate(x: Tensor, positions: tuple[Tensor, Tensor], prefix: int) -> Tensor:
    """Rotary embedding of all but the first ``prefix`` tokens of x (B, H, T, D), halves paired."""
    cos, sin = positions
    head, rest = x[:, :, :prefix], x[:, :, prefix:]
    half = rest.shape[-1] // 2
    turned = torch.cat([-rest[..., half:], rest[..., :half]], -1)
    return torch.cat([head, rest * cos + turned * sin], 2)


def _tensor(mask: Any) -> Tensor:
    if not isinstance(mask, Tensor):
        raise UnsupportedMethodError(
            f"an attention mask of type {type(mask).__name__} cannot follow the tokens that are left: "
            "call model.set_attn_implementation('sdpa')"
        )
    return mask


def _dropout(core: Any) -> float:
    for name in DROPOUTS:
        value = getattr(core, name, None)
        if isinstance(value, (int, float)):
            return float(value)
    return 0.0


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -float("inf"))
