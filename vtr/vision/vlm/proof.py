"""Prove on a tiny twin that a class of vision-language models can be wrapped.

A twin (:mod:`vtr.vision.vlm.twin`) has the class and the options of the model, random weights and small sizes, so that
the proof costs about a second of one CPU core and no memory of the model's device, whatever its size and however its
weights are stored. Two prompts of different lengths are run:

- keeping every token gives the outputs of the bare twin;
- a shortened sequence gives those of the bare twin that runs at full length, with the dropped tokens hidden from every
  later query; in layers with a recurrent state, which have no mask, those of the bare layers on the shorter sequence;
- an answer generated with a KV cache has the logits of one that is generated without.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vtr.compat.transformers import RECURRENT, SLIDING, quiet, window_of
from vtr.core.language_attention import LanguageAttentionSite
from vtr.core.language_site import LanguageSite
from vtr.core.method import Method, Reduction, Stage, TokenMethod
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap, top_indices
from vtr.core.wrapping import Entry
from vtr.errors import UnsupportedModelError
from vtr.vision.vlm.generic import Generic, is_vlm, lacking
from vtr.vision.vlm.placeholders import find, visual_ids
from vtr.vision.vlm.twin import shrunk, twin
from vtr.vision.vlm.twin_prompts import Inputs, pictures, prompt

CLOSE = 1e-4  # float32, the same sums in another order
STEPS = 3


class Proof(NamedTuple):
    """Findings on a twin.

    Attributes:
        refused: which part differs; empty if the class can be wrapped.
        two_way: whether the tokens of a picture see one another.
        blind: why methods cannot read the attention of its layers; empty if they can.
        inside: why methods cannot compute the attention of its layers, or choose the entries of its cache.
    """

    refused: str
    two_way: bool = False
    blind: str = ""
    inside: str = ""


@dataclass(frozen=True)
class Leave(TokenMethod):
    """Keep a share of each sample's tokens, those with the largest hidden states, at given stages."""

    name: ClassVar[str] = "proof"
    paper: ClassVar[str] = "none"
    sites: ClassVar[tuple[str, ...]] = ("prompt", "decoder")

    at: tuple[tuple[str, int, str], ...] = ()
    share: float = 0.5

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage(*where) for where in self.at)

    def reduce(self, site: Site) -> Reduction:
        valid = site.valid
        if valid is None:
            valid = torch.ones(site.batch, site.n, dtype=torch.bool, device=site.device)
        number = (valid.sum(1) * self.share).ceil().long()
        kept, padded = top_indices(site.hidden.float().norm(dim=-1), number, valid)
        return Reduction(TokenMap.keep(kept, site.n, padded))


@dataclass(frozen=True)
class PlainAttention(Method):
    """Compute the attention of every layer from what a site shows: softmax over the keys that a row may see."""

    name: ClassVar[str] = "proof-attention"
    paper: ClassVar[str] = "none"
    sites: ClassVar[tuple[str, ...]] = ("attention",)
    needs: ClassVar[Mapping[str, frozenset[str]]] = {"attention": frozenset({"qkv", "prompt"})}
    reads_cache: ClassVar[bool] = True

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("attention", i) for i in range(info.depth["attention"]))

    def attend(self, site: LanguageAttentionSite) -> Tensor:
        groups = site.q.shape[1] // site.k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (site.k, site.v))
        columns = torch.arange(k.shape[2])
        rows = columns[-site.q.shape[2] :, None]
        seen = (columns <= rows) & site.valid[:, None]
        if site.window is not None:
            seen &= rows - columns < site.window
        logits = site.q @ k.transpose(2, 3) * site.scale
        logits = logits.masked_fill(~seen[:, None], torch.finfo(logits.dtype).min)
        return logits.softmax(-1) @ v


@dataclass(frozen=True)
class ReadAttention(TokenMethod):
    """Read the attention of the last text token, and what visual tokens receive, in every layer."""

    name: ClassVar[str] = "proof-look"
    paper: ClassVar[str] = "none"
    sites: ClassVar[tuple[str, ...]] = ("decoder",)

    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("decoder", i, "start") for i in range(info.depth["decoder"]))

    def reduce(self, site: Site) -> None:
        assert isinstance(site, LanguageSite)
        self.seen.append((site.attention_rows_from_text()[:, :, 0], site.attention_received()))


_KNOWN: dict[Any, Proof] = {}


