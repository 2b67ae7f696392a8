"""A memory of a stream: what is merged, what is forgotten, and that it does not grow."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.video import TokenMemory


def stream(frames: int, n: int = 6, width: int = 8, change: float = 0.4, seed: int = 0) -> Tensor:
    """(frames, n, width): every place keeps its token, and now and then gets a new one."""
    g = torch.Generator().manual_seed(seed)
    now = torch.randn(n, width, generator=g)
    out = []
    for _ in range(frames):
        fresh = torch.rand(n, 1, generator=g) < change
        now = torch.where(fresh, torch.randn(n, width, generator=g), now)
        out.append(now + 0.05 * torch.randn(n, width, generator=g))
    return torch.stack(out)


class Slow:
    """The same memory, token by token."""

    def __init__(self, capacity: int, similarity: float, match: str, window: int | None) -> None:
        self.capacity, self.similarity = capacity, similarity
        self.match, self.window = match, window
        self.kept: list[dict] = []
        self.frames = 0

    def add(self, frame: Tensor) -> None:
        t = self.frames
        found = []
        for place, x in enumerate(frame):
            best, cosine = None, -2.0
            for entry in self.kept:
                if self.window is not None and entry["seen"] < t - self.window:
                    continue
                if self.match == "place" and entry["place"] != place:
                    continue
                c = float(F.cosine_similarity(x, entry["mean"], dim=0))
                if self.match == "place" or c > cosine:  # the newest of the place, or the nearest
                    best, cosine = entry, c
            found.append((best, cosine))
        for (best, cosine), (place, x) in zip(found, enumerate(frame), strict=True):
            if best is not None and cosine >= self.similarity:
                best["members"].append(x)
                best["seen"] = t
            else:
                self.kept.append({"mean": x, "members": [x], "seen": t, "place": place, "frame": t})
        for entry in self.kept:
            entry["mean"] = torch.stack(entry["members"]).mean(0)
        while len(self.kept) > self.capacity:
            # Not seen for longest goes first; of those, the one that began first.
            seen = [e["seen"] for e in self.kept]
            del self.kept[seen.index(min(seen))]
        self.frames += 1


@pytest.mark.parametrize("window", [1, 3, None])
@pytest.mark.parametrize("match", ["place", "nearest"])
@pytest.mark.parametrize("capacity", [8, 20, 1000])
def test_it_is_what_the_words_say(match: str, window: int | None, capacity: int) -> None:
    memory = TokenMemory(capacity, similarity=0.8, match=match, window=window)
    slow = Slow(capacity, 0.8, match, window)
    for frame in stream(30):
        memory.add(frame)
        slow.add(frame)
        assert memory.place.tolist() == [e["place"] for e in slow.kept]
        assert memory.frame.tolist() == [e["frame"] for e in slow.kept]
        assert memory.seen.tolist() == [e["seen"] for e in slow.kept]
        assert memory.size.tolist() == [len(e["members"]) for e in slow.kept]
        assert torch.allclose(memory.tokens, torch.stack([e["mean"] for e in slow.kept]), atol=1e-5)
    assert int(memory.size.max()) > 2, "something was merged"


def test_ten_thousand_frames_in_constant_memory() -> None:
    memory = TokenMemory(64, similarity=0.9, match="place")
    g = torch.Generator().manual_seed(0)
    now = torch.randn(16, 8, generator=g)
    bytes_then = storages_then = 0
    for t in range(10_000):
        now = torch.where(
            torch.rand(16, 1, generator=g) < 0.2, torch.randn(16, 8, generator=g), now
        )
        memory.add(now)
        assert len(memory) <= 64
        if t == 99:
            bytes_then = memory.nbytes
            storages_then = sum(x.untyped_storage().nbytes() for x in memory._state.values())
            assert len(memory) == 64
    assert memory.frames == 10_000 and memory.total == 160_000
    assert memory.nbytes == bytes_then
    assert sum(x.untyped_storage().nbytes() for x in memory._state.values()) == storages_then
    assert int(memory.seen.max()) == 9_999


def test_a_still_picture_takes_one_frame() -> None:
    """... and its mean stays right over thousands of merges, in half precision too."""
    picture = torch.randn(5, 16).bfloat16()
    memory = TokenMemory(50)
    for _ in range(3000):
        memory.add(picture)
    assert len(memory) == 5 and memory.size.tolist() == [3000] * 5
    assert memory.tokens.dtype == torch.bfloat16
    assert torch.equal(memory.tokens, picture)


def test_nothing_is_lost_below_the_capacity() -> None:
    frames = stream(12)
    for match in ("place", "nearest"):
        memory = TokenMemory(1000, similarity=0.7, match=match, window=None)
        memory.add(frames)
        assert int(memory.size.sum()) == memory.total == 72
        total = (memory.tokens * memory.size[:, None]).sum(0)
        assert torch.allclose(total, frames.sum((0, 1)), atol=1e-3)
        assert (memory.frame.diff() >= 0).all()
    whole = TokenMemory(1000, similarity=2.0)
    whole.add(frames)
    assert torch.equal(whole.tokens, frames.flatten(0, 1)), "nothing is that similar"


def test_frames_together_are_frames_one_by_one() -> None:
    frames = stream(10)
    together, alone = TokenMemory(20, evict="random"), TokenMemory(20, evict="random")
    together.add(frames, [0.5 * i for i in range(10)])
    for i, frame in enumerate(frames):
        alone.add(frame, 0.5 * i)
    for name in ("tokens", "size", "frame", "seen", "place", "time"):
        assert torch.equal(getattr(together, name), getattr(alone, name))
    assert torch.equal(alone.time, alone.frame * 0.5)


def test_scores_decide_what_goes() -> None:
    frames = torch.randn(6, 4, 8)
    scores = torch.rand(6, 4)
    given = TokenMemory(8, similarity=2.0, evict="given", recent=0)
    given.add(frames, scores=scores)
    assert sorted(given.score.tolist()) == sorted(scores.flatten().topk(8).values.tolist())

    still = frames.clone()
    still[:, 0] = frames[0, 0]  # the first cell never changes: nothing of it is new
    novel = TokenMemory(8, similarity=2.0, window=None, evict="novelty", recent=0)
    novel.add(still)
    assert novel.place.tolist().count(0) <= 1 and len(novel) == 8

    size = TokenMemory(4, similarity=0.9, evict="size", recent=0)
    always = torch.randn(1, 8)
    for i in range(5):
        size.add(torch.cat([always, torch.randn(2, 8, generator=torch.Generator().manual_seed(i))]))
    assert int(size.size.max()) == 5, "what is always there stays"

    ours = TokenMemory(5, similarity=2.0, recent=0, evict=lambda m: -m.frame.float() - m.place / 10)
    ours.add(frames)
    assert (ours.frame * 4 + ours.place).tolist() == [0, 1, 2, 3, 4]
    wrong = TokenMemory(5, similarity=2.0, evict=lambda m: m.frame[:1])
    with pytest.raises(ValueError, match="evict returned"):
        wrong.add(frames)


def test_a_reservoir_keeps_all_times_alike() -> None:
    counts = torch.zeros(4)
    for seed in range(25):
        memory = TokenMemory(60, similarity=2.0, evict="random", recent=0, seed=seed)
        memory.add(torch.randn(100, 4, 8, generator=torch.Generator().manual_seed(seed)))
        counts += torch.bincount(memory.frame // 25, minlength=4)
    share = counts / counts.sum()
    assert (share - 0.25).abs().max() < 0.04, share


def test_recent_frames_stay() -> None:
    frames = torch.randn(9, 4, 8)
    memory = TokenMemory(12, similarity=2.0, evict=lambda m: -m.frame.float(), recent=2)
    memory.add(frames)
    assert memory.frame.tolist() == [0] * 4 + [7] * 4 + [8] * 4


def test_times_may_be_an_array() -> None:
    """As a loaded video's timestamps are."""
    frames = stream(3)
    for time in (np.array([0.5, 1.0, 2.5]), torch.tensor([0.5, 1.0, 2.5]), (0.5, 1, 2.5)):
        memory = TokenMemory(100, similarity=2.0)
        memory.add(frames, time)
        assert memory.time.unique().tolist() == [0.5, 1.0, 2.5]
        memory.add(frames[0], time[2])
        assert float(memory.time[-1]) == 2.5
    with pytest.raises(ValueError, match="2 times were given for 3 frames"):
        memory.add(frames, np.zeros(2))


