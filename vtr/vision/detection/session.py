"""Run methods inside the encoder of a detector: some tokens are computed in a layer, and all come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtr.compat.detectors import QUERIES, REFERENCES, SHAPES, SHAPES_LIST, DetectorNames
from vtr.compat.torch import in_backward
from vtr.compat.transformers import CHECKPOINTED
from vtr.core.detector_site import DetectorCall, DetectorSite, Levels
from vtr.core.method import Reduction
from vtr.core.tokens import TokenMap
from vtr.core.trace import StageRecord, Trace
from vtr.core.wrapping import Bound, Entry, PerThread, Threaded, Wrapping
from vtr.errors import UnsupportedMethodError
from vtr.vision.detection.layers import DetectorLayer, named
from vtr.vision.encoders.blocks import place_forward
from vtr.vision.encoders.graphs import refuse_symbolic


class DetectorRun:
    """The state of one call.

    Attributes:
        map: from all tokens to those that the layers compute; None is all of them.
        values: (B, L, C) what the layers read in place of the present tokens; None is these.
        whole: what the attention of the running layer needs of all tokens.
    """

    def __init__(self, call: DetectorCall, first: Tensor, batch: int) -> None:
        self.call = call
        self.first = first
        self.batch = batch
        self.trace = Trace(batch=batch, notes={"detector": call})
        self.memory: dict[int, dict[str, Any]] = {}
        self.map: TokenMap | None = None
        self.values: Tensor | None = None
        self.whole: dict[str, Any] | None = None


class DetectorSession(Threaded):
    """Runs the visits of all active methods in the layers of one encoder.

    Args:
        owner: the wrapping; its entries, info and trace are used.
        family: the names of the model.
        encoder: the module that runs the layers.
        layers: one per layer, in order.
        classes: the model's class head for tokens, or None.
        samplers: the modules of the decoder that sample the encoder's tokens.
        projection: the module whose output is the one feature map of an encoder of plain tokens, or None.
    """

    run = PerThread[DetectorRun | None]()
    given = PerThread[dict[str, Any] | None]()
    shape = PerThread[tuple[int, int] | None]()

    def __init__(
        self,
        owner: Wrapping,
        family: DetectorNames,
        encoder: nn.Module,
        layers: Sequence[DetectorLayer],
        classes: Callable[[Tensor], Tensor] | None,
        samplers: Sequence[nn.Module],
        projection: nn.Module | None,
    ) -> None:
        super().__init__()
        self.owner = owner
        self.family = family
        self.encoder = encoder
        self.layers = list(layers)
        self.classes = classes
        self.samplers = list(samplers)
        self.projection = projection
        self.visits: dict[int, list[Entry]] = {}

    def install(self) -> None:
        """Plan the visits and set the patches."""
        owner = self.owner
        self.forget()
        self.visits = {}
        sampling = False
        for entry, stage in owner.stages():
            self.visits.setdefault(stage.layer, []).append(entry)
            sampling |= "sampling" in entry.method.requirements(owner.info).get("detector", ())
        owner.hook(owner.root.register_forward_pre_hook(Bound(self, "see"), with_kwargs=True))
        owner.hook(self.encoder.register_forward_pre_hook(Bound(self, "begin"), with_kwargs=True))
        if self.projection is not None:
            owner.hook(self.projection.register_forward_hook(Bound(self, "take_shape")))
        for number, layer in enumerate(self.layers):
            place_forward(owner, layer.layer, Bound(self, "forward", number))
            place_forward(owner, layer.attention, Bound(self, "attend", number))
        for sampler in self.samplers if sampling else ():
            owner.hook(sampler.register_forward_pre_hook(Bound(self, "sample"), with_kwargs=True))

    # ---- the call ---------------------------------------------------------------------------

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of the model's call."""
        self.given, self.run = named(module, args, kwargs), None

    def take_shape(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.shape = (output.shape[2], output.shape[3])

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a run when the encoder is called."""
        family, given = self.family, named(module, args, kwargs)
        x: Tensor = given[family.tokens]
        refuse_symbolic(x)
        if x.dim() == 4:  # one feature map, which the encoder flattens
            self.shape = (x.shape[2], x.shape[3])
            x = x.flatten(2).transpose(1, 2)
        levels = self._levels(given, x.shape[1])
        mask = given.get(family.mask) if family.mask else None
        valid = None if mask is None else (~mask.bool() if family.padding else mask.bool())
        counts = [x.shape[1]] * len(x) if valid is None else valid.sum(1).tolist()
        if all(n == x.shape[1] for n in counts):
            valid = None
        call = DetectorCall(levels, valid, counts)
        if self.given is not None:
            _add_pictures(call, self.given)
        self.given = None
        self.run = DetectorRun(call, x, len(x))
        self.owner.trace = self.run.trace

    def _levels(self, given: dict[str, Any], tokens: int) -> Levels:
        if not self.family.deformable:
            if self.shape is None or self.shape[0] * self.shape[1] != tokens:
                raise UnsupportedMethodError(
                    f"{self.owner.info.family} was given {tokens} tokens of a feature map of unknown shape "
                    "(inputs_embeds): call it with pixel_values"
                )
            return (self.shape,)
        shapes = given.get(SHAPES_LIST)
        shapes = given[SHAPES].tolist() if shapes is None else shapes
        return tuple((int(height), int(width)) for height, width in shapes)

    def sample(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the points that a layer of the decoder reads, for training."""
        if self.run is None or not self.owner.root.training:
            return
        given = named(module, args, kwargs)
        points, weights = given["sampling_locations"], given["attention_weights"]
        self.run.call.sampling.append((points.detach(), weights.detach()))

    # ---- one layer --------------------------------------------------------------------------

    def forward(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """The forward of a layer."""
        layer, run = self.layers[number], self.run
        given = named(layer.layer, args, kwargs)
        if run is None:
            raise RuntimeError(
                f"layer {number} of {self.owner.info.family} was called outside of its encoder"
            )
        if in_backward() or (getattr(layer.layer, CHECKPOINTED, False) and layer.layer.training):
            raise UnsupportedMethodError(
                f"{self.owner.info.family} runs layer {number} again in the backward pass, which methods in the "
                "encoder of a detector do not support: call model.gradient_checkpointing_disable()"
            )
        x: Tensor = given[QUERIES]
        few = self._visit(number, run, x, given)
        queries = x.shape[1] if run.map is None else run.map.n_out
        run.trace.count("detector", number, queries, queries)
        if run.map is None and few is None and run.values is None:
            return type(layer.layer).forward(layer.layer, **given)
        step = run.map
        if step is None:
            step = TokenMap.identity(run.batch, x.shape[1], x.device)
        values = x if run.values is None else run.values.to(x.dtype)
        run.whole = layer.whole(given, values)
        try:
            few = step.gather(x) if few is None else few.to(x.dtype)
            out = type(layer.layer).forward(layer.layer, **layer.few(given, few, step))
        finally:
            run.whole = None
        if isinstance(out, tuple):
            return step.restore(out[0], x), *out[1:]
        return step.restore(out, x)

    def attend(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """The forward of a layer's attention."""
        layer, run = self.layers[number], self.run
        if run is None or run.whole is None:
            return type(layer.attention).forward(layer.attention, *args, **kwargs)
        return layer.attend(named(layer.attention, args, kwargs), run.whole)

    def _visit(
        self, number: int, run: DetectorRun, x: Tensor, given: dict[str, Any]
    ) -> Tensor | None:
        """Ask the methods that visit a layer; returns the tokens to compute, if one has computed them itself."""
        few = None
        for entry in self.visits.get(number, ()):
            site = self._site(number, run, entry, x, given)
            made = entry.token_method.reduce(site)
            if made is not None:
                few = self._commit(number, run, entry, x, made)
        return few

    def _site(
        self, number: int, run: DetectorRun, entry: Entry, x: Tensor, given: dict[str, Any]
    ) -> DetectorSite:
        levels = run.call.levels
        return DetectorSite(
            call=run.call,
            first=run.first,
            positions=given.get(self.family.positions),
            reference_points=given.get(REFERENCES),
            classes=self.classes,
            layer=number,
            info=self.owner.info,
            hidden=x,
            map=TokenMap.identity(run.batch, x.shape[1], x.device),
            memory=run.memory.setdefault(self.owner.entries.index(entry), {}),
            grid=levels[0] if len(levels) == 1 else None,
            training=self.owner.root.training,
            modules=entry.modules_like(x),
            notes=run.trace.notes,
        )

    def _commit(
        self, number: int, run: DetectorRun, entry: Entry, x: Tensor, made: Reduction
    ) -> Tensor | None:
        run.map, run.values = made.map, made.values
        if made.map is not None:
            levels, tokens = run.call.levels, x.shape[1]
            grid = levels[0] if len(levels) == 1 else None
            name, left = entry.method.name, made.map.n_out
            record = StageRecord("detector", number, name, tokens, left, made.map, made.map, grid)
            run.trace.stages.append(record)
        return made.tokens

    def flops(self) -> tuple[int, int]:
        """Dense and reduced FLOPs of the layers for the last call, per image (of its padded size)."""
        trace = self.owner.trace
        tokens = trace.notes["detector"].tokens
        counted = trace.tokens["detector"]
        dense = sum(layer.flops(tokens, tokens) for layer in self.layers)
        reduced = sum(
            layer.flops(counted.get(number, (tokens, tokens))[0], tokens)
            for number, layer in enumerate(self.layers)
        )
        for entry in self.owner.active:
            if entry.modules is not None and any(
                s.method == entry.method.name for s in trace.stages
            ):
                reduced += entry.token_method.overhead(entry.modules, tokens)
        return dense, reduced


def _add_pictures(call: DetectorCall, given: dict[str, Any]) -> None:
    """Add the sizes of the pictures and the boxes of the labels, if the model was given them."""
    pixels, mask, labels = (given.get(name) for name in ("pixel_values", "pixel_mask", "labels"))
    if isinstance(pixels, Tensor):
        call.size = (pixels.shape[-2], pixels.shape[-1])
        if mask is None:
            call.sizes = torch.tensor([call.size] * len(pixels), device=pixels.device).float()
        else:
            seen = mask.bool()
            call.sizes = torch.stack([seen.any(2).sum(1), seen.any(1).sum(1)], 1).float()
    if labels is not None and all("boxes" in label for label in labels):
        call.boxes = [label["boxes"] for label in labels]
