"""Gradient checkpointing of wrapped language models: gradients are those without it."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)

import vtr
from tests.vision.vlm.methods import cutting
from tests.vision.vlm.models import FAMILIES, visual
from tests.vision.vlm.picks import BOTH, DECODER, MIDDLE, PROMPT, Pick
from tests.vision.vlm.videos import VIDEOS
from vtr.compat.transformers import cache_of, with_cache
from vtr.core.method import Reduction
from vtr.core.tokens import TokenMap
from vtr.vision.vlm.wrapping import language_of

either = pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])


@cache
def made(name: str) -> tuple[Any, dict[str, Any]]:
    model, inputs = (FAMILIES | VIDEOS)[name](2)
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    return model.train(), {**inputs, "labels": labels.masked_fill(visual(labels), -100)}


def enable(model: Any, reentrant: bool = False, every_n_layers: int = 1, **kwargs: Any) -> None:
    """By its name of today, or of before 5.24."""
    kwargs, options = {"use_reentrant": reentrant, **kwargs}, {"every_n_layers": every_n_layers}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs, **options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs, **options)


def disable(model: Any) -> None:
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()


class Checkpoints:
    """A model that checkpoints, and counts the runs of its layers' MLPs."""

    def __init__(self, model: Any, reentrant: bool = False, **options: Any) -> None:
        self.model, self.options, self.runs = model, {"reentrant": reentrant, **options}, 0

    def __enter__(self) -> Checkpoints:
        enable(self.model, **self.options)
        layers = language_of(self.model.model).layers
        self.hooks = [x.mlp.register_forward_pre_hook(self.count) for x in layers]
        return self

    def count(self, *_: Any) -> None:
        self.runs += 1

    def __exit__(self, *error: Any) -> None:
        disable(self.model)
        for hook in self.hooks:
            hook.remove()


def gradients(model: Any, *runs: dict[str, Any]) -> dict[str, Tensor]:
    """Of the sum of the losses of several calls, before one backward pass."""
    model.zero_grad()
    torch.manual_seed(0)
    sum(model(**inputs).loss for inputs in runs).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) > 10
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7, msg=name)


@either
@pytest.mark.parametrize(
    "method", [PROMPT, DECODER, BOTH, MIDDLE], ids=["prompt", "decoder", "both", "middle"]
)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "smolvlm"])
def test_gradients_are_those_without_checkpointing(
    name: str, method: Pick, reentrant: bool
) -> None:
    model, inputs = made(name)
    dense = gradients(model, inputs)
    with vtr.apply(model, method) as handle:
        want = gradients(model, inputs)
        trace = [(s.site, s.layer, s.tokens_out) for s in handle.trace.stages]
        with Checkpoints(model, reentrant) as ran:
            same(gradients(model, inputs), want)
        assert ran.runs == 8
        assert [(s.site, s.layer, s.tokens_out) for s in handle.trace.stages] == trace
    weight = next(n for n in want if n.endswith("layers.3.mlp.down_proj.weight"))
    assert float((want[weight] - dense[weight]).abs().max()) > 1e-4
    same(gradients(model, inputs), dense)


@pytest.mark.parametrize(("name", "reentrant"), [("llava", False), ("llava_next_video", True)])
def test_every_method(name: str, reentrant: bool) -> None:
    model, inputs = made(name)
    cuts = 0
    for method in cutting(model):
        with vtr.apply(model, method) as handle:
            try:
                want = gradients(model, inputs)
            except vtr.UnsupportedMethodError as error:
                assert "inside the vision tower" in str(error)
                continue
            with Checkpoints(model, reentrant):
                if reentrant and method.carries_gradients and handle.trace.tokens.get("encoder"):
                    with pytest.raises(RuntimeError, match="use_reentrant=False"):
                        gradients(model, inputs)
                    continue
                same(gradients(model, inputs), want)
            cuts += bool(handle.trace.stages)
    assert cuts > 5