@pytest.mark.parametrize("evict", ["given", "novelty", "own"])
def test_what_has_no_score_goes_first(evict: str) -> None:
    frames, scores = torch.randn(2, 4, 8), torch.rand(2, 4)
    if evict == "novelty":
        frames[1, 1] = float("nan")
    scores[1, 1] = float("nan")
    by: Any = (lambda m: m.score) if evict == "own" else evict
    memory = TokenMemory(7, similarity=2.0, evict=by, recent=0)
    memory.add(frames, scores=scores)
    assert (memory.frame * 4 + memory.place).tolist() == [0, 1, 2, 3, 4, 6, 7]


def test_deep_copies_are_independent() -> None:
    memory = TokenMemory(20)
    memory.add(stream(5))
    twin = copy.deepcopy(memory)
    before = memory.tokens.clone()
    twin.add(stream(3, seed=2))
    assert torch.equal(memory.tokens, before) and twin.frames == 8


def test_a_stored_memory_goes_on_where_it_was() -> None:
    frames = stream(12)
    memory = TokenMemory(20, evict="random", recent=0)
    memory.add(frames[:6], grid=(2, 3))
    twin = pickle.loads(pickle.dumps(memory))
    for each in (memory, twin):
        each.add(frames[6:])
    for name in ("tokens", "size", "frame", "seen", "place", "time"):
        assert torch.equal(getattr(twin, name), getattr(memory, name))
    assert twin.frames == 12 and twin.grid == (2, 3)


