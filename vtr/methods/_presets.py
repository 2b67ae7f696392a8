"""Settings that a method's authors published, by model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

P = TypeVar("P", bound="Presets")


class Presets:
    """For methods with published settings: ``RectifiedSparse.preset("wan2.1-t2v", drop=0.8)``."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def preset(cls: type[P], name: str, **changes: Any) -> P:
        """The settings published for a model (a key of :attr:`PRESETS`), with ``changes``.

        Raises:
            ValueError: there are none of that name.
        """
        if name not in cls.PRESETS:
            near = difflib.get_close_matches(str(name), cls.PRESETS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{cls.__name__} has no preset {name!r}.{hint} Known: {', '.join(cls.PRESETS)}"
            )
        return cls(**{**cls.PRESETS[name], **changes})
