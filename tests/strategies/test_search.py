"""``vtr.search`` end to end on tiny models: results, seeds, resumption, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("optuna")

import vtr
from vtr.strategies import Grid, GSearch, PSigmoid, Target, Uniform, answered
from vtr.testing.models.encoders import images, vit

DATA = [(images(2, seed=s), torch.tensor([1, 2])) for s in range(2)]
SMALL = PSigmoid(trials=5, start=3)


def run(method: Any = None, **changes: Any) -> vtr.Plan:
    options: dict[str, Any] = {"target": {"flops": 0.6}, "strategy": SMALL, **changes}
    return vtr.search(vit(), DATA, vtr.EViT(fuse=False) if method is None else method, **options)


def brute_force(plan: vtr.Plan) -> tuple[float, float]:
    """Loss and FLOPs of a plan on the data, computed apart."""
    model = vit()
    lost, dense, reduced = [], 0, 0
    for x, _ in DATA:
        with torch.no_grad():
            p = model(x).double().log_softmax(-1)
            with vtr.apply(model, plan) as handle:
                q = model(x).double().log_softmax(-1)
                a, b = handle.report().flops["encoder"]
        lost += (p.exp() * (p - q)).sum(-1).tolist()
        dense, reduced = dense + a, reduced + b
    return sum(lost) / len(lost), reduced / dense


@pytest.mark.parametrize(
    "strategy",
    [SMALL, GSearch(levels=4, rounds=2), Uniform(), Grid({"keep": (0.9, 0.5, 0.3)})],
    ids=lambda s: s.name,
)
def test_the_plan_is_within_the_budget_and_has_measured_what_it_says(strategy, tmp_path):
    plan = run(strategy=strategy)
    plan.save(tmp_path / "plan.json")
    plan = vtr.Plan.load(tmp_path / "plan.json")
    loss, share = brute_force(plan)
    assert plan.measured["loss"] == pytest.approx(loss, rel=1e-5)
    assert plan.measured["costs"]["flops"]["share"] == pytest.approx(share)
    assert share <= 0.6
    assert plan.measured["objective"] == "kl" and plan.measured["target"] == {"flops": 0.6}
    assert len(plan.measured["schedule"]["kept"]) == 6
    assert plan.data["samples"] == 4 and len(plan.data["sha256"]) == 64
    assert plan.versions["vtr"] and plan.versions["optuna"]


def test_a_tolerated_loss_is_kept():
    for strategy in (GSearch(levels=4), PSigmoid(trials=2), Uniform()):
        plan = run(target=Target(loss=0.05, minimise="tokens"), strategy=strategy)
        loss, _ = brute_force(plan)
        assert loss <= 0.05 and plan.measured["loss"] == pytest.approx(loss, rel=1e-5)
        assert plan.measured["costs"]["tokens"]["share"] < 1


def test_a_search_is_a_function_of_seed_and_data():
    first, model = run(), vit()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again = vtr.search(model, DATA, vtr.EViT(fuse=False), target={"flops": 0.6}, strategy=SMALL)
    assert again == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert run(seed=1).measured["points"] != first.measured["points"]


def test_a_search_continues_in_its_file(tmp_path):
    path = tmp_path / "study.db"
    run(strategy=PSigmoid(trials=2, start=3), study=path)
    assert run(study=path) == run()
    with pytest.raises(ValueError, match="holds a search with another target"):
        run(study=path, target={"flops": 0.5})


def test_methods_without_a_schedule_are_solved_for_their_one_number():
    plan = vtr.search(vit(), DATA, vtr.ToFe(), target={"flops": 0.7})
    assert plan.measured["strategy"]["name"] == "uniform"
    assert plan.measured["costs"]["flops"]["share"] <= 0.7
    grid = vtr.search(
        vit(), DATA, "tome", target={"flops": 0.7}, strategy=Grid({"r": (2, 8, 9), "keep": (None,)})
    )
    assert grid.methods[0].r in (2, 8, 9)  # type: ignore[attr-defined]


@pytest.mark.parametrize("objective", ["cosine", "relative-error", "cross-entropy", "accuracy"])
def test_objectives_by_name(objective):
    plan = run(objective=objective, strategy=Grid({"keep": (0.4,)}))
    assert plan.measured["objective"] == objective


def test_an_objective_may_be_a_function():
    def worst(output: Any, batch: Any) -> torch.Tensor:
        return -output[range(2), batch[1]]

    plan = run(objective=worst, strategy=Grid({"keep": (0.4,)}))
    model, dense, reduced = vit(), [], []
    for x, y in DATA:
        with torch.no_grad():
            dense += (-model(x)[range(2), y]).tolist()
            with vtr.apply(model, plan):
                reduced += (-model(x)[range(2), y]).tolist()
    assert plan.measured["loss"] == pytest.approx((sum(reduced) - sum(dense)) / 4, rel=1e-5)
    assert plan.measured["objective"] == "worst"


def test_latency_is_measured_against_the_dense_model():
    plan = run(target={"latency": 1e6}, strategy=Grid({"keep": (0.2,)}))
    assert plan.measured["costs"]["latency"]["dense"] > 0


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"target": {"flops": 1e-9}}, ValueError, "no candidate is within the target"),
        (
            {"target": {"loss": 0.0}, "strategy": Grid({"keep": (0.1,)})},
            ValueError,
            "the nearest of 1 has a loss of",
        ),
        ({"target": {"kv": 0.5}}, vtr.UnsupportedMethodError, "the target 'kv' cannot be measured"),
        ({"strategy": "grid"}, ValueError, "strategy must be a vtr.strategies.Strategy"),
        ({"objective": "bleu"}, ValueError, "objective must be one of"),
        ({"strategy": Grid({"kept": (1,)})}, ValueError, "evit has no option 'kept'"),
        ({"strategy": Grid({"keep": (5.0,)})}, ValueError, "no combination of options works"),
        ({"method": vtr.VTCCLS}, ValueError, "method must be one vtr method"),
        ({"method": vtr.CLSAttention(), "strategy": Uniform("k")}, ValueError, "has no option 'k'"),
    ],
)
def test_a_search_that_cannot_be_is_refused(changes, error, words):
    with pytest.raises(error, match=words):
        run(**changes)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "at least one batch"),
        (images(), "write \\[batch\\]"),
        ([3], "batch 0 must be images"),
        ([(images(),)], ""),
    ],
)
def test_data_of_another_form_is_refused(data, words):
    def call() -> vtr.Plan:
        return vtr.search(
            vit(), data, vtr.EViT(), target={"flops": 0.9}, strategy=Grid({"keep": (0.5,)})
        )

    if not words:
        assert call().data["samples"] == 2
        return
    with pytest.raises(ValueError, match=words):
        call()


def test_labels_are_asked_for_and_models_must_be_as_they_are():
    with pytest.raises(ValueError, match="objective='accuracy' needs labels"):
        vtr.search(vit(), [images()], vtr.EViT(), target={"flops": 0.5}, objective="accuracy")
    model = vit()
    with pytest.raises(ValueError, match="training mode"):
        vtr.search(model.train(), DATA, vtr.EViT(), target={"flops": 0.5})
    with vtr.apply(model.eval(), vtr.EViT()), pytest.raises(ValueError, match="wrapped already"):
        vtr.search(model, DATA, vtr.EViT(), target={"flops": 0.5})


@pytest.mark.parametrize("option", [{"options": ()}, {"options": {"keep": 3}}])
def test_a_grid_maps_options_to_values(option):
    with pytest.raises(ValueError, match="options"):
        Grid(**option)


def test_the_options_of_strategies_are_checked():
    for wrong in ({"trials": 0}, {"sampler_name": "cma"}, {"start": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PSigmoid(**wrong)
    with pytest.raises(ValueError, match="levels"):
        GSearch(levels=1)


# ---- vision-language models ---------------------------------------------------------------------


def test_a_language_model_is_searched_at_its_answers():
    pytest.importorskip("transformers")
    from vtr.testing.models.vlms import llava

    model, inputs = llava(2)
    data = answered(model, [inputs], tokens=3)
    ids, labels = data[0]["input_ids"], data[0]["labels"]
    assert (labels[:, :-3] == -100).all() and torch.equal(labels[:, -3:], ids[:, -3:])
    plan = vtr.search(
        model, data, vtr.PyramidDrop(), target={"kv": 0.9}, strategy=GSearch(levels=3, rounds=1)
    )
    inner = {k: v for k, v in data[0].items() if k != "labels"}
    rows = slice(ids.shape[1] - 4, ids.shape[1] - 1)
    with torch.no_grad():
        p = model(**inner).logits[:, rows].double().log_softmax(-1)
        with vtr.apply(model, plan) as handle:
            q = model(**inner).logits[:, rows].double().log_softmax(-1)
            dense, reduced = handle.report().kv_bytes
    assert plan.measured["loss"] == pytest.approx(
        float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4
    )
    assert plan.measured["costs"]["kv"]["share"] == pytest.approx(reduced / dense)
    assert reduced / dense <= 0.9


def test_a_method_of_the_cache_is_measured_while_answers_are_written():
    pytest.importorskip("transformers")
    from vtr.testing.models.vlms import llava

    model, inputs = llava(2)
    with pytest.raises(ValueError, match=r"acts while answers are written.*strategies\.answered"):
        vtr.search(model, [inputs], vtr.SnapKV(), target={"kv": 0.9})
    data = answered(model, [inputs], tokens=3)
    plan = vtr.search(
        model, data, vtr.SnapKV(window=4), target={"kv": 0.99}, strategy=Grid({"keep": (2,)})
    )
    with torch.no_grad():
        whole = model(**{k: v for k, v in data[0].items() if k != "labels"}).logits[:, -4:-1]
        p = whole.double().log_softmax(-1)
        prompt = inputs["input_ids"].shape[1]
        with vtr.apply(model, plan):
            out = model(**inputs, use_cache=True)
            logits, cache = [out.logits[:, -1]], out.past_key_values
            for step in range(2):
                mask = data[0]["attention_mask"][:, : prompt + step + 1]
                ids = data[0]["input_ids"][:, prompt + step, None]
                out = model(
                    input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True
                )
                logits.append(out.logits[:, -1])
    q = torch.stack(logits, 1).double().log_softmax(-1)
    found = plan.measured["loss"]
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found > 0


def test_the_last_hidden_state_is_compared_by_its_cosine():
    pytest.importorskip("transformers")
    from vtr.testing.models.vlms import llava

    model, inputs = llava(2)
    plan = vtr.search(
        model, [inputs], vtr.PyramidDrop(), target={"kv": 0.99}, objective="cosine",
        strategy=Grid({"keep": (0.3,)}),
    )  # fmt: skip
    with torch.no_grad():
        full = model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1].double()
        with vtr.apply(model, plan):
            cut = model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1].double()
    cosine = torch.nn.functional.cosine_similarity(full, cut, dim=-1)
    assert plan.measured["loss"] == pytest.approx(float((1 - cosine).mean()), rel=1e-4)


def test_prompts_that_are_padded_on_the_right_are_not_answered():
    pytest.importorskip("transformers")
    from vtr.testing.models.vlms import llava

    model, inputs = llava(2)
    mask = inputs["attention_mask"].clone()
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="batch 0 is padded on the right"):
        answered(model, [{**inputs, "attention_mask": mask}])


# ---- plans --------------------------------------------------------------------------------------


def test_the_plan_of_another_model_is_refused_with_the_reason():
    plan = run(strategy=Grid({"keep": (0.4,)}))
    for other, words in (
        (vit(seed=1), "has other numbers than this model's"),
        (vit(depth=4), "its depth is 6, and this model's is 4"),
        (vit(embed_dim=24), "its embed_dim is 48, and this model's is 24"),
    ):
        with pytest.raises(vtr.UnsupportedModelError, match=f"another model.*{words}"):
            vtr.apply(other, plan)
    half = vit().to(torch.bfloat16)
    vtr.apply(half, plan).remove()  # another dtype is the same model
