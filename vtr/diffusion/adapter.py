"""The adapter for diffusers: pipelines and their transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vtr.compat.diffusers import CONTEXT, ENDED
from vtr.compat.torch import in_backward
from vtr.core.calibration import Fingerprint, fingerprint
from vtr.core.method import Method
from vtr.core.recompute import Again, adopt, release
from vtr.core.site import ModelInfo
from vtr.core.trace import Trace
from vtr.core.wrapping import Bound, Entry, PerThread, Wrapping, _Absent
from vtr.diffusion import block as _block
from vtr.diffusion.attention import compute
from vtr.diffusion.block import parts_of
from vtr.diffusion.families import FAMILIES as _FAMILIES
from vtr.diffusion.families import blocks_of, layers_of
from vtr.diffusion.processor import SiteProcessor, site_processor
from vtr.diffusion.run import DiffusionCall, DiffusionRun, Paddings
from vtr.diffusion.session import ScheduleRef, Session
from vtr.diffusion.site import BlockSite, CallFacts, DiffusionAttentionSite
from vtr.diffusion.targets import Experts, locate, supported
from vtr.diffusion.unet import unet_blocks
from vtr.errors import UnsupportedMethodError, UnsupportedModelError

__all__ = ["FAMILIES", "locate", "wrap"]

FAMILIES = tuple(f"{f.name} (diffusers)" for f in _FAMILIES)


def wrap(root: nn.Module) -> Wrapping:
    """A wrapping of one transformer, or of the transformers of a pipeline."""
    return DiffusionWrapping(root)


class DiffusionWrapping(Wrapping):
    """Patches: the processor of every attention layer, ``cache_context`` (names of branches), and a
    pre-hook of the transformer (grid, step).

    Attributes:
        members: the transformers.
        family, heads, head_dim: what they are.
        block_of: the block of each attention layer.
        schedule: the pipeline or scheduler that runs them.
        by_layer, by_block: the method of each attention layer and block that has one.
        inside: a transformer is running, or its last call was broken off.
        thread: the one that called a transformer last.
        shared: dicts of methods by (method, transformer) that live across runs, for masks.
        session: counts runs and steps.
        contexts: names of the branches that are open in this thread.
        run, call: the last ones; ``call`` is None before the first.

    Options of ``apply``, for a transformer without its pipeline:
        steps: denoising steps of a run.
        scheduler: the scheduler of diffusers that runs it; it tells the steps, and their number, even
            if the timesteps given to the transformer are rounded to one number.
    """

    options: dict[str, Any] = {"steps": None, "scheduler": None}
    contexts = PerThread[list[tuple[str, dict[str, Any]]]](make=list)

    def __init__(self, root: nn.Module) -> None:
        self.members = cast(list[Any], root.members if isinstance(root, Experts) else [root])
        self.family = supported(self.members[0])
        layers = layers_of(self.family, self.members[0])
        self.heads, self.head_dim, width = _sizes(layers[0][1])
        self.block_of = [number for number, _ in layers]
        self.schedule = ScheduleRef()
        self.by_layer: dict[int, Entry] = {}
        self.by_block: dict[int, Entry] = {}
        self._forget()
        unet = unet_blocks(self.members[0]) if self.family.unet else []
        looks = {"qkv", "denoising", "hidden"} | ({"frames"} if self.family.video else set())
        info = ModelInfo(
            self.family.name,
            {"attention": len(layers), "block": self.block_of[-1] + 1},
            {"attention": frozenset(looks), "block": frozenset({"hidden"})},
            dim=width,
            heads=self.heads,
            head_dim=self.head_dim,
            experts=len(self.members),
            downsample=tuple(found.downsample for found in unet),
        )
        super().__init__(root, info)

    def _forget(self) -> None:
        """No run has begun."""
        self.session = Session()
        self.run = DiffusionRun()
        self.call: DiffusionCall | None = None
        self.inside, self.thread = False, 0
        self.shared: dict[tuple[int, int], dict[Any, Any]] = {}
        self._paddings = Paddings()

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts without a run: tensors of one may belong to a graph, masks are built again.
        state = {k: v for k, v in super().__getstate__().items() if k != "trace"}
        fresh = {
            "session": Session(),
            "run": DiffusionRun(),
            "call": None,
            "shared": {},
            "inside": False,
        }
        return {**state, **fresh, "_paddings": Paddings(), "_trace": Trace()}

    def attach(self, target: Any) -> None:
        """Remember the pipeline that ``apply`` was given: it knows the schedule."""
        if target is not self.root and hasattr(target, "scheduler"):
            self.schedule = ScheduleRef(target)

    def fingerprint(self) -> Fingerprint:
        """The identity of the transformer, or of all transformers of the pipeline together.

        The hashed weight is that of the last attention module: fine-tuning changes it, LoRA does not.
        """
        found = [fingerprint(m, layers_of(self.family, m)[-1][1]) for m in self.members]
        if len(found) == 1:
            return found[0]
        hashes = [own.sha256 for own in found]
        both = hashlib.sha256("".join(hashes).encode()).hexdigest() if all(hashes) else ""
        sizes = {**found[0].sizes, "transformers": len(found)}
        return dataclasses.replace(found[0], sizes=sizes, sha256=both)

    # ---- applying -------------------------------------------------------------------------------

    def add(self, entries: Sequence[Entry]) -> None:
        super().add(entries)
        for entry in entries:
            # Not held by the entry: a copy of the transformer is run by another scheduler.
            scheduler = entry.options.pop("scheduler", None)
            if scheduler is not None:
                self.schedule = ScheduleRef(scheduler=scheduler)

    def check(self, method: Method, options: dict[str, Any]) -> None:
        steps = options.get("steps")
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            raise ValueError(f"steps must be the number of denoising steps, got {steps!r}")
        scheduler = options.get("scheduler")
        if scheduler is not None and not hasattr(scheduler, "timesteps"):
            raise ValueError(
                "scheduler must be the scheduler of diffusers whose timesteps the transformer is "
                f"called with, got {type(scheduler).__name__}"
            )
        if self.family.unet and "attention" in method.sites:
            raise UnsupportedMethodError(
                f"{method.name} needs one grid of tokens for the whole model, and a UNet has tokens at "
                "several resolutions: use a method that merges around blocks (ToMeSD, SiTo, ToMA)"
            )
        super().check(method, options)
        if not {s.site for s in method.stages(self.info)} <= set(self.info.depth):
            raise UnsupportedMethodError(
                f"{method.name} acts at {', '.join(method.sites)}; a diffusion transformer has the "
                f"sites {', '.join(self.info.depth)}"
            )
        blocks = any(s.site == "block" for s in method.stages(self.info))
        if blocks and not self.family.merges:
            raise UnsupportedMethodError(
                f"{method.name} merges tokens, and the blocks of {self.family.name} have tokens of another "
                "kind in front of the image or video: use a method for attention"
            )
        if "mlp" in parts_of(method) and self.family.mlp is None:
            raise UnsupportedMethodError(
                f"{method.name} merges around MLPs, and {self.family.name} has blocks without an MLP: "
                "merge around attention only"
            )
        if "cross" in parts_of(method) and self.family.cross is None:
            raise UnsupportedMethodError(
                f"{method.name} merges around cross-attention, which works in UNets, and this is "
                f"{self.family.name}: leave merge_cross=False"
            )
        from vtr.kernels.attention import TRITON_DIMS

        if getattr(method, "backend", "auto") == "triton" and self.head_dim not in TRITON_DIMS:
            raise UnsupportedMethodError(
                f"the Triton kernels have head dims {TRITON_DIMS}, {self.family.name} here has "
                f'{self.head_dim}: leave backend="auto"'
            )

    def install(self) -> None:
        stages = self.stages()
        self.by_layer = {s.layer: e for e, s in stages if s.site == "attention"}
        self.by_block = {s.layer: e for e, s in stages if s.site == "block"}
        for index, member in enumerate(self.members):
            for layer, (_, attention) in enumerate(layers_of(self.family, member)):
                current: Any = attention.processor
                while isinstance(current, SiteProcessor):
                    owner = current.vtr_attend.owner
                    if owner is self or not owner.active:
                        # Put back by who had kept it (unfuse_qkv_projections) after its time.
                        current = current.vtr_original
                        continue
                    raise UnsupportedModelError(
                        "this transformer is wrapped by another vtr.apply (on the pipeline, or on "
                        "the transformer itself): give all methods to one of them"
                    )
                self.patch(attention, "processor", self._processor(current, layer))
            self._install_blocks(member)
            if hasattr(member, CONTEXT):
                self.patch(member, CONTEXT, Bound(self, "context", index))
                self.patch(member, ENDED, Bound(self, "ended", index))
            self.hook(
                member.register_forward_pre_hook(Bound(self, "enter", index), with_kwargs=True)
            )
            self.hook(member.register_forward_hook(Bound(self, "leave"), always_call=True))

    def _processor(self, current: Any, layer: int) -> SiteProcessor:
        around = None
        if self.block_of[layer] in self.by_block:
            around = Bound(self, "around", layer)
        entry = self.by_layer.get(layer)
        needs = {} if entry is None else entry.method.requirements(self.info)
        looks = "hidden" in needs.get("attention", ())
        return site_processor(current, Bound(self, "attention", layer), around, looks)

    def _install_blocks(self, member: Any) -> None:
        if self.family.loops:
            part = getattr(member, self.family.loops)
            self.hook(part.register_forward_pre_hook(Bound(self, "count_rows")))
        for first, holder in self._holders(member):
            self.hook(
                holder.register_forward_pre_hook(Bound(self, "level", first), with_kwargs=True)
            )
        for number, block in enumerate(blocks_of(self.family, member)):
            entry = self.by_block.get(number)
            if entry is None:
                continue
            self.hook(
                block.register_forward_pre_hook(Bound(self, "block", number), with_kwargs=True)
            )
            names = {"mlp": self.family.mlp, "cross": self.family.cross}
            for part in ("mlp", "cross"):
                inner = getattr(block, names[part] or "", None)
                if part in parts_of(entry.method) and inner is not None:
                    self.hook(inner.register_forward_pre_hook(Bound(self, "before", number)))
                    self.hook(inner.register_forward_hook(Bound(self, "after", number)))

    def _holders(self, member: Any) -> list[tuple[int, Any]]:
        """The models in a UNet that hold blocks, each with the number of its first block."""
        found = unet_blocks(member) if self.family.unet else []
        first = {id(each.holder): number for number, each in reversed(list(enumerate(found)))}
        return [(n, each.holder) for n, each in enumerate(found) if first[id(each.holder)] == n]

    def check_together(self, entries: Sequence[Entry]) -> None:
        super().check_together(entries)
        blocks: dict[int, Entry] = {}
        for entry in entries:
            blocks |= {s.layer: entry for s in entry.method.stages(self.info) if s.site == "block"}
        for entry in entries:
            for stage in entry.method.stages(self.info):
                merger = blocks.get(self.block_of[stage.layer])
                if stage.site == "attention" and merger is not None:
                    raise ValueError(
                        f"{merger.method.name} merges tokens around attention layer {stage.layer}, "
                        f"where {entry.method.name} needs all of them: give them different "
                        "dense_layers"
                    )

    def uninstall(self) -> None:
        # A processor that was set after apply is the user's: it stays.
        for at, (owner, name, before) in enumerate(self._patched):
            if name == "processor":
                current = owner.__dict__.get(name)
                if isinstance(current, SiteProcessor):
                    current = current.vtr_original
                    # One with weights is a submodule; only ours was in the instance's attributes.
                    before = _Absent if isinstance(current, nn.Module) else current
                elif current is not None:
                    before = current
                self._patched[at] = (owner, name, before)
        super().uninstall()
        for member in self.members:
            for module in (member, *(holder for _, holder in self._holders(member))):
                release(self, module)
        self._forget()

    # ---- during a call --------------------------------------------------------------------------

    @contextlib.contextmanager
    def context(self, index: int, name: str, **facts: Any) -> Iterator[None]:
        """In place of the transformer's ``cache_context``: the name of the branch, on its way."""
        member = self.members[index]
        self.contexts.append((name, facts))
        try:
            with getattr(type(member), CONTEXT)(member, name, **facts):
                yield
        except BaseException:
            if self.thread == threading.get_ident():
                self.inside = False
                self.session.end()
            raise
        finally:
            self.contexts.pop()

    def ended(self, index: int, *args: Any, **kwargs: Any) -> None:
        """In place of what a pipeline calls on its transformers at its end: states are let go."""
        self.run.states.clear()
        self.session.end()
        member = self.members[index]
        getattr(type(member), ENDED)(member, *args, **kwargs)

    @torch.compiler.disable(recursive=False)
    def checkpointed(self, function: Any, block: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of diffusers' ``function`` that checkpoints a block."""
        return function(Again(self, self, block), *args, **kwargs)

    def facts(self) -> DiffusionCall | None:
        """For :class:`vtr.core.recompute.Again`: the running call."""
        return self.call

    @contextlib.contextmanager
    def repeating(self, facts: DiffusionCall | None) -> Iterator[None]:
        """For :class:`vtr.core.recompute.Again`: put an earlier call in place, and back the last."""
        now = self.call
        self.call = None if facts is None else facts.repeated()
        try:
            yield
        finally:
            self.call = now

    @torch.compiler.disable
    def enter(
        self, index: int, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """At the start of a forward call of a transformer."""
        if self.inside:
            # Once: that one may have been broken off, which does not show in every way.
            self.inside = False
            self._check_thread()
            self.session.end()  # the last one was broken off, and its run with it
        self.inside, self.thread = True, threading.get_ident()
        given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        view = self.family.view(model, given)
        name, facts = self.contexts[-1] if self.contexts else (None, {})
        time, inputs = given[self.family.time], given[self.family.latents]
        value = float(time.max()) if isinstance(time, Tensor) else float(time)
        rounded = (value, self.family.scale, time.dtype if isinstance(time, Tensor) else None)
        if self.family.flipped:
            value = 1000.0 - 1000.0 * value
            rounded = (value, 1.0, None)
        clock, latents = self.schedule.clock(), None
        if not clock.tells_steps:
            one = inputs if isinstance(inputs, Tensor) else torch.stack(inputs)
            latents = torch.linalg.vector_norm(one.detach().float())
        number, step, branch = self.session.enter(
            index,
            value,
            name=name,
            index=facts.get("step_index"),
            clock=clock,
            repeats=lambda: self.schedule.repeats(*rounded),
            latents=latents,
            rising=self.family.rising,
            training=model.training,
        )
        if number != self.run.number:
            self.run = DiffusionRun(number, self.schedule.steps(*rounded))
        said = [e.options["steps"] for e in self.active if e.options.get("steps")]
        seen = CallFacts(
            run=number,
            step=step,
            steps=said[0] if said else facts.get("num_inference_steps") or self.run.steps,
            timestep=value,
            branch=branch,
            grid=view.grid,
            text_first=self.family.text_first,
            text_valid=self.same_text(view.seen(self.family.text_first)),
            extra=view.extra,
            training=model.training,
            expert=index,
            expert_step=self.run.enter(index, step),
        )
        batch = len(inputs)
        self._trace = Trace(batch=batch, notes={"attention": {}})
        self.call = DiffusionCall(seen, batch, batch, self._trace, self.run.costs)
        self._adopt(model)

    @torch.compiler.disable
    def leave(self, *call: Any) -> None:
        """At the end of a forward call; of one that has raised, its run is broken off."""
        if self.thread == threading.get_ident():
            self.inside = False
            if call[-1] is None:
                self.session.end()

    def _check_thread(self) -> None:
        """Raise ``RuntimeError`` if the call that is running is of another thread."""
        if self.thread != threading.get_ident():
            raise RuntimeError(
                f"this {self.family.name} transformer is running in another thread, and the steps and "
                "states of a method are those of one run at a time: let one run follow the other, or "
                "give each thread a copy (copy.deepcopy of the pipeline)"
            )

    def same_text(self, valid: Tensor | None) -> Tensor | None:
        """The padding of an earlier call if it is equal; see :class:`Paddings`."""
        return self._paddings.same(valid)

    def _adopt(self, model: nn.Module) -> None:
        """Wrap processors and checkpointing that were set after apply (fused projections...)."""
        for module in (model, *(holder for _, holder in self._holders(model))):
            adopt(self, module)
        for layer, (_, attention) in enumerate(layers_of(self.family, model)):
            current: Any = attention.processor
            if not isinstance(current, SiteProcessor):
                attention.__dict__["processor"] = self._processor(current, layer)

    @torch.compiler.disable
    def attention(
        self, layer: int, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
        hidden: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """In place of the attention function of a processor."""
        if self.inside and not in_backward():
            self._check_thread()
        return compute(self, layer, function, args, kwargs, hidden)

    @torch.compiler.disable
    def count_rows(self, module: nn.Module, args: Any) -> None:
        """Before the blocks, which may be compiled whole: FasterCache leaves out half of some batches."""
        if self.call is not None:
            self.call.rows = args[0].shape[0]

    @torch.compiler.disable
    def level(self, first: int, holder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the start of a part of a UNet: the grid of its blocks, of which one has the number ``first``."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.call is not None:
            for number in range(first, first + len(holder.transformer_blocks)):
                self.call.grids[number] = (1, *hidden.shape[-2:])

    @torch.compiler.disable
    def block(
        self, number: int, module: nn.Module, args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        """At the input of a block: what its tokens are merged into."""
        _block.enter(self, number, module, args, kwargs)

    @torch.compiler.disable
    def around(self, layer: int, function: Any, args: Any, kwargs: Any) -> Any:
        """In place of a processor, in blocks whose tokens may be merged around it."""
        return _block.attention(self, layer, function, args, kwargs)

    @torch.compiler.disable
    def before(self, number: int, module: nn.Module, args: Any) -> Any:
        return _block.before(self, number, args)

    @torch.compiler.disable
    def after(self, number: int, module: nn.Module, args: Any, out: Any) -> Any:
        return _block.after(self, number, out)

    def attention_site(
        self, layer: int, entry: Entry, facts: CallFacts, heads: tuple[Tensor, Tensor, Tensor],
        scale: float, dense: Callable[[], Tensor], hidden: Tensor | None = None,
    ) -> DiffusionAttentionSite:  # fmt: skip
        """The site of one attention call, with the state of its method."""
        assert self.call is not None
        which, index = self.entries.index(entry), facts.expert
        q, k, v = heads
        return DiffusionAttentionSite(
            call=facts, layer=layer, layers=self.info.depth["attention"], q=q, k=k, v=v, scale=scale,
            dense=dense, hidden=hidden,
            state=self.run.state(q.shape[0], which, index, facts.branch, layer),
            shared=self.shared.setdefault((which, index), {}),
            memory=self.call.memory.setdefault(which, {}),
            notes=self.call.notes(layer),
            table=entry.table, modules=entry.modules_like(q), backend=getattr(entry.method, "backend", "auto"),
        )  # fmt: skip

    def block_site(self, number: int, hidden: Tensor) -> BlockSite:
        """The site of one block, with the state of its method."""
        assert self.call is not None
        facts, which = self.call.facts_at(number), self.entries.index(self.by_block[number])
        return BlockSite(
            call=facts, layer=number, layers=self.info.depth["block"], hidden=hidden,
            state=self.run.state(hidden.shape[0], which, facts.expert, facts.branch, "block", number),
            shared=self.shared.setdefault((which, facts.expert), {}),
            memory=self.call.memory.setdefault(which, {}),
            notes=self.call.trace.notes.setdefault("block", {}).setdefault(number, {}),
        )  # fmt: skip

    def release(self, layer: int, entry: Entry, facts: CallFacts) -> None:
        """Let go of what :meth:`attention_site` gave as the state of this method and branch."""
        self.run.release(self.entries.index(entry), facts.expert, facts.branch, layer)

    def costs(self) -> dict[str, Any] | None:
        layers = self._trace.notes.get("attention")
        if not layers:
            return None
        last = [note["flops"] for note in layers.values() if "flops" in note]
        return {
            "attention, last call": (round(sum(d for d, _ in last)), round(sum(float(r) for _, r in last))),
            "attention, this run": (round(float(self.run.costs[0])), round(float(self.run.costs[1]))),
        }  # fmt: skip

    @property
    def trace(self) -> Trace:
        """The last call. ``notes["attention"][layer]`` has ``density`` (float) and ``flops``."""
        for note in self._trace.notes.get("attention", {}).values():
            for key, value in note.items():
                if isinstance(value, Tensor) and value.ndim == 0:
                    note[key] = float(value)
            if "flops" in note:
                note["flops"] = tuple(float(n) for n in note["flops"])
        return self._trace

    @trace.setter
    def trace(self, trace: Trace) -> None:
        self._trace = trace


def _sizes(attention: Any) -> tuple[int, int, int]:
    """Number of heads, their dimension, and the width of the hidden states."""
    heads = int(attention.heads if hasattr(attention, "heads") else attention.num_heads)
    query = attention.to_q if hasattr(attention, "to_q") else attention.to_query
    # Quantised weights are packed: their shape is not the layer's.
    return heads, int(query.out_features) // heads, int(query.in_features)
