"""Sweeps on the built-in model: the same answers as a plain loop, resumed, in any batches."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import vtr
from tests.calibrated import image_share  # noqa: F401
from tests.evaluate.conftest import QUESTIONS
from vtr.evaluate.cells import Cell
from vtr.evaluate.fingerprint import fingerprint
from vtr.evaluate.store import Store, StoredAnswer, cell_id
from vtr.evaluate.tasks import SEED
from vtr.zoo import loading

pytest.importorskip("lmms_eval")

TASK = "digits_vqa"


@pytest.fixture(scope="module", autouse=True)
def _cache(cache):
    return cache


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep with everything in it, and its store."""
    from vtr.evaluate.runner import evaluate

    path = tmp_path_factory.mktemp("sweep") / "store.sqlite"
    methods = [
        vtr.Random(keep=1.0, site="prompt"),
        vtr.FlowCut(keep=17),
        vtr.PyramidDrop(keep=17),
        vtr.Random(keep=9, seed=5),
    ]
    lines: list[str] = []
    results = evaluate(
        methods=methods, store=path, seeds=(0, 1), batch_size=20, progress=lines.append
    )
    return SimpleNamespace(results=results, path=path, methods=methods, lines=lines)


def rows_of(path, outcome):
    with Store(path) as store:
        return store.rows(outcome.name, TASK)


def test_scores_equal_those_of_a_plain_loop(swept):
    from vtr.evaluate import vlm
    from vtr.zoo import load_vlm, vqa

    model, processor = load_vlm()
    chosen = [None, swept.methods[1], swept.methods[2], swept.methods[3]]
    plain = vlm.evaluate(model, processor, chosen, vqa(QUESTIONS, seed=SEED), batch_size=20)
    ours = {str(o.cell): o for o in swept.results.outcomes}
    for expected, name in zip(
        plain,
        ("dense", "FlowCut(keep=17)", "PyramidDrop(keep=17)", "Random(keep=9, seed=5)"),
        strict=True,
    ):
        found = ours[name]
        assert found.score == pytest.approx(expected.accuracy, abs=1e-12)
        assert 0 < found.score <= 1 and found.samples == QUESTIONS
        if expected.flops is not None:  # of the tower too; a method's own work is in one of them
            share = expected.flops[1] / expected.flops[0]
            ours_share = found.costs["flops"] / found.costs["flops_dense"]
            assert -0.005 < share - ours_share < 0.03
        for kind, value in expected.kinds.items():
            assert found.metrics[kind.replace(" ", "_")] == pytest.approx(value, abs=1e-12)


def test_keeping_all_tokens_gives_exactly_the_unwrapped_answers(swept):
    dense, *rest = swept.results.outcomes
    everything = [o for o in rest if "keep=1.0" in str(o.cell)]
    assert [o.cell.seed for o in everything] == [0, 1]
    answers = {key: r.answer for key, r in rows_of(swept.path, dense).items()}
    for outcome in everything:
        assert outcome.metrics == dense.metrics
        rows = rows_of(swept.path, outcome)
        assert {key: r.answer for key, r in rows.items()} == answers
        assert all(r.flops == r.flops_dense and r.kv == r.kv_dense for r in rows.values())


def test_costs_are_those_of_a_handle(swept):
    from vtr.zoo import load_vlm, vqa
    from vtr.zoo.questions import prompt

    (outcome,) = [o for o in swept.results.outcomes if "PyramidDrop" in str(o.cell)]
    row = rows_of(swept.path, outcome)[0, 0]
    model, processor = load_vlm()
    inputs = prompt(processor, vqa(1, seed=SEED))
    with torch.no_grad(), vtr.apply(model, swept.methods[2], positions="original") as handle:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        report = handle.report()
    dense, reduced = report.flops["language"]
    assert row.flops_dense - row.flops == pytest.approx(dense - reduced, rel=0.02)
    # The whole dense model: tower and projector come on top of the language model.
    assert row.flops_dense > dense and row.flops > reduced
    assert row.kv_dense == report.kv_bytes[0] and row.kv == pytest.approx(report.kv_bytes[1])
    assert row.tokens_in == 144 and row.tokens_out == 17
    counts = [n for n, _ in handle.trace.tokens["decoder"].values()]
    assert row.mean_tokens == pytest.approx(sum(counts) / len(counts))
    assert row.seconds > 0 and row.batch == 20 and row.new_tokens >= 2


