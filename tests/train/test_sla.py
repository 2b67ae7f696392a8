"""Fine-tuning under sparse attention: losses and gradients by hand, exact resume, files, and refusals."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass

import pytest
import torch

import vtr
from tests.tiny import ours
from vtr.core.module_files import FILE, ModuleFile
from vtr.testing.models.diffusion import CASES
from vtr.train.sla import SparseTuner, TuningSettings, load
from vtr.train.state import load_state

WAN = CASES["wan"]
FAST = TuningSettings(steps=4, rate=1e-3, module_rate=1e-2, seed=3)
METHOD = vtr.SLA(0.3, block=16)


def batch(number):
    g = torch.Generator().manual_seed(number)
    return {
        "latents": torch.randn(2, 4, 3, 6, 10, generator=g),
        "encoder_hidden_states": torch.randn(2, 7, 16, generator=g),
    }


@dataclass(frozen=True, kw_only=True)
class Dense(vtr.RandomSparse):
    """Skips nothing, as methods do that begin a run with dense attention."""

    def attend(self, site):
        return site.dense()


def tuner(path, method=METHOD, settings=FAST, model=None, data=batch, **options):
    return SparseTuner(
        WAN.build() if model is None else model, method, data, path, settings, **options
    )


def numbers(found):
    return {name: p.detach().clone() for name, p in found.weights.items()}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


# ---- a step ---------------------------------------------------------------------------------------


def by_hand(number, settings):
    """Noisy latents, times and noise of a batch, as the docstrings say."""
    g = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
    given = batch(number)
    t = torch.sigmoid(settings.time_mean + settings.time_std * torch.randn(2, generator=g))
    noise = torch.randn(given["latents"].shape, generator=g)
    at = t[:, None, None, None, None]
    inputs = {"hidden_states": (1 - at) * given["latents"] + at * noise, "timestep": 1000 * t}
    return {**inputs, "encoder_hidden_states": given["encoder_hidden_states"]}, noise - given[
        "latents"
    ]


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("loss", ["distil", "data"])
def test_the_loss_is_that_of_the_definition(loss, lora, tmp_path):
    settings = dataclasses.replace(FAST, loss=loss, lora=lora)
    given, target = by_hand(0, settings)
    dense = WAN.build()
    if loss == "distil":
        with torch.no_grad():
            target = dense(**given, return_dict=False)[0]
    with torch.no_grad(), vtr.apply(dense.train(), METHOD):
        wanted = (dense(**given, return_dict=False)[0] - target).square().mean()
    with tuner(tmp_path, settings=settings) as run:
        news = run.step()
        assert news["loss"] == pytest.approx(float(wanted), rel=1e-5)
        assert news["rate"] == FAST.rate
        assert 0.2 < news["density"] < 0.4


def test_training_lowers_the_loss_of_a_fixed_batch_and_moves_every_weight(tmp_path):
    settings = dataclasses.replace(FAST, steps=12, loss="data", rate=3e-3, clip=1.0)
    with tuner(tmp_path, settings=settings, data=lambda number: batch(0)) as run:
        before = numbers(run)
        first = run.loss_of(batch(0), 0).item()
        for _ in range(12):
            run.step()
        after = numbers(run)
        assert run.loss_of(batch(0), 0).item() < 0.9 * first
        learned = [n for n in after if "modules" in n and n.endswith("weight")]
        assert len(learned) == 3 and all(bool(after[n].any()) for n in learned)
        moved = [n for n in after if not torch.equal(before[n], after[n])]
        assert len(moved) > 0.9 * len(after)


def test_gradients_of_several_batches_are_those_of_one_large_batch(tmp_path):
    """SGD would show it; AdamW's second step does too, by its moments."""
    settings = dataclasses.replace(FAST, accumulate=2, loss="data")
    with tuner(tmp_path, settings=settings) as run:
        run.step()
        found = {
            n: run.optimizer.state[p]["exp_avg"]
            for n, p in run.weights.items()
            if p in run.optimizer.state
        }
        assert found
    model = WAN.build().train()
    with vtr.apply(model, METHOD):
        for number in (0, 1):
            given, target = by_hand(number, settings)
            ((model(**given, return_dict=False)[0] - target).square().mean() / 2).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[f"model.{name}"], 0.1 * p.grad, atol=1e-6, rtol=1e-4)