def generic_family(root: Any, inner: Any) -> Generic | None:
    """The family of a class that is known by its structure alone; None if it is no vision-language model.

    Raises:
        UnsupportedModelError: it is one, and a part of it differs from what a cut can be followed through.
    """
    if not is_vlm(inner):
        return None
    title = type(inner).__name__.removesuffix("Model").removesuffix("ForConditionalGeneration")
    odd = lacking(inner)
    proof = Proof(odd) if odd else proof_of(root, inner)
    if proof.refused:
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no entry in vtr, and cannot be wrapped as a tower, a projector "
            f"and a language model: {proof.refused}"
        )
    return Generic(title, *proof[1:])


def proof_of(root: Any, inner: Any) -> Proof:
    """Prove the class of a model once for each configuration that differs in more than its sizes."""
    key = (type(root), json.dumps(shrunk(root.config).to_dict(), sort_keys=True, default=str))
    if key not in _KNOWN:
        with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
            _KNOWN[key] = _prove(type(root), root.config, root is inner)
    return _KNOWN[key]


def _prove(cls: Any, config: Any, bare: bool) -> Proof:
    try:
        model = twin(cls, config)
        inner = model if bare else model.model
        found = pictures(inner)
        inputs = prompt(model, inner, found, ((0,), (1, 2)))
        dense, masks = _seen(model, inner, inputs)
    except Exception as error:
        return Proof(f"a tiny twin of it does not run: {type(error).__name__}: {error}")
    ways = any(_looks_ahead(mask) for mask in masks)
    try:
        refused = _differs(model, inner, inputs, ways, dense)
        if refused:
            return Proof(refused, ways)
        inside = _attends_otherwise(model, inner, inputs, ways)
        return Proof("", ways, _reads_otherwise(model, inner, inputs, ways), inside)
    except Exception as error:
        return Proof(
            f"a tiny twin of it does not run with a method: {type(error).__name__}: {error}"
        )


def _seen(model: Any, inner: Any, inputs: Inputs) -> tuple[Tensor, list[Any]]:
    """The outputs, and the masks that the language model is given."""
    from vtr.vision.vlm.wrapping import language_of

    masks: list[Any] = []

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        masks.extend(mask.values() if isinstance(mask, dict) else [mask])

    hook = language_of(inner).register_forward_pre_hook(see, with_kwargs=True)
    try:
        return run(model, inputs), masks
    finally:
        hook.remove()


