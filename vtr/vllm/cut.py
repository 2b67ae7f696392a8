"""The cut of one picture's tokens, with the number of those that stay known before there are any.

Needs no vLLM: its classes stand in the modules beside this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtr.core.budget import count
from vtr.core.language_site import Frames, LanguageSite, VisualSpan
from vtr.core.method import Reduction
from vtr.core.site import ModelInfo, Site
from vtr.core.text import parse
from vtr.core.tokens import TokenMap
from vtr.errors import UnsupportedMethodError
from vtr.methods.common.scored import ScoredMethod

SETTING = "vtr"
"""Name of the configuration's attribute that holds the method in its text form."""

TOWER = frozenset({"hidden", "cls_attention", "attention_received", "keys", "queries", "values"})
"""Signals that the layers of a CLIP tower show."""


class Cut:
    """A method on the pictures of one served model.

    vLLM computes the features of a picture apart from the prompt, and keeps them for every prompt that has this
    picture: a cut sees one picture, no text, and no other picture.

    Attributes:
        method: what is applied.
        info: what the method may know of the model.
    """

    def __init__(self, method: ScoredMethod, info: ModelInfo) -> None:
        self.method = method
        self.info = info

    @property
    def looks(self) -> tuple[int, ...]:
        """0-based layers of the tower that the method looks at, ascending."""
        return tuple(sorted(self.method.looks(self.info)))

    def number(self, tokens: int) -> int:
        """Count what stays of a picture of ``tokens`` tokens; it depends on nothing else."""
        keep = self.method.keep
        return min(count(keep[0] if isinstance(keep, tuple) else keep, tokens), tokens)

    def choose(self, tokens: Tensor, grid: tuple[int, int], memory: dict[str, Any]) -> Tensor:
        """Choose the tokens of pictures of one size.

        Args:
            tokens: (B, N, C) what the language model would get, in raster order.
            grid: (rows, columns), of N tokens.
            memory: what :meth:`looking` stored of these pictures.

        Returns:
            (B, K) int64 indices, ascending; K is :meth:`number` of N.

        Raises:
            RuntimeError: the method keeps another number than was reserved.
        """
        batch, n = tokens.shape[:2]
        reduction: Reduction | None = self.method.reduce(
            _site(self.info, tokens.detach(), grid, memory)
        )
        if reduction is None or reduction.map is None:
            kept = torch.arange(n, device=tokens.device).expand(batch, n)
        else:
            kept = reduction.map.kept
        if kept.shape[1] != self.number(n):
            raise RuntimeError(
                f"{self.method.name} keeps {kept.shape[1]} of {n} tokens, but {self.number(n)} places were "
                "reserved in the prompt"
            )
        return kept

    @contextmanager
    def looking(self, layers: Sequence[nn.Module], heads: int) -> Iterator[dict[str, Any]]:
        """Let the method look at a CLIP tower that runs meanwhile; yields what it stores.

        Args:
            layers: of the tower, with ``self_attn.qkv_proj``, whose output (B, T, 3 C), or the first of a
                tuple, has the queries, keys and values of all heads one behind the other.
            heads: of the attention.

        Raises:
            RuntimeError: the tower ran more than once.
        """
        memory: dict[str, Any] = {}
        seen: set[int] = set()
        projected: dict[int, Tensor] = {}
        handles = []

        def keep(layer: int) -> Any:
            def hook(_: nn.Module, __: Any, out: Any) -> None:
                projected[layer] = out[0] if isinstance(out, tuple) else out

            return hook

        def look(layer: int) -> Any:
            def hook(_: nn.Module, __: Any, out: Any) -> None:
                if layer in seen:
                    raise RuntimeError("the vision tower ran twice for one batch of pictures")
                seen.add(layer)
                hidden = out[0] if isinstance(out, tuple) else out
                qkv = _heads(projected.pop(layer), heads)
                self.method.reduce(_tower_site(self.info, layer, hidden, qkv, memory))

            return hook

        for index in self.looks:
            projection: Any = layers[index].self_attn.qkv_proj  # type: ignore[union-attr]
            handles.append(projection.register_forward_hook(keep(index)))
            handles.append(layers[index].register_forward_hook(look(index)))
        try:
            yield memory
        finally:
            for handle in handles:
                handle.remove()


