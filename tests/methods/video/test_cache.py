"""The KV cache: what is freed is gone, and answers are those of a full cache with the same keys masked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vtr
from tests.vision.vlm.models import START, Inputs
from tests.vision.vlm.videos import VIDEOS
from vtr.compat.transformers import cache_of, given_cache, with_cache
from vtr.vision.vlm.store import EntryStore

STEPS = 6
LAYER = 1


def generate(model: Any, inputs: Inputs, **more: Any) -> Any:
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=STEPS, **settings, **more)


def reduced(model: Any, inputs: Inputs, method: vtr.Method, **more: Any) -> tuple[Any, vtr.Trace]:
    with vtr.apply(model, method, **more) as handle:
        return generate(model, inputs), handle.trace


def lengths(out: Any) -> list[int]:
    return [layer.keys.shape[2] for layer in cache_of(out).layers]


def size(out: Any) -> int:
    """Bytes of the cache's own storage."""
    tensors = [t for layer in cache_of(out).layers for t in (layer.keys, layer.values)]
    return sum(t.untyped_storage().nbytes() for t in tensors)


def stores(cache: Any) -> list[EntryStore]:
    return [layer for layer in cache.layers if isinstance(layer, EntryStore)]


class Masked:
    """A full cache, of which layers after LAYER see the chosen columns only: DyCoke's rule written out on
    the weights that eager attention returns."""

    def __init__(self, model: Any, columns: range, number: int, similarity: float | None) -> None:
        self.columns, self.number, self.similarity = list(columns), number, similarity
        self.before: Tensor | None = None
        self.chosen: set[int] = set()
        self.choices: list[set[int]] = []
        layers = model.model.language_model.layers
        self.hooks = [layers[LAYER].self_attn.register_forward_hook(self.choose)]
        for layer in layers[LAYER + 1 :]:
            self.hooks.append(layer.register_forward_pre_hook(self.hide, with_kwargs=True))

    def choose(self, module: Any, args: Any, output: Any) -> None:
        self.prompt = output[1].shape[2] > 1
        row = output[1][0, :, -1].mean(0)[self.columns]
        if self.before is not None:
            if self.similarity is None:
                return
            if F.cosine_similarity(row, self.before, dim=0) >= self.similarity:
                self.before = row
                return
        self.before = row
        self.chosen = {self.columns[i] for i in row.topk(self.number).indices.tolist()}
        self.choices.append(self.chosen)

    def hide(self, module: Any, args: Any, kwargs: Any) -> Any:
        if self.prompt:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        past = given_cache(kwargs).get_seq_length(0)
        mask = torch.zeros(1, 1, hidden.shape[1], past)
        gone = [c for c in self.columns if c not in self.chosen]
        mask[..., gone] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}


@pytest.mark.parametrize("name", ["llava_next_video", "qwen2_vl_video"])
@pytest.mark.parametrize(
    ("evicted", "similarity"), [("drop", None), ("cpu", 1.0), ("cpu", 0.9999), ("cpu", 0.5)]
)
def test_answers_are_those_of_a_masked_full_cache(
    name: str, evicted: str, similarity: float | None
) -> None:
    model, inputs = VIDEOS[name](1)
    model.set_attn_implementation("eager")
    keep: dict[str, Any] = {"keep": 0.3, "layer": LAYER}
    start = int((inputs["input_ids"][0] > START - 3).nonzero()[0])
    method = vtr.DyCoke(kv=4, evicted=evicted, similarity=similarity or 0.9, **keep)
    out, trace = reduced(model, inputs, method)
    tokens = trace.stages[0].tokens_out
    with vtr.apply(model, vtr.DyCoke(kv=None, **keep)):
        masked = Masked(model, range(start, start + tokens), 4, similarity)
        full = generate(model, inputs)
        for hook in masked.hooks:
            hook.remove()
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(full.logits))
    assert torch.equal(out.sequences, full.sequences)
    if similarity == 1.0:
        assert len(masked.choices) == STEPS and len(set(map(frozenset, masked.choices))) > 1
    if similarity is None:
        assert len(masked.choices) == 1
    dense, _ = reduced(model, inputs, vtr.DyCoke(kv=None, **keep))
    saved = tokens - 4
    assert lengths(out) == [n - saved * (i > LAYER) for i, n in enumerate(lengths(dense))]
    assert size(out) == size(dense) * sum(lengths(out)) // sum(lengths(dense)) < size(dense)