def test_the_teacher_stays_dense_and_as_it_was(tmp_path):
    model = WAN.build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with tuner(tmp_path, model=model) as run:
        assert run.teacher is not model
        run.step()
        run.step()
        assert all(torch.equal(v, before[k]) for k, v in run.teacher.state_dict().items())
        assert ours(run.teacher) == []
    with tuner(tmp_path / "lora", settings=dataclasses.replace(FAST, lora=4)) as run:
        assert run.teacher is None, "an adapter is switched off instead of a second copy"
        run.step()
        run.step()
        assert not run.handle.paused
        base = {n: p for n, p in run.model.named_parameters() if "lora" not in n}
        own = {n.replace(".base_layer", ""): p for n, p in base.items()}
        assert all(torch.equal(p, before[n]) for n, p in own.items())
        assert all("lora" in n or "modules" in n for n in run.weights)


@pytest.mark.parametrize("lora", [None, 4])
def test_gradient_checkpointing_changes_nothing(lora, tmp_path):
    found = []
    for checkpointing in (False, True):
        settings = dataclasses.replace(FAST, checkpointing=checkpointing, lora=lora)
        with tuner(tmp_path / str(checkpointing), settings=settings) as run:
            run.step()
            run.step()
            found.append(numbers(run))
            model = run.model
    assert not model.is_gradient_checkpointing
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        vtr.TopKSparse(0.3, block=16),
        vtr.VSA(0.3, tile=(1, 3, 5), block=16),
        vtr.RandomSparse(0.4, block=16),
        vtr.SlidingTile(window=(1, 1, 1), tile=(1, 3, 5), block=16),
    ],
    ids=str,
)
def test_methods_that_can_be_trained_with(method, tmp_path):
    with tuner(tmp_path, method) as run:
        first = run.step()
        second = run.step()
        assert math.isfinite(second["loss"]) and first["density"] < 1
        assert (run.modules is not None) == method.learned
        run.export()
    model = WAN.build()
    found = load(model, tmp_path)
    assert type(found) is type(method)
    with torch.no_grad(), vtr.apply(model, found):
        assert model(**WAN.call())[0].isfinite().all()


# ---- schedules --------------------------------------------------------------------------------------


def test_the_share_of_skipped_blocks_grows_until_the_density_is_reached(tmp_path):
    settings = dataclasses.replace(FAST, steps=6, sparsity_step=0.3, sparsity_every=2)
    assert [settings.density(n, 0.25) for n in range(7)] == pytest.approx(
        [1.0, 1.0, 0.7, 0.7, 0.4, 0.4, 0.25]
    )
    with tuner(tmp_path, settings=settings) as run:
        modules = run.modules
        seen = [run.step()["density"] for _ in range(6)]
        assert run.handle.modules[0] is modules
        run.export()
    assert seen[0] == seen[1] == 1.0
    assert seen[1] > seen[2] > seen[4]
    assert ModuleFile.read(tmp_path).method["density"] == 0.3


def test_rates_rise_and_fall(tmp_path):
    settings = TuningSettings(steps=100, warmup=10, schedule="cosine")
    assert settings.factor(0) == pytest.approx(0.1, rel=1e-3)
    assert settings.factor(50) == pytest.approx(0.51)
    assert settings.factor(99) == pytest.approx(0.02, rel=0.02)
    assert TuningSettings().factor(0) == TuningSettings().factor(1999) == 1.0


def test_times_are_normal_in_their_logit():
    settings = TuningSettings(time_mean=math.log(5), time_std=1.3)
    t = settings.times(20_000, torch.Generator().manual_seed(0)).double()
    # The same as a shift of 5 of times with a mean of 0, as schedulers write it.
    plain = torch.sigmoid(
        1.3 * torch.randn(20_000, generator=torch.Generator().manual_seed(0)).double()
    )
    torch.testing.assert_close(t, 5 * plain / (1 + 4 * plain), atol=1e-6, rtol=1e-6)
    assert t.logit().mean() == pytest.approx(math.log(5), abs=0.03)


def test_averaged_weights_are_the_result(tmp_path):
    settings = dataclasses.replace(FAST, ema=0.5)
    with tuner(tmp_path, settings=settings) as run:
        average = numbers(run)
        for step in range(1, 5):
            run.step()
            share = 1 - min(0.5, step / (step + 9))
            average = {n: a + share * (run.weights[n].detach() - a) for n, a in average.items()}
        last = numbers(run)
        run.export()
        assert same(numbers(run), last), "the run continues with its own weights"
    model = WAN.build()
    method = load(model, tmp_path)
    for name, wanted in average.items():
        if name.startswith("model."):
            torch.testing.assert_close(model.state_dict()[name[6:]], wanted, atol=1e-6, rtol=1e-5)
    assert not torch.equal(average["model.proj_out.weight"], last["model.proj_out.weight"])
    assert method.weights is not None


