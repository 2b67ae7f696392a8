"""``check_adapter``: hold an adapter to the laws on a model of one's own."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vtr
from vtr.core.adapters import ADAPTERS
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.registry import registry
from vtr.core.site import ModelInfo, Site
from vtr.core.wrapping import Wrapping
from vtr.testing import life
from vtr.testing.examples import examples
from vtr.testing.kinds import Inputs, Kind, SiteLayers, cast, result
from vtr.testing.methods import hold, laws_of, refused
from vtr.testing.models.blocks import BLOCKS
from vtr.testing.trial import Trial, close, require

# Methods that between them use all of an adapter: they gather, open the attention, weigh tokens by size,
# cut before, inside and behind a layer, and merge.
PROBES = ("random", "cls-attention", "tome", "fastv", "sparsevlm", "own-frame", "tomesd")


def check_adapter(
    wrap: Callable[[Any], Wrapping] | None,
    model: nn.Module | Kind,
    *inputs: Any,
    compiles: bool = True,
    **named: Any,
) -> tuple[str, ...]:
    """Hold an adapter to the laws: those of methods that it supports, and that looking changes nothing.

    Args:
        wrap: makes a wrapping of the model, as an adapter's ``wrap`` does; None is what ``vtr.apply`` finds.
        model: a small one in evaluation mode, in float32; or a :class:`Kind`, for models whose samples are
            not the rows of their inputs.
        inputs, named: of a call of the model with two different samples or more. Tensors whose first
            dimension is as long as that of the first tensor are split into samples; floating-point ones
            are what a sample looks like.
        compiles: whether to try ``torch.compile`` (with the eager backend), which takes seconds.

    Returns:
        the names of the methods that were applied.

    Raises:
        AssertionError: a law is broken; the message names the law, the method and the model. Also if no
            method works on the model.
        ValueError: the inputs hold fewer than two samples.
        UnsupportedModelError: no adapter takes the model.
    """
    kind = model if isinstance(model, Kind) else Given.of(model, inputs, named)
    with _registered(wrap, kind.model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names: list[str] = []
        reasons: list[str] = []
        first = Trial(kind, examples(Look()))
        hold("off is bit-identical", life.off, first)
        hold("looking changes nothing", looking, first)
        if isinstance(kind, Given):
            kind.find_layers()
        for name in PROBES:
            settings = examples(registry()[name])
            reason = refused(kind, settings)
            if reason:
                reasons.append(f"{name}: {reason}")
                continue
            trial = Trial(kind, settings)
            for law, check in laws_of(trial.method).items():
                if check is not life.compiles or (compiles and not names):
                    hold(law, check, trial)
            names.append(name)
    if not names:
        raise AssertionError(f"no method works on {kind}. {'; '.join(reasons)}")
    return tuple(names)


@dataclass(frozen=True)
class Look(TokenMethod):
    """Asks for the queries, keys and values of every encoder layer, and changes nothing."""

    name: ClassVar[str] = "look"
    paper: ClassVar[str] = "none"
    sites: ClassVar[tuple[str, ...]] = ("encoder",)

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        """Open the attention if there is one to open."""
        return {"encoder": frozenset({"keys"})} if self.stages(info) else {}

    @classmethod
    def examples(cls) -> dict[str, Any]:
        return {"everything": (), "counted": ()}

    def check(self, info: ModelInfo) -> None:
        """Work on every model: one without an encoder shows nothing to look at."""

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        shown = "keys" in info.signals.get("encoder", ())
        return tuple(Stage("encoder", i) for i in range(info.depth["encoder"] if shown else 0))

    def reduce(self, site: Site) -> Reduction | None:
        shapes = {tuple(t.shape) for t in site.qkv}
        require(len({shape[2] for shape in shapes}) == 1, f"q, k and v have the shapes {shapes}")
        tokens = next(iter(shapes))[2]
        require(
            tokens == site.prefix + site.n,
            f"{site.site}[{site.layer}] shows {tokens} rows of q, k, v for {site.prefix} protected and "
            f"{site.n} visual tokens",
        )
        return None


def looking(trial: Trial) -> None:
    """A model whose attention is opened computes what it computes closed."""
    found = trial.run(trial.method, trial.batch)
    close(found.out, trial.native, 1e-4, "the model with opened attention")
    cut = [r for r in found.trace.stages if r.tokens_out < r.tokens_in]
    require(not cut, "a method that returns None has cut")


@contextlib.contextmanager
def _registered(wrap: Callable[[Any], Wrapping] | None, model: Any) -> Iterator[None]:
    """Let ``vtr.apply`` find ``wrap`` for one model, for a while."""
    if wrap is None:
        yield
        return
    adapter = ModuleType("adapter_under_test")
    kept = type(model)
    found: dict[str, Any] = {
        "FAMILIES": (kept.__name__,),
        "locate": lambda target: target if type(target) is kept else None,
        "wrap": wrap,
    }
    adapter.__dict__.update(found)
    known = ADAPTERS.setdefault(kept.__module__.partition(".")[0], [])
    known.insert(0, adapter)
    try:
        yield
    finally:
        known.remove(adapter)
        if not known:
            del ADAPTERS[kept.__module__.partition(".")[0]]


@dataclass(frozen=True, eq=False)
class Given(Kind):
    """A model that a test has, with the inputs of a call of it."""

    given: Any = None
    inputs: tuple[Any, ...] = ()
    named: tuple[tuple[str, Any], ...] = ()
    batch_size: int = 0

    @classmethod
    def of(cls, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Given:
        """Make a kind of a model and the inputs of a call of it."""
        tensors = [x for x in (*inputs, *named.values()) if isinstance(x, Tensor)]
        if not tensors or len(tensors[0]) < 2:
            raise ValueError("give the inputs of a call with at least two samples, as tensors")
        return cls(
            type(model).__name__, "torch", {}, compiles=True, given=model, inputs=inputs,
            named=tuple(named.items()), batch_size=len(tensors[0]),
        )  # fmt: skip

    def build(self) -> Any:
        return self.given

    def find_layers(self) -> None:
        """Find the list of encoder layers, if it is the only one of its length."""
        facts: list[ModelInfo] = []

        @dataclass(frozen=True)
        class Facts(Look):
            def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
                facts.append(info)
                return ()

        vtr.apply(self.model, Facts()).remove()
        depth = facts[0].depth.get("encoder")
        found = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, BLOCKS) and len(module) == depth
        ]
        if len(found) == 1:
            object.__setattr__(self, "layers", {"encoder": SiteLayers(found[0], second="")})
            object.__setattr__(self, "prefix", facts[0].prefix)

    @property
    def samples(self) -> list[Inputs]:
        both = dict(enumerate(self.inputs)) | dict(self.named)
        return [
            {str(k): v[b : b + 1] if self._split(v) else v for k, v in both.items()}
            for b in range(self.batch_size)
        ]

    def _split(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.batch_size

    def changed(self, sample: Inputs) -> Inputs:
        return {
            k: v.flip(-1) * 0.7 if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in sample.items()
        }

    def batch(self, samples: list[Inputs], side: str = "left") -> Inputs:
        whole = {str(k): v for k, v in (dict(enumerate(self.inputs)) | dict(self.named)).items()}
        return {
            k: torch.cat([s[k] for s in samples]) if self._split(whole[k]) else v
            for k, v in samples[0].items()
        }

    def call(self, model: Any, inputs: Inputs) -> Tensor:
        positional = [inputs[str(i)] for i in range(len(self.inputs))]
        return result(model(*positional, **{k: inputs[k] for k, _ in self.named}))

    def images(self, sample: Inputs) -> list[tuple[int, int]]:
        return []  # as many tokens as the trace says, one image

    def cast(self, inputs: Inputs, dtype: torch.dtype) -> Inputs:
        return {k: cast(v, dtype) for k, v in inputs.items()}
