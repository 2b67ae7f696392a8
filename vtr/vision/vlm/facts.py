"""Facts of a vision-language model that methods may know before a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vtr.compat.transformers import (
    FULL,
    MODALITIES,
    SLIDING,
    cannot_ask,
    layer_config,
    writes_otherwise,
)
from vtr.core.site import SIGNALS, LanguageSizes, ModelInfo
from vtr.errors import UnsupportedModelError
from vtr.vision.encoders.facts import encoder_info, square_grid
from vtr.vision.encoders.image import open_image
from vtr.vision.encoders.pooling import has_pooling
from vtr.vision.vlm.attention import has_halves
from vtr.vision.vlm.generic import Generic
from vtr.vision.vlm.packed import PackedSession, form_of, packed_info
from vtr.vision.vlm.pixels import open_pixels
from vtr.vision.vlm.tower import TowerSession

if TYPE_CHECKING:
    from vtr.vision.vlm.wrapping import VLMWrapping

TOWER_FACTS = ("prefix", "has_cls", "dim", "heads", "tokens")


def vlm_info(owner: VLMWrapping) -> ModelInfo:
    """The facts of a model; opens its towers, which are kept in ``owner.towers``."""
    config = owner.lm.config
    layers = len(owner.layers)
    depth = {"prompt": 1, "decoder": layers}
    look = frozenset({"hidden", "text"})
    decoder = look
    if not owner.closed:
        decoder = look | {"queries", "keys", "values", "text_attention", "attention_received"}
    config = layer_config(config, 0)
    heads = config.num_attention_heads
    language = LanguageSizes(
        config.hidden_size,
        heads,
        getattr(config, "num_key_value_heads", heads),
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
    facts = _towers(owner)
    if facts is not None:
        depth |= facts.depth
        look |= {"encoder_scores"}
        decoder |= {"encoder_scores"}
    common: dict[str, Any] = {n: getattr(facts, n) for n in TOWER_FACTS if facts is not None}
    if facts is not None:
        common["last_layer"] = owner.family.last_layer(owner.inner, facts.depth["encoder"])
    if not owner.family.fixed:
        common["tokens"] = None
    signals = {} if facts is None else dict(facts.signals)
    if facts is not None and all(map(has_pooling, (s.tower for s in owner.towers.values()))):
        signals["encoder"] |= {"pooling"}
    signals |= {"prompt": look, "decoder": decoder}
    closed = {}
    odd = _apart(owner) or cannot_ask(owner.lm, getattr(owner.layers[0], "self_attn", None))
    if odd:
        closed["attention"] = closed["kv"] = odd
    else:
        depth["attention"] = depth["kv"] = layers
        signals["attention"] = frozenset({"qkv", "prompt", "hidden"})
        signals["kv"] = frozenset({"entries", "hidden"})
    silent = writes_otherwise(owner.root) or (_apart(owner) if owner.family.two_way else "")
    if silent:
        closed["logits"] = silent
    else:
        depth["logits"] = 1
        signals["logits"] = look & SIGNALS["logits"]
    info = ModelInfo(
        f"transformers {owner.family.title}",
        depth,
        signals,
        tower_cuts=not owner.family.cuts,
        decoder_middle=has_halves(owner.layers[0]),
        mrope=owner.mrope,
        language=language,
        closed=closed,
        **common,
    )
    open_image(info, owner.family.fixed_size(owner.inner))
    open_pixels(info, owner.family.whole_pictures(owner.inner))
    return info


def _apart(owner: VLMWrapping) -> str:
    """Say why the attention of a language model is not that of one causal mask in every layer; empty if it is."""
    if owner.family.inside:
        return owner.family.inside
    if owner.family.two_way:
        return f"{owner.family.title} lets the tokens of a picture see one another"
    if owner.shares:
        return owner.closed
    if any(kind not in (*FULL, *SLIDING) for kind in owner.kinds):
        odd = sorted({kind for kind in owner.kinds if kind not in FULL})
        return f"the language model has layers of the kind {', '.join(odd)}"
    return ""


def _towers(owner: VLMWrapping) -> ModelInfo | None:
    """Open the vision towers; None if methods can only look from the prompt on."""
    facts: ModelInfo | None = None
    opened: dict[Any, TowerSession | PackedSession] = {}
    for kind in MODALITIES.values():
        tower: Any = owner.family.tower(owner.inner, kind)
        if tower is None and isinstance(owner.family, Generic):
            return None
        if tower not in opened:
            session, facts = _opened(owner, tower)
            if session is None:
                return None
            opened[tower] = session
        owner.towers[kind] = opened[tower]
    return facts


def _opened(
    owner: VLMWrapping, tower: Any
) -> tuple[TowerSession | PackedSession | None, ModelInfo | None]:
    from vtr.vision.encoders.transformers import tower_parts

    if form_of(tower) is not None:
        packed = PackedSession(owner, tower)
        return packed, packed_info(packed)
    try:
        parts = tower_parts(tower)
    except UnsupportedModelError:
        return None, None
    session = TowerSession(owner, parts.runners, parts.prefix, square_grid, tower)
    return session, encoder_info("", **parts._asdict(), pixels=True)