# ---- runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, 4])
def test_a_resumed_run_is_bit_identical(lora, tmp_path):
    settings = dataclasses.replace(
        FAST, lora=lora, ema=0.9, clip=1.0, warmup=2, schedule="cosine", accumulate=2,
        sparsity_step=0.4, sparsity_every=1,
    )  # fmt: skip
    with tuner(tmp_path / "whole", settings=settings) as run:
        assert run.run()
        whole, averages = numbers(run), run.averages
    with tuner(tmp_path / "parts", settings=settings) as run:
        run.step()
        run.step()
        run.save()
    model = WAN.build()
    with tuner(tmp_path / "parts", settings=settings, model=model, resume=True) as run:
        assert run.position == 2
        assert run.run()
        assert same(numbers(run), whole) and same(run.averages, averages)
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()] if (tmp_path / "whole/log.jsonl").exists() else []  # fmt: skip
    assert not log, "four steps are fewer than ten"
    files = sorted(f.name for f in (tmp_path / "parts").iterdir())
    weights = "pytorch_lora_weights.safetensors" if lora else "transformer"
    assert files == sorted([FILE, "state.safetensors", weights])


def test_a_list_of_batches_begins_again_and_is_skipped_forward(tmp_path):
    data = [batch(n) for n in range(3)]
    with tuner(tmp_path / "list", data=data) as run:
        run.run()
        by_list = numbers(run)
    with tuner(tmp_path / "function", data=lambda n: batch(n % 3)) as run:
        run.run()
        assert same(numbers(run), by_list)
    with tuner(tmp_path / "parts", data=data) as run:
        run.step()
        run.save()
    with tuner(tmp_path / "parts", data=data, resume=True) as run:
        run.run()
        assert same(numbers(run), by_list)


def test_the_log_has_the_mean_loss_and_a_run_can_be_stopped(tmp_path):
    settings = dataclasses.replace(FAST, log_every=2, save_every=2)
    with tuner(tmp_path, settings=settings) as run:
        assert not run.run(minutes=0)
        assert run.position == 0
        assert run.run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert set(lines[0]) == {"step", "loss", "norm", "rate", "density", "seconds"}
    _, about = load_state(tmp_path / "state.safetensors")
    assert about["step"] == 4 and about["method"]["name"] == "sla"


@pytest.mark.parametrize("lora", [None, 4])
def test_the_folder_is_the_fine_tuned_model(lora, tmp_path):
    settings = dataclasses.replace(FAST, lora=lora, rate=1e-2)
    model = WAN.build()
    with tuner(tmp_path, settings=settings, model=model) as run:
        run.run()
        model.eval()
        with torch.no_grad():
            wanted = model(**WAN.call())[0]
    assert ours(model) == []
    fresh = WAN.build()
    method = load(fresh, tmp_path)
    assert method == dataclasses.replace(METHOD, weights=str(tmp_path / FILE))
    with torch.no_grad(), vtr.apply(fresh, method):
        torch.testing.assert_close(fresh(**WAN.call())[0], wanted, atol=1e-6, rtol=1e-5)


# ---- refusals -----------------------------------------------------------------------------------------


def test_weights_of_another_model_are_refused(tmp_path):
    with tuner(tmp_path / "full", settings=dataclasses.replace(FAST, rate=1e-1)) as run:
        run.run()
    with pytest.raises(
        vtr.UnsupportedModelError, match=r"another model: its weight .* other numbers"
    ):
        vtr.apply(WAN.build(), dataclasses.replace(METHOD, weights=str(tmp_path / "full")))
    with tuner(tmp_path / "lora", settings=dataclasses.replace(FAST, lora=4)) as run:
        run.run()
    other = WAN.build()
    with torch.no_grad():
        for p in other.parameters():
            p.neg_()
    with pytest.raises(vtr.UnsupportedModelError, match="other numbers"):
        load(other, tmp_path / "lora")
    with pytest.raises(vtr.UnsupportedModelError, match="trained with another model"):
        load(CASES["flux"].build(), tmp_path / "lora")
    with pytest.raises(vtr.UnsupportedModelError, match="began with another model"):
        tuner(
            tmp_path / "lora", settings=dataclasses.replace(FAST, lora=4), model=other, resume=True
        )
    assert ours(other) == []


def test_gradients_that_are_switched_off_are_refused(tmp_path):
    with tuner(tmp_path) as run:
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"needs gradients.*no_grad"):
            run.step()
        with torch.inference_mode(), pytest.raises(RuntimeError, match="needs gradients"):
            run.step()
        run.step()


