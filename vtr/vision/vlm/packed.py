"""Looks inside vision towers where all images of a call lie end to end in one sequence (Qwen,
VideoLLaMA3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vtr.compat.transformers import PACKED, WINDOWS
from vtr.core.site import QKV, ModelInfo, Site
from vtr.core.tokens import TokenMap
from vtr.core.wrapping import Bound, Entry, PerThread, Threaded
from vtr.vision.encoders.blocks import linear_flops
from vtr.vision.vlm.attention import rotate

if TYPE_CHECKING:
    from vtr.vision.vlm.wrapping import VLMWrapping

SIGNALS = frozenset({"hidden", "queries", "keys", "values", "attention_received"})


class Form(NamedTuple):
    """The parts of a tower: its blocks, and the names of a block's first norm and attention."""

    blocks: nn.ModuleList
    norm: str
    attention: str


def form_of(tower: Any) -> Form | None:
    """The form of a tower, None if it is another one."""
    for path, norm, name, projection, merger in PACKED:
        blocks: Any = tower
        for part in path.split("."):
            blocks = getattr(blocks, part, None)
        if not isinstance(blocks, nn.ModuleList):
            continue
        attention: Any = getattr(blocks[0], name, None)
        if (
            all(hasattr(attention, part) for part in (projection, "num_heads", "scaling"))
            and hasattr(blocks[0], norm)
            and hasattr(tower, merger)
        ):
            return Form(blocks, norm, name)
    return None


class PackedSession(Threaded):
    """Shows a method the tower's layers, one row per image (or frame), padded to the largest.

    Patches are in the order in which the merger reads them: 2 x 2 neighbours follow one another. Qwen2.5's
    windows are undone. Attention signals are computed from a layer's q and k over all patches of the image,
    also in layers that attend within windows themselves. Nothing is cut here.
    """

    capture = PerThread[Any]()
    lengths = PerThread[list[int]](make=list)
    order = PerThread[Tensor | None]()
    entered = PerThread[Tensor | None]()

    def __init__(self, owner: VLMWrapping, tower: Any) -> None:
        super().__init__()
        self.owner = owner
        self.tower = tower
        form = form_of(tower)
        assert form is not None
        self.form = form
        self.blocks: Any = form.blocks
        self.visits: dict[int, list[Entry]] = {}

    def facts(self) -> dict[str, Any]:
        attention: Any = getattr(self.blocks[0], self.form.attention)
        first = getattr(attention, "qkv", None) or attention.q_proj
        return {"dim": first.in_features, "heads": attention.num_heads}

    def picture_flops(self, patches: int) -> int:
        """FLOPs of the layers for a picture of so many patches."""
        tower, width, total = self.tower, self.facts()["dim"], 0
        whole = getattr(tower, "fullatt_block_indexes", range(len(self.blocks)))
        window = (getattr(tower, "window_size", 0) // getattr(tower, "patch_size", 1)) ** 2
        for i, block in enumerate(self.blocks):
            seen = patches if i in whole else min(patches, window)
            total += patches * (linear_flops(block) + 4 * seen * width)
        return total

    def install(self) -> None:
        owner = self.owner
        self.visits = {}
        for entry, stage in owner.stages():
            if stage.site == "encoder":
                self.visits.setdefault(stage.layer, []).append(entry)
        owner.hook(self.tower.register_forward_pre_hook(Bound(self, "start"), with_kwargs=True))
        for layer in self.visits:
            block = self.blocks[layer]
            owner.hook(block.register_forward_pre_hook(Bound(self, "enter"), with_kwargs=True))
            owner.hook(block.register_forward_hook(Bound(self, "leave", layer), with_kwargs=True))
        if hasattr(self.tower, WINDOWS):
            owner.patch(self.tower, WINDOWS, Bound(self, "permute"))

    def start(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Frames are attended to one by one: each is a row."""
        grids = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        assert grids is not None
        self.lengths = [h * w for t, h, w in grids.tolist() for _ in range(t)]
        self.order = None

    def permute(self, x: Tensor, window_index: Tensor, seq_len: int) -> Tensor:
        """Remember how windows were put together."""
        unit = self.tower.spatial_merge_unit
        groups = torch.argsort(window_index.to(x.device))
        self.order = (groups[:, None] * unit + torch.arange(unit, device=groups.device)).reshape(-1)
        return getattr(type(self.tower), WINDOWS)(self.tower, x, window_index, seq_len)

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.entered = args[0] if args else kwargs["hidden_states"]

    # Scores only rank tokens. Without gradients they leave nothing in the graph that activation
    # checkpointing, whose second pass has no call to show them to, would expect there again.
    @torch.no_grad()
    def leave(
        self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        entered, self.entered = self.entered, None
        capture = self.capture
        if capture is None or entered is None:
            return
        rows = PackedQKV(self, module, entered, kwargs["position_embeddings"])
        number = torch.tensor(self.lengths, device=output.device)
        width = max(self.lengths)
        index = torch.arange(width, device=output.device).expand(len(self.lengths), width)
        valid = index < number[:, None]
        has_padding = min(self.lengths) < width
        owner = self.owner
        capture.crops = len(self.lengths)
        capture.patches = list(self.lengths)
        for entry in self.visits[layer]:
            key = owner.entries.index(entry)
            site = Site(
                site="encoder",
                layer=layer,
                info=owner.info,
                hidden=self.split(output),
                map=TokenMap.keep(torch.where(valid, index, -1), width, has_padding),
                memory=capture.memory.setdefault(key, {}),
                valid=valid if has_padding else None,
                qkv=rows,
                scale=float(getattr(module, self.form.attention).scaling),
                training=owner.root.training,
                modules=entry.modules_like(output),
                notes=owner.tracing.notes,
            )
            if entry.token_method.reduce(site) is not None:
                raise RuntimeError(f"{entry.method.name} cuts in a tower that cannot be cut")

    def split(self, x: Tensor) -> Tensor:
        """(patches, ...) -> (images, largest, ...), padded with zeros."""
        if self.order is not None:
            x = x[self.order]
        return nn.utils.rnn.pad_sequence(list(x.split(self.lengths)), batch_first=True)


class PackedQKV:
    """q, k, v of a layer, (images, H, largest, D)."""

    def __init__(
        self, session: PackedSession, block: Any, hidden: Tensor, rope: tuple[Tensor, Tensor]
    ) -> None:
        self.session, self.block, self.hidden, self.rope = session, block, hidden, rope

    def __call__(self) -> QKV:
        form, split = self.session.form, self.session.split
        attn = getattr(self.block, form.attention)
        x = getattr(self.block, form.norm)(self.hidden)
        if hasattr(attn, "qkv"):
            parts = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(1)
        else:
            made = (attn.q_proj(x), attn.k_proj(x), attn.v_proj(x))
            parts = tuple(y.unflatten(-1, (attn.num_heads, -1)) for y in made)
        q, k, v = (split(y).transpose(1, 2) for y in parts)
        cos, sin = (split(t.float()) for t in self.rope)
        return rotate(q.float(), cos, sin).to(v), rotate(k.float(), cos, sin).to(v), v


def packed_info(session: PackedSession) -> ModelInfo:
    """Facts of a packed tower, as :func:`vtr.vision.encoders.facts.encoder_info` gives them of others."""
    return ModelInfo(
        family="",
        depth={"encoder": len(session.blocks)},
        signals={"encoder": SIGNALS},
        **session.facts(),
    )
