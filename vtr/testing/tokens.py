"""Laws of methods that decide which tokens are computed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vtr.core.budget import count
from vtr.core.method import TokenMethod
from vtr.testing.maps import check_map, check_trace
from vtr.testing.models.blocks import layers_of
from vtr.testing.trial import Trial, close, equal, instead, kept, require


def everything(trial: Trial) -> None:
    """Keep everything is the model, bit by bit."""
    for method in trial.settings.everything:
        found = trial.run(method, trial.batch)
        cuts = [r for r in trial.own(found.trace) if r.tokens_out < r.tokens_in]
        require(not cuts, f"{method} cuts: {found.trace.summary()}")
        equal(found.out, trial.native, f"{method}")


def maps(trial: Trial) -> None:
    """Kept indices ascend, are unique and in range; mass is conserved; padding is never kept."""
    for method in trial.settings.some:
        assert isinstance(method, TokenMethod)
        plain = method.reduce

        def reduce(site: Any, plain: Any = plain) -> Any:
            made = plain(site)
            if made is not None and made.map is not None and not made.absolute:
                check_map(made.map, getattr(site, "valid", None))
            return made

        for side in trial.kind.sides or ("left",):
            inputs = trial.kind.batch(trial.kind.samples, side)
            found = trial.run(instead(method, "reduce", reduce), inputs)
            check_trace(found.trace, trial.kind.rows)
            require(bool(found.out.isfinite().all()), "the output is not finite")
            for record in trial.own(found.trace):
                if not method.size_weighted or method.drops or record.site not in method.sites:
                    continue
                total = record.total
                require(
                    bool((total.size.sum(1) == total.n_in).all()),
                    f"a merging method lost tokens: {total.size.sum(1).tolist()} of {total.n_in}",
                )


def counts(trial: Trial) -> None:
    """As many tokens are left as the budget says: rounded up, per image if it is a number."""
    for method in trial.settings.counted:
        keep = getattr(method, "keep", None)
        if not trial.kind.counted & set(method.sites) or not isinstance(keep, (int, float)):
            continue
        try:
            found = trial.run(method, trial.batch)
        except ValueError:  # a method that cannot go so far says so
            continue
        records = trial.own(found.trace)
        if not records:
            continue
        left = [len(kept(records[-1], b)) for b in range(len(trial.kind.samples))]
        lawful = [
            [sum(count(keep, n) + rest for n, rest in parts) for parts in way]
            for way in _ways(trial, keep, records[-1].total.n_in)
        ]
        require(
            left in lawful,
            f"{method} leaves {left} tokens of the samples; its budget is {lawful[0]}",
        )


def _ways(trial: Trial, keep: float, tokens: int) -> list[list[list[tuple[int, int]]]]:
    """Per sample the parts that a budget counts, each with tokens beside it that stay: a fraction is of all
    tokens of a sample and a number per image; or both per video, whose separators stay."""
    per = [trial.kind.images(sample) or [(tokens, 0)] for sample in trial.kind.samples]
    whole = [
        [(sum(n for n, _ in images), 0)] if isinstance(keep, float) else images for images in per
    ]
    first = [[(n, 0) for n, _ in images] for images in whole]
    return [first, [[(n - rest, rest) for n, rest in images] for images in per]]


def alone(trial: Trial) -> None:
    """A sample alone equals the sample in a padded batch, whatever the side of the padding."""
    for side in trial.kind.sides or ("left",):
        inputs = trial.kind.batch(trial.kind.samples, side)
        both = trial.reduced if side == "left" else trial.run(trial.method, inputs)
        for b, own in enumerate(trial.alone):
            steps = both.out.shape[1] if both.out.dim() > 2 else None
            wanted = own.out[:1] if steps is None else own.out[:1, :steps]
            _same_choice(trial, both.trace, b, own.trace, f"sample {b}, padding {side}")
            close(both.out[b : b + 1], wanted, trial.kind.tolerance, f"sample {b}, padding {side}")


def leak(trial: Trial) -> None:
    """Other pixels in one sample of a batch move no other sample."""
    samples = trial.kind.samples
    for changed in range(len(samples)):
        rows = [trial.kind.changed(s) if i == changed else s for i, s in enumerate(samples)]
        found = trial.run(trial.method, trial.kind.batch(rows))
        for b in range(len(samples)):
            same = f"sample {b} after a change of sample {changed}"
            if b != changed:
                _same_choice(trial, found.trace, b, trial.reduced.trace, same, b)
                close(found.out[b], trial.reduced.out[b], trial.kind.tolerance / 4, same)
            else:
                require(
                    not torch.equal(found.out[b], trial.reduced.out[b]),
                    f"sample {b} does not depend on its own pixels",
                )


def _same_choice(trial: Trial, found: Any, b: int, wanted: Any, what: str, row: int = 0) -> None:
    """In the end the same tokens are left of a sample; the stages before may be others, if one has to wait for
    another sample of its batch."""
    records, others = trial.own(found), trial.own(wanted)
    if not records or not others:
        return
    got, want = kept(records[-1], b), kept(others[-1], row)
    require(got == want, f"{what}: {got} are left, and otherwise {want}")


def reduces(trial: Trial) -> bool:
    """Return True if the method does something on this kind of model."""
    return bool(trial.reduced.trace.stages)


def one(trial: Trial) -> None:
    """One token is enough."""
    for method in trial.settings.some[:1]:
        if "keep" in {f.name for f in dataclasses.fields(method)} and not isinstance(
            getattr(method, "keep", None), tuple
        ):
            try:
                found = trial.run(method.replace(keep=1), trial.batch)
            except ValueError:  # a method that cannot go so far says so
                continue
            require(bool(found.out.isfinite().all()), "keep=1: the output is not finite")
            for record in trial.own(found.trace):
                for b in range(record.total.batch):
                    require(kept(record, b), f"keep=1: sample {b} has no token left")


def truth(trial: Trial) -> None:
    """The trace says how many tokens the layers really computed."""
    kind, sample = trial.kind, trial.kind.samples[0]
    with trial.applied(trial.method) as handle, _counting(trial) as seen, torch.no_grad():
        torch.manual_seed(7)
        kind.forward(kind.model, sample)
        trace = handle.trace
    for (site, half, layer), length in seen.items():
        if layer not in trace.tokens.get(site, {}):
            continue
        said = trace.tokens[site][layer][half]
        found = kind.visual(site, length, sample)
        require(
            said == found,
            f"{site}[{layer}] computed {found} tokens in its {('first', 'second')[half]} half, and the "
            f"trace says {said}",
        )


@contextlib.contextmanager
def _counting(trial: Trial) -> Iterator[dict[tuple[str, int, int], int]]:
    """Count what the halves of the layers get, by (site, half, layer): the columns of their input."""
    kind, seen, hooks = trial.kind, {}, []

    def count_at(key: tuple[str, int, int]) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            tensors = [
                x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 1
            ]
            seen[key] = tensors[0].shape[-2]

        return hook

    for site, (path, *halves) in kind.layers.items():
        for layer, block in enumerate(layers_of(kind.model, path)):
            for half, part in enumerate(halves):
                if half and not part:
                    continue
                module = block.get_submodule(part) if part else block
                hook = count_at((site, half, layer))
                hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()
