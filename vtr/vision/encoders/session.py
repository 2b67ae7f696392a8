"""Run methods inside any sequence-shaped vision encoder.

A family's adapter gives one :class:`BlockRunner` per block; :class:`EncoderSession` puts a runner in
place of each block's ``forward`` (on the instance, so that classes, parameters and ``state_dict``
stay as they are), keeps the token map of the running call, and calls the methods at their stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtr.compat.torch import in_backward
from vtr.core.method import Stage, TokenMethod
from vtr.core.recompute import Again
from vtr.core.trace import StageRecord
from vtr.core.wrapping import Bound, Entry, PerThread, Threaded, Wrapping
from vtr.errors import UnsupportedMethodError, UnsupportedModelError
from vtr.vision.encoders.attending import Attending, saved_flops
from vtr.vision.encoders.attention import Probe
from vtr.vision.encoders.blocks import BlockRunner, EncoderRun, place_forward
from vtr.vision.encoders.graphs import check_graph, refuse_symbolic
from vtr.vision.encoders.image import Smaller, ask, entry_of, resized
from vtr.vision.encoders.passes import BlockPass, Passes
from vtr.vision.encoders.pooling import log_sizes
from vtr.vision.encoders.visits import visit


class EncoderSession(Threaded):
    """Runs the stages of all active methods inside the blocks of one encoder.

    Args:
        owner: the wrapping; its entries, info and trace are used.
        runners: one per block, in order.
        prefix: number of protected tokens in front.
        grid: tokens -> (height, width) or None.
        tower: the module that gets the images, so that methods may look at them.

    Attributes:
        restoring: whether block outputs have full length, in every call.
        whole: the same for the running call of this thread.
        shape: the grid of the running call of this thread, where its adapter has noted it.
        mean: what an adapter hands from one hook of the running call to the next.
        image: what became of the pictures of the coming call, between their hook and the first block.
        small: the smaller pictures that the running call sees, or None.
        latest: the call that began last, in any thread.
        passes: tells a call's passes through its blocks from those of its backward pass.
    """

    run = PerThread[EncoderRun | None]()
    pixels = PerThread[Tensor | None]()
    whole = PerThread[bool](False)
    shape = PerThread[tuple[int, ...] | None]()
    mean = PerThread[Tensor | None]()
    image = PerThread[Smaller | None]()
    small = PerThread[Tensor | None]()

    def __init__(
        self,
        owner: Wrapping,
        runners: Sequence[BlockRunner],
        prefix: int,
        grid: Callable[[int], tuple[int, ...] | None],
        tower: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.owner = owner
        self.runners = list(runners)
        if len({id(r.block) for r in self.runners}) < len(self.runners):
            raise UnsupportedModelError(
                f"{owner.info.family}: one block is used at several depths (shared weights), so that methods "
                "cannot tell the layers apart"
            )
        self.prefix = prefix
        self.grid = grid
        self.tower = tower
        self.latest: EncoderRun | None = None
        self.passes = Passes(owner)
        self.restoring = False
        self.visits: dict[tuple[int, str], list[Entry]] = {}
        self.attending: dict[int, Entry] = {}
        self.probed: frozenset[int] = frozenset()
        self.biased: frozenset[int] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "latest": None}

    def install(self) -> None:
        """Plan the visits and put the runners in place."""
        owner = self.owner
        self.forget()
        self.visits, self.latest = {}, None
        self.attending = {s.layer: e for e, s in self.attention_stages()}
        probed: set[int] = set()
        biased: set[int] = set()
        looks = False
        for entry, stage in owner.stages():
            if stage.site != "encoder":
                continue
            runner = self.runners[stage.layer]
            place = stage.place if runner.split else "end"
            self.visits.setdefault((stage.layer, place), []).append(entry)
            wanted = entry.method.requirements(owner.info).get("encoder", frozenset())
            if wanted - {"hidden", "pixels"}:
                probed.add(stage.layer)
            looks = looks or "pixels" in wanted
        for entry in owner.active:
            if isinstance(entry.method, TokenMethod):
                biased |= entry.method.biased_layers(owner.info)
        self.probed, self.biased = frozenset(probed), frozenset(biased)
        for layer, runner in enumerate(self.runners):
            place_forward(owner, runner.block, Bound(self, "forward", layer))
            runner.install(owner)
        owner.hook(self.passes)
        if looks and self.tower is not None:
            owner.hook(self.tower.register_forward_pre_hook(Bound(self, "see"), with_kwargs=True))

    def attention_stages(self) -> list[tuple[Entry, Stage]]:
        """List the visits of methods that compute the attention of blocks."""
        return [(e, s) for e, s in self.owner.stages() if s.site == "attention"]

    def see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the images of the call for the methods that look at them."""
        pixels = args[0] if args else kwargs.get("pixel_values")
        if not isinstance(pixels, Tensor) or pixels.dim() != 4:
            raise UnsupportedMethodError(
                "a method looks at the pixels, which this call does not give as images (B, C, H, W)"
            )
        self.pixels = pixels

    # ---- the picture ------------------------------------------------------------------------

    def shrink(self, images: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
        """The pictures that the model is to see instead of ``images`` (B, C, H, W), by the method at the
        site ``image``: smaller ones, or the same.

        Args:
            grid: rows and columns of their patches.
            patch: height and width of one in pixels.
        """
        entry = entry_of(self.owner)
        self.image = self.small = None
        if entry is None:
            return images
        self.image = small = ask(self.owner, entry, len(images), grid, images, {}, {})
        if small is None:
            return images
        self.shape = small.grid
        images = resized(images, (small.grid[0] * patch[0], small.grid[1] * patch[1]))
        if self.pixels is not None:
            self.pixels = images
        self.small = images
        return images

    # ---- one block --------------------------------------------------------------------------

    def forward(self, layer: int, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        refuse_symbolic(x)
        runner = self.runners[layer]
        if args:
            kwargs = runner.named(args, kwargs)
        if torch.compiler.is_compiling():
            if self._checkpointed():
                return self._uncompiled(layer, x, kwargs)
            run = None
        else:
            run = self.passes.again(layer, x)
        return self._pass(layer, run, x, kwargs)

    @torch.compiler.disable(reason="activation checkpointing of an encoder with methods")
    def _uncompiled(self, layer: int, x: Tensor, kwargs: dict[str, Any]) -> Any:
        return self._pass(layer, self.passes.again(layer, x), x, kwargs)

    def _pass(self, layer: int, run: EncoderRun | None, x: Tensor, kwargs: dict[str, Any]) -> Any:
        """A block in a run of a backward pass, or (None) in the running call."""
        if run is None:
            run = self._begin(x) if layer == 0 else self.run
        if run is None:
            raise RuntimeError(
                "a wrapped encoder was entered in the middle: call the model from its first block"
            )
        checkpoint = self.runners[layer].checkpoints()
        if checkpoint is None:
            return self.block(layer, run, x, kwargs)
        block = BlockPass(self.block, layer, run, kwargs)
        return checkpoint(Again(self.owner, block, block), x)

    def _checkpointed(self) -> bool:
        """Tell whether the model is set to run its blocks again in the backward pass."""
        flag = getattr(self.owner.root, "grad_checkpointing", False)
        return torch.is_grad_enabled() and (
            bool(flag) or any(r.checkpointed() for r in self.runners)
        )

    def block(self, layer: int, run: EncoderRun, x: Tensor, kwargs: dict[str, Any]) -> Any:
        """One pass through a block: of a call, or of its backward pass."""
        runner = self.runners[layer]
        compiling = torch.compiler.is_compiling()
        if not compiling and run.first is None:
            self.passes.watch(run, layer, x)
        run.prefix = self.prefix + runner.more
        self._expect(run, x, layer)
        if run.restoring:
            x = run.short(x)
        given, kwargs = kwargs, runner.narrow(kwargs, run)
        probe = self._probe(run, layer, x)
        x = runner.attend(x, probe, kwargs)
        if probe is not None and probe.method is not None and probe.out is None:
            raise RuntimeError(
                f"block {layer} of {self.owner.info.family} did not give its attention to a method: its runner must "
                "compute it with probe.attend(q, k, v)"
            )
        before = x.shape[1] - run.prefix
        x = visit(self, run, layer, "middle", x, probe, given)
        after = x.shape[1] - run.prefix
        x = runner.feed(x, kwargs)
        x = visit(self, run, layer, "end", x, probe, given)
        run.trace.count("encoder", layer, before, after)
        if layer == len(self.runners) - 1 and run.first is None:
            self._finish(run)
        if run.restoring and run.cut:
            x, run.base = run.full(x), None
        if not compiling:
            self.passes.leave(run, layer, x)
        return runner.returned(x)

    def _finish(self, run: EncoderRun) -> None:
        """After the last block."""
        run.memory.clear()
        # Written only if it was: an attribute that is new in the next call compiles a model again.
        if self.pixels is not None:
            self.pixels = None
        if self.small is not None:
            self.small = None

    def _begin(self, x: Tensor) -> EncoderRun:
        if x.dim() != 3:
            raise TypeError(f"expected a (batch, tokens, channels) sequence, got {tuple(x.shape)}")
        whole = self.restoring or self.whole
        run = EncoderRun(x.shape[0], x.shape[1] - self.prefix, self.prefix, whole)
        if run.tokens < 1:
            raise ValueError(f"the sequence has {x.shape[1]} tokens, {self.prefix} of them prefix")
        check_graph(self.owner.active)
        root = self.owner.root
        run.grid, run.pixels, run.training = self.grid(run.tokens), self.pixels, root.training
        run.entries = self.owner.active
        run.checkpointed = self._checkpointed()
        run.image, self.image = self.image, None
        self.run = run
        if not torch.compiler.is_compiling() and in_backward():
            run.late = True  # the whole encoder runs again, and has its trace already
            return run
        self.latest = run
        self._trace(run)
        if run.image is not None:
            self._note(run, run.image)
        return run

    def _trace(self, run: EncoderRun) -> None:
        """Make the trace of a run that begins known."""
        self.owner.trace = run.trace

    def _note(self, run: EncoderRun, small: Smaller) -> None:
        """Record that the pictures are smaller."""
        step = small.map
        if run.tokens != step.n_out:
            raise RuntimeError(
                f"{self.owner.info.family} made {run.tokens} tokens of a picture of "
                f"{small.grid[0]} x {small.grid[1]} patches"
            )
        name = small.entry.method.name
        run.trace.stages.append(
            StageRecord("image", 0, name, step.n_in, step.n_out, step, step, small.before)
        )

    def _expect(self, run: EncoderRun, x: Tensor, layer: int) -> None:
        now = run.tokens if run.map is None or run.restoring else run.map.n_out
        if run.restoring and run.image is not None and layer > 0:
            now = run.image.map.n_in
        if x.shape[1] != now + run.prefix or x.shape[0] != run.batch:
            raise RuntimeError(
                f"block {layer} got a sequence of shape {tuple(x.shape)}, expected "
                f"({run.batch}, {now + run.prefix}, ...): was the model changed between its blocks, or "
                "called inside its own call?"
            )
        if run.map is not None and run.map.kept.device != x.device:
            raise RuntimeError(
                f"the tokens were cut on {run.map.kept.device}, but block {layer} runs on {x.device}: "
                "keep all blocks of the encoder on one device"
            )

    def _probe(self, run: EncoderRun, layer: int, x: Tensor) -> Probe | None:
        has_padding = run.map is not None and run.map.has_padding
        if not self.runners[layer].split:
            if has_padding:
                raise ValueError(
                    f"block {layer} cannot mask padding: samples of this batch have different numbers "
                    "of tokens; use a fixed budget, or batch size 1"
                )
            return None
        bias = policy = None
        counts = run.counts if layer in self.biased else None
        if run.map is not None and has_padding and counts is None:
            counts = run.map.size.clamp(max=1)
        if counts is not None:  # padding counts 0, so that its bias is -inf
            bias = log_sizes(torch.cat([counts.new_ones(run.batch, run.prefix), counts], 1))
        if run.policy is not None:
            ones = run.policy.new_ones(run.batch, run.prefix)
            policy = torch.cat([ones, run.policy], 1)
        entry = self.attending.get(layer)
        if entry is not None:
            return Probe(bias, policy, Attending(self, run, layer, entry, x, bias, policy))
        if bias is None and policy is None and layer not in self.probed:
            return None
        return Probe(bias, policy)

    # ---- after the blocks -------------------------------------------------------------------

    def pool_sizes(self, x: Tensor) -> Tensor | None:
        """(B, N) sizes by which the pooling must weigh the visual tokens of x, or None.

        Raises:
            RuntimeError: x is of a call in another thread, whose sizes are not known here.
        """
        run = self.run
        if run is not None:
            return self._sizes(run, x)
        if self.latest is not None and self._sizes(self.latest, x) is not None:
            raise RuntimeError(
                "the pooling must weigh tokens by what this model's call has merged, but the call ran in "
                "another thread: pool in the thread that runs the blocks, or use output='restored'"
            )
        return None

    def _sizes(self, run: EncoderRun, x: Tensor) -> Tensor | None:
        if run.policy is not None:  # training: as if they were gone
            none = run.policy.sum(1, keepdim=True) == 0
            counts = run.policy + none
            counts = counts if run.mass is None else counts * run.mass
            return counts if x.shape[1] == run.tokens + self.prefix else None
        if run.map is None or x.shape[1] != run.map.n_out + self.prefix:
            return None  # nothing happened, or a restored sequence, which is pooled as it is
        if run.counts is not None:
            return run.counts
        return run.map.size.clamp(max=1) if run.map.has_padding else None

    def flops(self) -> tuple[int, int]:
        """Dense and reduced FLOPs of the blocks for the last call, per sample."""
        root, trace = self.owner.root, self.owner.trace
        counted = trace.tokens.get("encoder", {})
        tokens = counted.get(0, (0, 0))[0]
        whole = next((s.tokens_in for s in trace.stages if s.site == "image"), tokens)
        notes = trace.notes.get("attention", {}) if self.attending else {}
        dense = reduced = 0
        for layer, runner in enumerate(self.runners):
            before, after = counted.get(layer, (tokens, tokens))
            prefix = self.prefix + runner.more
            dense += runner.flops(whole + prefix, whole + prefix)
            reduced += runner.flops(before + prefix, after + prefix)
            reduced -= saved_flops(runner, notes.get(layer, {}), before + prefix)
        for entry in self.owner.active:
            worked = root.training or any(s.method == entry.method.name for s in trace.stages)
            if entry.modules is not None and worked:
                reduced += entry.method.overhead(entry.modules, tokens)
        return dense, reduced
