"""Laws of methods that compute the attention of a diffusion transformer in another way."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from vtr.testing.places import check_text_place
from vtr.testing.trial import Trial, close, instead, require

DENSE = 3e-5  # float32, two orders of the same sums


def everything(trial: Trial) -> None:
    """Keep everything is dense attention."""
    for method in trial.settings.everything:
        close(trial.run(method, trial.batch).out, trial.native, DENSE, f"{method}")


def alone(trial: Trial) -> None:
    """A sample alone equals the sample in a batch."""
    for b, own in enumerate(trial.alone):
        close(trial.reduced.out[b : b + 1], own.out, DENSE, f"sample {b}")


def leak(trial: Trial) -> None:
    """Other latents in one sample of a batch move no other sample."""
    samples = trial.kind.samples
    for changed in range(len(samples)):
        rows = [trial.kind.changed(s) if i == changed else s for i, s in enumerate(samples)]
        found = trial.run(trial.method, trial.kind.batch(rows)).out
        for b in range(len(samples)):
            if b != changed:
                what = f"sample {b} after a change of sample {changed}"
                close(found[b], trial.reduced.out[b], 1e-5, what)


def text(trial: Trial) -> None:
    """Text is dense both ways: every token sees all valid text, and valid text sees every token.

    And the trace says no smaller density than what was really seen.
    """
    for method in trial.settings.some:
        sites: list[tuple[Any, Tensor]] = []
        plain = method.attend  # type: ignore[attr-defined]

        def attend(site: Any, plain: Any = plain, sites: Any = sites) -> Tensor:
            out: Tensor = plain(site)
            if site.layer not in {s.layer for s, _ in sites}:
                sites.append((site, _weights(plain, site)))
            return out

        trial.run(instead(method, "attend", attend), trial.batch)
        for site, weights in sites:
            _check_text(site, weights)
            # A substitute for skipped blocks sees every one of their keys.
            if "mask" not in site.notes or site.notes.get("rest"):
                continue
            said = float(site.notes["density"])
            seen = float((weights.abs() > 1e-9).float().mean())
            require(
                seen <= said + 1e-3,
                f"attention[{site.layer}] sees {seen:.3f} of the pairs, and the trace says {said:.3f}",
            )


def place(trial: Trial) -> None:
    """Text may be first or last: see :func:`vtr.testing.places.check_text_place`."""
    if getattr(getattr(trial.kind, "facts", None), "text_first", True):
        for method in trial.settings.some:
            check_text_place(method)


def _weights(attend: Any, site: Any) -> Tensor:
    """(B, H, S, S) float32, how much of each value is in each row of the output.

    The output is affine in the values: each call has as many of them at one as a value has channels.
    """

    def out(v: Tensor) -> Tensor:
        probe = copy.copy(site)
        probe.v, probe.state, probe.notes = v, dict(site.state), dict(site.notes)
        probe.memory = dict(site.memory)
        return attend(probe).float()  # type: ignore[no-any-return]

    nothing = out(torch.zeros_like(site.v))
    length, width = site.q.shape[2:]
    rows = []
    for start in range(0, length, width):
        v = torch.zeros_like(site.v)
        number = min(width, length - start)
        index = torch.arange(number)
        v[:, :, start + index, index] = 1
        rows.append((out(v) - nothing)[..., :number])
    return torch.cat(rows, -1)


def _check_text(site: Any, weights: Tensor) -> None:
    if not site.text:
        return
    batch, length = weights.shape[0], weights.shape[-1]
    words = torch.zeros(batch, length, dtype=torch.bool)
    start = 0 if site.text_first else site.tokens
    words[:, start : start + site.text] = True
    valid = torch.ones_like(words)
    if site.text_valid is not None:
        valid[:, start : start + site.text] = site.text_valid
    seen = (weights.abs() > 1e-9).all(1)  # by every head
    for b in range(batch):
        text = (words & valid)[b]
        for what, part in (
            ("a token does not see the text", seen[b][valid[b]][:, text]),
            ("text does not see a token", seen[b][text][:, valid[b]]),
        ):
            side = "first" if site.text_first else "last"
            require(
                bool(part.all()),
                f"attention[{site.layer}], text {side}, sample {b}: {what} in "
                f"{int((~part).sum())} of {part.numel()} pairs. Text is dense both ways",
            )
        hidden = (words & ~valid)[b]
        require(
            not bool(seen[b][valid[b]][:, hidden].any()),
            f"attention[{site.layer}], sample {b}: padded text is seen",
        )


def reduces(trial: Trial) -> bool:
    """Return True if the method computes something else than dense attention on this kind of model."""
    return not torch.allclose(trial.reduced.out, trial.native, atol=DENSE, rtol=DENSE)
