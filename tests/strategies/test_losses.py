"""Losses equal their formulas in plain numpy, and are 0 for the dense model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vtr.strategies.losses import LOSSES, Rows, check_objective

SAMPLE = np.array([0, 0, 1, 2, 2, 2])


def rows(seed: int) -> Rows:
    values = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
    return Rows(values, torch.from_numpy(SAMPLE), torch.tensor([0, 1, 2, 3, 4, 0]), 3)


def means(per_row: np.ndarray) -> np.ndarray:
    return np.array([per_row[s == SAMPLE].mean() for s in range(3)])


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def test_each_loss_is_its_formula():
    found, dense = rows(0), rows(1)
    y, x = (r.values.double().numpy() for r in (found, dense))
    p, q = log_softmax(x), log_softmax(y)
    np.testing.assert_allclose(LOSSES["kl"](found, dense), means((np.exp(p) * (p - q)).sum(1)))
    same = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
    np.testing.assert_allclose(LOSSES["cosine"](found, dense), means(1 - same))
    error = ((y - x) ** 2).sum(1) / (x**2).sum(1)
    np.testing.assert_allclose(LOSSES["relative-error"](found, dense), means(error))
    labels = found.labels.numpy()
    more = -q[range(6), labels] + p[range(6), labels]
    np.testing.assert_allclose(LOSSES["cross-entropy"](found, dense), means(more))


def test_a_sample_is_right_if_all_its_labels_are():
    dense, found = rows(0), rows(0)
    dense.values.zero_()
    dense.values[range(6), dense.labels] = 1  # all three samples are right
    found.values.copy_(dense.values)
    found.values[4, 1] = 2  # one of three labels of sample 2
    assert LOSSES["accuracy"](found, dense).tolist() == [0, 0, 1]
    assert LOSSES["accuracy"](dense, found).tolist() == [0, 0, -1]


@pytest.mark.parametrize("name", LOSSES)
def test_the_dense_model_loses_nothing(name):
    assert LOSSES[name](rows(3), rows(3)).abs().max() < 1e-12


def test_nan_counts_as_no_likeness():
    broken = rows(0)
    broken.values[2] = float("nan")
    assert LOSSES["cosine"](broken, rows(1))[1] == 1


def test_another_objective_is_refused():
    for given in (None, "kl", print):
        check_objective(given)
    with pytest.raises(ValueError, match="objective must be one of kl, cosine"):
        check_objective("bleu")