@either
@pytest.mark.parametrize("method", [BOTH, MIDDLE], ids=["both", "middle"])
def test_training_with_a_frozen_tower_and_language_model(method: Pick, reentrant: bool) -> None:
    """As LoRA is trained: a few weights of the layers, and inputs that ask for gradients."""
    model, inputs = FAMILIES["llava"](2)
    inputs = {**inputs, "labels": made("llava")[1]["labels"]}
    model.train().requires_grad_(False)
    model.enable_input_require_grads()
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.requires_grad_(True)
        layer.mlp.up_proj.weight.requires_grad_(True)
    with vtr.apply(model, method):
        want = gradients(model, inputs)
        with Checkpoints(model, reentrant) as ran:
            got = gradients(model, inputs)
    assert ran.runs == 8 and len(got) == 8
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-5, atol=1e-7)


@either
@pytest.mark.parametrize("method", [DECODER, MIDDLE], ids=["decoder", "middle"])
def test_several_calls_before_one_backward_pass(method: Pick, reentrant: bool) -> None:
    """Other images, other lengths, and text alone: each layer repeats the cut of its own call."""
    model, inputs = made("llava")
    one = {k: v[:1] for k, v in inputs.items()}
    text = {k: inputs[k][:, -4:] for k in ("input_ids", "attention_mask", "labels")}
    with vtr.apply(model, method):
        want = gradients(model, inputs, one, text)
        with Checkpoints(model, reentrant):
            same(gradients(model, inputs, one, text), want)


@either
def test_only_some_layers(reentrant: bool) -> None:
    model, inputs = made("llava")
    for method in (DECODER, MIDDLE):
        with vtr.apply(model, method):
            want = gradients(model, inputs)
            with Checkpoints(model, reentrant, every_n_layers=2) as ran:
                same(gradients(model, inputs), want)
            assert 4 < ran.runs < 8


@either
def test_autocast(reentrant: bool) -> None:
    model, inputs = made("qwen3_vl")
    with vtr.apply(model, MIDDLE), torch.autocast("cpu", torch.bfloat16):
        want = gradients(model, inputs)
        with Checkpoints(model, reentrant):
            same(gradients(model, inputs), want)


# ---- methods inside of a layer -------------------------------------------------------------------


class Drawn(Pick):
    """Draws anew each time it is asked."""

    def reduce(self, site: Any) -> Any:
        kept = torch.randperm(site.n)[:3].sort().values.expand(site.batch, -1)
        return Reduction(TokenMap.keep(kept, site.n))


class Weighted(Pick):
    """Merges by weights that follow from the tokens, or makes the tokens itself."""

    def reduce(self, site: Any) -> Any:
        half = site.n // 2
        kept = torch.arange(half).expand(site.batch, -1)
        source = torch.arange(site.n).remainder(half).expand(site.batch, -1)
        score = site.queries.flatten(2).mean(-1) if site.n % 2 else site.hidden.mean(-1)
        weights = torch.softmax(score, -1)
        if site.layer == 1:
            return Reduction(TokenMap.merged(kept, source), weights)
        merged = TokenMap.merged(kept, source)
        return Reduction(merged, tokens=merged.merge(site.hidden * 2, weights, True).exp())


@either
def test_a_choice_is_made_once(reentrant: bool) -> None:
    model, inputs = made("llava")
    for place in ("middle", "end"):
        with vtr.apply(model, Drawn((("decoder", 1, place),))):
            want = gradients(model, inputs)
            with Checkpoints(model):
                enable(model, reentrant, preserve_rng_state=False)
                same(gradients(model, inputs), want)