def test_errors() -> None:
    for options, words in (
        ({"capacity": 0}, "capacity must be"),
        ({"capacity": True}, "capacity must be"),
        ({"capacity": 4, "window": 0}, "window must be"),
        ({"capacity": 4, "match": "cell"}, "match must be"),
        ({"capacity": 4, "evict": "newest"}, "evict must be"),
        ({"capacity": 4, "similarity": float("nan")}, "similarity must be"),
        ({"capacity": 4, "recent": -1}, "recent must be"),
    ):
        with pytest.raises(ValueError, match=words):
            TokenMemory(**options)
    memory = TokenMemory(8)
    with pytest.raises(ValueError, match="empty"):
        _ = memory.tokens
    with pytest.raises(AttributeError):
        _ = memory.colour
    memory.add(torch.randn(4, 8), grid=(2, 2))
    for tokens, options, words in (
        (torch.randn(9, 8), {}, "more than capacity"),
        (torch.randn(5, 8), {}, "start anew"),
        (torch.randn(4, 7), {}, "start anew"),
        (torch.randn(4, 8), {"grid": (4, 1)}, "start anew"),
        (torch.randn(4, 8), {"grid": (3, 3)}, "cells"),
        (torch.randn(8), {}, "tokens must be"),
        (torch.ones(4, 8).long(), {}, "tokens must be"),
        (torch.randn(2, 4, 8), {"time": [0.0]}, "times"),
        (torch.randn(4, 8), {"scores": torch.rand(3)}, "scores must have"),
    ):
        with pytest.raises(ValueError, match=words):
            memory.add(tokens, **options)
    assert memory.frames == 1, "what is refused leaves no trace"
    with pytest.raises(ValueError, match="needs scores"):
        TokenMemory(8, evict="given").add(torch.randn(4, 8))
    memory.clear()
    memory.add(torch.randn(6, 3))
    assert len(memory) == 6