def test_the_offloaded_copy_holds_all_and_the_cache_none_of_it() -> None:
    model, inputs = VIDEOS["llava_next_video"](1)
    out, trace = reduced(model, inputs, vtr.DyCoke(kv=2, layer=LAYER))
    n = trace.stages[0].tokens_out
    heads, dim = cache_of(out).layers[0].keys.shape[1::2]
    assert [s.aside is not None for s in stores(cache_of(out))] == [i > LAYER for i in range(1, 4)]
    for store in stores(cache_of(out))[LAYER:]:
        aside = store.aside
        assert aside is not None and aside.keys.shape == aside.values.shape == (1, heads, n, dim)
        assert ((aside.at >= 0).sum(2) == 2).all()
        there = store.columns().gather(2, aside.at.clamp(min=0))
        assert torch.equal(there[aside.at >= 0], aside.columns[aside.at >= 0])
    dropped, _ = reduced(model, inputs, vtr.DyCoke(kv=2, layer=LAYER, evicted="drop"))
    assert all(s.aside is None for s in stores(cache_of(dropped))) and size(dropped) == size(out)


@pytest.mark.parametrize("name", ["llava_onevision_mixed", "qwen2_5_vl_video", "llava_next_video"])
@pytest.mark.parametrize(
    "method",
    [vtr.DyCoke(kv=0.4, layer=LAYER, similarity=1.0), vtr.PruneVid(layer=2, threshold=0.1)],
    ids=["dycoke", "prunevid"],
)
def test_a_batch_gives_each_sample_what_it_gets_alone(name: str, method: vtr.Method) -> None:
    """The second sample has no image, or is longer; rows are padded apart in every layer."""
    model, inputs = VIDEOS[name](2)
    both, trace = reduced(model, inputs, method)
    alone_model, alone_inputs = VIDEOS[name](1)
    alone, own = reduced(alone_model, alone_inputs, method)
    torch.testing.assert_close(
        torch.stack(both.logits)[:, :1], torch.stack(alone.logits), atol=2e-4, rtol=2e-4
    )
    for record, single in zip(trace.stages, own.stages, strict=True):
        mine = record.total.kept[0]
        assert mine[mine >= 0].tolist() == single.total.kept[0].tolist()


def test_prunevid_frees_earlier_layers_of_what_later_ones_cut() -> None:
    model, inputs = VIDEOS["video_llava"](1)
    trimmed, trace = reduced(model, inputs, vtr.PruneVid(layer=2))
    kept, _ = reduced(model, inputs, vtr.PruneVid(layer=2, trim=False))
    cut = trace.stages[-1].tokens_in - trace.stages[-1].tokens_out
    assert cut > 0 and lengths(trimmed) == [lengths(kept)[-1]] * 4
    assert lengths(kept)[0] == lengths(kept)[-1] + cut
    assert torch.equal(trimmed.logits[0], kept.logits[0]), "the first answer is of the prompt"
    assert not torch.equal(trimmed.logits[-1], kept.logits[-1])


def test_trimmed_layers_answer_like_masked_ones() -> None:
    model, inputs = VIDEOS["llava_next_video"](1)
    model.set_attn_implementation("eager")
    trimmed, trace = reduced(model, inputs, vtr.PruneVid(layer=2))
    first = trace.stages[-1]
    gone = sorted(set(range(first.tokens_in)) - set(first.map.kept[0].tolist()))
    start = int((inputs["input_ids"][0] > START - 3).nonzero()[0])
    layers = model.model.language_model.layers

    def hide(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] > 1:
            return None
        past = given_cache(kwargs).layers[module.self_attn.layer_idx].keys.shape[2]
        mask = torch.zeros(1, 1, 1, past + 1)
        mask[..., [start + j for j in gone]] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    with vtr.apply(model, vtr.PruneVid(layer=2, trim=False)):
        hooks = [x.register_forward_pre_hook(hide, with_kwargs=True) for x in layers[:2]]
        full = generate(model, inputs)
        for hook in hooks:
            hook.remove()
    assert gone
    torch.testing.assert_close(torch.stack(trimmed.logits), torch.stack(full.logits))