def cut_of(config: Any, family: str) -> Cut:
    """Make the cut that a model's configuration asks for.

    Args:
        config: transformers' configuration of the whole model, with the method's text form as its attribute
            ``vtr``.
        family: ``"llava"`` or ``"qwen2.5-vl"``.

    Raises:
        ValueError: the setting is missing or names no method.
        UnsupportedMethodError: the method needs what vLLM does not show.
    """
    text = getattr(config, SETTING, None)
    if not isinstance(text, str):
        raise ValueError(
            f"this architecture needs a method: give vLLM hf_overrides={{'{SETTING}': 'divprune:keep=64'}}, "
            f"got {text!r}"
        )
    method, info = parse(text), facts(config, family)
    if not isinstance(method, ScoredMethod) or "prompt" not in method.sites:
        raise UnsupportedMethodError(
            f"{text} does not work in vLLM: only methods work that keep the tokens of highest score at the "
            "entry of the language model, such as divprune, vtc-cls or fastervlm. Methods inside the language "
            "model or at its cache need another attention than vLLM's, and merged tokens are not supported"
        )
    if method.site_of(info) != "prompt":
        raise UnsupportedMethodError(
            f"{text} cuts at the site {method.site_of(info)}: give it site=prompt, or use a method of that site"
        )
    for site, wanted in method.requirements(info).items():
        shown = info.signals.get(site, frozenset())
        if not wanted <= shown:
            raise UnsupportedMethodError(
                f"{text} needs {', '.join(sorted(wanted - shown))} at the site {site}, which this model does "
                f"not show in vLLM. {_why(wanted - shown)}"
            )
    if not info.mrope and method.positions_at("prompt") != "compact":
        raise UnsupportedMethodError(
            f"{text} keeps the positions of the tokens that stay, but vLLM numbers the tokens of {family} one "
            "after the other: use a method with compact positions, such as divprune or vtc-cls"
        )
    return Cut(method, info)


def facts(config: Any, family: str) -> ModelInfo:
    """Collect what a method may know of a served model, from its configuration alone.

    Raises:
        UnsupportedMethodError: the model has a vision tower whose tokens are no plain grid (Pixtral).
    """
    if family == "qwen2.5-vl":
        return ModelInfo(
            "qwen2.5-vl (vLLM)", {"prompt": 1}, {"prompt": frozenset({"hidden"})}, mrope=True
        )
    vision, layer = config.vision_config, config.vision_feature_layer
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise UnsupportedMethodError(
            f"a LLaVA with a tower of type {vision.model_type} does not work in vLLM with vtr: its pictures "
            "have tokens at the ends of rows. Towers of CLIP and SigLIP work"
        )
    side = vision.image_size // vision.patch_size
    depth, signals = {"prompt": 1}, {"prompt": frozenset({"hidden"})}
    last = -1
    if vision.model_type == "clip_vision_model" and isinstance(layer, int):
        last = layer - 1 if layer >= 0 else vision.num_hidden_layers + layer
        depth["encoder"] = last + 1
        signals = {"prompt": frozenset({"hidden", "encoder_scores"}), "encoder": TOWER}
    return ModelInfo(
        "llava (vLLM)",
        depth,
        signals,
        prefix=1 if depth.get("encoder") else 0,
        has_cls="encoder" in depth,
        dim=vision.hidden_size,
        heads=vision.num_attention_heads,
        tokens=side * side,
        last_layer=last,
    )


def _why(missing: frozenset[str]) -> str:
    if "text" in missing:
        return (
            "The features of a picture are computed without its prompt, and shared by all prompts"
        )
    return "A tower of CLIP shows its attention; for others use a method that needs none, such as divprune"


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3 C) -> q, k, v, each (B, H, T, D)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    return q, k, v


def _tower_site(
    info: ModelInfo,
    layer: int,
    hidden: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    memory: dict[str, Any],
) -> Site:
    tokens = hidden[:, info.prefix :]
    return Site(
        site="encoder",
        layer=layer,
        info=info,
        hidden=tokens,
        front=hidden[:, : info.prefix],
        map=TokenMap.identity(tokens.shape[0], tokens.shape[1], tokens.device),
        memory=memory,
        qkv=lambda: qkv,
        scale=qkv[0].shape[-1] ** -0.5,
        prefix=info.prefix,
    )


def _site(
    info: ModelInfo, tokens: Tensor, grid: tuple[int, int], memory: dict[str, Any]
) -> LanguageSite:
    """Build the entry of the language model for pictures that each stand alone in a prompt without text."""
    batch, n = tokens.shape[:2]
    none = torch.zeros(batch, 0, dtype=torch.bool, device=tokens.device)
    zero = torch.zeros(batch, n, dtype=torch.long, device=tokens.device)

    def frames() -> Frames:
        place = torch.arange(n, device=tokens.device).expand(batch, n)
        span = VisualSpan(0, n, "image", 1, grid)
        return Frames(zero, place, zero, [[span] for _ in range(batch)])

    def spread(scores: Tensor, newline: float | None) -> Tensor:
        return scores.float()  # a token for each patch, and no separators

    return LanguageSite(
        site="prompt",
        layer=0,
        info=info,
        hidden=tokens,
        map=TokenMap.identity(batch, n, tokens.device),
        memory=memory,
        grid=grid,
        text=tokens[:, :0],
        text_valid=none,
        text_after=none,
        images=[[(0, n, grid)] for _ in range(batch)],
        entry=torch.full((batch,), n, dtype=torch.long, device=tokens.device),
        frames=frames,
        spread=spread,
        rows=None,
    )