def _looks_ahead(mask: Any) -> bool:
    """Tell whether a (B, 1, L, K) mask lets a token see a later one."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return False
    seen = mask if mask.dtype == torch.bool else mask == 0
    # Rows of padding may see everything.
    return bool((seen.triu(1) & seen[:, :, -1:].transpose(2, 3)).any())


def _differs(model: Any, inner: Any, inputs: Inputs, ways: bool, dense: Tensor) -> str:
    """Say what differs between a wrapped twin and the bare one; empty if nothing does."""
    from vtr.vision.vlm.wrapping import VLMWrapping

    owner = VLMWrapping(model, inner, Generic(type(inner).__name__, ways))
    layers = len(owner.layers)
    entry, inside = ("prompt", 0, "entry"), ("decoder", layers // 2, "start")
    everything = Leave((entry, inside), 1.0)
    kept, _ = applied(owner, everything, inputs)
    if not _close(kept, dense, inputs):
        return "a run that keeps every token has other outputs than the model"
    recurrent = any(kind in RECURRENT for kind in owner.kinds)
    places = [(entry,), (inside,), (entry, inside)]
    if owner.shares:  # between layers that hold keys and those that attend to them
        first = next(i for i, source in enumerate(owner.sources) if source != i)
        inside = ("decoder", first, "start")
        places += [(inside,), (entry, inside)]
    for at in places:
        method = Leave(at)
        got, gone = applied(owner, method, inputs)
        if not recurrent:
            wanted = hidden_run(owner, inputs, gone)
            if not _close(got, wanted, inputs):
                where = " and ".join(name for name, *_ in at)
                return f"after a cut at the {where} its outputs are not those with the dropped tokens masked"
            if _close(got, dense, inputs):
                return "dropping half of the visual tokens changes nothing: the tokens are not read"
    if recurrent:
        odd = _runs_shorter(owner, entry, inside)
        if odd:
            return odd
    if hasattr(model, "generate"):
        return _generates(owner, Leave((entry, inside)), inputs)
    return ""


def _reads_otherwise(model: Any, inner: Any, inputs: Inputs, ways: bool) -> str:
    """Say why the attention that methods read is not the model's; empty if it is.

    It is computed from q and k, and compared with the maps of the eager attention.
    """
    from vtr.vision.vlm.wrapping import VLMWrapping

    owner = VLMWrapping(model, inner, Generic(type(inner).__name__, ways))
    if owner.closed:
        return ""
    title, look = type(owner.layers[0].self_attn).__name__, ReadAttention()
    try:
        with applied_to(owner, look):
            run(model, inputs)
        model.set_attn_implementation("eager")
        maps = model(**inputs, output_attentions=True).attentions
    except Exception as error:
        return f"the attention maps of {title} cannot be compared ({type(error).__name__}: {error})"
    kinds, real = find(inner, inputs["input_ids"], None), inputs["attention_mask"].bool()
    if maps is None or len(maps) != len(look.seen) or kinds is None:
        return f"{title} shows no attention maps to compare with"
    for (rows, received), weights in zip(look.seen, maps, strict=True):
        for b in range(len(real)):
            here = (kinds[b] > 0).nonzero().flatten()
            paid = weights[b][:, real[b]].mean((0, 1))[here]
            if not torch.allclose(rows[b, :, : len(here)], weights[b, :, -1, here], atol=1e-4):
                return f"{title} computes another attention than softmax(q k) of its projections"
            if not torch.allclose(received[b, : len(here)], paid, atol=1e-4):
                return f"{title} computes another attention than softmax(q k) of its projections"
    return ""


def _attends_otherwise(model: Any, inner: Any, inputs: Inputs, ways: bool) -> str:
    """Say why the attention of a site is not that of the model; empty if it is."""
    from vtr.vision.vlm.wrapping import VLMWrapping

    owner = VLMWrapping(model, inner, Generic(type(inner).__name__, ways))
    if "attention" in owner.info.closed:
        return ""
    title = type(owner.layers[0].self_attn).__name__
    wanted = _answer(model, inputs)
    try:
        with applied_to(owner, PlainAttention()):
            got = _answer(model, inputs)
    except Exception as error:
        return f"{title} computes more than a softmax over keys ({error})"
    same = torch.allclose(got, wanted, rtol=CLOSE, atol=CLOSE)
    return "" if same else f"{title} computes more than a softmax over keys"


def _answer(model: Any, inputs: Inputs) -> Tensor:
    """(B, ...) what a model says at the last columns, with steps on its cache if it can generate."""
    if not hasattr(model, "generate"):
        return run(model, inputs)[:, -1]
    out = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True,
        output_logits=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return torch.stack(out.logits, 1)


def run(model: Any, inputs: Inputs) -> Tensor:
    """(B, L, C) logits, or last hidden states of a model without a head."""
    out = model(**inputs)
    found = getattr(out, "logits", None)
    result: Tensor = out.last_hidden_state if found is None else found
    return result


def _close(a: Tensor, b: Tensor, inputs: Inputs) -> bool:
    """Compare at the last column, where every sample has a token."""
    return torch.allclose(a[:, -1], b[:, -1], rtol=CLOSE, atol=CLOSE)


@contextmanager
def applied_to(owner: Any, method: Method) -> Iterator[None]:
    """Apply a method to a wrapping for a while."""
    entries = [Entry(method, dict(owner.options), None)]
    owner.add(entries)
    try:
        yield
    finally:
        owner.drop(entries)


def applied(owner: Any, method: Leave, inputs: Inputs) -> tuple[Tensor, dict[int, Tensor]]:
    """The outputs of a wrapped twin, and what was dropped: first layer that lacks it -> (B, L) bool."""
    with applied_to(owner, method):
        out = run(owner.root, inputs)
        return out, dropped(owner, inputs)


def dropped(owner: Any, inputs: Inputs) -> dict[int, Tensor]:
    """Tokens that the stages of the last call dropped: first layer that lacks it -> (B, L) bool."""
    kinds = find(owner.inner, inputs["input_ids"], None)
    assert kinds is not None
    out = {}
    for stage in owner.trace.stages:
        gone = kinds > 0
        for b, kept in enumerate(stage.total.kept):
            places = gone[b].nonzero().flatten()
            gone[b, places[kept[kept >= 0]]] = False
        out[0 if stage.site == "prompt" else stage.layer] = gone
    return out


def hidden_run(owner: Any, inputs: Inputs, gone: dict[int, Tensor]) -> Tensor:
    """The outputs of the bare twin at full length, dropped tokens hidden from the layers that lack them."""
    hooks = []
    for i, layer in enumerate(owner.layers):
        now = [g for first, g in gone.items() if first <= i]
        if now:
            hide = _hide(torch.stack(now).any(0))
            hooks.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        return run(owner.root, inputs)
    finally:
        for hook in hooks:
            hook.remove()


def _hide(gone: Tensor) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, mask = args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask")
        batch, length = hidden.shape[-3:-1]
        if mask is None:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
            mask = mask.expand(batch, -1, -1, -1)
        keys = torch.nn.functional.pad(gone, (0, mask.shape[3] - length))[:, None, None]
        fill = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask.masked_fill(keys, fill)}

    return hook


def _runs_shorter(owner: Any, *places: tuple[str, int, str]) -> str:
    """Compare a cut in layers with a recurrent state with the bare layers on the shorter sequence."""
    language, ends = owner.lm, list[Tensor]()
    found = pictures(owner.inner)
    for place in places:
        first = place[1] if place[0] == "decoder" else 0
        for samples in ((0,), (1, 2)):
            inputs = prompt(owner.root, owner.inner, found, (samples,))
            hook = language.register_forward_hook(
                lambda *given: ends.append(given[-1].last_hidden_state[:, -1])
            )
            _, gone = applied(owner, Leave((place,)), inputs)
            hook.remove()
            wanted = _shorter(owner, inputs, first, ~gone[first][0])
            if not torch.allclose(ends[-1], wanted, rtol=CLOSE, atol=CLOSE):
                return f"after a cut at the {place[0]} its outputs are not those of its layers on what is left"
    return ""


def _shorter(owner: Any, inputs: Inputs, first: int, keep: Tensor) -> Tensor:
    """(1, C): the last state of the bare layers from ``first`` on, given one sample's tokens that are left."""
    given: dict[str, Any] = {}

    def see_entry(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given["position_ids"] = kwargs.get("position_ids")

    def see_layer(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given["hidden"] = args[0] if args else kwargs["hidden_states"]

    hooks = [
        owner.lm.register_forward_pre_hook(see_entry, with_kwargs=True),
        owner.layers[first].register_forward_pre_hook(see_layer, with_kwargs=True),
    ]
    run(owner.root, inputs)
    for hook in hooks:
        hook.remove()
    positions, hidden = given["position_ids"], given["hidden"]
    if positions is None:
        positions = torch.arange(hidden.shape[1])[None]
    rest = copy.deepcopy(owner.lm)
    rest.layers = rest.layers[first:]
    rest.config.layer_types = list(rest.config.layer_types)[first:]
    rest.config.num_hidden_layers = len(rest.layers)
    # Never None: gaps in positions without a mask are read as several packed sequences.
    masks: Any = torch.ones(1, int(keep.sum()), dtype=torch.long)
    if owner.sliding:  # windows are those of the sequence as it was given
        at = keep.nonzero().flatten()
        behind = at[:, None] - at
        window = (behind >= 0) & (behind < window_of(owner.lm.config))
        masks = {kind: window[None, None] if kind in SLIDING else None for kind in owner.kinds}
    out = rest(
        inputs_embeds=hidden[:, keep],
        position_ids=positions[..., keep],
        attention_mask=masks,
        use_cache=False,
    )
    state: Tensor = out.last_hidden_state[:, -1]
    return state


def _generates(owner: Any, method: Leave, inputs: Inputs) -> str:
    """Compare answers with and without a KV cache."""
    options = {
        "max_new_tokens": STEPS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "eos_token_id": None,
        "pad_token_id": 0,
        # A placeholder in an answer would be read as one of the prompt without a cache.
        "suppress_tokens": list(visual_ids(owner.inner.config)),
    }
    generate = owner.root.generate
    with applied_to(owner, method):
        out = generate(**inputs, **options, use_cache=True)
        answer = torch.stack(out.logits, 1)
        try:
            again = torch.stack(generate(**inputs, **options, use_cache=False).logits, 1)
        except Exception:
            again = None
    if again is None:
        if _succeeds(generate, **inputs, **options, use_cache=False):
            return "after a cut generate fails without a KV cache"
        with applied_to(
            owner, method
        ):  # the class itself does: the answer is appended to its prompts
            grown = [_longer(inputs, out.sequences, step) for step in range(STEPS)]
            again = torch.stack([run(owner.root, one)[:, -1] for one in grown], 1)
    if answer.shape != again.shape:
        return "generate writes other numbers of tokens with and without a KV cache"
    if not torch.allclose(answer, again, rtol=CLOSE, atol=CLOSE):
        return "after a cut an answer written with a KV cache has other logits than one without"
    return ""


def _succeeds(function: Any, **options: Any) -> bool:
    try:
        function(**options)
    except Exception:
        return False
    return True


def _longer(inputs: Inputs, sequences: Tensor, step: int) -> Inputs:
    """Prompts with the first ``step`` tokens of their answers, (B, L + step) ids."""
    ids = inputs["input_ids"]
    new = sequences[:, ids.shape[1] : ids.shape[1] + step]
    out = dict(inputs)
    for name, value in inputs.items():
        if value.shape == ids.shape:
            more = {"input_ids": new, "attention_mask": torch.ones_like(new)}
            out[name] = torch.cat([value, more.get(name, torch.zeros_like(new)).to(value)], 1)
    return out
