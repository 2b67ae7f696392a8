"""vtr calls libraries by their current names: no warning of deprecation comes from its calls."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import vtr
from vtr.compat.transformers import CACHE, cache_name

pytestmark = pytest.mark.contract
transformers = pytest.importorskip("transformers")

from tests.vision.vlm import models  # noqa: E402  (needs transformers)

DEPRECATION = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)


class Written(logging.Handler):
    """Keeps what a logger writes."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def deprecations() -> Iterator[list[str]]:
    """Collects warnings of deprecation: those of Python, and what transformers and diffusers log."""
    # Said once per process otherwise.
    type(logging.getLogger()).warning_once.cache_clear()  # type: ignore[attr-defined]
    written, found = Written(), list[str]()
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers", "timm")]
    for logger in loggers:
        logger.addHandler(written)
    try:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            yield found
    finally:
        for logger in loggers:
            logger.removeHandler(written)
    found += [str(w.message) for w in raised if issubclass(w.category, DEPRECATION)]
    found += [str(w.message) for w in raised if "deprecat" in str(w.message).lower()]
    found += [line for line in written.lines if "deprecat" in line.lower()]


def vlm(name: str) -> tuple[Any, Callable[[], Any]]:
    """A forward call, answers with a dynamic and a static cache, with drafts and beams."""
    model, inputs = models.FAMILIES[name](1)

    def use() -> None:
        with torch.no_grad():
            model(**inputs, use_cache=True, output_hidden_states=True)
        options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
        model.generate(**inputs, **options)
        model.generate(**inputs, **options, cache_implementation="static")
        model.generate(**inputs, **options, prompt_lookup_num_tokens=2)
        if models.ENCODES_FIRST:
            model.generate(**inputs, **options, num_beams=2, return_dict_in_generate=True)
        labels = inputs["input_ids"].clone()
        model(**inputs, labels=labels).loss.backward()

    return model, use


def timm_vit() -> tuple[Any, Callable[[], Any]]:
    pytest.importorskip("timm")
    from tests.tiny import images, vit

    model = vit(global_pool="avg")
    return model, lambda: (model(images()), model.forward_intermediates(images()))


def tower(name: str) -> tuple[Any, Callable[[], Any]]:
    from tests.vision import towers

    model = towers.build(name)
    return model, lambda: model(towers.pixels(), output_hidden_states=True, output_attentions=True)


def open_clip() -> tuple[Any, Callable[[], Any]]:
    pytest.importorskip("open_clip")
    from open_clip.model import CLIP

    from tests.tiny import images, spread

    vision = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "head_width": 12}
    text = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1}
    model: Any = spread(CLIP(24, {**vision, "pool_type": "avg"}, text)).visual
    return model, lambda: model(images(size=32))


def wan() -> tuple[Any, Callable[[], Any]]:
    pytest.importorskip("diffusers")
    from tests.diffusion.models import CASES

    model = CASES["wan"].build()

    def use() -> None:
        with torch.no_grad(), model.cache_context("cond"):
            model(**CASES["wan"].call())

    return model, use


CUT = [vtr.DivPrune(keep=6), vtr.FastV(keep=3, layer=1)]
USES: dict[str, tuple[Callable[[], tuple[Any, Callable[[], Any]]], Any]] = {
    "llava": (lambda: vlm("llava"), CUT),
    "llava in the tower": (lambda: vlm("llava"), vtr.VisionZip(keep=6)),
    "qwen2_5_vl": (lambda: vlm("qwen2_5_vl"), CUT),
    "qwen3_vl": (lambda: vlm("qwen3_vl"), CUT),
    "timm": (timm_vit, vtr.ToMe(r=8)),
    "clip": (lambda: tower("clip"), vtr.EViT(keep=0.5, layers=(1,))),
    "siglip-classes": (lambda: tower("siglip-classes"), vtr.ToMe(r=8)),
    "dinov2": (lambda: tower("dinov2"), vtr.EViT(keep=0.5, layers=(1,))),
    "open_clip": (open_clip, vtr.EViT(keep=0.5, layers=(1,))),
    "wan": (wan, vtr.RandomSparse(density=0.5)),
}


@pytest.mark.parametrize("name", USES)
def test_no_deprecation_is_caused(name: str) -> None:
    build, method = USES[name]
    model, use = build()
    with deprecations() as dense:
        use()
    with deprecations() as found:
        handle = vtr.apply(model, method)
        use()
        handle.report()
        handle.remove()
    assert set(found) <= set(dense)


def test_profiling_causes_no_deprecation() -> None:
    model, inputs = models.llava(1)
    with deprecations() as found:
        vtr.profile(model, {**inputs, "use_cache": True}, CUT[1], repeats=1)
    assert not found


def test_deprecations_are_seen() -> None:
    """Of Python and of the log, in a test as in a program of its own."""
    with deprecations() as found:
        warnings.warn("old", FutureWarning, stacklevel=1)
        logging.getLogger("transformers.modeling_utils").warning("`x` is deprecated")
    assert found == ["old", "`x` is deprecated"]


renamed = pytest.mark.skipif(
    cache_name(transformers.LlavaModel.forward) != CACHE[0],
    reason="this version of transformers has one name for the cache",
)
older = pytest.mark.filterwarnings("ignore:.*past_key_values.*deprecated:FutureWarning")


@renamed
@older
@pytest.mark.parametrize("name", ["llava", "llava_onevision"])
def test_the_cache_by_its_older_name_gives_the_same(name: str) -> None:
    model, inputs = models.FAMILIES[name](2)
    length = inputs["input_ids"].shape[1]
    more = torch.tensor([[20, 21], [22, 23]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    logits = {}
    for argument in (None, *CACHE):  # None: one that the model makes
        with torch.no_grad(), vtr.apply(model, CUT, positions="original"):
            given = {} if argument is None else {argument: transformers.DynamicCache()}
            first = model(**inputs, **given, use_cache=True)
            held = [first.cache, first.past_key_values, first["past_key_values"]]
            assert all(cache is held[0] for cache in held)
            # Fewer than were given.
            assert held[0].layers[0].keys.shape[2] < length
            second = model(input_ids=more, attention_mask=mask, **{argument or CACHE[0]: held[0]})
        logits[argument] = first.logits, second.logits
    for argument in CACHE:
        for got, wanted in zip(logits[argument], logits[None], strict=True):
            assert torch.equal(got, wanted)


@renamed
@older
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_generate_takes_the_cache_by_its_older_name(name: str) -> None:
    model, inputs = models.FAMILIES[name](1)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    with vtr.apply(model, CUT):
        answers = [
            model.generate(**inputs, **options, **given)
            for given in ({}, {CACHE[1]: transformers.DynamicCache()})
        ]
    assert torch.equal(*answers)
