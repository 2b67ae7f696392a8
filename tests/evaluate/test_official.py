"""Official tasks through lmms-eval's own prompts and scoring, on rows made here in their format.

The rows lie in a folder with the names of the hub's, and the working directory is that folder:
``load_dataset("org/name")`` takes a folder before it asks the hub. Expected scores are worked out by
hand.
"""

from __future__ import annotations

import pytest

pytest.importorskip("lmms_eval")
pytest.importorskip("pyarrow")

from tests.evaluate import mirror
from vtr.evaluate import answering
from vtr.evaluate.store import Store, StoredAnswer
from vtr.zoo import loading

N = mirror.NUMBER


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The folder, as working directory of this module's tests."""
    root = tmp_path_factory.mktemp("hub")
    for make in mirror.MAKERS.values():
        make(root)
    import datasets

    plain = datasets.Dataset.map
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        # GQA's own code starts eight processes for twelve rows.
        patch.setattr(
            datasets.Dataset,
            "map",
            lambda self, *a, **k: plain(self, *a, **{**k, "num_proc": None}),
        )
        yield root


# What is answered to sample n: right on every second sample or pair, so that every rule has to count.
ORACLE = {
    "gqa": lambda n: f"{('left', 'red', 'no')[n % 3].title()}." if n % 2 else "something",
    "pope": lambda n: "yes" if n < N // 2 else "No",
    "textvqa_val": lambda n: "Stop" if n % 2 else "go",
    "scienceqa_img": lambda n: "ABC"[n % 3] + ". a reason" if n % 2 else "none",
    "mme": lambda n: "Yes" if n % 2 == 0 or n < 4 else "no",
    "vqav2_val": lambda n: "2" if n % 2 else "three",
}

# By hand. pope: truth is yes, no, yes, ...; 6 x yes then 6 x no: 3 true positives, 3 false, 3 missed.
# textvqa: "go" is always right; "stop" (2 of 10): 8 truths see two others, two see one: .8*2/3 + .2/3.
# mme: of the 3 pairs in "color" 2 are answered Yes Yes (one right) and one Yes No (both right):
#   (50 + 50 + 200) / 3 = 100; "commonsense_reasoning" has three whole pairs: 200.
# vqav2: "2" stands for "two", given by 3 of 10: 7 truths see three others (1), 3 see two (2/3);
#   "three" is given by 7.
STOP = 0.8 * 2 / 3 + 0.2 * 1 / 3
EXPECTED = {
    "gqa": {"exact_match": 0.5},
    "pope": {
        "pope_accuracy": 0.5,
        "pope_precision": 0.5,
        "pope_recall": 0.5,
        "pope_f1_score": 0.5,
    },
    "textvqa_val": {"exact_match": (1 + STOP) / 2},
    "scienceqa_img": {"exact_match": 0.5},
    "mme": {"mme_perception_score": 100.0, "mme_cognition_score": 200.0},
    "vqav2_val": {"exact_match": (1 + (0.7 + 0.3 * 2 / 3)) / 2},
}


def test_the_scores_are_those_of_the_rules(hub, monkeypatch, tmp_path):
    from vtr.evaluate.runner import prepare, run

    prompts = {}

    def told(self, works, handle):
        prompts.update({(w.task, w.doc): w.prompt for w in works})
        return [StoredAnswer(w.doc, w.idx, w.prompt.key, ORACLE[w.task](w.doc)) for w in works]

    monkeypatch.setattr(answering.Answerer, "_generate", told)
    results = run(prepare(tasks=list(EXPECTED)), submissions=tmp_path)
    assert not results.failed
    for outcome in results.outcomes:
        found = {k: outcome.metrics[k] for k in EXPECTED[outcome.task]}
        assert found == pytest.approx(EXPECTED[outcome.task]), outcome.task
        assert outcome.samples == N and outcome.errors == 0
    (line,) = results.lines()
    assert line.scores["mme"] == 300.0 and line.scores["pope"] == pytest.approx(0.5)
    assert len(prompts) == 6 * N and all(len(p.images) == 1 for p in prompts.values())
    words = prompts["gqa", 3].messages[0]["content"]
    assert words[0] == {"type": "image"}
    assert words[1]["text"] == "what is 3 ?\nAnswer the question using a single word or phrase."
    assert prompts["gqa", 3].generation["max_new_tokens"] == 16
    assert prompts["textvqa_val", 0].until == ("ASSISTANT:",)
    # pictures of GQA are found by their id: questions 2n and 2n + 1 share one
    pixels = [prompts["gqa", n].images[0].getpixel((0, 0)) for n in range(N)]
    assert pixels[::2] == pixels[1::2] and len(set(pixels)) == N // 2
    assert list(tmp_path.glob("submissions/textvqa_submission_*.json"))
    assert not (hub / "submissions").exists()


def test_a_real_model_goes_through_all_of_them(hub):
    from vtr.evaluate.runner import evaluate

    with Store() as store:
        results = evaluate(
            tasks=list(EXPECTED), methods="flowcut", keep=9, store=store, limit=4, batch_size=4
        )
        assert not results.failed and len(results.outcomes) == 12
        for outcome in results.outcomes:
            assert outcome.errors == 0 and outcome.samples == 4
            assert outcome.costs["tokens_out"] == (9 if outcome.cell.methods else 144)
            rows = store.rows(outcome.name, outcome.task)
            assert len(rows) == 4 and all(r.new_tokens >= 1 for r in rows.values())
    assert "textvqa_val" in results.markdown() and "| FlowCut(keep=9) |" in results.markdown()


def test_changed_pictures_are_asked_again(hub, monkeypatch, tmp_path):
    """The same rows with other pixels: the store must not answer from before."""
    from vtr.evaluate.runner import evaluate

    with Store() as store:
        first = evaluate(tasks="pope", store=store, limit=4).outcomes[0]
        make = mirror.picture
        monkeypatch.setattr(mirror, "picture", lambda seed: make(seed + 1000))
        mirror.pope(tmp_path)
        monkeypatch.chdir(tmp_path)
        # datasets goes by the relative name of a folder, and would take the old one from its cache.
        monkeypatch.setattr(
            "lmms_eval.api.task._resolve_hf_datasets_cache_dir", lambda: str(tmp_path / "cache")
        )
        second = evaluate(tasks="pope", store=store, limit=4).outcomes[0]
        assert (first.new, second.new, second.reused) == (4, 4, 0)
        assert first.name == second.name and len(store.rows(second.name, "pope")) == 4


def test_a_model_id_is_not_taken_for_a_task_folder(hub):
    with pytest.raises(ValueError, match="no model"):
        loading.find_vlm("lmms-lab-encoder-nothing")