@pytest.mark.parametrize("layer", [1, 2])
def test_gradients_through_weights_and_tokens_of_a_method(layer: int) -> None:
    model, inputs = made("llava")
    with vtr.apply(model, Weighted((("decoder", layer, "middle"),))):
        want = gradients(model, inputs)
        with Checkpoints(model):
            same(gradients(model, inputs), want)
            enable(model, reentrant=True)
            with pytest.raises(
                RuntimeError, match=r"weighted|pick merges tokens inside of a layer"
            ):
                gradients(model, inputs)
    for reentrant in (False, True):  # before and after a layer, neither is part of it
        with vtr.apply(model, Weighted((("decoder", layer, "end"),))):
            want = gradients(model, inputs)
            with Checkpoints(model, reentrant):
                same(gradients(model, inputs), want)


@either
def test_methods_that_go_before_the_backward_pass(reentrant: bool) -> None:
    """A cut inside of a layer could not be repeated; others need no method any more."""
    model, inputs = made("llava")

    def late(method: Pick) -> dict[str, Tensor]:
        model.zero_grad()
        with vtr.apply(model, method):
            loss = model(**inputs).loss
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with vtr.apply(model, DECODER):
        want = gradients(model, inputs)
    with Checkpoints(model, reentrant):
        same(late(DECODER), want)
        with pytest.raises(RuntimeError, match="were applied, paused or removed between"):
            late(MIDDLE)
    model.zero_grad()


# ---- life, and what is refused -------------------------------------------------------------------


def test_the_functions_of_the_model_come_back() -> None:
    model, inputs = FAMILIES["llava"](1)
    model.train()
    enable(model)
    layers = model.model.language_model.layers
    before = [dict(vars(layer)) for layer in layers]
    with vtr.apply(model, MIDDLE):
        want = gradients(model, {**inputs, "labels": inputs["input_ids"]})
        twin = copy.deepcopy(model)
    assert [dict(vars(layer)) for layer in layers] == before
    same(gradients(twin, {**inputs, "labels": inputs["input_ids"]}), want)
    for handle in vtr.handles(twin):
        handle.remove()
    assert {k for x in twin.model.language_model.layers for k in vars(x)} == {
        k for x in before for k in x
    }


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_the_older_name() -> None:
    model, inputs = made("llava")
    with vtr.apply(model, BOTH):
        want = gradients(model, inputs)
        model.gradient_checkpointing_enable()
        same(gradients(model, inputs), want)
    disable(model)


@either
@pytest.mark.parametrize("method", [PROMPT, DECODER, MIDDLE], ids=["prompt", "decoder", "middle"])
def test_checkpoints_of_the_caller_around_layers(method: Pick, reentrant: bool) -> None:
    """FSDP's: refused where the second run would lose a cut, and go on without a word."""
    how = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    model, inputs = FAMILIES["llava"](2)
    inputs = {**inputs, "labels": made("llava")[1]["labels"], "use_cache": False}
    model.train()
    layers = model.model.language_model.layers
    with vtr.apply(model, method):
        want = gradients(model, inputs)
        for i, layer in enumerate(layers):
            layers[i] = checkpoint_wrapper(layer, checkpoint_impl=how)
        if method is PROMPT:  # nothing is cut at a layer
            got = gradients(model, inputs)
            same({k.replace("_checkpoint_wrapped_module.", ""): v for k, v in got.items()}, want)
        else:
            with pytest.raises(RuntimeError, match="let transformers do it"):
                gradients(model, inputs)
    with pytest.raises(vtr.UnsupportedMethodError, match="CheckpointWrapper takes no"):
        vtr.apply(model, method)


def test_an_earlier_turn_in_the_cache_is_refused() -> None:
    model, inputs = FAMILIES["llava"](1)
    with vtr.apply(model, PROMPT):
        with torch.no_grad():
            cache = cache_of(model(**inputs, use_cache=True))
        model.train()
        enable(model)
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 2, dtype=torch.long)
        more = with_cache(type(model).forward, cache)
        with pytest.raises(RuntimeError, match="goes without a KV cache"):
            model(input_ids=torch.tensor([[7, 8]]), attention_mask=mask, **more)
