"""ZipCache, the cache of ZipVL and the staircase of bits, against loops over heads, rows and entries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vtr
from tests.methods.kv_sites import Cache
from tests.methods.language_sites import Prompt
from vtr.core.kv_site import KVSite
from vtr.methods.common.bits import ranking_rows
from vtr.methods.common.token_sets import probe_rows

TEXT = "t" * 4 + "v" * 28 + "t" * 8
KINDS = (TEXT, "." * 9 + TEXT[9:], TEXT[:-6] + "." * 6)  # no, left and right padding


class Chat(Cache):
    """A cache that holds every column, with the bits of each."""

    def __init__(self, *kinds: str) -> None:
        super().__init__(*kinds)
        self.stored = torch.full(self.k.shape[:3], 32)
        self.visual = self.marks.kind > 0

    def show(self, start: int, end: int, chosen: int = 0) -> KVSite:
        """The call with rows ``start`` to ``end``; entries were last chosen before column ``chosen``."""
        self.columns = torch.arange(start).expand(*self.k.shape[:2], -1)
        self.length, self.fresh = start, start - chosen
        return self.call(end - start, bits=lambda: self.stored[:, :, :end])

    def compress(self, method: Any, start: int, end: int, chosen: int = 0) -> Tensor:
        """Let a method choose: bits (B, Hk, K), 0 for what is dropped."""
        change = method.compress(self.show(start, end, chosen))
        self.stored[:, :, :end] = change.bits.masked_fill(~change.kept, 0)
        return self.stored[:, :, :end]

    def alone(self, sample: int) -> Chat:
        plain, out = super().alone(sample), Chat(self.kinds[sample].replace(".", ""))
        out.q, out.k, out.v = plain.q, plain.k, plain.v
        return out

    def row(self, sample: int, row: int) -> np.ndarray:
        """(H, S) float64: the attention of one row over the columns."""
        out = np.zeros((self.q.shape[1], self.k.shape[2]))
        for h in range(len(out)):
            for column, weight in self.attention(sample, h, row, range(row + 1)).items():
                out[h, column] = weight
        return out


def probed(chat: Chat, sample: int, start: int, end: int, recent: float, random: float, seed: int):
    """The rows that rank, as columns: ranks among the tokens of the call, drawn for their number alone."""
    rows = [c for c in range(start, end) if chat.tokens[sample, c]]
    if end - start == 1:
        return rows
    n = len(rows)
    numbers = [x if isinstance(x, int) else math.ceil(round(x * n, 9)) for x in (recent, random)]
    return [rows[i] for i in probe_rows(n, *numbers, seed).tolist()]


def brute_force(chat: Chat, sample: int, start: int, end: int, new, method: vtr.ZipCache):
    """Bits of the new entries of a sample, {(head, column): bits}, as the paper says (section 4.3)."""
    rows = probed(chat, sample, start, end, method.recent, method.random, method.seed + chat.layer)
    heads, groups = chat.q.shape[1], chat.k.shape[1]
    found = {}
    for g in range(groups):
        score = {}
        for j in new:
            total, count = 0.0, 0
            for row in rows:
                if row < j:
                    continue
                count += 1
                of_head = chat.row(sample, row)
                total += sum(of_head[h, j] for h in range(heads) if h * groups // heads == g)
            score[j] = total / max(count, 1)
        low = math.floor(round((1 - method.salient) * len(new), 9))
        worst = sorted(new, key=lambda j: (score[j], -j))[:low]
        for j in new:
            found[g, j] = method.low if j in worst else method.high
    return found


def check(chat: Chat, found, expected, sample: int):
    for g, j in np.ndindex(found.shape[1:]):
        if chat.tokens[sample, j]:
            assert found[sample, g, j] == expected.get((g, j), 32), (sample, g, j)


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("salient, recent, random", [(0.6, 0.05, 0.05), (0.5, 0.2, 7)])
def test_zipcache_stores_what_the_paper_says(salient, recent, random, text):
    chat = Chat(*KINDS)
    method = vtr.ZipCache(salient, recent=recent, random=random, seed=3, text=text)
    found = chat.compress(method, 0, 40).clone()
    for b in range(3):
        new = [j for j in range(40) if chat.tokens[b, j] and (text or chat.visual[b, j])]
        check(chat, found, brute_force(chat, b, 0, 40, new, method), b)


def test_new_tokens_are_ranked_by_the_newest_row_and_old_ones_stay_as_they_are():
    chat = Chat("t" * 60, "." * 5 + "t" * 55)
    method = vtr.ZipCache(0.5, every=10)
    before = chat.compress(method, 0, 50).clone()
    found = chat.compress(method, 59, 60, chosen=50)
    assert torch.equal(found[:, :, :50], before)
    for b in range(2):
        expected = brute_force(chat, b, 59, 60, range(50, 60), method)
        for g, j in np.ndindex(2, 10):
            assert found[b, g, 50 + j] == expected[g, 50 + j]
    assert (found[:, :, 50:] == 4).sum(2).eq(5).all()


def test_a_late_token_seen_by_few_rows_is_not_the_worse_for_it():
    """With sums instead of means early tokens, which more rows see, would be the salient ones."""
    chat = Chat("t" * 40)
    chat.q[:] = 0  # uniform attention: 1 / (i + 1)
    found = chat.compress(vtr.ZipCache(0.5, recent=1.0), 0, 40)
    # The mean over rows i >= j of 1 / (i + 1) falls with j: exactly the first half is salient.
    assert (found[..., :20] == 4).all() and (found[..., 20:] == 2).all()
    late = Chat("t" * 40)
    late.q[:] = 0
    late.k[:, :, 38] = 5
    late.q[:, :, 39] = 5  # one row alone sees it, and attends to nothing else
    found = late.compress(vtr.ZipCache(0.05, recent=1.0), 0, 40)
    assert (found[:, :, 38] == 4).all()


@pytest.mark.parametrize("sample", [0, 1, 2])
def test_a_sample_alone_has_the_rows_and_bits_that_it_has_in_a_batch(sample):
    for method in (vtr.ZipCache(0.5), vtr.ZipVLCache(0.6, recent=6, random=5)):
        chat = Chat(*KINDS)
        alone = chat.alone(sample)
        many = chat.compress(method, 0, 40)[sample][:, chat.tokens[sample]]
        assert torch.equal(many, alone.compress(method, 0, alone.tokens.shape[1])[0])


def test_rows_are_found_among_the_tokens_of_the_call():
    chat = Chat(*KINDS, "." * 40)
    rows = ranking_rows(chat.show(10, 40), 4, 3, 5)
    for b in range(3):
        expected = [c - 10 for c in probed(chat, b, 10, 40, 4, 3, 5)]
        assert [r for r in rows[b].tolist() if r >= 0] == expected
    assert (rows[3] == -1).all()


# ---- ZipVL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.3, 0.6, 0.9])
def test_the_important_tokens_are_those_of_zipvl(tau):
    options = {"recent": 6, "random": 5, "seed": 2}
    prompt = Prompt(TEXT, layer=1)
    chosen = vtr.ZipVL(tau, last_rows=1, block=16, **options).tokens(prompt.site())
    chat = Chat(TEXT)
    chat.q, chat.k, chat.v = prompt.q, prompt.k, prompt.v
    found = chat.compress(vtr.ZipVLCache(tau, **options), 0, 40)
    assert torch.equal(found, torch.where(chosen, 4, 2)[:, None].expand_as(found))
    assert 0 < int((found == 2).sum()) < found.numel()


def test_the_second_version_drops_what_is_not_important():
    chat, other = Chat(*KINDS), Chat(*KINDS)
    options = {"recent": 6, "random": 5}
    bits = chat.compress(vtr.ZipVLCache(0.6, **options), 0, 40)
    kept = other.compress(vtr.ZipVLCache(0.6, high=16, low=0, **options), 0, 40)
    live = chat.tokens[:, None].expand_as(kept)
    assert torch.equal(kept[live], torch.where(bits == 4, 32, 0)[live])
    assert (kept[live & ~chat.visual[:, None]] == 32).all()  # text stays


def test_while_an_answer_is_written_tau_decides_how_many_new_tokens_are_important():
    chat = Chat("t" * 60)
    found = chat.compress(vtr.ZipVLCache(0.5), 59, 60, chosen=50)
    mass = chat.row(0, 59).mean(0)[50:]
    order, total, important = np.argsort(-mass), 0.0, {9}  # the newest always
    for j in order:
        important.add(int(j))
        total += mass[j]
        if total >= 0.5 * mass.sum():
            break
    assert (found[..., :50] == 32).all()
    for j in range(10):
        assert (found[0, :, 50 + j] == (4 if j in important else 2)).all()
    dropping = Chat("t" * 60)
    method = vtr.ZipVLCache(0.5, high=16, low=0)
    assert (dropping.compress(method, 59, 60, chosen=50) == 32).all()


# ---- the staircase --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [True, False])
def test_bits_fall_with_the_tokens_that_came_after(text):
    chat = Chat(*KINDS)
    method = vtr.StaircaseKV((3, 10, 20), bits=(16, 8, 4, 2), text=text)
    for end in (30, 40):
        found = chat.compress(method, 0, end)
        for b in range(3):
            for j in range(end):
                if not chat.tokens[b, j]:
                    continue
                age = int(chat.tokens[b, j + 1 : end].sum())
                bits = 32 if age < 3 else 8 if age < 10 else 4 if age < 20 else 2
                wanted = bits if text or chat.visual[b, j] else 32
                assert (found[b, :, j] == wanted).all()


def test_bits_do_not_come_back():
    chat = Chat("t" * 20)
    chat.stored[:] = 2
    assert (chat.compress(vtr.StaircaseKV((30,), bits=(16, 4)), 0, 20) == 2).all()


# ---- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: vtr.ZipCache(1.5), "salient"),
        (lambda: vtr.ZipCache(high=3), r"high must be one of 16, 8, 4, 2 .* got 3"),
        (lambda: vtr.ZipCache(high=2, low=4), r"low must be at most high=2, got 4"),
        (lambda: vtr.ZipCache(low=0), r"low must be one of 16, 8, 4, 2"),
        (lambda: vtr.ZipCache(recent=0), "recent"),
        (lambda: vtr.ZipCache(random=2.0), "random"),
        (lambda: vtr.ZipCache(every=-1), "every must be an int from 0 on"),
        (lambda: vtr.ZipCache(text=1), "text"),
        (lambda: vtr.ZipVLCache(0.0), "tau"),
        (lambda: vtr.ZipVLCache(low=3), r"low must be one of 16, 8, 4, 2, 0"),
        (lambda: vtr.ZipVLCache(high=4, low=8), r"low must be at most high=4, got 8"),
        (lambda: vtr.StaircaseKV(5), r"ages must be a tuple of ints, got 5"),
        (lambda: vtr.StaircaseKV((9, 3)), r"ages must be ascending ints from 1 on"),
        (lambda: vtr.StaircaseKV((0,), bits=(4, 2)), r"ages must be ascending ints from 1 on"),
        (lambda: vtr.StaircaseKV((9,), bits=(4, 3)), r"bits\[1\] must be one of"),
        (lambda: vtr.StaircaseKV((9,), bits=(2, 4)), r"bits must not rise with age"),
        (lambda: vtr.StaircaseKV((9,)), r"one number more than ages, got 3 and 1"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
