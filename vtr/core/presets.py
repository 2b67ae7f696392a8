"""Settings that a method's authors published, by model and budget."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

P = TypeVar("P", bound="Presets")


class Presets:
    """For methods with published settings: ``FlowCut.preset("llava-1.5-7b/64")``.

    A name is that of the model the setting was published for, followed by ``/`` and the row of the
    published table (a number of tokens, or a share) for methods that have several. The setting is an
    ordinary configuration of the method: it can be applied to any model that the method works on.

    Class attributes:
        PRESETS: the options by name; what they do not name has its default.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def preset(cls: type[P], name: str, **changes: Any) -> P:
        """The method as published under ``name`` (see :meth:`presets`), with ``changes``.

        ``vtr.create("flowcut", preset="llava-1.5-7b/64")`` is the same by name, and
        ``flowcut:preset=llava-1.5-7b/64`` on a command line.

        Raises:
            ValueError: the method has no preset of that name; the message lists those it has.
        """
        if name not in cls.PRESETS:
            near = difflib.get_close_matches(str(name), cls.PRESETS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{cls.__name__} has no preset {name!r}.{hint} Known: {', '.join(cls.PRESETS)}"
            )
        return cls(**{**cls.PRESETS[name], **changes})

    @classmethod
    def presets(cls: type[P]) -> dict[str, P]:
        """All published settings by name, each as a configured method."""
        return {name: cls.preset(name) for name in cls.PRESETS}