def test_what_a_cache_holds_is_in_the_table():
    from vtr.evaluate.dryrun import estimate
    from vtr.evaluate.runner import prepare, run

    job = prepare(methods=vtr.RandomKV(keep=0.25), limit=8, batch_size=4)
    results = run(job)
    dense, held = results.lines()
    assert held.tokens == dense.tokens == 144 and held.of_flops == dense.of_flops == 1
    assert 0.25 < held.of_kv < 0.5 and held.kv < dense.kv
    assert held.tokens_per_s > 0 and dense.tokens_per_s > 0
    text = results.markdown()
    assert "KV KiB" in text.splitlines()[0] and "Cut nothing" not in text
    guess = estimate(job).cells
    assert 0.3 < guess[1].kv_bytes / guess[0].kv_bytes < 0.55  # with 60 words
    assert guess[1].tokens == 144 and guess[1].flops == guess[0].flops


def test_a_finished_sweep_runs_again_without_the_model(swept, monkeypatch):
    from vtr.evaluate import answering
    from vtr.evaluate.runner import evaluate

    monkeypatch.setattr(answering.Answerer, "_generate", lambda *a: pytest.fail("asked again"))
    again = evaluate(methods=swept.methods, store=swept.path, seeds=(0, 1), batch_size=7)
    assert [o.metrics for o in again.outcomes] == [o.metrics for o in swept.results.outcomes]
    assert all(o.new == 0 and o.reused == QUESTIONS for o in again.outcomes)
    with Store(swept.path) as store:
        cells = store.cells()
        for outcome in again.outcomes:
            assert store.result(outcome.name, TASK)["metrics"] == outcome.metrics
            assert len(store.scores(outcome.name, TASK)) == QUESTIONS
    assert {c["model"] for c in cells.values()} == {again.fingerprint}


def test_random_draws_do_not_depend_on_batches_or_where_a_run_began():
    from vtr.evaluate.runner import evaluate

    options = {"methods": vtr.Random(keep=9), "dense": False, "seeds": (3,)}
    with Store() as one, Store() as two:
        whole = evaluate(**options, store=one, batch_size=20).outcomes[0]
        evaluate(**options, store=two, batch_size=1, limit=13)
        parts = evaluate(**options, store=two, batch_size=3).outcomes[0]
        assert (parts.new, parts.reused) == (QUESTIONS - 13, 13)
        answers = [
            {k: r.answer for k, r in s.rows(o.name, TASK).items()}
            for s, o in ((one, whole), (two, parts))
        ]
    assert answers[0] == answers[1] and len(set(answers[0].values())) > 5


def test_a_sample_that_raises_is_recorded_and_the_others_are_answered(monkeypatch, swept):
    from vtr.evaluate import answering
    from vtr.evaluate.runner import evaluate

    generate = answering.Answerer._generate

    def sometimes(self, works, handle):
        if any(w.doc == 7 for w in works):
            raise ValueError("this picture is broken")
        return generate(self, works, handle)

    monkeypatch.setattr(answering.Answerer, "_generate", sometimes)
    with Store() as store:
        results = evaluate(store=store, batch_size=10, limit=20)
        (outcome,) = results.outcomes
        assert outcome.errors == 1 and outcome.samples == 20 and not results.failed
        bad = store.rows(outcome.name, TASK)[7, 0]
        assert bad.error == "ValueError: this picture is broken" and bad.answer == ""
        assert "| raised |" in results.markdown() and "count as wrong" in results.markdown()
        (right,) = [o for o in swept.results.outcomes if str(o.cell) == "dense"]
        dense = rows_of(swept.path, right)
        for key, row in store.rows(outcome.name, TASK).items():
            assert key == (7, 0) or row.answer == dense[key].answer

        monkeypatch.setattr(answering.Answerer, "_generate", generate)
        kept = evaluate(store=store, batch_size=10, limit=20).outcomes[0]
        assert (kept.errors, kept.new) == (1, 0)
        healed = evaluate(store=store, batch_size=10, limit=20, retry_errors=True).outcomes[0]
        assert (healed.errors, healed.new, healed.reused) == (0, 1, 19)


