"""Methods at the budget of one slider: which option of each method it moves."""

from __future__ import annotations

import dataclasses
from typing import Any

from vtr.core.method import Method
from vtr.core.registry import create, registry

BUDGETS = {"keep": 1, "density": 1, "drop": -1, "ratio": -1, "window": 1, "keys": 1}
"""Options that say how much is kept as a share, and whether a larger one keeps more (1) or less (-1)."""
MASS = {
    "flexprefill": "gamma",
    "proxyattn": "gamma",
    "svg2": "p",
    "xattention": "threshold",
    "xattention-dit": "threshold",
    "zipvl": "tau",
    "zipvl-cache": "tau",
}
"""Methods that keep a share of the attention, with the option that says which."""
SMALL = {"block": 16, "last_rows": 1, "key_block": 16, "chunk": 16, "min_length": 0, "rows": 16}
"""Sizes of blocks for the built-in models, whose sequences are shorter than one block of the defaults."""
TRAINED = {
    "adaptive-sparse-vit": "digits-adaptive",
    "dynamicvit": "digits-dynamicvit",
    "sparsifiner": "digits-sparsifiner",
}
"""Methods whose weights for ``"digits-vit"`` come with the package."""
SIZES: dict[str, dict[str, Any]] = {
    "draft-attention": {"patch": (4, 4)},
    "radial": {"decay": 0.05, "sink": False},
}
"""Options of single methods for them."""
MOST = {"ratio": 0.75}
"""Largest value of an option, if it is less than 0.95."""


def method_at(name: str, keep: float, model: str = "", tokens: int | None = None) -> Method:
    """Return a method at a budget.

    Args:
        name: of a registered method.
        keep: share of the tokens, of the pairs of tokens or of the attention that is kept, in (0, 1].
        model: of a built-in model; its sizes of blocks and trained weights are used.
        tokens: of a picture, for methods whose budget is a number of tokens alone.

    Raises:
        ValueError: there is no such method, or ``keep`` is out of range.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep!r}")
    known = registry()
    if name not in known:
        raise ValueError(f"there is no method {name!r}")
    fields = {f.name for f in dataclasses.fields(known[name]) if f.init}
    options: dict[str, Any] = {}
    if model.startswith("digits-"):
        options |= {k: v for k, v in SMALL.items() if k in fields and _block(known[name], k)}
        options |= SIZES.get(name, {})
        if "dense_steps" in fields:
            options["dense_steps"] = 0.4  # the built-in generator has 12 steps
    if model == "digits-vit" and name in TRAINED:
        options["weights"] = TRAINED[name]
    option = budget_of(known[name])
    plain = create(name, **options)
    if getattr(plain, "seed", 0) is None:  # the same picture twice gives the same tokens
        plain = plain.replace(seed=0)
    if option is None:
        return plain
    if option == "method":  # one around another
        inner: Any = getattr(plain, option)
        return plain.replace(method=method_at(inner.name, keep, model, tokens))
    try:
        return plain.replace(**{option: _value(option, keep)})
    except ValueError:
        if tokens is None or option not in ("keep", "keys"):
            raise
        return plain.replace(**{option: max(1, round(keep * tokens))})


def budget_of(cls: type[Method]) -> str | None:
    """Name the option that says how much a method keeps; None if it has none that is a share."""
    if cls.name in MASS:
        return MASS[cls.name]
    fields: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(cls) if f.init}
    if isinstance(fields.get("method"), Method):
        return "method"
    for name in BUDGETS:
        if name in fields and (name in ("keep", "density") or isinstance(fields[name], float)):
            return name
    return None


def _value(option: str, keep: float) -> float:
    most = MOST.get(option, 0.95)
    if BUDGETS.get(option, 1) < 0:
        return round(min(1 - keep, most), 6)
    return keep if option in BUDGETS else min(keep, most)


def _block(cls: type[Method], option: str) -> bool:
    """Tell whether an option has a number of tokens as its default, which a small model may change."""
    default = {f.name: f.default for f in dataclasses.fields(cls)}[option]
    return isinstance(default, int) and default > 1