@pytest.mark.parametrize("evicted", ["drop", "cpu"])
def test_beams(evicted: str) -> None:
    """Caches of beams are exchanged; the answer is that of beams over a cache of fixed choice."""
    model, inputs = VIDEOS["llava_next_video"](2)
    method = vtr.DyCoke(kv=3, layer=LAYER, evicted=evicted)
    with vtr.apply(model, method) as handle:
        out = generate(model, inputs, num_beams=3)
        assert out.sequences.shape[0] == 2
        kept = handle.trace.stages[-1].total.kept.reshape(2, 3, -1)
        assert (kept == kept[:, :1]).all()


class MaskedRows:
    """As :class:`Masked`, for rows that each choose anew in every step."""

    def __init__(self, model: Any, columns: range, number: int) -> None:
        self.columns, self.number = torch.tensor(columns), number
        layers = model.model.language_model.layers
        self.hooks = [layers[LAYER].self_attn.register_forward_hook(self.choose)]
        for layer in layers[LAYER + 1 :]:
            self.hooks.append(layer.register_forward_pre_hook(self.hide, with_kwargs=True))

    def choose(self, module: Any, args: Any, output: Any) -> None:
        self.prompt = output[1].shape[2] > 1
        rows = output[1][:, :, -1].mean(1)[:, self.columns]
        self.gone = torch.ones_like(rows, dtype=torch.bool)
        self.gone.scatter_(1, rows.topk(self.number, 1).indices, False)

    def hide(self, module: Any, args: Any, kwargs: Any) -> Any:
        if self.prompt:
            return None
        past = given_cache(kwargs).get_seq_length(0)
        mask = torch.zeros(len(self.gone), 1, 1, past)
        mask[:, 0, 0, self.columns] = self.gone * torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}


def test_beams_have_choices_of_their_own() -> None:
    """What was chosen goes with the beam when rows are exchanged."""
    number = 1
    model, inputs = VIDEOS["llava_next_video"](1)
    model.set_attn_implementation("eager")
    more = {"num_beams": 4, "num_return_sequences": 4}
    method = vtr.DyCoke(keep=0.5, kv=number, layer=LAYER, similarity=1.0)
    with vtr.apply(model, method) as handle:
        out, trace = generate(model, inputs, **more), handle.trace
    start = int((inputs["input_ids"][0] > START - 3).nonzero()[0])
    with vtr.apply(model, vtr.DyCoke(keep=0.5, kv=None, layer=LAYER)):
        masked = MaskedRows(model, range(start, start + trace.stages[0].tokens_out), number)
        full = generate(model, inputs, **more)
        for hook in masked.hooks:
            hook.remove()
    assert torch.equal(out.sequences, full.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(full.logits))


@pytest.mark.parametrize(
    "method", [vtr.FastV(layer=2), vtr.EVS(keep=0.5), vtr.DyCoke(kv=3, layer=LAYER, similarity=1.0)]
)
def test_rows_of_a_cut_cache_are_repeated_and_chosen(method: vtr.Method) -> None:
    """One prompt, several continuations: each as if it were the only one."""
    model, inputs = VIDEOS["llava_next_video"](1)
    n = inputs["input_ids"].shape[1]

    def step(cache: Any, ids: list[list[int]], number: int) -> Tensor:
        mask = torch.ones(len(ids), n + number, dtype=torch.long)
        return model(
            input_ids=torch.tensor(ids),
            attention_mask=mask,
            **with_cache(type(model).forward, cache),
        ).logits

    with torch.no_grad(), vtr.apply(model, method):
        alone = []
        for first, second in ((7, 11), (8, 12), (9, 10)):
            cache = cache_of(model(**inputs, use_cache=True))
            alone.append([step(cache, [[first]], 1), step(cache, [[second]], 2)])
        cache = cache_of(model(**inputs, use_cache=True))
        cache.batch_repeat_interleave(3)
        both = step(cache, [[7], [8], [9]], 1)
        torch.testing.assert_close(both, torch.cat([a[0] for a in alone]), atol=1e-5, rtol=0)
        cache.batch_select_indices(torch.tensor([2, 0]))
        both = step(cache, [[10], [11]], 2)
        want = torch.cat([alone[2][1], alone[0][1]])
        torch.testing.assert_close(both, want, atol=1e-5, rtol=0)


