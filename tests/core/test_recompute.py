"""What activation checkpointing of all model kinds shares: knowing a call again, and repeating its cuts."""

from __future__ import annotations

import copy
import gc
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vtr.compat.torch import in_backward
from vtr.core.method import Reduction
from vtr.core.recompute import Again, Guard, Inputs, copied, repeated
from vtr.core.tokens import TokenMap


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_input_is_known_again_in_the_backward_pass(reentrant: bool) -> None:
    """Two calls, one backward pass: each second pass finds the note of its own call."""
    inputs, seen = Inputs(), []
    weight = torch.randn(4, 4, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        seen.append(inputs.find(x, 3) if in_backward() else "first")
        return (x @ weight).tanh()

    outputs = []
    for name in ("one", "other"):
        x = torch.randn(2, 4, requires_grad=True) * 2
        inputs.note(x, 3, name)
        outputs.append(checkpoint(block, x, use_reentrant=reentrant).sum())
        del x
    sum(outputs).backward()
    assert seen[:2] == ["first", "first"]
    assert sorted(seen[2:]) == ["one", "other"]


def test_notes_end_with_their_tensors() -> None:
    inputs, x = Inputs(), torch.randn(3)
    inputs.note(x, 0, "note")
    assert inputs.find(x[1:], 0) == inputs.find(x.detach(), 0) == "note"
    assert inputs.find(x, 1) is None
    assert inputs.find(x.clone(), 0) is None
    assert copy.deepcopy(inputs).find(x, 0) is None
    del x
    gc.collect()
    inputs.purge()
    assert not inputs._notes


def test_tensors_without_storage_are_not_noted() -> None:
    inputs = Inputs()

    def look(x: torch.Tensor) -> torch.Tensor:
        inputs.note(x, 0, "note")
        assert inputs.find(x, 0) is None
        return x * 2

    torch.func.vmap(look)(torch.ones(2, 3))


class Counting:
    """An owner whose fact is a number."""

    def __init__(self) -> None:
        self.number = 0

    def facts(self) -> int:
        return self.number

    @contextmanager
    def repeating(self, facts: int) -> Any:
        now, self.number = self.number, facts
        try:
            yield
        finally:
            self.number = now


def test_again_repeats_the_facts_of_its_first_call() -> None:
    owner, active = Counting(), ["entry"]
    wrapping: Any = SimpleNamespace(active=active, info=SimpleNamespace(family="no"))
    calls = [Again(wrapping, owner, lambda: owner.number) for _ in range(2)]
    for number, call in enumerate(calls):
        owner.number = number
        assert call() == number
    owner.number = 7
    assert [call() for call in calls] == [0, 1]
    assert owner.number == 7
    wrapping.active = []
    with pytest.raises(RuntimeError, match="go backward first"):
        calls[0]()
    with pytest.raises(RuntimeError, match="go backward first"):
        Guard(wrapping, active)(torch.ones(1))  # type: ignore[arg-type]


def test_a_second_pass_has_the_cut_of_the_first() -> None:
    first = TokenMap.keep(torch.tensor([[0, 2]]), 4)
    other = TokenMap.keep(torch.tensor([[1, 2]]), 4)
    sizes = torch.ones(1, 4)
    for weights in (None, sizes):
        made = repeated("m", Reduction(other, weights), first, sizes)
        assert made is not None
        assert made.map is first
        assert made.weights is weights
    own = Reduction(TokenMap.keep(first.kept.clone(), 4), torch.rand(1, 4))
    assert repeated("m", own, first, sizes) is own
    assert repeated("m", None, None, sizes) is None
    policy = Reduction(None, policy=sizes)
    assert repeated("m", policy, None, sizes) is policy
    for wrong, map in (
        (Reduction(other, torch.rand(1, 4)), first),  # weights for another choice
        (Reduction(other, tokens=torch.rand(1, 2, 3)), first),
        (Reduction(TokenMap.keep(torch.tensor([[1]]), 4)), first),  # another number
        (None, first),
        (Reduction(other), None),
    ):
        with pytest.raises(RuntimeError, match="m chose other tokens"):
            repeated("m", wrong, map, sizes)


def test_copies_share_tensors_and_no_containers() -> None:
    x = torch.ones(2)
    before = {"a": [x], "b": {"c": x}}
    after = copied(before)
    after["a"].append(1)
    after["b"]["d"] = 2
    assert len(before["a"]) == 1
    assert list(before["b"]) == ["c"]
    assert after["a"][0] is x
