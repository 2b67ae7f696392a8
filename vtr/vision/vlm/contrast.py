"""Decoding by contrast: the logits of every step, against those of another run of the model.

While ``generate`` runs, a logits processor runs the language model a second time, on the same prompt with
fewer visual tokens. It does so behind the model's own call: no method acts on the second run, which has its
own KV cache. It takes embeddings and positions from the model's calls and enters the language model itself, so
that neither the vision tower nor what a model keeps between calls (``rope_deltas``) is touched, and padding is
counted as ``generate`` counts it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.compat.transformers import (
    BEAMS,
    DEEPSTACK_FEATURES,
    DEEPSTACK_MASKS,
    GENERATION,
    PROCESSORS,
    TOKEN_TYPES,
    given_cache,
    new_cache,
    with_processors,
)
from vtr.core.wrapping import Bound, Entry, PerThread, Threaded
from vtr.errors import UnsupportedMethodError
from vtr.vision.vlm.branch import Branch, NewColumns, branch_of, keep_branch
from vtr.vision.vlm.cache import cached, cuts_of, length_of
from vtr.vision.vlm.deepstack import narrowed
from vtr.vision.vlm.placeholders import find
from vtr.vision.vlm.sequence import SequenceLayout, follow, padding_mask, positions_along
from vtr.vision.vlm.visit import language_site

if TYPE_CHECKING:
    from vtr.vision.vlm.call import LanguageCall
    from vtr.vision.vlm.wrapping import VLMWrapping


class ContrastSession(Threaded):
    """Contrasts the logits of a model, by the one method that does.

    Attributes:
        entry: the method, None without one.
        running: this thread's generate.
        inside: whether the second run runs in this thread.
    """

    running = PerThread[Any](lambda: None)  # a weak reference
    inside = PerThread[bool](False)

    def __init__(self, owner: VLMWrapping) -> None:
        super().__init__()
        self.owner = owner
        self.entry: Entry | None = None

    def install(self) -> None:
        owner = self.owner
        self.forget()
        self.entry = next((e for e, s in owner.stages() if s.site == "logits"), None)
        if self.entry is None:
            return
        owner.patch(owner.root, PROCESSORS, Bound(self, "processors"))
        owner.hook(owner.lm.register_forward_pre_hook(Bound(self, "before"), with_kwargs=True))

    def check_together(self, entries: Sequence[Entry]) -> None:
        """Raise ``ValueError`` if a method that contrasts cannot be combined with another one."""
        stages = [(e.method.name, e.method.stages(self.owner.info)) for e in entries]
        contrasts = [name for name, found in stages if any(s.site == "logits" for s in found)]
        if len(contrasts) > 1:
            raise ValueError(
                f"{' and '.join(contrasts)} both contrast the logits: apply one of them"
            )
        for name, found in stages if contrasts else ():
            if any(s.cuts and s.site in ("image", "pixels", "encoder") for s in found):
                raise ValueError(
                    f"{contrasts[0]} chooses among all visual tokens of a prompt, of which {name} cuts some "
                    "before it: apply one that cuts at the prompt or inside the language model"
                )

    def refuse_drafts(self) -> None:
        """Raise ``UnsupportedMethodError``: assisted decoding begins."""
        if self.entry is not None:
            raise UnsupportedMethodError(
                f"{self.entry.method.name} contrasts one token at a time, and assisted decoding judges several "
                "drafts at once: generate without an assistant model and prompt_lookup_num_tokens"
            )

    # ---- generate ---------------------------------------------------------------------------

    def processors(self, *args: Any, **kwargs: Any) -> Any:
        """generate lists its logits processors."""
        root: Any = self.owner.root
        names = inspect.signature(getattr(type(root), PROCESSORS)).bind(root, *args, **kwargs)
        beams = getattr(names.arguments[GENERATION], BEAMS, None) or 1
        answer = Answer(self, beams)
        # The processors own it: with them it goes at the end of generate, or when generate fails.
        self.running = weakref.ref(answer)
        return with_processors(root, Contrast(answer), Plausible(answer), *args, **kwargs)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The language model is entered."""
        answer = self.running()
        if answer is not None and not self.inside and self.owner.language.purpose.generating:
            answer.calls.append(GivenCall(kwargs))

    def prompt(self, call: LanguageCall, embeds: Tensor) -> None:
        """A call with visual tokens has begun, of which nothing is cut yet."""
        answer = self.running()
        if answer is None or not call.purpose.generating or not answer.calls:
            return
        given = answer.calls[-1]
        if answer.branch is not None and answer.branch.seen > given.before:
            return  # without a cache every call runs the prompt
        given.choose(self, call, embeds)

    def run(self, branch: Branch, columns: NewColumns) -> Tensor:
        """Run the second run's next columns; returns the logits of its last column, (B, V) float32."""
        self.inside = True
        try:
            hidden = branch.run(self.owner.lm, columns)
        finally:
            self.inside = False
        return self.head(hidden[:, -1:])

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (B, V) float32 of hidden states (B, 1, C)."""
        root: Any = self.owner.root
        return root.get_output_embeddings()(hidden)[:, -1].float()  # type: ignore[no-any-return]


class GivenCall:
    """A call of the language model that generate makes, as it was given.

    Attributes:
        before: columns of earlier calls, also of those that were cut.
        layout: what the second run sees of the call; None for everything.
        vector: (B, C) what the head reads instead of a second run; None if there is one.
        live: (B,) bool, samples with visual tokens; None in a call without any.
    """

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.kwargs = kwargs
        self.embeds: Tensor = kwargs["inputs_embeds"]
        self.cache = given_cache(kwargs)
        past, cuts = length_of(self.cache), cuts_of(self.cache)
        self.before = past if cuts is None or not past else past + cuts.offset
        self.layout: SequenceLayout | None = None
        self.vector: Tensor | None = None
        self.live: Tensor | None = None

    def choose(self, session: ContrastSession, call: LanguageCall, embeds: Tensor) -> None:
        """Ask the method what the other source sees of a prompt."""
        owner, entry = session.owner, session.entry
        assert entry is not None
        method: Any = entry.method
        site = language_site(call, entry, "logits", 0, "step", embeds)
        self.live = call.layout.valid_slots.any(1)
        notes = owner.tracing.notes.setdefault("logits", {})
        with call.casting(False):
            if not method.runs:
                self.vector = method.read(site)
                return
            kept = method.keep(site)
        layout, _, _ = call.layout.cut(kept, call.rank, owner.compact(entry, "logits"))
        tokens = layout.valid.sum(1)
        if not torch.equal(tokens, call.layout.valid.sum(1)):
            self.layout = layout
        notes["kept"], notes["tokens"] = kept, tokens

    def columns(self, skip: int, shift: Tensor | None) -> NewColumns:
        """Columns of the call from ``skip`` on, for the second run."""
        batch, length = self.embeds.shape[:2]
        total, kwargs = self.before + length, self.kwargs
        valid = padding_mask(kwargs.get("attention_mask"), batch, total, self.embeds.device)
        if valid is None:
            valid = torch.ones(batch, total, dtype=torch.bool, device=self.embeds.device)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(self.before, total, device=self.embeds.device)[None]
        types = {n: kwargs[n] for n in TOKEN_TYPES if isinstance(kwargs.get(n), Tensor)}
        layout = self.layout
        if layout is None:
            more = {n: x[:, -length:][:, skip:] for n, x in types.items()}
            if not skip:  # features that Qwen3-VL adds to visual tokens
                stack = (DEEPSTACK_MASKS, DEEPSTACK_FEATURES)
                more |= {n: kwargs[n] for n in stack if kwargs.get(n) is not None}
            embeds, valid = self.embeds[:, skip:], valid[:, self.before + skip :]
            positions = positions[..., skip:]
        else:
            index, valid = layout.index, layout.valid
            embeds = follow(self.embeds, index, valid)
            positions = positions_along(
                positions.expand(*positions.shape[:-2], batch, -1), index, valid
            )
            more = {n: follow(x[:, -length:], index, valid) for n, x in types.items()}
            more |= narrowed(kwargs, layout)
            if layout.adjust is not None:
                positions = positions - layout.adjust
        if shift is not None:
            positions = positions - shift[:, None]
        return NewColumns(embeds, valid, positions.clamp(min=0), more)


class Answer:
    """One generate.

    Attributes:
        calls: those of the language model that the second run has not followed yet.
        branch: the second run, None before a prompt with pictures.
    """

    def __init__(self, session: ContrastSession, beams: int) -> None:
        self.session, self.beams = session, beams
        self.calls: list[GivenCall] = []
        self.branch: Branch | None = None
        self.full: Tensor | None = None

    @property
    def method(self) -> Any:
        assert self.session.entry is not None
        return self.session.entry.method

    def other(self, ids: Tensor) -> Branch | None:
        """Follow the model's own run up to the step whose ids (B, n) are given; None without pictures so far."""
        calls, self.calls = self.calls, []
        if not calls:
            raise RuntimeError(
                f"{self.method.name} contrasts the logits of generate, which has not called the language model "
                "for this step: use greedy decoding, sampling or beam search of transformers"
            )
        branch = self.branch
        if branch is not None:
            if self.beams > 1:
                branch.follow(ids, self.beams)
        else:
            branch = self._begin(calls, ids)
            if branch is None:
                return None
        for call in calls:
            self._step(branch, call)
        branch.ids, self.branch = ids, branch
        keep_branch(calls[-1].cache, branch)
        return branch

    def _begin(self, calls: list[GivenCall], ids: Tensor) -> Branch | None:
        """The second run at the start of a generate: new, or that of the turns before."""
        first = calls[0]
        branch = branch_of(first.cache) if first.before else None
        if branch is None:
            pictured = self._pictured(first, ids) if first.before else False
            if pictured:
                raise self._unknown(first)
            if all(call.live is None for call in calls):
                return None
            branch = Branch(new_cache(self.session.owner.lm))
            if first.before:
                self._copy(branch, first, pictured)
            return branch
        assert branch.ids is not None
        most = min(first.before, branch.ids.shape[1])
        same = branch.ids.shape[0] == ids.shape[0] and torch.equal(
            branch.ids[:, :most], ids[:, :most]
        )
        if not same or first.before > branch.seen or not branch.crop(first.before):
            raise self._unknown(first)
        return branch

    def _pictured(self, first: GivenCall, ids: Tensor) -> bool | None:
        """Tell whether earlier columns have pictures; None if their ids are not known."""
        if ids.shape[1] != first.before + first.embeds.shape[1]:
            return None
        found = find(self.session.owner.inner, ids[:, : first.before], None)
        return found is not None and bool(found.any())

    def _copy(self, branch: Branch, first: GivenCall, pictured: bool | None) -> None:
        """Up to the first picture both runs are the same one."""
        owner, before = self.session.owner, first.before
        branch.seen = before
        if not self.method.runs:
            return
        if pictured is None or cuts_of(first.cache) is not None:
            raise self._unknown(first)
        for i in range(len(owner.layers)):
            found = cached(first.cache, i, before)
            if found is None:
                raise self._unknown(first)
            branch.cache.update(*found, i)
        batch, length = first.embeds.shape[:2]
        mask = first.kwargs.get("attention_mask")
        valid = padding_mask(mask, batch, before + length, first.embeds.device)
        every = torch.ones(batch, before, dtype=torch.bool, device=first.embeds.device)
        branch.mask = every if valid is None else valid[:, :before]

    def _unknown(self, first: GivenCall) -> RuntimeError:
        return RuntimeError(
            f"{self.method.name} runs the model a second time with fewer visual tokens, and has not done so for "
            f"the first {first.before} columns of this KV cache: begin with a new cache, and let generate write the "
            "whole conversation while the method is applied"
        )

    def _step(self, branch: Branch, call: GivenCall) -> None:
        skip = branch.seen - call.before
        if skip < 0 or (skip and call.cache is not None):
            raise self._unknown(call)
        end = call.before + call.embeds.shape[1]
        if self.method.runs:
            columns = call.columns(skip, branch.shift)
            branch.logits = self.session.run(branch, columns)
            if call.layout is not None and call.layout.tail is not None:
                tail = call.layout.tail
                branch.shift = tail if branch.shift is None else branch.shift + tail
        elif call.vector is not None:
            assert call.live is not None
            logits = self.session.head(call.vector[:, None])
            old = logits if branch.logits is None else branch.logits
            branch.logits = torch.where(call.live[:, None], logits, old)
        branch.seen = end
        if call.live is not None:
            branch.live = call.live if branch.live is None else branch.live | call.live
            branch.prompt = end


class Contrast:
    """The logits processor that contrasts, before all others."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answer = self.answer
        answer.full, branch = scores, answer.other(input_ids)
        if branch is None:
            return scores
        assert branch.logits is not None and branch.live is not None
        mixed = answer.method.contrast(scores, branch.logits.to(scores))
        return torch.where(branch.live.to(scores.device)[:, None], mixed, scores)


class Plausible:
    """The logits processor that leaves plausible tokens, behind all that forbid some."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answer, branch = self.answer, self.answer.branch
        if branch is None:
            return scores
        assert answer.full is not None and branch.live is not None
        none = -float("inf")
        allowed = answer.full.masked_fill(scores == none, none)
        left = scores.masked_fill(~answer.method.plausible(allowed), none)
        if answer.beams > 1:  # sums of log-probabilities are compared between beams
            left = left.log_softmax(-1)
        return torch.where(branch.live.to(scores.device)[:, None], left, scores)