def test_a_model_with_nothing_to_train_is_refused_and_left_as_it_was(tmp_path):
    frozen = WAN.build().requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to train.*requires_grad_\(True\)"):
        tuner(tmp_path, vtr.TopKSparse(0.3, block=16), model=frozen)
    assert ours(frozen) == [] and not frozen.training
    low = WAN.build().bfloat16()
    with pytest.raises(ValueError, match=r"in torch.bfloat16.*load the model in float32"):
        tuner(tmp_path, model=low)
    assert ours(low) == []


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Dense(0.3, block=16), "computed all attention densely in training"),
        (vtr.Rettention(0.3, block=16), "Re-ttention carries a ratio from step to step"),
        (vtr.ToMeSD(), "does not act inside the attention"),
    ],
    ids=str,
)
def test_methods_that_learn_nothing_are_refused(method, message, tmp_path):
    errors = (vtr.UnsupportedMethodError, RuntimeError)
    with pytest.raises(errors, match=message), tuner(tmp_path, method) as run:
        run.step()


def test_families_of_flow_matching_are_families():
    from vtr.diffusion.families import FAMILIES
    from vtr.train.sla import FLOW

    assert set(FLOW) <= {family.name for family in FAMILIES}


def test_models_without_flow_matching_and_wrapped_models_are_refused(tmp_path):
    with pytest.raises(vtr.UnsupportedModelError, match="CogVideoX does not predict eps - x0"):
        tuner(tmp_path, model=CASES["cogvideox"].build())
    model = WAN.build()
    with (
        vtr.apply(model, METHOD),
        pytest.raises(vtr.UnsupportedModelError, match="remove their handles"),
    ):
        tuner(tmp_path, model=model)
    with pytest.raises(vtr.UnsupportedModelError, match="Linear is not supported"):
        tuner(tmp_path, model=torch.nn.Linear(2, 2))


def test_runs_that_do_not_fit_their_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="to resume"):
        tuner(tmp_path, resume=True)
    with tuner(tmp_path) as run:
        run.step()
        run.save()
    with pytest.raises(FileExistsError, match="resume=True continues it"):
        tuner(tmp_path)
    with pytest.raises(ValueError, match=r"another setting \(rate differ\)"):
        tuner(tmp_path, settings=dataclasses.replace(FAST, rate=1.0), resume=True)
    with pytest.raises(ValueError, match=r"another method \(density differ\)"):
        tuner(tmp_path, METHOD.replace(density=0.5), resume=True)
    (tmp_path / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no safetensors file"):
        tuner(tmp_path, resume=True)


def test_batches_of_another_kind_are_refused(tmp_path):
    message = r"'latents'.*got dict with pixels"
    with (
        tuner(tmp_path, data=lambda n: {"pixels": 1}) as run,
        pytest.raises(ValueError, match=message),
    ):
        run.step()
    with tuner(tmp_path, data=iter([])) as run, pytest.raises(ValueError, match="no batches"):
        run.step()


def test_an_adapter_beside_others_is_refused(tmp_path):
    from peft import LoraConfig

    model = WAN.build()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="has adapters already"):
        tuner(tmp_path, settings=dataclasses.replace(FAST, lora=4), model=model)


def test_a_schedule_of_density_needs_a_density(tmp_path):
    with pytest.raises(ValueError, match="sparsity_step needs a method with a density"):
        tuner(
            tmp_path,
            vtr.RadialAttention(block=16),
            settings=dataclasses.replace(FAST, sparsity_step=0.1),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an int of at least 1"),
        ({"rate": 0}, "rate must be a number above 0"),
        ({"rate": float("nan")}, "rate must be a number above 0"),
        ({"loss": "rcm"}, "loss must be one of distil, data"),
        ({"precision": "fp16"}, "precision must be one of no, bf16"),
        ({"lora": 0}, "lora must be a rank of at least 1"),
        ({"ema": 1.0}, "ema must be between 0 and 1"),
        ({"warmup": -1}, "warmup must be an int of at least 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        TuningSettings(**options)


def test_runs_of_two_precisions_in_one_process(tmp_path):
    """Accelerate has one precision for the whole process; each run has its own."""
    losses = {}
    for number, precision in enumerate(("no", "bf16", "no")):
        with tuner(
            tmp_path / str(number), settings=dataclasses.replace(FAST, precision=precision)
        ) as one:
            losses[number] = one.step()["loss"]
    assert losses[0] == losses[2] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)
