"""The names that the author of a method imports: ``from vtr.methods.base import ScoredMethod, register``.

Bases for methods that decide which visual tokens a model computes with:

- :class:`ScoredMethod`: keeps the tokens of highest score. You write ``score(site)`` alone.
- :class:`TextScoredMethod`: the same, for scores that are text-to-image attention, which
  :class:`vtr.Debias` can correct.
- :class:`TokenMethod`: any other decision. You write ``stages(info)`` and ``reduce(site)``.

Bases for methods that decide what an attention call of a diffusion transformer computes:

- :class:`MaskedAttention`: a mask that follows from the grid of tokens. You write ``grid_mask(grid)`` alone.
- :class:`DynamicAttention`: blocks that are chosen at run time. You write ``scores(view)`` and
  ``budget(scores, view)``.
- :class:`AttentionMethod`: any other. You write ``attend(site)``.

A base for methods that compute the attention of a vision encoder:

- :class:`EncoderAttentionMethod`: you write ``attend(site)``, which may mask pairs, or leave out heads.

Bases for methods that act inside the attention of a language model:

- :class:`PrefillMethod`: skips key blocks of a long prompt. You write ``blocks(site)`` alone.
- :class:`EditMethod`: changes the attention of some rows. You write ``edit(site, attention, rows)``.
- :class:`DecodeMethod`: reads a part of the visual keys in decoding steps. You write ``select(site)`` alone, or,
  for a :class:`ReusingMethod`, in which a few layers choose for the others, ``choose(site)``.
- :class:`LanguageAttentionMethod`: any other. You write ``attend(site)``.

Base for methods that change the logits while text is generated:

- :class:`ContrastMethod`: contrasts them with those of a second run. You write ``keep(site)``, the tokens that
  this run sees.

A method is a frozen dataclass, decorated with :func:`register` (outermost) and
``@dataclass(frozen=True)``. Everything else here is used by them: budgets (``Keep`` and the checks of
options), published settings (:class:`Presets`), visits (:class:`Stage`), and results
(:class:`Reduction` over a :class:`TokenMap`).
"""

from __future__ import annotations

from vtr.core.budget import (
    Keep,
    check_count,
    check_flag,
    check_keep,
    check_layers,
    check_number,
    check_schedule,
    count,
    counts,
    fit_layers,
    geometric,
    spread,
    third_points,
)
from vtr.core.encoder_attention import EncoderAttentionSite
from vtr.core.kv_site import Change, KVSite
from vtr.core.language_attention import LanguageAttentionSite
from vtr.core.language_site import LanguageSite, VisualSpan
from vtr.core.method import Examples, Method, Reduction, Stage, TokenMethod
from vtr.core.presets import Presets
from vtr.core.registry import register
from vtr.core.schedulable import Schedulable
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap, take, top_indices
from vtr.methods.common.attention import AttentionMethod, check_share
from vtr.methods.common.contrast import ContrastMethod
from vtr.methods.common.decode import DecodeMethod, ReusingMethod
from vtr.methods.common.dynamic import BlockChoice, DynamicAttention, GridView
from vtr.methods.common.edit import EditMethod
from vtr.methods.common.encoder_attention import EncoderAttentionMethod
from vtr.methods.common.kv import EvictionMethod, KVMethod
from vtr.methods.common.language_attention import LanguageAttentionMethod
from vtr.methods.common.masked import (
    Grid,
    GridMask,
    MaskedAttention,
    SequenceMask,
    masked_attention,
)
from vtr.methods.common.prefill import PrefillMethod
from vtr.methods.common.scored import ScoredMethod, TextScoredMethod

__all__ = [
    "AttentionMethod",
    "BlockChoice",
    "Change",
    "ContrastMethod",
    "DecodeMethod",
    "DynamicAttention",
    "EditMethod",
    "EncoderAttentionMethod",
    "EncoderAttentionSite",
    "EvictionMethod",
    "Examples",
    "Grid",
    "GridMask",
    "GridView",
    "KVMethod",
    "KVSite",
    "Keep",
    "LanguageAttentionMethod",
    "LanguageAttentionSite",
    "LanguageSite",
    "MaskedAttention",
    "Method",
    "ModelInfo",
    "PrefillMethod",
    "Presets",
    "Reduction",
    "ReusingMethod",
    "Schedulable",
    "ScoredMethod",
    "SequenceMask",
    "Site",
    "Stage",
    "TextScoredMethod",
    "TokenMap",
    "TokenMethod",
    "VisualSpan",
    "check_count",
    "check_flag",
    "check_keep",
    "check_layers",
    "check_number",
    "check_schedule",
    "check_share",
    "count",
    "counts",
    "fit_layers",
    "geometric",
    "masked_attention",
    "register",
    "spread",
    "take",
    "third_points",
    "top_indices",
]
