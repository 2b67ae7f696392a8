"""Laws of methods inside the attention of a language model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtr.compat.transformers import cache_of, with_cache
from vtr.core.method import Method
from vtr.methods.common.decode import DecodeMethod
from vtr.methods.common.edit import EditMethod
from vtr.methods.common.language_attention import LanguageAttentionMethod
from vtr.methods.common.prefill import PrefillMethod
from vtr.testing.trial import Inputs, Trial, close, instead, require

EXACT = 1e-5  # float32, of one attention call
LOGITS = 1e-4  # float32, behind all layers
SEEN = 1e-6  # weight of a value that is seen


def acts_inside(method: type[Method] | Method) -> bool:
    """Tell whether a method acts inside the attention of a language model."""
    cls = method if isinstance(method, type) else type(method)
    return issubclass(cls, LanguageAttentionMethod)


def everything(trial: Trial) -> None:
    """Keep everything is dense attention: in every call, and in the end."""
    for method in trial.settings.everything:

        def compare(site: Any, attend: Any, method: Any = method) -> Tensor:
            out: Tensor = attend(site)
            rows = site.row_mask(site.valid)[:, None, :, None]
            what = f"{method}, attention[{site.layer}] in a {site.phase}"
            close(out * rows, dense(site) * rows, EXACT, what)
            return out

        for side in trial.kind.sides or ("left",):
            inputs = trial.kind.batch(trial.kind.samples, side)
            found = trial.run(_with(method, compare), inputs).out
            wanted = trial.native if side == "left" else trial.call(inputs)
            close(found, wanted, LOGITS, f"{method}, padding {side}")


def alone(trial: Trial) -> None:
    """A sample alone equals the sample in a padded batch of two, and of eight."""
    samples = trial.kind.samples
    for side, times in (("left", 4), *((side, 1) for side in trial.kind.sides if side != "left")):
        found = trial.run(trial.method, trial.kind.batch(samples * times, side)).out
        for b, row in enumerate(found):
            own = trial.alone[b % len(samples)].out[0, : len(row)]
            what = f"sample {b} of {len(found)}, padding {side}"
            close(row, own, trial.kind.tolerance, what)


def whole(trial: Trial) -> None:
    """Attention is causal and leaves padding out; its rows sum to 1, and those that are not the method's are dense.

    A decoding step that reads a part of the keys reads all text. And the trace says no smaller density than what was
    really seen.
    """
    for method in trial.settings.some:
        looked: dict[tuple[int, str], tuple[Any, float]] = {}

        def look(site: Any, attend: Any, method: Any = method, looked: Any = looked) -> Tensor:
            place = site.layer, site.phase
            if place not in looked:
                looked[place] = site, _check(method, attend, site)
            return attend(site)  # type: ignore[no-any-return]

        chat(trial, _with(method, look), trial.batch)
        _compare_density(looked)
        for side in trial.kind.sides[1:]:
            looked.clear()
            trial.run(_with(method, look), trial.kind.batch(trial.kind.samples, side))
            _compare_density(looked)


def _compare_density(looked: dict[tuple[int, str], tuple[Any, float]]) -> None:
    for (layer, phase), (site, seen) in looked.items():
        if "density" in site.notes:
            said = float(site.notes["density"])
        elif phase == "decode":
            said = float(site.notes["work"] / site.pairs)
        else:  # a turn of text alone
            continue
        require(
            seen <= said + 1e-3,
            f"attention[{layer}] in a {phase} sees {seen:.3f} of the pairs, and the trace says {said:.3f}: "
            "site.count(share) notes what site.sparse and site.dense do not compute",
        )


def turns(trial: Trial) -> None:
    """A second turn with images continues from the cache of the first: dense if everything is kept, and alone as
    in a batch."""
    for method in trial.settings.everything:
        what = f"{method}, two turns"
        close(chat(trial, method, trial.batch), chat(trial, None, trial.batch), LOGITS, what)
    both = chat(trial, trial.method, trial.batch)
    for b, sample in enumerate(trial.kind.samples):
        own = chat(trial, trial.method, sample)
        close(both[b], own[0], trial.kind.tolerance, f"sample {b} in two turns")


def chat(trial: Trial, method: Method | None, inputs: Inputs) -> Tensor:
    """The last logits of a prompt, of a second turn with the same images, and of a token behind it, (B, 3, V)."""
    with nullcontext() if method is None else trial.applied(method), torch.no_grad():
        return _chat(trial.kind.model, inputs)


def _chat(model: Any, inputs: Inputs) -> Tensor:
    mask, cache, out = inputs["attention_mask"][:, :0], None, []
    batch = inputs["input_ids"].shape[0]
    said = torch.arange(30, 37).expand(batch, -1)
    again = {**inputs, "input_ids": torch.cat([said, inputs["input_ids"]], 1)}
    again["attention_mask"] = pad(inputs["attention_mask"], (7, 0), value=1)
    if "mm_token_type_ids" in inputs:
        again["mm_token_type_ids"] = pad(inputs["mm_token_type_ids"], (7, 0))
    one = {"input_ids": said[:, :1], "attention_mask": torch.ones_like(said[:, :1])}
    for turn in (inputs, again, one):
        mask, length = torch.cat([mask, turn["attention_mask"]], 1), turn["input_ids"].shape[1]
        # Tokens are counted, so that padding between two turns changes nothing.
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        if "mm_token_type_ids" in inputs:
            positions = positions.expand(3, -1, -1)
        more: dict[str, Any] = {} if cache is None else with_cache(type(model).forward, cache)
        found = model(
            **{**turn, "attention_mask": mask}, position_ids=positions, use_cache=True, **more
        )
        cache = cache_of(found)
        out.append(found.logits[:, -1])
    return torch.stack(out, 1)


def _with(method: Method, around: Callable[[Any, Any], Tensor]) -> Method:
    """The method with ``around(site, attend)`` in the place of its ``attend``."""
    attend = method.attend  # type: ignore[attr-defined]
    return instead(method, "attend", lambda site: around(site, attend))


def every_row(site: Any) -> Tensor:
    """(B, L) the rows of a call, -1 for padding."""
    rows = torch.arange(site.q.shape[2]).expand(len(site.valid), -1)
    return torch.where(site.row_mask(site.valid), rows, -1)


def dense(site: Any) -> Tensor:
    """Dense attention (B, H, L, D) from a map of all rows and columns."""
    out: Tensor = site.weigh(site.attention_rows(every_row(site)))
    return out


def _check(method: Method, attend: Any, given: Any) -> float:
    """Check the weights of one attention call, and return the share of the allowed pairs that is seen."""
    site, edited = copy.copy(given), torch.zeros_like(given.row_mask(given.valid))
    change = type(site).edit

    def plain(probe: Any) -> Tensor:
        """Run the method, with dense attention that follows the values of the probe."""

        def edit(how: Any, rows: Tensor) -> Tensor:
            edited.logical_or_(_marked(rows, edited))
            out: Tensor = change(probe, how, rows)
            return out

        probe._dense = lambda: dense(probe)
        probe.edit = edit
        out: Tensor = attend(probe)
        return out

    weights = _weights(plain, site, not isinstance(method, DecodeMethod))
    probe = copy.copy(site)
    probe.notes, probe.state, probe.memory = {}, *copy.deepcopy((site.state, site.memory))
    said = weights @ site.v.float().repeat_interleave(site.q.shape[1] // site.v.shape[1], 1)
    valid = site.row_mask(site.valid)
    if not torch.allclose(
        said * valid[:, None, :, None], plain(probe) * valid[:, None, :, None], atol=1e-3
    ):
        return 0.0  # what is chosen depends on the values: they cannot be told apart by it
    where = f"{method}, attention[{site.layer}] in a {site.phase}"
    sees = site.sees(every_row(site))
    wrong = (weights.abs() > SEEN).any(1) & ~sees & valid[..., None]
    if bool(wrong.any()):
        b, i, j = wrong.nonzero()[0].tolist()
        reason = (
            "padding"
            if not site.valid[b, j]
            else "later"
            if j > site.offset + i
            else "outside of the window"
        )
        raise AssertionError(
            f"{where}: row {i} of sample {b} sees column {j}, which is {reason} (it is column "
            f"{site.offset + i} itself); {int(wrong.sum())} such pairs. Attention is causal: see site.sees(rows)"
        )
    total = weights.sum(-1)
    lawful = (total - 1).abs() < 1e-3
    if isinstance(method, PrefillMethod):
        lawful |= (weights.abs() <= SEEN).all(-1)  # a row that is skipped
    if isinstance(method, (PrefillMethod, EditMethod, DecodeMethod)):
        bad = ~lawful & valid[:, None]
        require(
            not bool(bad.any()),
            f"{where}: rows of attention sum to 1, and {int(bad.sum())} do not (one sums to "
            f"{float(total[bad][0]) if bool(bad.any()) else 1:.3f})",
        )
    own = torch.ones_like(valid)
    if isinstance(method, PrefillMethod):
        behind = valid.int().flip(1).cumsum(1).flip(1)
        own = ~site.row_mask(site.text) & (behind > method.last_rows)
        own &= site.phase != "decode"
    elif isinstance(method, EditMethod):
        own = edited
    elif isinstance(method, DecodeMethod):
        own &= site.phase == "decode"
        if site.phase == "decode":
            _check_text(weights, site, where)
    other = (valid & ~own)[:, None, :, None]
    close(weights * other, site.attention_rows(every_row(site)) * other, 1e-4,
          f"{where}: the rows that are dense (text, the last ones, or those that are not edited)")  # fmt: skip
    seen = (weights.abs() > SEEN) & valid[:, None, :, None]
    return float(seen.sum() / (site.pairs * site.q.shape[1]))


def _check_text(weights: Tensor, site: Any, where: str) -> None:
    """Check that a step reads all text that it sees: with fewer other keys it weighs no less than in dense
    attention."""
    given = site.attention_rows(every_row(site))
    less = (weights < given - 1e-4) & (site.text & site.valid[:, -1:])[:, None, None]
    if bool(less.any()):
        b, h, _, j = less.nonzero()[0].tolist()
        raise AssertionError(
            f"{where}: head {h} of sample {b} does not read column {j}, which is text; {int(less.sum())} such pairs. "
            "Only visual keys are left out: see DecodeMethod.read"
        )


def _weights(attend: Any, site: Any, wider: bool) -> Tensor:
    """(B, H, L, S) float32, how much of each value is in each row of the output: what is computed of values that
    are one for one column each. If ``wider``, queries and keys get zeros at the end to be as wide as these."""
    columns, width = site.k.shape[2:]
    probe = copy.copy(site)
    if wider:
        probe.q, probe.k = (pad(x, (0, max(columns, width) - width)) for x in (site.q, site.k))
    probe.v = torch.eye(columns, max(columns, width)).expand(*site.v.shape[:2], -1, -1)
    probe.notes, probe.state, probe.memory = {}, *copy.deepcopy((site.state, site.memory))
    out: Tensor = attend(probe)[..., :columns].float()
    return out


def _marked(rows: Tensor, like: Tensor) -> Tensor:
    """(B, L) bool, True for rows (B, R)."""
    length = like.shape[1]
    found = torch.zeros(len(like), length + 1, dtype=torch.bool)
    return found.scatter(1, torch.where(rows < 0, length, rows), True)[:, :length]
