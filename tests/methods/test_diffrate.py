"""DiffRate against its algorithm (arXiv 2305.17997, section 3), image by image, in the authors' order of tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vtr
from tests.tiny import images, vit
from vtr.methods.common.rates import LearnedRates, straight_through


def literal(
    model: Any, x: Tensor, prune: tuple[int, ...], merge: tuple[int, ...]
) -> tuple[list[tuple[int, ...]], Tensor, list[float]]:
    """One image: members of what is left, features and masses, class token first, others by falling rank."""
    h = model._pos_embed(model.patch_embed(x))[0]
    prefix = model.num_prefix_tokens
    groups = [[t] for t in range(h.shape[0])]
    mass = [1.0] * h.shape[0]
    for block, most, left in zip(model.blocks, prune, merge, strict=True):
        normed = block.norm1(h)
        tokens, width = normed.shape
        q, k, v = block.attn.qkv(normed).reshape(tokens, 3, 3, -1).permute(1, 2, 0, 3)
        bias = torch.tensor(mass, dtype=h.dtype).log()
        attention = (q @ k.transpose(-1, -2) * (width // 3) ** -0.5 + bias).softmax(-1)
        h = h + block.attn.proj((attention @ v).transpose(0, 1).reshape(tokens, width))
        score = attention[:, 0].mean(0).tolist()
        order = sorted(range(prefix, tokens), key=lambda j: -score[j])[:most]
        stay, gone = order[:left], order[left:]
        new, count, weight = h.clone(), [1] * tokens, list(mass)
        for j in gone:
            cos = [float(h[j] @ h[i] / (h[j].norm() * h[i].norm())) for i in stay]
            i = stay[cos.index(max(cos))]
            new[i] += h[j]
            count[i] += 1
            weight[i] += max(0.0, max(cos)) * mass[j]
            groups[i] = groups[i] + groups[j]
        keep = [*range(prefix), *stay]
        h = torch.stack([new[i] / count[i] for i in keep])
        mass, groups = [weight[i] for i in keep], [groups[i] for i in keep]
        h = h + block.mlp(block.norm2(h))
    return [tuple(sorted(g)) for g in groups], h, mass


LISTS = {
    "both": ((64, 60, 44, 40, 31, 9), (64, 52, 44, 33, 31, 6)),
    "pruning alone": ((64, 50, 40, 40, 20, 8), (64, 50, 40, 40, 20, 8)),
    "merging alone": ((64, 64, 64, 50, 50, 20), (64, 60, 50, 50, 25, 3)),
    "a number that grows": ((64, 40, 50, 30, 35, 20), (64, 35, 45, 25, 35, 1)),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4}], ids=["class", "registers"])
def test_tokens_masses_and_features_of_the_paper(name: str, options: Any) -> None:
    prune, merge = LISTS[name]
    model, x = vit(**options).double(), images(2).double()
    with vtr.apply(model, vtr.DiffRate(prune=prune, merge=merge)) as handle, torch.no_grad():
        got = model.forward_features(x)
        total, cuts = handle.trace.stages[-1].total, handle.trace.stages
        masses = handle._wrapping.session.latest.mass
    assert [s.tokens_out for s in cuts] == sorted({min(merge[: i + 1]) for i in range(1, 6)})[::-1]
    prefix = model.num_prefix_tokens
    for b in range(2):
        with torch.no_grad():
            groups, h, mass = literal(model, x[b : b + 1], prune, merge)
            h = model.norm(h)
        expected = {tuple(t - prefix for t in g): i for i, g in enumerate(groups) if g[0] >= prefix}
        mine = {
            tuple(j for j in range(64) if total.source[b, j] == slot): slot
            for slot in range(total.n_out)
        }
        assert set(mine) == set(expected)
        for group, slot in mine.items():
            i = expected[group]
            torch.testing.assert_close(got[b, prefix + slot], h[i], atol=1e-6, rtol=1e-5)
            assert float(masses[b, slot]) == pytest.approx(mass[i], rel=1e-5)
            assert total.size[b, slot] == len(group)
        torch.testing.assert_close(got[b, :prefix], h[:prefix], atol=1e-6, rtol=1e-5)


def test_the_mean_over_tokens_counts_masses() -> None:
    """As in the authors' patch of MAE models: the sum of mass times feature over the sum of masses."""
    prune, merge = LISTS["both"]
    model, x = vit(global_pool="avg").double(), images(2).double()
    with vtr.apply(model, vtr.DiffRate(prune=prune, merge=merge)), torch.no_grad():
        got = model(x)
        for b in range(2):
            _, h, mass = literal(model, x[b : b + 1], prune, merge)
            weights = torch.tensor(mass[1:], dtype=h.dtype)
            mean = (h[1:] * weights[:, None]).sum(0) / weights.sum()
            wanted = model.head(model.fc_norm(mean))
            torch.testing.assert_close(got[b], wanted, atol=1e-6, rtol=1e-5)


