"""Decoding steps without a model, and what they compute, read slowly in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.methods.prompts import qkv, site_of
from vtr.core.language_attention import LanguageAttentionSite


def step(columns: int = 60, *, batch: int = 2, padding: tuple[int, ...] = (0, 13), seed: int = 0,
         dtype: torch.dtype = torch.float32, **given: Any) -> LanguageAttentionSite:  # fmt: skip
    """A decoding step of ``batch`` samples with so many columns of padding on the left."""
    q, k, v = qkv(1, columns, batch=batch, dtype=dtype, seed=seed)
    valid = torch.arange(columns) >= torch.tensor(padding[:batch])[:, None]
    return site_of(q, k, v, valid=valid, **given)


def alone(site: LanguageAttentionSite, b: int, **given: Any) -> LanguageAttentionSite:
    """One sample of a step, without its padding."""
    rows = site.valid[b]
    k, v = (x[b : b + 1, :, rows] for x in (site.k, site.v))
    return site_of(site.q[b : b + 1], k, v, **{"layer": site.layer, "layers": site.layers, **given})


def seen(site: LanguageAttentionSite) -> np.ndarray:
    """(B, S) bool: the columns that the step sees."""
    length = site.k.shape[2]
    least = 0 if site.window is None else length - site.window
    return site.valid.numpy() & (np.arange(length) >= least)


def softmax(site: LanguageAttentionSite, b: int, h: int, columns: Any) -> np.ndarray:
    """Attention of one query head over some columns (n,)."""
    group = site.q.shape[1] // site.k.shape[1]
    q, k = (x.double().numpy() for x in (site.q[b, h, 0], site.k[b, h // group]))
    scores = site.scale * k[columns] @ q
    weight = np.exp(scores - scores.max())
    return np.asarray(weight / weight.sum())


def attention(site: LanguageAttentionSite) -> np.ndarray:
    """Attention of all query heads over what they see, (B, H, S)."""
    out, sees = np.zeros((*site.q.shape[:2], site.k.shape[2])), seen(site)
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            columns = np.flatnonzero(sees[b])
            out[b, h, columns] = softmax(site, b, h, columns)
    return out


def read(site: LanguageAttentionSite, sets: list[list[set[int]]]) -> np.ndarray:
    """Attention output over a set of columns of each sample and key head, (B, H, 1, D)."""
    out, group = np.zeros(site.q.shape), site.q.shape[1] // site.k.shape[1]
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            columns = sorted(sets[b][h // group])
            if columns:
                values = site.v[b, h // group].double().numpy()[columns]
                out[b, h, 0] = softmax(site, b, h, columns) @ values
    return out


def always(site: LanguageAttentionSite, b: int, recent: int) -> set[int]:
    """The columns of a sample that are always read."""
    columns = [int(c) for c in np.flatnonzero(site.valid[b].numpy())]
    text = {c for c in columns if not site.visual[b, c]}
    first = columns[:1] if site.window is None or len(columns) < site.window else []
    return (text | {*first, *columns[-recent:]}) & set(np.flatnonzero(seen(site)[b]).tolist())


def others(site: LanguageAttentionSite, b: int, recent: int) -> list[int]:
    """The columns of a sample that are read if they are chosen."""
    return sorted(set(np.flatnonzero(seen(site)[b]).tolist()) - always(site, b, recent))


def sets_of(columns: Tensor) -> list[list[set[int]]]:
    """The columns of each sample and key head; none is there twice."""
    found = [[[c for c in head if c >= 0] for head in sample] for sample in columns.tolist()]
    assert all(len(head) == len(set(head)) for sample in found for head in sample)
    return [[set(head) for head in sample] for sample in found]
