"""Debias: the prior, its fit, and the corrected ranking."""

from __future__ import annotations

import math

import pytest
import torch

from vtr.methods.debias import fit_recency, recency_weights


def test_weights_divide_by_the_exponential_prior() -> None:
    index = torch.tensor([[0, 3, 8], [1, 2, 4]])
    got = recency_weights(index, torch.tensor([9, 5]), 1.7)
    for b, total in enumerate((9, 5)):
        for s, i in enumerate(index[b].tolist()):
            mu = 0.3
            prior = [mu * math.exp(1.7 * j / (total - 1)) for j in range(total)]
            assert float(got[b, s]) == pytest.approx(prior[0] / prior[i], rel=1e-5)


@pytest.mark.parametrize(("mu", "sigma"), [(0.002, 1.9), (1.0, -0.7), (0.5, 0.0), (3.0, 6.0)])
def test_the_fit_finds_an_exponential_again(mu: float, sigma: float) -> None:
    x = torch.linspace(0, 1, 576)
    assert fit_recency(mu * torch.exp(sigma * x)) == pytest.approx((mu, sigma), rel=1e-3, abs=1e-4)


def test_the_fit_is_the_best_one_under_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(0, 1, 200, dtype=torch.float64)
    noise = torch.rand(200, generator=generator, dtype=torch.float64)
    a = torch.exp(1.3 * x) * (0.7 + 0.6 * noise)
    mu, sigma = fit_recency(a)

    def error(m: float, s: float) -> float:
        return float((m * torch.exp(s * x) - a).square().sum())

    best = error(mu, sigma)
    for dm in (-0.01, 0.0, 0.01):
        for ds in (-0.01, 0.0, 0.01):
            assert best <= error(mu + dm, sigma + ds) + 1e-9


def test_a_profile_that_is_none_is_refused() -> None:
    for bad in (torch.ones(2, 3), torch.ones(1), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="attention"):
            fit_recency(bad)