def test_later_merges_add_masses_up() -> None:
    step = vtr.TokenMap.merged(torch.tensor([[0, 2]]), torch.tensor([[0, 0, 1, -1]]))
    assert step.total(torch.tensor([[1.5, 2.0, 4.0, 8.0]])).tolist() == [[3.5, 4.0]]


def test_published_lists() -> None:
    """The lists count the class token; every one is for the blocks of its model, and starts with all tokens."""
    found = vtr.DiffRate.preset("deit-small/2.9")
    assert found.prune == (196, 195, 189, 167, 149, 138, 128, 116, 98, 77, 57, 2)
    assert found.merge == (196, 193, 175, 155, 140, 132, 120, 106, 87, 63, 55, 2)
    assert vtr.DiffRate.preset("deit-base/11.5").merge == (
        *(196, 196, 191, 177, 157, 144, 126, 110, 93, 49, 34, 2),
    )
    depth = {"deit": 12, "mae-base": 12, "mae-large": 24, "mae-huge": 32}
    for name, method in vtr.DiffRate.presets().items():
        blocks = next(d for start, d in depth.items() if name.startswith(start))
        assert method.prune is not None and method.merge is not None
        assert len(method.prune) == len(method.merge) == blocks
        assert method.prune[0] == method.merge[0] == (256 if "huge" in name else 196)
        assert min(method.merge) >= 1


def test_cost_of_a_published_list() -> None:
    """deit-small/2.9 costs 2.9 G multiply-adds with patch embedding and head, by the authors' formula."""
    method, c = vtr.DiffRate.preset("deit-small/2.9"), 384
    assert method.prune and method.merge
    n, total = 197, 197 * c * 768 + c * 1000
    for p, m in zip(method.prune, method.merge, strict=True):
        total += 4 * n * c * c + 2 * n * n * c
        n = min(n, p + 1, m + 1)
        total += 8 * n * c * c
    assert total / 1e9 == pytest.approx(2.9, abs=0.05)


def test_a_budget_is_reached_in_equal_steps() -> None:
    prune, merge = vtr.DiffRate(keep=0.25).counts(6, 64)
    assert merge == (64, 55, 45, 36, 26, 16)
    assert prune == (64, 60, 50, 41, 31, 21)
    for keep, left in ((1.0, 64), (1, 1), (0.1, 7)):
        assert vtr.DiffRate(keep=keep).counts(6, 64)[1][-1] == left
    model = vit()
    with vtr.apply(model, vtr.DiffRate(keep=1)) as handle, torch.no_grad():
        assert model(images()).isfinite().all()
    assert handle.trace.stages[-1].tokens_out == 1


# ---- learning ------------------------------------------------------------------------------------------


def rates(tokens: int = 64, depth: int = 6, step: int = 4, seed: int | None = None) -> LearnedRates:
    made = LearnedRates(tokens, depth, step, 48)
    if seed is not None:
        with torch.no_grad():
            made.scores.normal_(0, 2, generator=torch.Generator().manual_seed(seed))
    return made


def test_expected_numbers_and_survival() -> None:
    made = rates(13, 3, 4, seed=1)
    assert made.candidates.tolist() == [13, 9, 5, 1]
    scores = made.scores.detach().double().numpy()
    for block in range(2):
        for kind in range(2):
            p = np.exp(scores[block, kind])
            p /= p.sum()
            mean = float(p @ [13, 9, 5, 1])
            assert float(made.expected().detach()[block, kind]) == pytest.approx(
                math.ceil(mean), abs=1e-5
            )
            survive = [
                sum(q for q, n in zip(p, (13, 9, 5, 1), strict=True) if n > j) for j in range(13)
            ]
            assert made.survival()[block, kind].tolist() == pytest.approx(survive, abs=1e-6)
    gradient = torch.autograd.grad(made.expected()[1, 0], made.scores)[0][1, 0]
    p = torch.softmax(made.scores[1, 0].detach(), 0)
    torch.testing.assert_close(gradient, p * (made.candidates - p @ made.candidates))


