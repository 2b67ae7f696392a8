"""Methods inside a language model's attention, where one law per call is not enough: caches, beams, training ..."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.laws.everyone import INSIDE
from tests.laws.test_planted_inside import Flatter, Thirds
from tests.vision.vlm.models import (
    FAMILIES,
    IMAGE,
    TEXT,
    build,
    clip,
    noise,
    prompts,
    repeats_samples,
    transformers,
)
from tests.vision.vlm.videos import VIDEOS
from vtr.compat.transformers import attention_implementation, cache_of, with_cache
from vtr.core.registry import registry
from vtr.methods.base import DecodeMethod, PrefillMethod
from vtr.testing import KINDS, examples
from vtr.testing.methods import trial_of
from vtr.testing.models.prompts import split
from vtr.testing.trial import Trial

pytestmark = pytest.mark.filterwarnings("ignore")
every = pytest.mark.parametrize("name", INSIDE)


DECODE = [name for name in INSIDE if issubclass(registry()[name], DecodeMethod)]
OTHERS = [name for name in INSIDE if name not in DECODE]


def third(first: int) -> pytest.MarkDecorator:
    """Those that act in decoding steps, and a third of the other methods: what these laws ask is mostly the base's,
    and they take seconds a method."""
    return pytest.mark.parametrize("name", [*OTHERS[first::3], *DECODE])


either = pytest.mark.parametrize("method", [Thirds(block=16, last_rows=2), Flatter()], ids=str)
GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
CLOSE = 1e-4


@functools.cache
def trial(name: str, kind: str = "internvl") -> Trial:
    return trial_of(KINDS[kind], examples(registry()[name]))


def one(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v[:1] for k, v in inputs.items()}


@torch.no_grad()
def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(7)
    return model.generate(**inputs, **{"max_new_tokens": 4, **GREEDY, **options})


def logits(out: Any) -> Tensor:
    return torch.stack(out.logits, 1)


def close(found: Tensor, wanted: Tensor, tolerance: float = CLOSE) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def forced(model: Any, cache: Any, past: Tensor, tokens: Tensor) -> Tensor:
    """Logits behind each of ``tokens`` (B, T), which come one by one after a prompt with the mask ``past``."""
    out = []
    for token in tokens.split(1, 1):
        past = torch.cat([past, torch.ones_like(token)], 1)
        found = model(
            input_ids=token, attention_mask=past, position_ids=past.cumsum(1)[:, -1:] - 1,
            **with_cache(type(model).forward, cache),
        )  # fmt: skip
        out.append(found.logits[:, -1])
    return torch.stack(out, 1)


def positions(inputs: dict[str, Any]) -> Tensor:
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def prompted(model: Any, inputs: dict[str, Any]) -> Any:
    """The cache of a prompt."""
    return cache_of(model(**inputs, position_ids=positions(inputs), use_cache=True))


SAID = torch.tensor([[31, 77, 8], [5, 60, 99]])


# ---- caches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in INSIDE if issubclass(registry()[n], PrefillMethod)])
def test_a_sparse_prefill_leaves_decoding_to_the_model(name: str) -> None:
    """The model without the method continues from the cache, and computes the same."""
    t = trial(name)
    model, inputs = t.kind.model, t.batch
    with t.applied(t.method):
        wanted = forced(model, prompted(model, inputs), inputs["attention_mask"], SAID)
        cache = prompted(model, inputs)
    close(forced(model, cache, inputs["attention_mask"], SAID), wanted, 1e-5)


@either
def test_decoding_with_a_cache_is_decoding_without(method: Any) -> None:
    """If what is chosen for earlier rows does not depend on later text."""
    model, inputs = KINDS["internvl"].longer.model, KINDS["internvl"].longer.whole
    ids = torch.cat([inputs["input_ids"], SAID], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(SAID)], 1)
    longer = {**inputs, "input_ids": ids, "attention_mask": mask}
    with vtr.apply(model, method), torch.no_grad():
        found = forced(model, prompted(model, inputs), inputs["attention_mask"], SAID)
        whole = model(**longer, position_ids=positions(longer)).logits[:, -3:]
    if isinstance(method, Thirds):  # rows that were the last ones are no longer
        method = method.replace(last_rows=5)
        with vtr.apply(model, method), torch.no_grad():
            whole = model(**longer, position_ids=positions(longer)).logits[:, -3:]
    close(found, whole)


@third(0)
def test_a_static_cache_is_a_dynamic_one(name: str) -> None:
    t = trial(name)
    with t.applied(t.method):
        wanted = logits(generate(t.kind.model, t.batch))
        found = logits(generate(t.kind.model, t.batch, cache_implementation="static"))
    close(found, wanted)


@repeats_samples
@third(1)
def test_each_beam_has_the_score_of_its_text(name: str) -> None:
    t = trial(name)
    model, sample = t.kind.model, t.kind.samples[0]
    with t.applied(t.method):
        out = generate(model, t.batch, num_beams=3, num_return_sequences=3, output_scores=True)
        texts = out.sequences[:3, t.batch["input_ids"].shape[1] :]
        three = {k: torch.cat([v] * 3) for k, v in sample.items()}
        first = generate(model, three, max_new_tokens=1)
        later = forced(model, cache_of(first), three["attention_mask"], texts[:, :-1])
    scores = torch.cat([first.logits[0][:, None], later], 1).log_softmax(-1)
    total = scores.gather(2, texts[..., None]).mean((1, 2))
    close(out.sequences_scores[:3], total)
    assert len({tuple(row) for row in texts.tolist()}) == 3


# A draft is a later turn of text, and the text of a later turn may have sinks.
DRAFTS_ARE_TURNS = {"var"}


@pytest.mark.parametrize("name", [n for n in OTHERS[1::3] if n not in DRAFTS_ARE_TURNS])
def test_drafts_are_judged_as_tokens_one_by_one(name: str) -> None:
    """Several rows of text are a later turn of it."""
    t = trial(name)
    model, sample = t.kind.model, t.kind.samples[1]
    with t.applied(t.method):
        wanted = generate(model, sample, max_new_tokens=6)
        found = generate(model, sample, max_new_tokens=6, prompt_lookup_num_tokens=3)
    assert torch.equal(found.sequences, wanted.sequences)
    close(logits(found), logits(wanted))


@every
def test_a_prompt_in_chunks(name: str) -> None:
    """It is right, or refused by name: a method that asks for frames needs whole images."""
    t = trial(name)
    model, sample = t.kind.model, t.kind.samples[0]
    wanted = logits(generate(model, sample))
    for method in (*t.settings.everything, t.method):
        with t.applied(method):
            try:
                found = logits(generate(model, sample, prefill_chunk_size=20))
            except RuntimeError as error:
                assert "no chunked prefill" in str(error)
                continue
        assert found.isfinite().all()
        if method in t.settings.everything:
            close(found, wanted)


# ---- training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learner() -> tuple[Any, dict[str, Any]]:
    kind = KINDS["internvl"].longer
    model, inputs = copy.deepcopy(kind.model).train(), kind.whole
    ids = inputs["input_ids"]
    labels = torch.where((ids == IMAGE) | (inputs["attention_mask"] == 0), -100, ids)
    return model, {**inputs, "labels": labels}


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", OTHERS[2::3])
def test_gradients(name: str, learner: Any) -> None:
    """Those of dense attention if everything is kept; and with checkpoints those without."""
    model, inputs = learner
    t = trial(name)
    dense = gradients(model, inputs)
    for method in t.settings.everything[:1]:
        with t.applied(method, model):
            same(gradients(model, inputs), dense)
    with t.applied(t.method, model):
        wanted = gradients(model, inputs)
        assert any(not torch.allclose(wanted[n], g, atol=1e-5) for n, g in dense.items())
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )
        disable = getattr(
            model, "activation_checkpointing_disable", model.gradient_checkpointing_disable
        )
        enable()
        try:
            same(gradients(model, inputs), wanted)
        finally:
            disable()


# ---- the model -----------------------------------------------------------------------------------


@pytest.mark.slow
@either
def test_every_implementation_of_attention(method: Any) -> None:
    """It may be chosen while a method is applied, and is that of the model afterwards."""
    model, inputs = FAMILIES["llava"](2)
    wanted = None
    # Compiling FlexAttention takes many seconds.
    names = (
        ("sdpa", "eager", "flex_attention") if isinstance(method, Flatter) else ("sdpa", "eager")
    )
    for name in names:
        with vtr.apply(model, method), torch.no_grad():
            model.set_attn_implementation(name)
            assert attention_implementation(model.model.language_model) == name
            found = model(**inputs).logits[:, -1]
        assert model.config.get_text_config()._attn_implementation == name
        assert model.config.vision_config._attn_implementation == name
        wanted = found if wanted is None else wanted
        close(found, wanted)


@either
def test_the_tower_keeps_its_attention(method: Any) -> None:
    model, inputs = FAMILIES["llava"](2)
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    configs = model.config.vision_config, model.config
    before = [c._attn_implementation for c in configs]
    with vtr.apply(model, method):
        assert [c._attn_implementation for c in configs] == before
        assert "vtr" in model.config.get_text_config()._attn_implementation
        generate(model, inputs)
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    assert [c._attn_implementation for c in configs] == before


@either
def test_models_that_share_a_configuration_do_not_meet(method: Any) -> None:
    kind = KINDS["internvl"].longer
    model, inputs = kind.build(), kind.whole
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    assert other.config.get_text_config() is model.config.get_text_config()
    dense = logits(generate(model, inputs))
    with vtr.apply(model, method):
        wanted = logits(generate(model, inputs))
        assert not torch.allclose(wanted, dense, atol=CLOSE)
        assert torch.equal(logits(generate(other, inputs)), dense)
        with vtr.apply(other, method.replace(dense_layers=2)):
            assert torch.equal(logits(generate(model, inputs)), wanted)
            assert not torch.equal(logits(generate(other, inputs)), wanted)
        assert torch.equal(logits(generate(model, inputs)), wanted)
        assert torch.equal(logits(generate(other, inputs)), dense)
    assert torch.equal(logits(generate(model, inputs)), dense)


@functools.cache
def sliding() -> tuple[Any, dict[str, Any]]:
    """A LLaVA whose language model sees 24 tokens; prompts of 38 and 41."""
    text = transformers.MistralConfig(**TEXT, sliding_window=24)
    config = transformers.LlavaConfig(
        vision_config=clip(), text_config=text, image_token_id=IMAGE, image_seq_length=16,
        vision_feature_layer=-2,
    )  # fmt: skip
    model = build(transformers.LlavaForConditionalGeneration, config)
    return model, {"pixel_values": noise(3, 3, 28, 28), **prompts([[16], [16, 16]])}


@third(0)
def test_sliding_windows(name: str) -> None:
    """With a cache that lets go of what no row sees any more."""
    model, inputs = sliding()
    wanted = logits(generate(model, inputs))
    settings = examples(registry()[name])
    used = (settings.some[0], *settings.everything)
    if any(m.needs_table(None) for m in used if m.calibrated):  # type: ignore[arg-type]
        pytest.skip("its numbers are those of another model")
    for method in settings.everything:
        with vtr.apply(model, method):
            close(logits(generate(model, inputs)), wanted)
    with vtr.apply(model, settings.some[0]):
        both = logits(generate(model, inputs))
        rows = split(inputs)
        for b, row in enumerate(rows):
            close(logits(generate(model, row))[0], both[b])


@every
def test_attention_maps_are_refused(name: str) -> None:
    t = trial(name)
    wanted = t.reduced.out
    with t.applied(t.method):
        with pytest.raises(ValueError, match=rf"{name} computes no whole attention map.*vtr\.draw"):
            t.kind.model(**t.batch, output_attentions=True)
        assert torch.equal(t.call(t.batch), wanted)


def test_attention_maps_are_refused_through_the_configuration() -> None:
    model, inputs = FAMILIES["llava"](1)
    model.set_attn_implementation("eager")
    model.config.get_text_config().output_attentions = True
    assert model(**inputs).attentions is not None
    with vtr.apply(model, Flatter()), pytest.raises(ValueError, match="output_attentions=True"):
        model(**inputs)


# ---- families ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", {**FAMILIES, **VIDEOS})
def test_families(family: str) -> None:
    """Everything kept is dense, and a sample alone is as in a batch."""
    model, inputs = {**FAMILIES, **VIDEOS}[family](2)
    dense = logits(generate(model, inputs))
    for method in (Thirds(1.0, block=16), Flatter(0.0)):
        with vtr.apply(model, method):
            close(logits(generate(model, inputs)), dense)
    for method in (Thirds(block=16, last_rows=1), Flatter()):
        with vtr.apply(model, method):
            both = logits(generate(model, inputs))
            for b, row in enumerate(split(inputs)):
                close(logits(generate(model, row))[0], both[b], 2e-4)
        if isinstance(method, Flatter):
            assert not torch.allclose(both, dense, atol=1e-3)
    assert torch.equal(logits(generate(model, inputs)), dense)


# ---- readings of the papers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [n for n in INSIDE if issubclass(registry()[n], (PrefillMethod, DecodeMethod))]
)
def test_every_sparse_attention_has_a_reading_of_its_paper(name: str) -> None:
    import importlib

    from tests.methods.brute_force import BRUTE_FORCE

    module = importlib.import_module(BRUTE_FORCE[name])
    assert callable(module.brute_force), f"{BRUTE_FORCE[name]} has no function brute_force"


def test_the_table_of_readings_has_methods_alone() -> None:
    from tests.methods.brute_force import BRUTE_FORCE

    assert set(BRUTE_FORCE) <= set(INSIDE)
