"""A bounded memory of visual tokens for a stream of frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.tokens import top_indices

if TYPE_CHECKING:
    import numpy as np

#: Names for ``evict=``, each a score of tokens; the lowest are dropped first.
SCORES = ("oldest", "size", "novelty", "random", "given")

FIELDS = ("tokens", "size", "frame", "seen", "place", "time", "score", "novelty", "chance")


class TokenMemory:
    """A memory of at most ``capacity`` tokens for a stream of any length.

    Each token of a new frame is compared with the remembered token of its place (or the nearest one).
    If the two are similar, it is merged into that token, as a running mean; otherwise it becomes a new
    token of the memory. When the memory is full, the tokens of the lowest score are dropped. DyCoke
    (arXiv 2411.15024), HoliTom (arXiv 2505.21334) and FrameFusion (arXiv 2501.01986) also merge
    neighbours in time; here this runs frame by frame, without later frames.

    Args:
        capacity: tokens that are kept at most; at least those of one frame.
        similarity: least cosine at which a token is merged; above 1 nothing is merged.
        match: ``"place"`` compares with the newest token of the same cell of the frame, ``"nearest"``
            with the most similar token of any cell (which follows moving objects).
        window: a token is merged only into one that was seen in the last ``window`` frames; None is at
            any time.
        evict: the tokens that are dropped first: ``"oldest"`` (not seen for longest), ``"size"``
            (merged from the fewest tokens), ``"novelty"`` (least new when they came: 1 - cosine to
            their match), ``"random"`` (a reservoir: all tokens of the stream that were not merged are
            equally likely to stay), ``"given"`` (by the scores given to :meth:`add`), or a function of
            this memory that returns (M,) scores. NaN is dropped first.
        recent: newest frames whose tokens are not evicted, as far as they fit.
        seed: of ``evict="random"``.

    Attributes (M tokens, in the order of their first frame and place):
        tokens: (M, C) in the dtype of the frames; running means, kept in float32.
        size: (M,) int64, number of tokens of the stream that were merged into it.
        frame, seen: (M,) int64, numbers of its first and last frame.
        place: (M,) int64, its cell in the frame.
        time: (M,) float64, seconds of its first frame.
        score: (M,) float32, the largest of the scores that were given for it (0 without any).
        novelty: (M,) float32, 1 - cosine to its match when it came, 2 without a match.
        frames: frames so far.
        total: tokens so far.

    Raises:
        ValueError: a bad option.
    """

    def __init__(
        self,
        capacity: int,
        *,
        similarity: float = 0.9,
        match: str = "place",
        window: int | None = 1,
        evict: str | Callable[[TokenMemory], Tensor] = "oldest",
        recent: int = 1,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("capacity", capacity, 1), ("recent", recent, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        if window is not None and (isinstance(window, bool) or window < 1):
            raise ValueError(f"window must be an int of at least 1 or None, got {window!r}")
        if not similarity > -1:
            raise ValueError(f"similarity must be a cosine (above -1), got {similarity!r}")
        if match not in ("place", "nearest"):
            raise ValueError(f"match must be 'place' or 'nearest', got {match!r}")
        if not callable(evict) and evict not in SCORES:
            raise ValueError(
                f"evict must be a function or one of {', '.join(SCORES)}; got {evict!r}"
            )
        self.capacity = capacity
        self.similarity = similarity
        self.match = match
        self.window = window
        self.evict = evict
        self.recent = recent
        self.seed = seed
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.frames = 0
        self.total = 0
        self.grid: tuple[int, int] | None = None
        self._dtype = torch.float32
        self._state: dict[str, Tensor] = {}
        self._random = torch.Generator().manual_seed(self.seed)

    def __len__(self) -> int:
        return self._state["size"].shape[0] if self._state else 0

    def __repr__(self) -> str:
        return (
            f"TokenMemory({len(self)} of at most {self.capacity} tokens, after {self.total} tokens of "
            f"{self.frames} frames)"
        )

    def __getattr__(self, name: str) -> Any:
        if name not in FIELDS:
            raise AttributeError(f"TokenMemory has no attribute {name!r}")
        state = self.__dict__.get("_state")
        if not state:
            raise ValueError("the memory is empty: add a frame first")
        return state["tokens"].to(self._dtype) if name == "tokens" else state[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(x.numel() * x.element_size() for x in self._state.values())

    def add(
        self,
        tokens: Tensor,
        time: float | Sequence[float] | np.ndarray | Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
        scores: Tensor | None = None,
    ) -> None:
        """Add one frame (N, C), or several in order (F, N, C).

        Args:
            time: seconds of each frame, or of all; the frame's number if None.
            grid: (rows, columns) of a frame's tokens, for models that number positions by them.
            scores: (N,) or (F, N), for ``evict="given"`` or a function: higher scores stay longer.

        Raises:
            ValueError: frames of another number of tokens, width or grid than before; a frame that is
                larger than the capacity; scores missing or of another shape.
        """
        if tokens.dim() == 2:
            tokens = tokens[None]
            scores = None if scores is None else scores[None]
        if tokens.dim() != 3 or tokens.shape[1] == 0 or not tokens.is_floating_point():
            raise ValueError(
                f"tokens must be floats (N, C) or (F, N, C), got {tokens.dtype} {tuple(tokens.shape)}"
            )
        times = self._times(time, len(tokens))
        if scores is not None and scores.shape != tokens.shape[:2]:
            raise ValueError(
                f"scores must have shape {tuple(tokens.shape[:2])}, got {tuple(scores.shape)}"
            )
        if scores is None and self.evict == "given":
            raise ValueError("evict='given' needs scores=")
        self._fits(tokens, grid)
        for i, frame in enumerate(tokens.detach()):
            self._see(frame, times[i], None if scores is None else scores[i])

    def _times(self, time: Any, number: int) -> list[float]:
        """Return the seconds of each of ``number`` frames."""
        if time is None:
            return [float(self.frames + i) for i in range(number)]
        if hasattr(time, "tolist"):  # arrays, and their numbers
            time = time.tolist()
        times = [float(t) for t in time] if isinstance(time, Sequence) else [float(time)] * number
        if len(times) != number:
            raise ValueError(f"{len(times)} times were given for {number} frames")
        return times

    def _fits(self, tokens: Tensor, grid: tuple[int, int] | None) -> None:
        _, n, width = tokens.shape
        if n > self.capacity:
            raise ValueError(f"a frame has {n} tokens, more than capacity={self.capacity}")
        if grid is not None and grid[0] * grid[1] != n:
            raise ValueError(f"grid {grid} has {grid[0] * grid[1]} cells for {n} tokens")
        if self.frames == 0:
            self.grid, self._cells, self._width = grid, n, width
            self._dtype = tokens.dtype
        elif (n, width) != (self._cells, self._width) or (grid or self.grid) != self.grid:
            raise ValueError(
                f"frames so far had {self._cells} tokens of width {self._width} (grid {self.grid}), "
                f"this one has {n} of {width} (grid {grid}); start anew with clear()"
            )

    # ---- one frame --------------------------------------------------------------------------

    def _see(self, frame: Tensor, time: float, scores: Tensor | None) -> None:
        x = frame.float()
        given = x.new_zeros(len(x)) if scores is None else scores.to(x.device).float()
        nearest, cosine = self._nearest(x)
        joins = (nearest >= 0) & (cosine >= self.similarity)
        if self._state:
            self._join(x[joins], nearest[joins], given[joins])
        own = (~joins).nonzero()[:, 0]
        novelty = torch.where(nearest >= 0, 1 - cosine, torch.full_like(cosine, 2.0))
        self._append(x, own, time, given, novelty)
        self.frames += 1
        self.total += len(x)
        if len(self) > self.capacity:
            self._forget()

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Find the remembered token that each of x (N, C) is compared with, -1 for none, and the cosine."""
        n = len(x)
        none = torch.full((n,), -1, dtype=torch.long, device=x.device), x.new_zeros(n)
        if not self._state:
            return none
        s = self._state
        alive = torch.ones_like(s["seen"], dtype=torch.bool)
        if self.window is not None:
            alive = s["seen"] >= self.frames - self.window
        slots = alive.nonzero()[:, 0]
        if not len(slots):
            return none
        units = F.normalize(x, dim=1)
        if self.match == "nearest":
            best = (units @ F.normalize(s["tokens"][slots], dim=1).T).max(1)
            return slots[best.indices], best.values
        # The newest at each place: tokens are kept in the order of their first frame.
        newest = none[0].scatter_reduce(0, s["place"][slots], slots, "amax")
        there = F.normalize(s["tokens"][newest.clamp(min=0)], dim=1)
        return newest, (units * there).sum(1)

    def _join(self, x: Tensor, slots: Tensor, given: Tensor) -> None:
        s = self._state
        if not len(slots):
            return
        # Sums over the few slots that change, not over the whole memory; several tokens may join one.
        changed, group = slots.unique(return_inverse=True)
        count = torch.bincount(group, minlength=len(changed))
        total = x.new_zeros(len(changed), x.shape[1]).index_add_(0, group, x)
        before = s["size"][changed]
        after = before + count
        mean = s["tokens"][changed]
        # mean + (sum - count * mean) / size: no product of a mean and a size that grows for ever
        s["tokens"][changed] = mean + (total - count[:, None] * mean) / after[:, None]
        s["size"][changed] = after
        s["seen"][changed] = self.frames
        s["score"] = s["score"].scatter_reduce(0, slots, given, "amax")

    def _append(self, x: Tensor, own: Tensor, time: float, given: Tensor, novelty: Tensor) -> None:
        number = torch.full_like(own, self.frames)
        chance = torch.rand(len(own), generator=self._random, device="cpu").to(x.device)
        new = {
            "tokens": x[own],
            "size": torch.ones_like(own),
            "frame": number,
            "seen": number.clone(),
            "place": own,
            "time": torch.full(own.shape, time, dtype=torch.float64, device=x.device),
            "score": given[own],
            "novelty": novelty[own],
            "chance": chance,
        }
        old = self._state
        self._state = {k: torch.cat([old[k], new[k]]) for k in FIELDS} if old else new

    def _forget(self) -> None:
        s = self._state
        if callable(self.evict):
            score = self.evict(self)
            if score.shape != s["size"].shape:
                raise ValueError(
                    f"evict returned {tuple(score.shape)} scores for {len(self)} tokens"
                )
            score = score.to(s["tokens"].device).float()
        else:
            key = {"oldest": "seen", "given": "score", "random": "chance"}.get(
                self.evict, self.evict
            )
            score = s[key].double()
        # NaN is the worst, as everywhere; a sort would put it last.
        score = score.masked_fill(score.isnan(), -float("inf"))
        # Ranks, not scores: recent frames rank above all others, and differences of any size are kept.
        rank = torch.argsort(torch.argsort(score, stable=True), stable=True)
        newest = s["seen"] >= self.frames - self.recent
        rank = rank + newest * len(rank)
        kept = top_indices(rank[None], self.capacity)[0][0]
        self._state = {k: v[kept] for k, v in s.items()}