def test_cost_and_its_gradient() -> None:
    """The authors' recursion; the smaller number's gradient goes to both numbers of its block."""
    made = rates(seed=2)
    pairs, c, n = made.expected().detach().tolist(), 48, 65.0
    whole = 12 * n * c**2 + 2 * n**2 * c
    total, before = whole, [n]
    for pair in pairs:
        after = min(before[-1], pair[0] + 1, pair[1] + 1)
        total += 4 * before[-1] * c**2 + 2 * before[-1] ** 2 * c + 8 * after * c**2
        before.append(after)
    assert float(made.cost().detach()) == pytest.approx(total / (6 * whole), rel=1e-6)
    numbers = made.expected().detach().requires_grad_()
    made.expected = lambda: numbers  # type: ignore[method-assign]
    gradient = torch.autograd.grad(made.cost(), numbers)[0]
    for block in range(5):
        wanted = 8 * c**2 + (4 * c**2 + 4 * before[block + 1] * c if block < 4 else 0)
        assert gradient[block].tolist() == pytest.approx([wanted / (6 * whole)] * 2, rel=1e-5)


def test_masks_pass_gradients_straight_through() -> None:
    chance = torch.rand(8).requires_grad_()
    mask = straight_through(chance, 3, 6)
    assert mask.tolist() == [1, 1, 1, 0, 0, 0, 1, 1]
    assert torch.autograd.grad(mask.sum(), chance)[0].tolist() == [1] * 8


def masked(model: Any, x: Tensor, pairs: list[list[int]]) -> tuple[list[list[int]], Tensor]:
    """One image in training as the authors compute it: all tokens, sorted, with a mask on keys."""
    h = model._pos_embed(model.patch_embed(x))[0]
    n = h.shape[0]
    index, mass = list(range(n)), torch.ones(n, dtype=h.dtype)
    mask, alive = torch.ones(n, dtype=h.dtype), n
    policies = []
    for i, block in enumerate(model.blocks):
        normed = block.norm1(h)
        width = normed.shape[1]
        q, k, v = block.attn.qkv(normed).reshape(n, 3, 3, -1).permute(1, 2, 0, 3)
        logits = q @ k.transpose(-1, -2) * (width // 3) ** -0.5 + mass.log()
        weights = logits.exp() * (mask + (1 - mask) * torch.eye(n, dtype=h.dtype))
        attention = weights / weights.sum(-1, keepdim=True)
        h = h + block.attn.proj((attention @ v).transpose(0, 1).reshape(n, width))
        if i > 0:
            score = attention[:, 0].mean(0).tolist()
            order = [0, *sorted(range(1, n), key=lambda j: (-float(mask[j]), -score[j]))]
            h, mass, mask, index = (
                h[order],
                mass[order],
                mask[order].clone(),
                [index[j] for j in order],
            )
            prune, merge = (number + 1 for number in pairs[i - 1])
            mask[prune:alive] = 0 if prune < alive else mask[prune:alive]
            middle = min(prune, alive)
            if merge < middle:
                mask[merge:middle] = 0
                unit = h / h.norm(dim=-1, keepdim=True)
                similarity = unit[merge:middle] @ unit[1:merge].T
                best = similarity.max(-1)
                mass = mass.clone()
                mass[merge:middle] *= best.values
                mass = mass.clamp(min=1)
                new, count, more = h.clone(), torch.ones(n, dtype=h.dtype), mass.clone()
                for j, i_ in enumerate(best.indices.tolist()):
                    new[1 + i_] += h[merge + j]
                    count[1 + i_] += 1
                    more[1 + i_] += mass[merge + j]
                h, mass = new / count[:, None], more
            alive = min(middle, merge)
            policies.append(sorted(index[j] - 1 for j in range(1, n) if mask[j] > 0))
        h = h + block.mlp(block.norm2(h))
    return policies, model.norm(h)[0]


@pytest.mark.parametrize("seed", [None, 3, 4])
def test_training_is_the_authors_masked_network(seed: int | None) -> None:
    model, x, made = vit().double(), images(2).double(), rates(seed=seed)
    method = vtr.DiffRate(learn=True)
    with vtr.apply(model, method, modules=made) as handle:
        model.train()
        got = model.forward_features(x)
        records = handle.trace.policies
        tokens = handle.trace.tokens["encoder"]
    assert [(r.layer, r.place) for r in records] == [(n, "middle") for n in range(1, 6)]
    assert set(tokens.values()) == {(64, 64)}
    pairs = made.expected().detach().round().long().tolist()
    for b in range(2):
        policies, cls = masked(model, x[b : b + 1], pairs)
        for record, alive in zip(records, policies, strict=True):
            assert record.policy[b].nonzero()[:, 0].tolist() == alive
            assert set(record.policy[b].tolist()) <= {0.0, 1.0}
        torch.testing.assert_close(got[b, 0], cls, atol=1e-5, rtol=1e-5)


def test_learning_reaches_its_target_and_gives_a_static_method() -> None:
    model, x = vit(), images(2)
    method = vtr.DiffRate(learn=True, target=0.5)
    with vtr.apply(model, method) as handle:
        made = handle.modules[0]
        with pytest.raises(vtr.UnsupportedMethodError, match="rates are new"):
            model(x)
        model.train()
        optimizer = torch.optim.AdamW(made.parameters(), lr=0.05, weight_decay=0)
        labels = torch.tensor([3, 4])
        for _ in range(30):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), labels)
            (loss + sum(method.training_losses(handle.trace, made).values())).backward()
            optimizer.step()
        assert float(made.cost()) == pytest.approx(0.5, abs=0.05)
        model.eval()
        with torch.no_grad():
            learned = model(x)
        found = vtr.DiffRate.from_modules(made)
    assert isinstance(found, vtr.DiffRate) and not found.learn
    with vtr.apply(model, found), torch.no_grad():
        assert torch.equal(model(x), learned)


