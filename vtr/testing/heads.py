"""Laws of methods that compute the attention of a vision encoder in another way."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from vtr.core.method import Method, TokenMethod
from vtr.testing.trial import Trial, close, instead, require


def acts_in_encoder(method: type[Method] | Method) -> bool:
    """Tell whether a method computes the attention of a vision encoder."""
    return "patches" in method.needs.get("attention", ())


def cuts(method: type[Method] | Method) -> bool:
    """Tell whether it decides about tokens as well."""
    return issubclass(method if isinstance(method, type) else type(method), TokenMethod)


def whole(trial: Trial) -> None:
    """The rows of attention sum to 1, no weight is negative, and no token sees padding; the trace says no smaller
    density than what was really seen."""
    for method in trial.settings.some:
        plain = method.attend  # type: ignore[attr-defined]
        sites: list[Any] = []

        def attend(site: Any, plain: Any = plain, sites: Any = sites) -> Tensor:
            out: Tensor = plain(site)
            sites.append(site)
            return out

        trial.run(instead(method, "attend", attend), trial.batch)
        for site in sites:
            said = float(site.notes.get("density", 1.0))
            weights = _weights(plain, site)
            where = f"{method}, attention[{site.layer}]"
            require(bool((weights > -1e-6).all()), f"{where} has a negative weight")
            close(weights.sum(-1), torch.ones_like(weights[..., 0]), 1e-4, f"{where}, sums of rows")
            seen = float((weights > 1e-9).float().mean())
            require(
                seen <= said + 1e-3,
                f"{where} sees {seen:.3f} of the pairs, and the trace says {said:.3f}",
            )


def _weights(attend: Any, site: Any) -> Tensor:
    """(B, H, T, T) float32, how much of each value is in each row of the output."""
    length, width = site.q.shape[2:]
    rows = []
    for start in range(0, length, width):
        probe = copy.copy(site)
        probe.v, probe.notes, probe.memory = torch.zeros_like(site.v), {}, dict(site.memory)
        index = torch.arange(min(width, length - start))
        probe.v[:, :, start + index, index] = 1
        rows.append(attend(probe).float()[..., : len(index)])
    return torch.cat(rows, -1)
