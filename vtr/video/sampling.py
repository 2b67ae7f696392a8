"""Choice of frames: numbers of frames from their times. Pure functions of numpy arrays."""

from __future__ import annotations

import numpy as np

#: Containers round times (Matroska to a millisecond): a frame counts as shown this much early.
SLACK = 1e-3


def slack(gap: float) -> float:
    """Compute the seconds by which a frame counts as shown early, if ``gap`` seconds lie between two
    frames: at 1000 frames per second a whole millisecond would be the next frame's."""
    return min(SLACK, gap / 2)


def _slack(times: np.ndarray) -> float:
    return slack(float(np.median(np.diff(times)))) if len(times) > 1 else SLACK


def shown_at(times: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Find for each time of ``at`` the number of the frame shown then: the last that has begun."""
    return np.clip(np.searchsorted(times, at + _slack(times), side="right") - 1, 0, len(times) - 1)


def window(times: np.ndarray, start: float, end: float) -> tuple[int, int]:
    """Find the first and one past the last frame shown in the seconds [start, end)."""
    first = int(shown_at(times, np.array([start]))[0])
    last = int(np.searchsorted(times, end - _slack(times), side="left"))
    return first, max(last, first + 1)


def uniform(times: np.ndarray, frames: int) -> np.ndarray:
    """Choose ``frames`` different frames, evenly spaced in time from the first to the last.

    If the rate varies, two even times may show one frame: the later one then moves to the next frame
    that is free, so that exactly ``min(frames, len(times))`` are chosen. One frame is the middle one.
    """
    n = len(times)
    frames = min(frames, n)
    if frames == 1:
        return shown_at(times, np.array([(times[0] + times[-1]) / 2]))
    picked = shown_at(times, np.linspace(times[0], times[-1], frames))
    step = np.arange(frames)
    picked = np.maximum.accumulate(picked - step) + step  # strictly ascending
    return np.minimum(picked, n - frames + step)


def at_rate(times: np.ndarray, fps: float, start: float, end: float) -> np.ndarray:
    """Choose the frames shown at ``start`` and every 1/fps seconds after it, before ``end``; each once."""
    count = max(1, int(np.ceil((end - _slack(times) - start) * fps)))
    if count > 100 * len(times) + 100:  # far more instants than frames: every frame is shown at one
        return np.arange(len(times))
    return np.unique(shown_at(times, start + np.arange(count) / fps))


def cuts(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Find frames that begin a new scene: those whose change against the frame before is above both
    ``threshold`` and twice the median change of the frames around (so that a fast pan is no cut).

    Args:
        scores: (T,) mean absolute change of each frame against the one before, in [0, 1]; the first 0.
    """
    out = []
    for i in np.flatnonzero(scores > threshold):
        around = np.concatenate([scores[max(0, i - 8) : i], scores[i + 1 : i + 9]])
        if around.size == 0 or scores[i] > 2 * np.median(around):
            out.append(i)
    return np.array([i for i in out if i > 0], dtype=np.int64)


def scenes(scores: np.ndarray, threshold: float, frames: int | None) -> np.ndarray:
    """Choose frames that show every scene.

    Without ``frames``, it is the middle frame of each scene. With more scenes than ``frames``, only
    the strongest cuts count; with fewer, longer scenes get more frames (highest averages), evenly spaced.
    """
    n = len(scores)
    starts = cuts(scores, threshold)
    if frames is not None:
        frames = min(frames, n)
        if len(starts) > frames - 1:
            strongest = np.argsort(-scores[starts], kind="stable")[: frames - 1]
            starts = np.sort(starts[strongest])
    edges = np.concatenate([[0], starts, [n]])
    lengths = np.diff(edges)
    share = np.ones(len(lengths), dtype=np.int64)
    if frames is not None:
        for _ in range(frames - len(lengths)):
            # The scene that is served worst for its length, among those that have frames left.
            need = np.where(share < lengths, lengths / share, -1.0)
            share[int(need.argmax())] += 1
    picked = [
        begin + ((np.arange(k) + 0.5) * length / k).astype(np.int64)
        for begin, length, k in zip(edges[:-1], lengths, share, strict=True)
    ]
    return np.concatenate(picked)
