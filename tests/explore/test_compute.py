"""What the explorer computes, against vtr.apply and plain calls of the models."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import vtr
from vtr.core.registry import registry
from vtr.explore import compute, media, page, subjects
from vtr.explore.choices import budget_of, method_at
from vtr.zoo.inputs import preprocess, vlm_inputs


@pytest.fixture(scope="module")
def vit():
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    return subjects.load("digits-vit")


@pytest.fixture(scope="module")
def llava():
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    return subjects.load("digits-llava")


def test_classes_tokens_and_costs_are_those_of_apply(vit):
    shown = media.sample("digits-vit", 0)
    found = compute.compare(vit, shown, ["evit", "random"], 0.4)
    pixels = preprocess(vit.model, "digits-vit", shown.pictures[0])
    with torch.no_grad():
        dense = vit.model(pixels).softmax(1)[0]
        for column, method in zip(found.columns[1:], found.methods, strict=True):
            with vtr.apply(vit.model, method) as handle:
                chances = vit.model(pixels).softmax(1)[0]
            assert column.title == str(method)
            assert column.said[0].text == str(int(chances.argmax()))
            assert column.said[0].probability == pytest.approx(float(chances.max()), rel=1e-5)
            left = min(stage.tokens_out for stage in handle.trace.stages)
            assert (column.dense.tokens, column.costs.tokens) == (144, left)
            flops = handle.report().flops["encoder"]
            assert (column.dense.flops, column.costs.flops) == flops
            assert column.costs.milliseconds > 0
            assert len(column.stages) == len(handle.trace.stages)
    assert found.columns[0].said[0].probability == pytest.approx(float(dense.max()), rel=1e-5)
    assert found.methods == (vtr.EViT(keep=0.4), vtr.Random(keep=0.4, seed=0))


def test_a_stage_is_drawn_as_draw_draws_it(vit):
    shown = media.sample("digits-vit", 1)
    (_, column) = compute.compare(vit, shown, ["random"], 0.25, measure=False).columns
    with torch.no_grad(), vtr.apply(vit.model, vtr.Random(keep=0.25, seed=0)) as handle:
        vit.model(preprocess(vit.model, "digits-vit", shown.pictures[0]))
        drawn = np.asarray(vtr.draw(handle, shown.pictures[0], size=240, show_input=False))
    caption, picture = column.stages[0]
    assert caption == "encoder 0: 36 of 144"
    assert np.array_equal(np.asarray(picture), drawn[-240:])


def test_keep_changes_the_picture_and_everything_changes_nothing(vit):
    shown = media.sample("digits-vit", 0)
    few = compute.compare(vit, shown, ["cls-attention"], 0.1, measure=False).columns
    more = compute.compare(vit, shown, ["cls-attention"], 0.8, measure=False).columns
    every = compute.compare(vit, shown, ["cls-attention"], 1.0, measure=False).columns
    assert few[1].costs.tokens == 15 and more[1].costs.tokens == 116
    assert few[1].stages[0][1].tobytes() != more[1].stages[0][1].tobytes()
    assert every[1].said == every[0].said and not every[1].stages


def test_several_pictures_are_a_batch(vit):
    pictures = tuple(media.sample("digits-vit", n).pictures[0] for n in range(3))
    shown = media.Shown(pictures=pictures)
    dense, column = compute.compare(vit, shown, ["cls-attention"], 0.25, measure=False).columns
    assert [s.text for s in dense.said] == [media.sample("digits-vit", n).answer for n in range(3)]
    assert [c for c, _ in column.stages] == [
        f"picture {n}, encoder 1: 36 of 144" for n in (1, 2, 3)
    ]


def test_the_class_token_attends_where_the_model_says(vit):
    shown = media.sample("digits-vit", 0)
    maps = compute.attention(vit, shown).maps
    assert [caption for caption, _ in maps] == [f"layer {n}" for n in range(6)]
    # The first map again: softmax(q k / sqrt(d)) of the class token, by timm's own modules.
    pixels = preprocess(vit.model, "digits-vit", shown.pictures[0])
    with torch.no_grad():
        x = vit.model._pos_embed(vit.model.patch_embed(pixels))
        block = vit.model.blocks[0]
        qkv = block.attn.qkv(block.norm1(vit.model.norm_pre(x)))
        q, k, _ = qkv.reshape(1, -1, 3, block.attn.num_heads, block.attn.head_dim).permute(
            2, 0, 3, 1, 4
        )
        row = (
            (q[:, :, :1] @ k.transpose(-2, -1) * block.attn.scale).softmax(-1)[0, :, 0, 1:].mean(0)
        )
    brightest = int(row.argmax())
    heat = np.asarray(maps[0][1], float) - np.asarray(
        shown.pictures[0].resize((240, 240), 3), float
    )
    cells = np.abs(heat).sum(-1).reshape(12, 20, 12, 20).mean((1, 3)).flatten()
    assert int(cells.argmax()) == brightest


def test_an_answer_with_its_probability_is_that_of_generate(llava):
    shown = media.sample("digits-llava", 0)
    found = compute.compare(llava, shown, ["fastv", "zipvl"], 0.3)
    dense, fastv, sparse = found.columns
    asked = vlm_inputs(
        "digits-llava", llava.model, llava.processor, list(shown.pictures), shown.text
    )
    for column, method in ((dense, None), (fastv, vtr.FastV(keep=0.3))):
        handle = None if method is None else vtr.apply(llava.model, method, positions="original")
        with torch.no_grad():
            written = llava.model.generate(**asked, max_new_tokens=8, do_sample=False)
            new = written[:, asked["input_ids"].shape[1] :]
            # Its probability once more, one token after the other, without generate.
            ids, cache, chance = asked, None, 1.0
            for token in new[0]:
                out = llava.model(**ids, past_key_values=cache, use_cache=True)
                chance *= float(out.logits[0, -1].softmax(-1)[token])
                cache = out.past_key_values
                ids = {"input_ids": token.view(1, 1)}
        if handle is not None:
            handle.remove()
        assert (
            column.said[0].text == llava.processor.decode(new[0], skip_special_tokens=True).strip()
        )
        assert column.said[0].probability == pytest.approx(chance, rel=1e-3)
    assert fastv.costs.kv_bytes < fastv.dense.kv_bytes == sparse.dense.kv_bytes
    assert fastv.dense.flops == sparse.dense.flops
    assert 0 < sparse.costs.density < 1 and sparse.masks and not sparse.stages
    assert dense.said[0].text == shown.answer


def test_sinks_are_drawn_and_counted(llava):
    shown = media.sample("digits-llava", 0)
    maps = compute.attention(llava, shown)
    asked = vlm_inputs(
        "digits-llava", llava.model, llava.processor, list(shown.pictures), shown.text
    )
    assert maps.summary == vtr.sinks(llava.model, asked).summary()
    assert len(maps.maps) == 4 and maps.sinks[0][1].height > 40


def test_a_clip_is_asked_about():
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    subject = subjects.load("digits-video")
    shown = media.sample("digits-video", 0)
    dense, column = compute.compare(subject, shown, ["evs"], 0.25, measure=False).columns
    assert dense.said[0].text == shown.answer
    assert column.costs.tokens < column.dense.tokens and column.stages[0][1].width > 240
    with pytest.raises(ValueError, match="digits-llava takes no clips"):
        compute.compare(subjects.load("digits-llava"), shown, ["fastv"], 0.5)


def test_a_video_is_generated_from_a_prompt():
    pytest.importorskip("diffusers")
    subject = subjects.load("digits-wan")
    shown = media.sample("digits-wan", 0)
    dense, column = compute.compare(subject, shown, ["topk-sparse"], 0.5, "a 3 moving down").columns
    assert column.masks[0][0] == "result" and len(column.masks) == 2
    assert column.said[0].text.endswith("dB to dense") and column.costs.density == pytest.approx(
        0.5
    )
    assert dense.masks[0][1].tobytes() != column.masks[0][1].tobytes()
    with pytest.raises(ValueError, match="does not know 'elephant'"):
        compute.compare(subject, shown, ["topk-sparse"], 0.5, "a elephant")


def test_methods_that_do_not_work_are_refused_with_the_reason(vit):
    assert {s.name for s in vtr.supported(vit.model) if s.supported} >= set(vit.offered)
    assert set(vit.offered) | set(vit.refused) == set(registry())
    assert "acts at the site 'decoder'" in vit.refused["fastv"]
    assert "trained for this model" in vit.refused["dtop"]
    with pytest.raises(ValueError, match="fastv does not work on digits-vit: fastv acts at"):
        compute.compare(vit, media.sample("digits-vit", 0), ["fastv"], 0.5)
    page.refused_html(vit)


@pytest.mark.parametrize("keep", [0.05, 0.5, 1.0])
def test_every_method_that_is_offered_can_be_applied_at_every_budget(vit, llava, keep):
    for subject in (vit, llava):
        for name in subject.offered:
            method = subject.method(name, keep)
            vtr.apply(subject.model, method, **subject.options).remove()
            option = budget_of(type(method))
            if option == "keep":
                assert method.keep == keep


def test_a_budget_moves_the_option_that_a_method_has():
    assert method_at("topk-sparse", 0.2) == vtr.TopKSparse(density=0.2)
    assert method_at("jenga", 0.25) == vtr.Jenga(drop=0.75)
    assert method_at("tomesd", 0.1) == vtr.ToMeSD(ratio=0.75)  # the most that a cell can lose
    assert method_at("debias", 0.4) == vtr.Debias(vtr.FastV(keep=0.4))
    assert method_at("zipvl", 0.6) == vtr.ZipVL(tau=0.6)
    assert method_at("algm", 0.6) == vtr.ALGM()
    with pytest.raises(ValueError, match="keep must be in"):
        method_at("evit", 0.0)


def test_numbers_of_methods_are_checked(vit):
    shown = media.sample("digits-vit", 0)
    with pytest.raises(ValueError, match="one to three methods, got 0"):
        compute.compare(vit, shown, [], 0.5)
    with pytest.raises(ValueError, match="one to three methods, got 4"):
        compute.compare(vit, shown, ["evit", "tome", "random", "ppt"], 0.5)
    with pytest.raises(ValueError, match="choose a sample, or upload"):
        compute.compare(vit, media.Shown(), ["evit"], 0.5)


def test_a_method_that_fails_says_so_and_the_others_run(vit, monkeypatch):
    monkeypatch.setattr(
        vtr.ToMe, "reduce", lambda self, site: (_ for _ in ()).throw(ValueError("no <b>"))
    )
    found = compute.compare(vit, media.sample("digits-vit", 0), ["tome", "evit"], 0.5)
    assert [c.failed for c in found.columns] == [False, True, False]
    assert found.columns[1].note == "no <b>" and found.columns[2].costs.milliseconds > 0
    html = page.comparison_html(found, media.sample("digits-vit", 0))
    assert "no &lt;b&gt;" in html and "<b>" not in html
    assert not vtr.handles(vit.model)


def test_threads_do_not_mix_their_results(vit):
    asked = [(n, keep) for n in range(2) for keep in (0.2, 0.9)]
    alone = {
        key: compute.compare(
            vit, media.sample("digits-vit", key[0]), ["evit"], key[1], measure=False
        )
        for key in asked
    }
    found: dict[tuple[int, float], compute.Compared] = {}

    def run(key: tuple[int, float]) -> None:
        shown = replace(media.sample("digits-vit", key[0]), found={})
        found[key] = compute.compare(vit, shown, ["evit"], key[1], measure=False)

    threads = [threading.Thread(target=run, args=(key,)) for key in asked for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key in asked:
        assert found[key].columns[1].said == alone[key].columns[1].said


def test_names_of_models_that_are_no_models_are_refused(tmp_path):
    given = subjects.Subjects(["digits-vit"])
    for name in ("timm:vit_tiny_patch16_224", str(tmp_path), "a/b"):
        with pytest.raises(ValueError, match=r"the model must be one of digits-vit$"):
            given.get(name)
    typed = subjects.Subjects(["digits-vit"], typed=True)
    for name in (str(tmp_path), "../x", "/etc", "a/../b", "~/x"):
        with pytest.raises(ValueError, match="or an id of the hub"):
            typed.get(name)


def test_a_model_of_a_library_is_explored_by_its_name():
    pytest.importorskip("timm")
    subject = subjects.Subjects(typed=True).get("timm:vit_tiny_patch16_224")
    found = compute.compare(subject, media.sample("timm", 0), ["tome"], 0.5, measure=False)
    assert found.columns[1].costs.tokens == 98 and found.columns[1].said[0].text