def test_a_cell_that_always_raises_is_a_failure_and_the_sweep_goes_on(monkeypatch):
    from vtr.evaluate import answering
    from vtr.evaluate.runner import evaluate

    generate = answering.Answerer._generate

    def never(self, works, handle):
        if handle is not None:
            raise RuntimeError("no kernel for this")
        return generate(self, works, handle)

    monkeypatch.setattr(answering.Answerer, "_generate", never)
    results = evaluate(methods="fastv,visionzip", keep=9, limit=5, batch_size=5)
    assert [o.failure is None for o in results.outcomes] == [True, False, False]
    assert results.failed[0].failure.endswith("RuntimeError: no kernel for this")
    assert "FastV(keep=9) failed on digits_vqa" in results.markdown()


def test_batches_are_halved_when_memory_runs_out(monkeypatch):
    from vtr.evaluate import answering, model

    sizes: list[int] = []
    generate = answering.Answerer._generate

    def small(self, works, handle):
        sizes.append(len(works))
        if len(works) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(self, works, handle)

    monkeypatch.setattr(answering.Answerer, "_generate", small)
    monkeypatch.setitem(model.AUTO, "cpu", 16)
    from vtr.evaluate.runner import evaluate

    (outcome,) = evaluate(limit=20).outcomes
    assert outcome.errors == 0 and outcome.samples == 20
    assert sizes == [16, 8, 4, *[2] * 10]  # once smaller, it stays so
    sizes.clear()
    (outcome,) = evaluate(limit=10, batch_size=5).outcomes
    assert outcome.errors == 0 and sizes == [5, 1, 1, 1, 1, 1] * 2  # a given size is kept


def test_few_pictures_are_held_at_a_time(monkeypatch):
    """The prompts of a whole task would fill the memory: they are made as they are asked."""
    from vtr.evaluate import answering
    from vtr.evaluate.runner import evaluate

    held: list[int] = []
    answers = answering.Answerer.answers

    def counted(self, works, cell):
        held.append(len(works))
        return answers(self, works, cell)

    monkeypatch.setattr(answering.Answerer, "answers", counted)
    with Store() as store:
        (outcome,) = evaluate(limit=21, batch_size=2, store=store).outcomes
        assert held == [8, 8, 5] and outcome.new == outcome.samples == 21
        assert sorted(doc for doc, _ in store.rows(outcome.name, TASK)) == list(range(21))


def test_answers_without_a_word_are_counted(monkeypatch):
    from vtr.evaluate import answering
    from vtr.evaluate.runner import evaluate

    monkeypatch.setattr(
        answering.Answerer,
        "_generate",
        lambda self, works, handle: [
            StoredAnswer(w.doc, 0, w.prompt.key, "" if w.doc in (1, 3) else "7", tokens_in=144)
            for w in works
        ],
    )
    results = evaluate(limit=5)
    assert (results.outcomes[0].empty, results.lines()[0].empty) == (2, 2) and not results.failed
    assert "| empty |" in results.markdown() and "answers without a word" in results.markdown()


def test_trained_modules_of_a_method_are_part_of_the_cell(tmp_path):
    from vtr.evaluate.model import VTRChat

    lm = VTRChat()
    path = tmp_path / "modules.safetensors"
    names = []
    for content in (b"one", b"two", b"one"):
        path.write_bytes(content)
        names.append(cell_id(lm.describe(Cell((vtr.ToFe(weights=str(path)),)))))
    assert names[0] == names[2] != names[1]