def test_the_task_moves_the_rates_of_the_first_cut() -> None:
    model, x, made = vit().train(), images(2), rates(seed=5)
    with vtr.apply(model, vtr.DiffRate(learn=True), modules=made) as handle:
        model(x).square().sum().backward()
        assert vtr.DiffRate(learn=True).training_losses(handle.trace, made) == {}
    assert made.scores.grad is not None and made.scores.grad[0].abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters())


def test_a_loaded_state_is_the_same_rates() -> None:
    made, other = rates(seed=6), rates()
    other.load_state_dict(made.state_dict())
    assert other.counts() == made.counts() != rates().counts()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.5, "learn": True}, "give one of keep"),
        ({"keep": 0.5, "prune": (3,), "merge": (3,)}, "give one of keep"),
        ({"prune": (3, 2)}, "merge must be a number of tokens per block"),
        ({"prune": (3, 2), "merge": (3,)}, "got 2 and 1"),
        ({"prune": (3, 0), "merge": (3, 1)}, "prune must be an int >= 1"),
        ({"target": 0.5}, "set learn=True"),
        ({"learn": True, "target": 2.0}, "target must be a number"),
        ({"learn": 1}, "learn must be True or False"),
        ({"granularity": 0, "learn": True}, "granularity must be an int >= 1"),
    ],
)
def test_wrong_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtr.DiffRate(**options)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"12 numbers, and .* has 6 blocks"):
        vtr.apply(vit(), vtr.DiffRate.preset("deit-small/2.9"))
    with pytest.raises(vtr.UnsupportedMethodError, match="no class token"):
        vtr.apply(vit(class_token=False, global_pool="avg"), vtr.DiffRate())
    with pytest.raises(TypeError, match="modules must be those of"):
        vtr.DiffRate.from_modules(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="two blocks or more"):
        vtr.apply(vit(depth=1), vtr.DiffRate(learn=True))
    model = vit(dynamic_img_size=True).train()
    with vtr.apply(model, vtr.DiffRate(learn=True)), pytest.raises(ValueError, match="of one size"):
        model(images(size=80))
    chain = [vtr.ATS(layers=(0,)), vtr.DiffRate(prune=(64,) * 6, merge=(64, 20, 20, 20, 20, 20))]
    with pytest.raises(ValueError, match="both reduce at"):
        vtr.apply(vit(), chain)