def test_a_cache_made_in_inference_mode_is_followed_outside_it() -> None:
    model, inputs = VIDEOS["llava_next_video"](1)
    ids, mask = torch.tensor([[7]]), torch.ones(1, inputs["input_ids"].shape[1] + 1).long()
    with vtr.apply(model, vtr.DyCoke(kv=3, layer=LAYER, similarity=1.0)):
        with torch.inference_mode():
            first = cache_of(model(**inputs, use_cache=True))
            want = model(
                input_ids=ids, attention_mask=mask, **with_cache(type(model).forward, first)
            ).logits
            cache = cache_of(model(**inputs, use_cache=True))
        with torch.no_grad():
            got = model(
                input_ids=ids, attention_mask=mask, **with_cache(type(model).forward, cache)
            ).logits
    assert torch.equal(got, want)


def test_a_copy_of_the_cache_goes_on_by_itself() -> None:
    model, inputs = VIDEOS["llava_next_video"](1)
    with torch.no_grad(), vtr.apply(model, vtr.DyCoke(kv=3, layer=LAYER, similarity=1.0)):
        first = model(**inputs, use_cache=True)
        cache, twin = cache_of(first), copy.deepcopy(cache_of(first))
        n = inputs["input_ids"].shape[1]
        for step in range(3):
            ids = torch.tensor([[7 + step]])
            mask = torch.ones(1, n + step + 1, dtype=torch.long)
            a = model(
                input_ids=ids, attention_mask=mask, **with_cache(type(model).forward, cache)
            ).logits
            b = model(
                input_ids=ids, attention_mask=mask, **with_cache(type(model).forward, twin)
            ).logits
            assert torch.equal(a, b)
        assert cache.layers[-1].aside is not twin.layers[-1].aside


def test_a_new_prompt_forgets_the_old_one() -> None:
    model, inputs = VIDEOS["llava_next_video"](1)
    with vtr.apply(model, vtr.DyCoke(kv=3, layer=LAYER)), torch.no_grad():
        out = model(**inputs, use_cache=True)
        cache = cache_of(out)
        assert cache.layers[-1].aside is not None
        cache.reset()
        for layer in cache.layers:  # older versions of transformers leave zeros there
            if layer.keys is not None:
                layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
        text = {k: v[:, :3] for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        model(**text, **with_cache(type(model).forward, cache))
        assert all(layer.whole and layer.aside is None for layer in stores(cache))


def test_layers_that_do_not_exist_are_refused() -> None:
    model, _ = VIDEOS["llava_next_video"](1)
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.2 for 4 layers"):
        vtr.apply(model, vtr.DyCoke(layer=3))
    assert not vtr.handles(model)


def test_a_static_cache_is_freed_as_well() -> None:
    model, inputs = VIDEOS["llava_next_video"](1)
    with vtr.apply(model, vtr.DyCoke(layer=LAYER, kv=3)):
        wanted, found = (
            generate(model, inputs),
            generate(model, inputs, cache_implementation="static"),
        )
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits))
    freed = [[s.nbytes for s in stores(cache_of(out))] for out in (found, wanted)]
    assert freed[0] == freed[1]


def test_the_report_counts_what_is_held() -> None:
    model, inputs = VIDEOS["llava_next_video"](1)
    with vtr.apply(model, vtr.DyCoke(kv=3, layer=LAYER)) as handle, torch.no_grad():
        out = model(**inputs, use_cache=True)
        counted = handle.report().kv_bytes
        layers = cache_of(out).layers
        chosen = [store for store in stores(cache_of(out)) if not store.whole]
        whole = [x.keys.nbytes + x.values.nbytes for x in layers if x not in chosen]
        held = sum(whole) + sum(store.nbytes for store in chosen)
        assert counted is not None and counted[1] == held < counted[0] and size(out) < held