def test_padding_is_not_answered_and_both_layouts_are():
    from vtr.evaluate.model import VTRChat
    from vtr.evaluate.simple import VTRSimple
    from vtr.zoo import vqa

    samples = vqa(6, seed=1)
    data = {"t": {"test": [{"q": s.question, "image": s.image} for s in samples]}}
    options = {"max_new_tokens": 5, "do_sample": False}

    def turns(doc):
        content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["q"]}]
        return [{"role": "user", "content": content}]

    def request(args, padding=False):
        return SimpleNamespace(args=args, idx=0, metadata={"__padding_only__": padding})

    chat = [request((s.question, turns, options, i, "t", "test")) for i, s in enumerate(samples)]
    plain = [
        request((s.question, options, lambda doc: [doc["image"]], i, "t", "test"))
        for i, s in enumerate(samples)
    ]
    lm = VTRChat(batch_size=4)
    lm.task_dict = data
    found = lm.generate_until([*chat, request(chat[0].args, padding=True)])
    assert [r.text for r in found[:-1]] == [s.answer for s in samples] and found[-1].text == ""
    assert (lm.new, lm.reused, len(lm.store.rows(lm.cell_name, "t"))) == (6, 0, 6)
    assert [r.token_counts.output_tokens for r in found[:1]] == [3]
    assert [r.text for r in lm.generate_until(plain)] == [s.answer for s in samples]
    assert (lm.new, lm.reused) == (6, 6)  # the same questions, however they are asked
    lm.clean()
    assert lm.model is not None and not VTRChat.is_simple and VTRSimple.is_simple
    with pytest.raises(NotImplementedError, match="several rounds"):
        lm.generate_until_multi_round([])
    with pytest.raises(NotImplementedError, match="--force_simple"):
        lm.loglikelihood([])


def test_likelihoods_are_those_of_the_whole_text():
    from vtr.evaluate.simple import VTRSimple
    from vtr.zoo import vqa

    (sample, *_) = samples = vqa(3, seed=2)
    lm = VTRSimple()
    lm.task_dict = {"t": {"test": [{"image": s.image} for s in samples]}}

    def ask(answer, doc=0):
        args = (
            samples[doc].question,
            lambda _: answer,
            lambda d: [d["image"]],
            doc,
            "t",
            "test",
        )
        return lm.loglikelihood([SimpleNamespace(args=args, metadata={})])[0]

    right, greedy = ask(sample.answer)
    wrong, _ = ask("no no")
    assert greedy and right > wrong
    inputs = lm._answerer.encode([_prompt(sample)])
    tokens = lm.processor.tokenizer(sample.answer, return_tensors="pt", add_special_tokens=False)
    ids = torch.cat([inputs["input_ids"], tokens.input_ids], 1)
    with torch.no_grad():
        logits = lm.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]
        ).logits
    n = tokens.input_ids.shape[1]
    expected = logits[0, -n - 1 : -1].log_softmax(-1).gather(1, tokens.input_ids[0][:, None]).sum()
    assert right == pytest.approx(float(expected), abs=1e-4)
    lm.use(Cell((vtr.FastV(keep=144),)))
    assert ask(sample.answer)[0] == pytest.approx(right, abs=1e-4)
    lm.use(Cell((vtr.FastV(keep=1, layer=1),)))
    assert abs(ask("no no")[0] - wrong) > 1e-2
    with pytest.raises(ValueError, match="empty"):
        ask("")


