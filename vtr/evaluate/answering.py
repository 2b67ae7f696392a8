"""Answers of a wrapped model to prompts, with the cost of each."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtr.api import apply, handles
from vtr.compat.transformers import cache_of
from vtr.core.method import Method
from vtr.core.plan import Plan
from vtr.errors import UnsupportedModelError
from vtr.evaluate.cells import Cell
from vtr.evaluate.prompts import Prompt, cut
from vtr.evaluate.store import StoredAnswer
from vtr.inspect.flops import cache_bytes, count_flops


@dataclass(frozen=True, eq=False)
class Work:
    """A sample to answer: the place of its answer, its identity, and the prompt."""

    slot: int
    task: str
    doc: int
    idx: int
    prompt: Prompt


@dataclass(frozen=True)
class Cost:
    """Cost of a dense prefill of one sample: FLOPs of the whole model, bytes of its cache."""

    flops: float
    kv: float


class Answerer:
    """A model with its processor, and how large a batch it can take.

    Args:
        model, processor: of transformers, in eval mode.
        positions: option of :func:`vtr.apply`.
        size: samples in a batch.
        adapts: halve ``size`` for good when memory runs out; otherwise only the batch that failed is
            run again, sample by sample.
        frames: of a video.
        seed: of answers that are drawn.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        positions: str | None = None,
        size: int = 1,
        adapts: bool = False,
        frames: int = 8,
        seed: int = 0,
    ) -> None:
        self.model, self.processor = model, processor
        self.positions, self.size, self.adapts = positions, size, adapts
        self.frames, self.seed = frames, seed
        self._dense: dict[tuple[Any, ...], Cost | None] = {}
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.padding_side = "left"  # an answer follows the last token of every row
        config = model.config
        marks = (getattr(config, f"{kind}_token_id", None) for kind in ("image", "video"))
        self._visual = [m for m in marks if m is not None]

    def apply(self, methods: tuple[Method, ...], plan: Plan | None = None) -> Any:
        """Return a handle, or without methods a context that does nothing.

        Args:
            methods: applied together.
            plan: has their calibrated numbers.
        """
        if not methods:
            return nullcontext()
        given = list(methods) if plan is None else replace(plan, methods=methods)
        return apply(self.model, given, positions=self.positions)

    def check(self, cell: Cell) -> None:
        """Raise where the cell's methods cannot work on the model."""
        with self.apply(cell.draw(0), cell.plan):
            pass

    # ---- batches ----------------------------------------------------------------------------

    def answers(
        self, works: Sequence[Work], cell: Cell
    ) -> Iterator[list[tuple[Work, StoredAnswer]]]:
        """Answer all, a batch at a time; store each batch before the next begins."""
        groups: dict[tuple[Any, ...], list[Work]] = {}
        for work in works:
            p = work.prompt
            shape = (len(p.images), len(p.videos), str(p.generation), p.until, p.samples)
            groups.setdefault((cell.draw(work.doc), shape), []).append(work)
        for (methods, shape), group in groups.items():
            with self.apply(methods, cell.plan) as handle:
                # A drawn answer must not depend on its neighbours; videos differ in their shapes.
                alone = shape[-1] or shape[1]
                start = 0
                while start < len(group):
                    part = group[start : start + (1 if alone else self.size)]
                    done = self._answered(part, handle)
                    if done is not None:
                        yield done
                        start += len(part)

    def _answered(self, works: list[Work], handle: Any) -> list[tuple[Work, StoredAnswer]] | None:
        """Answer a batch; if it raises, sample by sample: what raises alone is recorded so.

        None when memory ran out and the batches are smaller from now on: to be tried again.
        """
        try:
            return list(zip(works, self._generate(works, handle), strict=True))
        except Exception as error:
            failure: Exception | None = error
        # Out of the handler: the traceback would keep the failed call's tensors alive.
        assert failure is not None
        full, text = _out_of_memory(failure), explain(failure)
        failure = None
        if full and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(works) == 1:
            (work,) = works
            return [(work, StoredAnswer(work.doc, work.idx, work.prompt.key, "", error=text))]
        if full and self.adapts:
            self.size = len(works) // 2
            return None
        alone = [self._answered([work], handle) for work in works]
        return [pair for pairs in alone if pairs is not None for pair in pairs]

    # ---- one call ---------------------------------------------------------------------------

    def encode(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Compute the processor's inputs on the model's device."""
        from vtr.evaluate.videos import load_videos

        texts = [
            self.processor.apply_chat_template(
                p.messages, add_generation_prompt=True, tokenize=False
            )
            for p in prompts
        ]
        media: dict[str, Any] = {}
        if any(p.images for p in prompts):
            nested = len(prompts) > 1 or len(prompts[0].images) > 1
            pictures = [list(p.images) for p in prompts]
            media["images"] = pictures if nested else pictures[0]
        if any(p.videos for p in prompts):
            media |= load_videos([v for p in prompts for v in p.videos], self.frames)
        # One special token too many changes answers; templates write their own.
        begins = getattr(getattr(self.processor, "tokenizer", None), "bos_token", None)
        if begins and all(t.startswith(begins) for t in texts):
            media["add_special_tokens"] = False
        inputs = self.processor(text=texts, return_tensors="pt", padding=True, **media)
        moved = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                value = value.to(self.model.device)
                if value.is_floating_point():
                    value = value.to(self.model.dtype)
            moved[name] = value
        return moved

    @torch.inference_mode()
    def _generate(self, works: list[Work], handle: Any) -> list[StoredAnswer]:
        prompts = [w.prompt for w in works]
        inputs = self.encode(prompts)
        torch.manual_seed(_number(self.seed, works[0].task, works[0].doc, works[0].idx))
        clock = _clock(self.model.device)
        start = clock()
        out = self.model.generate(**inputs, **prompts[0].generation)
        seconds = (clock() - start) / len(works)
        length = inputs["input_ids"].shape[1]
        written = out[:, length:]
        answers = self.processor.batch_decode(written, skip_special_tokens=True)
        visual = self._count(inputs["input_ids"])
        given = inputs["attention_mask"].sum(1)
        left, mean = tokens_left(handle, visual)
        saved = _saved(handle)
        rows = []
        for i, work in enumerate(works):
            dense = self._dense_cost(work.prompt, int(given[i]), int(visual[i]))
            rows.append(
                StoredAnswer(
                    work.doc,
                    work.idx,
                    work.prompt.key,
                    cut(answers[i], work.prompt.until).strip(),
                    tokens_in=int(visual[i]),
                    tokens_out=int(left[i]),
                    mean_tokens=float(mean[i]),
                    prompt_tokens=int(given[i]),
                    new_tokens=self._written(written[i]),
                    flops_dense=None if dense is None else dense.flops,
                    flops=None if dense is None else dense.flops - saved.flops,
                    kv_dense=None if dense is None else dense.kv,
                    kv=None if dense is None else dense.kv - saved.kv,
                    seconds=seconds,
                    batch=len(works),
                )
            )
        return rows

    def _count(self, ids: Tensor) -> Tensor:
        """(B,) int64: visual tokens of each prompt."""
        if not self._visual:
            return torch.zeros(len(ids), dtype=torch.long)
        return torch.isin(ids, torch.tensor(self._visual, device=ids.device)).sum(1).cpu()

    def _written(self, tokens: Tensor) -> int:
        """Tokens of an answer, its end included."""
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        for i, token in enumerate(tokens.tolist()):
            if token in ends:
                return i + 1
        return len(tokens)

    # ---- costs ------------------------------------------------------------------------------

    def _dense_cost(self, prompt: Prompt, length: int, visual: int) -> Cost | None:
        """FLOPs and cache of the dense prefill, counted once for prompts of one length.

        The number of visual tokens represents the size of the pictures: a key with their sizes would
        run nearly every sample of a task with photographs a second time.
        """
        key = (length, visual, len(prompt.images), len(prompt.videos))
        if key not in self._dense:
            self._dense[key] = self._counted(prompt)
        return self._dense[key]

    def _counted(self, prompt: Prompt) -> Cost | None:
        inputs = self.encode([prompt])
        paused = [h for h in handles(self.model) if not h.paused] if _known(self.model) else []
        for handle in paused:
            handle.pause()
        try:
            caches: list[Any] = []

            def call() -> None:
                caches.append(self.model(**inputs, logits_to_keep=1, use_cache=True))

            flops = count_flops(call)
            return Cost(float(flops), float(cache_bytes(cache_of(caches[0]))))
        except TypeError:  # a model without logits_to_keep, or with another kind of cache
            return None
        finally:
            for handle in paused:
                handle.resume()


def _known(model: Any) -> bool:
    try:
        handles(model)
    except UnsupportedModelError:
        return False
    return True


def tokens_left(handle: Any, visual: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) visual tokens in the last layer, and their mean over the language model's layers."""
    if handle is None:
        return visual, visual.double()
    last = handle._wrapping.language.last
    if last is None or not last.entered:  # prompts without a picture are never cut
        return visual, visual.double()
    words = last.valid.sum(1).cpu() - visual
    # A layer that is cut in its middle hands on what its second half held.
    halves = [last.halved.get(i, live) for i, live in enumerate(last.entered)]
    layers = torch.stack([live.sum(1).cpu() - words for live in last.entered])
    return halves[-1].sum(1).cpu() - words, layers.double().mean(0)


def _saved(handle: Any) -> Cost:
    """Return the FLOPs and bytes that the last call saved, per sample."""
    if handle is None or handle._wrapping.language.last is None:  # prompts without a picture
        return Cost(0.0, 0.0)
    report = handle.report()
    flops = sum(dense - reduced for dense, reduced in report.flops.values())
    kv = 0.0 if report.kv_bytes is None else report.kv_bytes[0] - report.kv_bytes[1]
    return Cost(float(flops), float(kv))


def explain(error: BaseException) -> str:
    """Format an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _number(*parts: Any) -> int:
    """Derive a seed from any values."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


def _clock(device: torch.device) -> Callable[[], float]:
    """Measure seconds of wall time; with one thread on the CPU, the processor's time for this process.

    The two are the same on an idle machine, and the second is not disturbed by other programs.
    """
    if device.type == "cuda":

        def now() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return now
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )
