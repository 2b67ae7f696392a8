"""transformers' video encoders: VideoMAE, ViViT and V-JEPA 2, over space-time tokens.

A token is a tube: a few frames of one patch. The grid is (frames, rows, columns) of tubes, and a
budget counts the tokens of the whole clip. Outputs are as those of image towers
(:mod:`vtr.vision.encoders.transformers`): block outputs have the tokens that are left, and
``output="restored"`` gives them their full length. Parts that read the whole grid always get it: V-JEPA 2's
predictor (pass ``skip_predictor=True`` if you do not need it), the masks that its caller gives, and a
VideoMAE classifier that reads the first token.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from vtr.compat.torch import in_backward
from vtr.compat.transformers import VIDEO_AROUND as AROUND
from vtr.compat.transformers import VIDEO_TOWERS as TOWERS
from vtr.compat.transformers import attention_implementation
from vtr.core.wrapping import Bound
from vtr.errors import UnsupportedMethodError, UnsupportedModelError
from vtr.vision.encoders.pooling import log_sizes
from vtr.vision.encoders.transformers import class_named, layer_runners
from vtr.vision.encoders.wrapping import EncoderWrapping

FAMILIES = tuple(f"transformers {name}" for name in TOWERS)

_REFUSED = {
    "VideoMAEForPreTraining": "it drops patches itself, and its decoder needs those that are left",
    "TimesformerModel": "its layers attend along time and along space in turn, over a full grid",
    "TimesformerForVideoClassification": "its layers attend along time and along space in turn, over a "
    "full grid",
}


class VideoWrapping(EncoderWrapping):
    """A wrapped transformers video encoder."""

    def __init__(self, root: Any) -> None:
        around = class_named(root, AROUND)
        attribute, self.use = ("", "") if around is None else AROUND[around]
        self.tower: Any = getattr(root, attribute) if attribute else root
        name = class_named(self.tower, TOWERS)
        assert name is not None
        path, prefix, self.pixels = TOWERS[name]
        if self.use == "mean" and root.fc_norm is None:
            self.use = "first"  # the classifier reads token 0, whatever became of it
        runners = layer_runners(self.tower, name, path, prefix)
        config = self.tower.config
        super().__init__(
            root,
            f"transformers {type(root).__name__}",
            runners,
            prefix=prefix,
            has_cls=prefix == 1,
            dim=config.hidden_size,
            heads=runners[0].heads,
            tokens=_tokens(config),
        )

    def grid(self, tokens: int) -> tuple[int, ...] | None:
        """(frames, rows, columns) of the call; None where the caller has masked tokens."""
        shape = self.session.shape
        return shape if shape is not None and math.prod(shape) == tokens else None

    def restores(self) -> bool:
        return self.use == "first" or super().restores()

    def install(self) -> None:
        super().install()
        self.hook(self.tower.register_forward_pre_hook(Bound(self, "look"), with_kwargs=True))
        root: Any = self.root
        if self.use == "mean":
            self.weigh_mean(self.tower, root.fc_norm)
        if self.use == "pooler":
            pooler = root.pooler
            parts = [(layer, layer.self_attn) for layer in pooler.self_attention_layers]
            last = pooler.cross_attention_layer
            for number, (layer, attention) in enumerate([*parts, (last, last.cross_attn)]):
                weigh = Bound(self, "weigh_keys", number, attention)
                self.hook(layer.register_forward_pre_hook(weigh, with_kwargs=True))

    # ---- the input --------------------------------------------------------------------------

    def look(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the grid of the call, and whether V-JEPA 2's predictor or masks need the full length."""
        given = inspect.signature(type(self.tower).forward).bind(self.tower, *args, **kwargs)
        named = dict(given.arguments)
        named.update(named.pop("kwargs", {}))
        pixels, config = named.get(self.pixels), self.tower.config
        self.session.shape = None
        if isinstance(pixels, Tensor) and pixels.dim() == 5:
            _, frames, _, height, width = pixels.shape
            tube, high, wide = _tube(config)
            if frames < tube:  # V-JEPA 2 repeats a single frame
                frames *= tube
            self.session.shape = (frames // tube, height // high, width // wide)
        whole = False
        if hasattr(self.tower, "predictor"):
            masks = named.get("context_mask") is not None or named.get("target_mask") is not None
            whole = masks or not named.get("skip_predictor", False)
        self.session.whole = whole

    def weigh_keys(
        self, number: int, attention: Any, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Log sizes for the keys of a layer of V-JEPA 2's pooler, which may run again in the backward pass."""
        keys, inputs = args[-1], self.session.passes.inputs
        again = not torch.compiler.is_compiling() and in_backward()
        bias: Tensor | None = inputs.find(keys, ("pooler", number)) if again else None
        if bias is None:
            sizes = self.session.pool_sizes(keys)
            if sizes is None:
                return None
            bias = log_sizes(sizes)[:, None, None, :].to(keys.dtype)
            if not torch.compiler.is_compiling() and (
                torch.is_grad_enabled() or keys.requires_grad
            ):
                inputs.note(keys, ("pooler", number), bias)
        implementation = attention_implementation(attention)
        if implementation != "sdpa":
            raise UnsupportedMethodError(
                f"the pooler of {type(self.root).__name__} cannot weigh merged or padded tokens with "
                f"the attention {implementation!r}, which takes no mask: call "
                "model.set_attn_implementation('sdpa')"
            )
        return args, {**kwargs, "attention_mask": bias.expand(-1, 1, args[0].shape[1], -1)}


def _tube(config: Any) -> tuple[int, int, int]:
    """Frames, rows and columns of pixels of one token."""
    tube = config.tubelet_size
    if isinstance(tube, (list, tuple)):  # ViViT
        return tube[0], tube[1], tube[2]
    patch = config.patch_size
    high, wide = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    return tube, high, wide


def _tokens(config: Any) -> int:
    """Tokens of a clip of the model's own size."""
    frames = getattr(config, "num_frames", None) or config.frames_per_clip
    side = getattr(config, "crop_size", None) or config.image_size
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    tube, high, wide = _tube(config)
    return (frames // tube) * (height // high) * (width // wide)


def locate(target: Any) -> nn.Module | None:
    """The module to wrap in ``target``: a video encoder, or the classifier around it.

    Raises:
        UnsupportedModelError: a video encoder that is known not to work, with the reason.
    """
    refused = class_named(target, _REFUSED)
    if refused is not None:
        raise UnsupportedModelError(
            f"transformers {refused} is not supported: {_REFUSED[refused]}. Supported: "
            f"{', '.join((*TOWERS, *AROUND))}"
        )
    if class_named(target, TOWERS) is not None or class_named(target, AROUND) is not None:
        return target
    return None


def wrap(root: Any) -> VideoWrapping:
    return VideoWrapping(root)