def _prompt(sample):
    from vtr.evaluate.prompts import make_prompt

    content = [{"type": "image", "url": sample.image}, {"type": "text", "text": sample.question}]
    return make_prompt([{"role": "user", "content": content}], {"max_new_tokens": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere/nothing"}, r"no model 'nowhere/nothing'.*A model is builtin"),
        ({"tasks": "gqaa"}, r"no task 'gqaa'\. Near it: .*gqa"),
        ({"tasks": "mmbench_en_dev"}, "mmbench_en_dev_static"),
        ({"tasks": "mmvet"}, "--judge"),
        ({"tasks": "mmbench_en"}, r"mmbench_en_dev \(of mmbench_en\) .* use mmbench_en_dev_static"),
        ({"tasks": "hallusion_bench_image"}, "--judge"),  # only its source tells
        ({"tasks": "mme", "limit": 3}, "even limit"),
        ({"tasks": ""}, "at least one task"),
        ({"methods": "flowkut"}, "Did you mean 'flowcut'"),
        ({"methods": "fastv", "keep": "0"}, "keep must be"),
        ({"keep": "9"}, "name one"),
        ({"methods": "rectified-sparse"}, "RectifiedSparse"),
        ({"methods": vtr.FastV(layer=9)}, "FastV"),
        ({"dense": False}, "nothing to run"),
        ({"limit": 0}, "limit must be whole numbers >= 1"),
        ({"limit": 0.5}, "limit must be whole"),
        ({"batch_size": "many"}, "batch_size"),
        ({"seeds": ()}, "seeds must not be empty"),
        ({"seeds": (-1,)}, "seeds"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"device": "tpu"}, "cpu, cuda"),
        ({"include": ["/nowhere"]}, "no such folder"),
        ({"include": "/nowhere"}, "--include-path /nowhere: there is no such folder"),
        ({"methods": vtr.FastV}, "give names or instances"),
        ({"methods": [3]}, "give names or instances"),
        ({"methods": {"keep": 3}}, "give names or instances"),
        ({"frames": 0}, "frames must be whole numbers >= 1"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(monkeypatch, options, message):
    from vtr.evaluate.runner import evaluate

    monkeypatch.setattr(loading, "load_found", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=message):
        evaluate(**options)


def test_sweeps_are_described_in_several_ways():
    from vtr.evaluate.runner import prepare

    def cells(**options):
        return [str(cell) for cell in prepare(**options).cells]

    assert cells(methods=["all", "fastv:keep=7"]) == cells(methods="all,fastv:keep=7")
    assert prepare(methods="random", seeds="0, 1") == prepare(methods="random", seeds=(0, 1))
    assert prepare(methods="random", seeds=1).cells[1].seed == 1


def test_a_folder_of_other_yaml_files_is_named(tmp_path):
    from vtr.evaluate.runner import prepare

    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match=f"cannot read the tasks in .*{tmp_path}"):
        prepare(include=tmp_path)


def test_a_task_without_data_ends_before_the_weights(monkeypatch, tmp_path):
    from vtr.evaluate.runner import evaluate

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)  # it is tried five times
    monkeypatch.setattr(loading, "load_found", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="data of the task vqav2_val cannot be loaded"):
        evaluate(tasks="vqav2_val", limit=2)


def test_model_arguments_that_do_not_exist_are_refused():
    from vtr.evaluate.model import VTRChat

    with pytest.raises(ValueError, match="unknown model_args quantize; there are: pretrained"):
        VTRChat(quantize=True)
    with pytest.raises(ValueError, match="a sweep"):
        VTRChat(method="fastv", keep="9,8")
    with pytest.raises(ValueError, match="method="):
        VTRChat(keep=9)


def test_the_fingerprint_sees_weights_and_processor_not_where_they_are(tmp_path):
    ref = loading.find_vlm("builtin")
    model, processor = loading.load_found(ref)
    first = fingerprint(model, processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    copy, copied = loading.load_found(loading.find_vlm(str(tmp_path)))
    assert fingerprint(copy, copied) == first
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    changed = fingerprint(model, processor)
    assert changed != first
    processor.chat_template += " "
    assert fingerprint(model, processor) != changed
    assert fingerprint(model.half(), processor) != changed
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        loading.find_vlm(str(tmp_path))


def test_nothing_is_imported_with_the_package():
    code = (
        "import sys, vtr, vtr.cli.commands, vtr.evaluate.plugin, vtr.cli.evaluate; vtr.evaluate.plugin.manifests();"
        "print([m for m in ('torch', 'transformers', 'lmms_eval.tasks', 'datasets') if m in sys.modules])"
    )
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stdout


def test_a_calibrated_plan_is_evaluated(image_share, tmp_path):  # noqa: F811
    from vtr.evaluate.runner import evaluate
    from vtr.zoo import load_vlm, vqa
    from vtr.zoo.questions import prompt

    model, processor = load_vlm()
    batch = prompt(processor, vqa(8, split="train"))
    plan = vtr.calibrate(model, [batch], "image-share")
    nothing = replace(plan, tables=({"share": torch.ones_like(plan.tables[0]["share"])},))
    results = evaluate(
        methods=[plan, nothing], store=tmp_path / "store.sqlite", limit=8, batch_size=8
    )
    dense, scaled, same = results.outcomes
    answers = [
        {n: row.answer for n, row in rows_of(tmp_path / "store.sqlite", o).items()}
        for o in (dense, scaled, same)
    ]
    assert answers[0] == answers[2] != answers[1]
    # A plan for another model is refused before weights are loaded.
    with pytest.raises(vtr.UnsupportedModelError, match=r"ImageShare.*LlavaForConditional"):
        evaluate("digits-video", tasks="digits_vqa", methods=plan)
