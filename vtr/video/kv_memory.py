"""A KV cache of constant size for a stream of frames that is asked at any time."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from vtr.compat.transformers import cache_of, with_cache
from vtr.core.wrapping import wrapping_of
from vtr.errors import UnsupportedMethodError, UnsupportedModelError
from vtr.vision.vlm.positions import renumber, stores_of, why_not
from vtr.vision.vlm.wrapping import VLMWrapping


class KVMemory:
    """A KV cache of all that a language model has read of a stream, kept at one size by a method.

    Frames are read once, each as a turn of one conversation; a question reads the cache and leaves it as it was.
    The method decides what stays: ``vtr.StreamingLLM(2000, evict="all")`` the first tokens and the newest ones
    (arXiv 2309.17453), ``vtr.H2O(2000, evict="all")`` those that got most attention, in each head. So that
    positions do not grow for ever, the entries are numbered anew when they reach ``positions``, and their keys
    are turned; in between they keep their own.

    :class:`TokenMemory` remembers visual tokens before the language model instead: a question reads all of them
    again, and may find what no earlier token asked for.

    Args:
        model: a wrapped vision-language model whose positions are plain numbers (LLaVA, InternVL and their
            like; not Qwen-VL). The method is applied as long as the memory is used.
        positions: the position at which entries are numbered anew; None is half of the model's.

    Attributes:
        turns: calls of :meth:`add` so far.

    Raises:
        UnsupportedModelError: the model is not wrapped, or its positions cannot be numbered anew.
        UnsupportedMethodError: no method keeps the cache at one size.

    >>> with vtr.apply(model, vtr.StreamingLLM(2000, evict="all")):
    ...     memory = vtr.video.KVMemory(model)
    ...     for time, image in vtr.video.stream("door.mp4", fps=1.0):
    ...         memory.add(**processor(text="<image>", images=image, return_tensors="pt"))
    ...     answer = memory.ask(question_ids, max_new_tokens=20)
    """

    def __init__(self, model: Any, *, positions: int | None = None) -> None:
        owner = wrapping_of(model)
        if not isinstance(owner, VLMWrapping):
            raise UnsupportedModelError(
                f"{type(model).__name__} is no wrapped vision-language model: use KVMemory inside of "
                'vtr.apply(model, vtr.StreamingLLM(2000, evict="all")), or vtr.video.TokenMemory'
            )
        odd = why_not(owner)
        if odd:
            raise UnsupportedModelError(
                f"the cache of {owner.info.family} cannot be kept for a stream: {odd}. Use "
                "vtr.video.TokenMemory"
            )
        self.model, self.owner = model, owner
        self._check()
        most = int(getattr(owner.lm.config, "max_position_embeddings", 4096))
        self.positions = most // 2 if positions is None else positions
        if not 1 <= self.positions <= most:
            raise ValueError(f"positions must be in 1..{most} for this model, got {positions!r}")
        self.clear()

    def _check(self) -> None:
        methods = [e.method for e in self.owner.active]
        if len(methods) != 1 or not getattr(methods[0], "bounded", False):
            names = ", ".join(map(str, methods)) or "no method"
            raise UnsupportedMethodError(
                f"KVMemory needs one method that keeps the cache at one size, and {names} is applied: one at the "
                'site kv with keep as an int and evict="all", or with bytes=, and equal heads and layers'
            )

    def clear(self) -> None:
        """Forget everything."""
        self._cache: Any = None
        self.turns = 0

    def __len__(self) -> int:
        """Entries that each head of each layer holds."""
        return 0 if self._cache is None else stores_of(self.owner, self._cache)[0].number

    def __repr__(self) -> str:
        return (
            f"KVMemory({len(self)} entries per head after {self.turns} turns, {self.nbytes} bytes)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        if self._cache is None:
            return 0
        return sum(s.nbytes for s in stores_of(self.owner, self._cache))

    @property
    def _length(self) -> int:
        return 0 if self._cache is None else int(self._cache.get_seq_length())

    @torch.no_grad()
    def add(self, **inputs: Any) -> None:
        """Read the next part of the stream.

        Args:
            inputs: the output of the processor for a text with one or more images or a video, batch 1.

        Raises:
            ValueError: several samples, or padding; or the part is longer than ``positions``.
        """
        self._check()
        ids: Tensor = inputs["input_ids"]
        mask = inputs.pop("attention_mask", None)
        if len(ids) != 1 or (mask is not None and not bool(mask.all())):
            raise ValueError("a memory reads one sample without padding at a time")
        if self._length + ids.shape[1] > self.positions and self._cache is not None:
            renumber(self.owner, self._cache)
        if self._length + ids.shape[1] > self.positions:
            raise ValueError(
                f"{len(self)} entries and {ids.shape[1]} new tokens are more than positions={self.positions}: "
                "let the method keep fewer, or add fewer frames at a time"
            )
        forward = type(self.model).forward
        more = {} if self._cache is None else with_cache(forward, self._cache)
        if "logits_to_keep" in inspect.signature(forward).parameters:
            more["logits_to_keep"] = 1
        mask = ids.new_ones(1, self._length + ids.shape[1])
        out = self.model(**inputs, attention_mask=mask, use_cache=True, **more)
        self._cache = cache_of(out)
        self.turns += 1

    @torch.no_grad()
    def ask(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Generate an answer to a question, (1, new) int64; the memory is as before.

        Args:
            input_ids: (1, L) int64, the question, without images.
            options: of ``model.generate``.

        Raises:
            ValueError: the memory is empty.
        """
        self._check()
        if self._cache is None:
            raise ValueError("the memory is empty: add a frame first")
        # generate leaves out as many tokens in front as the cache has; which ones does not matter.
        before = input_ids[:, :1].expand(-1, self._length)
        ids = torch.cat([before, input_ids], 1)
        cache = copy.deepcopy(self._cache)
        given = with_cache(type(self.model).forward, cache)
        out = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **given, **options
        )
        found = out if isinstance(out, Tensor) else out.sequences
        answer: Tensor = found[:, ids.shape[1] :]
        return answer
