"""Rows of the support matrix: the encoders of images and clips of timm, open_clip and transformers.

A class that ``vtr.apply`` takes is tried on a tiny random model: keeping every token is the bare model bit for bit, what
later layers compute on fewer tokens equals the bare model with the keys of the dropped ones masked
(:mod:`vtr.testing.masked`), opened attention computes what closed attention does, maps are whole, a sample gets
alone what it gets in a batch, and ``remove()`` gives the model back. Encoders with windows are held to the laws of
windows. All others are listed with the reason that ``vtr.apply`` gives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vtr
from vtr.api import _wrapping
from vtr.compat.encoders import is_attention
from vtr.core.registry import registry
from vtr.testing import life, tokens, windowed
from vtr.testing.adapters import Look, looking
from vtr.testing.examples import examples
from vtr.testing.kinds import Inputs, Kind
from vtr.testing.masked import KeysMasked
from vtr.testing.matrix.row import Row, State, broken, refusal, working
from vtr.testing.matrix.tower_models import EncoderClass, Tiny, candidates, is_transformer
from vtr.testing.trial import Trial, close, require

TOLERANCE = 2e-4
#: Methods that between them use all of an encoder's adapter, and those of windows.
TOKEN_METHODS = ("random", "cls-attention", "tome")
WINDOW_METHODS = ("sparsevit", "expedit")


def tower_rows(names: Sequence[str] | None = None) -> Iterator[Row]:
    """Try the classes of encoders of the installed libraries.

    Raises:
        ImportError: no library with encoders is installed.
    """
    for candidate in candidates(names):
        row = tower_row(candidate)
        if row is not None:
            yield row


def tower_row(candidate: EncoderClass) -> Row | None:
    """Try one class; None for one that is no transformer."""
    head = ("tower", candidate.library, candidate.name)
    try:
        empty = candidate.empty()
    except LookupError:  # an abstract class
        return None
    except Exception as error:  # any error of a default configuration
        return Row(*head, "refused", about=f"no model of it can be built: {_short(error)}")
    if not is_transformer(empty):
        return None
    reason = refusal(empty)
    if reason.startswith("no adapter"):
        reason = f"it is not wrapped yet: {layers_named(empty)}"
    if reason:
        return Row(*head, "refused", about=reason)
    sites, methods = working(empty)
    try:
        tiny = candidate.tiny()
        laws = _laws(candidate.name, tiny, methods)
    except Exception as error:  # any error of a class that has never been run here
        return Row(*head, "refused", about=f"a tiny model of it does not run: {_short(error)}")
    fault = broken(laws)
    if fault:
        return Row(*head, "refused", about=fault)
    closed = _closed(empty, sites)
    state: State = "partly" if closed else "works"
    return Row(*head, state, sites, len(methods), closed)


def layers_named(model: nn.Module) -> str:
    """Name the layers that an adapter would have to know: those of the lists whose layers have attention."""
    names: dict[str, None] = {}
    for held in model.modules():
        if isinstance(held, (nn.ModuleList, nn.Sequential)):
            for layer in held:
                if any(is_attention(type(part).__name__) for part in layer.children()):
                    names[type(layer).__name__] = None
    return f"its layers are {', '.join(names)}" if names else "it has no list of layers"


def _closed(model: nn.Module, sites: tuple[str, ...]) -> str:
    """Say what is closed on an encoder: single tokens, or the attention of its blocks."""
    info = _wrapping(model).info
    if "encoder" not in sites:
        return info.closed.get("encoder", "single tokens are not cut")
    if "keys" not in info.signals["encoder"]:
        return "its blocks cannot be opened: no method reads their attention"
    return ""


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


# ---- laws ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tower(Kind):
    """An encoder that was built already, for the laws of :mod:`vtr.testing`."""

    built: Tiny | None = None
    path: str = r"(blocks|layers)\.\d+"
    inner: str = "attn"

    rows: ClassVar[tuple[str, ...]] = ("encoder",)

    def build(self) -> Any:
        assert self.built is not None
        return self.built.model

    @property
    def samples(self) -> list[Inputs]:
        assert self.built is not None
        return [self.built.inputs(1, seed) for seed in range(2)]

    def batch(self, samples: list[Inputs], side: str = "left") -> Inputs:
        return {k: torch.cat([s[k] for s in samples]) for k in samples[0]}

    def changed(self, sample: Inputs) -> Inputs:
        return {k: v.flip(-1) * 0.7 if v.is_floating_point() else v for k, v in sample.items()}

    def call(self, model: Any, inputs: Inputs) -> Tensor:
        return output(model(**inputs) if "x" not in inputs else model(inputs["x"]))


#: Names of what encoders return that has one row for each sample, whatever was cut; the first that one has.
OUTPUTS = (
    *("logits", "class_queries_logits", "pooler_output", "image_embeds", "reconstruction"),
    "feature_maps",
)


def output(found: Any) -> Tensor:
    """The part of an encoder's output that has one row per sample whatever was cut, (B, ...)."""
    if isinstance(found, Mapping):
        for name in OUTPUTS:
            value = found.get(name)
            if value is not None:
                return value[-1] if isinstance(value, (tuple, list)) else value
        return found["last_hidden_state"][:, 0]  # type: ignore[no-any-return]
    while isinstance(found, (tuple, list)):
        found = found[0]
    return found if found.dim() == 2 else found[:, 0]  # type: ignore[no-any-return]


