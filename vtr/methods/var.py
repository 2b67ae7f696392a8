"""VAR: attention moves from sinks to the rest of the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vtr.methods.base import (
    EditMethod,
    Examples,
    LanguageAttentionSite,
    ModelInfo,
    Stage,
    check_flag,
    check_layers,
    check_number,
    register,
)
from vtr.methods.common.planned import planned
from vtr.methods.common.sinks import FirstToken, aligned, massive, move_mass, published


@register
@dataclass(frozen=True, kw_only=True)
class VAR(EditMethod):
    r"""Visual Attention Redistribution (ICLR 2025, arXiv 2503.03321): attention of sinks for the other visual tokens.

    A token is a sink of a layer if it enters it, after an RMS norm without weights, with a magnitude above
    ``tau`` in one of the channels ``dims``. Sinks are found in the prompt and remembered; a generated token is
    never one. In the rows after the image and in every decoding step, a head's row is image-centric if at least
    ``summ`` of its attention is on visual tokens, and at least ``rho`` of that on visual tokens that are no
    sinks. In these rows every sink, text too, keeps ``keep`` of its attention, and the visual tokens that are no sinks
    get the rest in proportion to what they have. All other rows and heads stay as they are. Draft tokens of assisted
    decoding come several at a time, as the text of a later turn does, in which sinks are looked for: its answers may
    differ from those of plain decoding.

    .. math::

        S = \Big\{j : \max_{d \in \mathrm{dims}} \Big|\frac{x_{jd}}{\mathrm{rms}(x_j)}\Big| > \tau\Big\},
        \qquad
        A'_j = \begin{cases} \mathrm{keep} \cdot A_j & j \in S \\
        A_j + (1 - \mathrm{keep}) \sum_{s \in S} A_s \cdot \frac{A_j}{\sum_{v \in V \setminus S} A_v} & j
        \in V \setminus S
        \end{cases}

    The paper calls p what is taken: a sink keeps 1 - p. The authors' code calls p what is kept, and ships p =
    0.6. Which of the two its tables used is not known. ``keep`` has the name of its effect: 0.6 is the code's
    setting, 0.4 the paper's formula with the same number.

    As in the code, layers 0 and 1 are left alone, and so is a sample without a visual sink in that layer. The paper
    leaves the last layer alone, the code means to and edits it: ``last_layer=True`` is what it does. Its code
    always uses the channels of the 7B model.

    Do not expect fewer hallucinations of every model. The paper has LLaVA-1.5-7B at 63.5 instead of 62.0
    on GQA; a rerun with sampling (SEVI's tables) has CHAIR_s at 512 tokens at 60.0 instead of 54.6 for LLaVA-1.5-7B,
    which is worse, and at 54.8 instead of 58.8 for the 13B model.

    Args:
        keep: share of its attention that a sink keeps; 1 changes nothing.
        dims: channels in which sinks are massive. None takes those of a plan (:func:`vtr.calibrate`), else
            the published ones of Llama-2 and Vicuna 1.5, which are known by their sizes: for another
            model of exactly their sizes give ``dims`` or a plan.
        tau: magnitude above which a channel is massive.
        rho: least share of a row's visual attention on tokens that are no sinks.
        summ: least attention of a row on visual tokens.
        last_layer: edit the last layer too.
    """

    name: ClassVar[str] = "var"
    paper: ClassVar[str] = (
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models, ICLR 2025, arXiv 2503.03321"
    )
    needs: ClassVar[Mapping[str, frozenset[str]]] = {
        "attention": frozenset({"qkv", "prompt", "hidden"})
    }
    calibrated: ClassVar[bool] = True

    keep: float = field(default=0.6, kw_only=False)
    dims: tuple[int, ...] | None = None
    tau: float = 20.0
    rho: float = 0.5
    summ: float = 0.2
    last_layer: bool = False
    dense_layers: int | tuple[int, ...] = 2

    def validate(self) -> None:
        super().validate()
        for name in ("keep", "rho", "summ"):
            check_number(getattr(self, name), name, 0, 1)
        check_number(self.tau, "tau", 0, float("inf"))
        check_flag(self.last_layer, "last_layer")
        if self.dims is not None:
            self._set("dims", check_layers(sorted(set(self.dims)), "dims"))

    @classmethod
    def examples(cls) -> Examples:
        free = {"tau": 1.0, "rho": 0.0, "summ": 0.0, "dense_layers": 0, "last_layer": True}
        some = cls(0.2, dims=(0, 1, 2, 3), **free)  # type: ignore[arg-type]
        return {"some": (some,), "everything": (some.replace(keep=1.0),), "counted": ()}  # type: ignore[dict-item]

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        last = info.depth["attention"] - 1
        return tuple(s for s in super().stages(info) if self.last_layer or s.layer != last)

    def attend(self, site: LanguageAttentionSite) -> Tensor:
        if self.keep == 1:
            return site.dense()
        self._find(site)
        return super().attend(site)

    def edit(self, site: LanguageAttentionSite, attention: Tensor, rows: Tensor) -> Tensor:
        sinks, visual = site.state["sinks"][:, None, None], site.visual[:, None, None]
        others = visual & ~sinks
        on_image = (attention * visual).sum(-1)
        on_others = (attention * others).sum(-1)
        centric = (on_image >= self.summ) & (on_others >= self.rho * on_image)
        return move_mass(attention, sinks, others, self.keep, centric & (visual & sinks).any(-1))

    def _find(self, site: LanguageAttentionSite) -> None:
        """Remember the sinks of all columns, (B, S) bool; what is generated has none."""
        known, _ = aligned(site.state.get("sinks", site.valid[:, :0]), site)
        new = torch.zeros_like(site.row_mask(site.valid))
        if site.phase != "decode":
            assert site.hidden is not None
            new = massive(site.hidden, self._dims(site), self.tau) & site.row_mask(site.valid)
        site.state["sinks"] = torch.cat([known, new], 1)

    def _dims(self, site: LanguageAttentionSite) -> tuple[int, ...]:
        if "dims" not in site.table and not self.needs_table(site.info):
            return self.dims or published(site.info)
        return tuple(
            planned(site, "dims", VAR, "give dims=, the channels of massive sinks").tolist()
        )

    def needs_table(self, info: ModelInfo) -> bool:
        return not (self.dims or published(info))

    def calibrator(self, info: ModelInfo) -> FirstToken:
        """Collect the channels in which the first token is massive."""
        return FirstToken(self.tau)
