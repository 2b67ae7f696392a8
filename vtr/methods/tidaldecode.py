"""TidalDecode: two layers choose the keys of a decoding step, all others reuse them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from vtr.methods.base import Examples, Presets, ReusingMethod, register
from vtr.methods.common.decode import best_columns

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class TidalDecode(Presets, ReusingMethod):
    r"""TidalDecode (ICLR 2025, arXiv 2410.05076): position-persistent sparse attention while decoding.

    In every decoding step the first two layers attend to all keys. The third one does as well and chooses the keys
    with the largest scores; the layers behind attend to these, until a correction layer attends to everything and
    chooses again. Published: 256 keys of the whole cache; layer 2 chooses, and of 32 layers layer 13 of Llama-3-8B
    (9 of Llama-2-7B) corrects. Other depths have the same share as Llama-3-8B.

    .. math::

        s_j = \sum_{h \in \mathrm{group}} A^{l_0}_h[n, j], \qquad
        \text{layers behind } l_0 \text{ read } \operatorname{top}_k(s) \text{ until the next layer that
        chooses}

    Against the authors' code: query heads choose one by one there, also those that share a key head. Here a key head
    chooses, by the sum of its query heads' attention, so that its keys are read once. ``keys`` counts visual keys;
    text, generated tokens and the first token are always read in addition.

    Args:
        keys: visual keys that each key head reads, a number per sample or a share.
        layers: layers that choose.
        recent: newest columns that are always read.
    """

    name: ClassVar[str] = "tidaldecode"
    paper: ClassVar[str] = "TidalDecode, ICLR 2025, arXiv 2410.05076"

    SHARES: ClassVar[tuple[float, ...]] = (13 / 32,)
    PRESETS: ClassVar = {
        "llama-3-8b/256": {"keys": 256, "layers": (2, 13)},
        "llama-2-7b/256": {"keys": 256, "layers": (2, 9)},
    }

    @classmethod
    def examples(cls) -> Examples:
        small = cls(6, layers=(0,), dense_layers=0)
        return {"some": (small,), "everything": (small.replace(keys=1.0), small.replace(keys=4096))}

    def choose(self, site: LanguageAttentionSite) -> Tensor:
        _, visual, number, most, _ = self.sides(site)
        attention = site.last_attention().unflatten(1, (site.k.shape[1], -1)).sum(2)
        return best_columns(attention, visual, number, most)