def _laws(name: str, tiny: Tiny, supported: Sequence[str]) -> dict[str, Callable[[], None]]:
    kind = Tower(name, "torch", {}, built=tiny, tolerance=TOLERANCE)
    laws: dict[str, Callable[[], None]] = {}
    token_methods = [m for m in TOKEN_METHODS if m in supported]
    for method in token_methods:
        trial = Trial(kind, examples(registry()[method]))
        for law, check in _TOKENS.items():
            laws[f"{law}, {method}"] = functools.partial(check, trial)
    if token_methods:
        look = Trial(kind, examples(Look()))
        laws["looking changes nothing"] = functools.partial(looking, look)
        laws["fewer tokens are masked ones"] = functools.partial(pruned, kind)
    for method in [m for m in WINDOW_METHODS if m in supported]:
        trial = Trial(kind, examples(registry()[method]))
        for law, check in _WINDOWS.items():
            laws[f"{law}, {method}"] = functools.partial(check, trial)
    return laws


_TOKENS: dict[str, Callable[[Trial], None]] = {
    "off is bit-identical": life.off,
    "keep everything is the model": tokens.everything,
    "maps are whole": tokens.maps,
    "a sample alone equals the sample in a batch": tokens.alone,
}
_WINDOWS: dict[str, Callable[[Trial], None]] = {
    "off is bit-identical": life.off,
    "keep everything is the model": windowed.everything,
    "maps are whole, and all tokens come back": windowed.whole,
    "a sample alone equals the sample in a batch": tokens.alone,
}


def pruned(kind: Tower) -> None:
    """Later blocks compute on fewer tokens what they compute on all of them with the dropped keys masked."""
    model, inputs = kind.model, kind.whole
    runners: Any = _wrapping(model).session.runners  # type: ignore[attr-defined]
    blocks = [runner.block for runner in runners]
    cut = max(0, len(blocks) // 2 - 1)
    seen: list[Tensor] = []

    def note(module: Any, args: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    hook = blocks[-1].register_forward_hook(note)
    try:
        with vtr.apply(model, vtr.create("random", keep=0.4, layers=(cut,), seed=3)) as handle:
            kind.call(model, inputs)
            kept = handle.trace.stages[0].map.kept  # (B, n)
            number = handle.trace.stages[0].tokens_in
        alive = torch.zeros(len(kept), number, dtype=torch.bool).scatter_(1, kept, True)
        with KeysMasked(blocks, cut, alive) as masked:
            kind.call(model, inputs)
        kind.call(model, inputs)
    finally:
        hook.remove()
    short, long, dense = seen
    require(masked.calls >= len(blocks) - cut - 1, "the attention of some blocks was not masked")
    front = long.shape[1] - number
    rows = torch.cat([torch.arange(front).expand(len(kept), -1), kept + front], 1)
    index = rows[..., None].expand(-1, -1, long.shape[2])
    if short.shape == long.shape:  # backbones give all tokens back, dropped ones with an old value
        short = short.gather(1, index)
    close(short, long.gather(1, index), TOLERANCE, "the last block's output")
    require(
        not torch.allclose(short, dense.gather(1, index), atol=10 * TOLERANCE),
        "the dropped tokens have no say: the law tells nothing",
    )
