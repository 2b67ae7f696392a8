"""DivPrune: the greedy max-min subset, recomputed token by token."""

from __future__ import annotations

import pytest
import torch

import vtr
from tests.vision.vlm.models import llava
from vtr.methods.divprune import DivPrune, farthest_points

from .slow import Sequence, features, run, samples


def slow_subset(x: torch.Tensor, k: int) -> list[int]:
    """Straight from the definition, in double precision, for one sample (N, C)."""
    x = x.double()
    n = x.shape[0]

    def distance(i: int, j: int) -> float:
        return float(1 - x[i] @ x[j] / (x[i].norm() * x[j].norm()))

    nearest = [min(distance(i, j) for j in range(n) if j != i) for i in range(n)]
    chosen = [max(range(n), key=lambda i: nearest[i])]
    while len(chosen) < k:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance(i, j) for j in chosen)))
    return sorted(chosen)


@pytest.mark.parametrize("chunk", [5, 512])
def test_equals_the_greedy_by_hand(chunk: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 24, 6)
    valid = torch.ones(3, 24, dtype=torch.bool)
    valid[1, 20:] = False
    valid[2, 15:] = False
    number = torch.tensor([7, 5, 15])
    chosen = farthest_points(x, number, valid, chunk=chunk)
    for row, size in enumerate((24, 20, 15)):
        expected = slow_subset(x[row, :size], int(number[row]))
        assert chosen[row].nonzero()[:, 0].tolist() == expected


def test_is_blind_to_the_length_of_tokens() -> None:
    torch.manual_seed(1)
    x = torch.randn(1, 20, 4)
    scale = torch.rand(1, 20, 1) * 10 + 0.1
    valid = torch.ones(1, 20, dtype=torch.bool)
    number = torch.tensor([6])
    assert torch.equal(farthest_points(x, number, valid), farthest_points(x * scale, number, valid))


@pytest.mark.parametrize("keep", [0, -1, 1.5, float("nan"), True, "8"])
def test_bad_budgets_are_refused(keep: object) -> None:
    with pytest.raises(ValueError, match="keep"):
        DivPrune(keep=keep)  # type: ignore[arg-type]


def test_cuts_the_projected_tokens_of_a_model() -> None:
    model, inputs = llava(2)
    with torch.no_grad(), vtr.apply(model, DivPrune(keep=6)) as handle:
        logits = model(**inputs).logits
    images = features(model, inputs)
    for b, ids in enumerate(samples(inputs)):
        wanted = slow_subset(images[b], 6 * (len(images[b]) // 16))
        kept = handle.trace.kept[b]
        assert kept[kept >= 0].tolist() == wanted

        def cut(sequence: Sequence, seen: object, wanted: list[int] = wanted) -> None:
            sequence.keep(wanted, compact=True)

        expected, _ = run(model, ids, images[b], {0: cut})
        torch.testing.assert_close(logits[b, -1], expected, atol=2e-5, rtol=1e-4)
