"""The video benchmark as a task of lmms-eval: files, questions, and the score of a real run."""

from __future__ import annotations

import json

import pytest

from vtr.zoo.video_questions import KINDS


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    pytest.importorskip("av")
    from vtr.evaluate.tasks import video

    return video.write(2, to=tmp_path_factory.mktemp("home") / "tasks")


def test_files_are_written_once(task):
    from vtr.evaluate.tasks import video

    rows = [json.loads(line) for line in (task / "digits_video.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in rows] == [*KINDS, *KINDS]
    assert all((task / r["video"]).stat().st_size > 1000 for r in rows)
    stamp = (task / rows[0]["video"]).stat().st_mtime_ns
    assert video.write(2, to=task) == task
    assert (task / rows[0]["video"]).stat().st_mtime_ns == stamp


def test_the_yaml_has_a_metric_for_every_kind(task):
    yaml = (task / "digits_video.yaml").read_text()
    assert all(f"metric: {kind.replace(' ', '_')}\n" in yaml for kind in KINDS)


def test_lmms_eval_asks_and_scores(task):
    pytest.importorskip("lmms_eval")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from vtr.evaluate import plugin

    plugin.register()
    tasks = TaskManager("ERROR", include_path=str(task), include_defaults=False, model_name="vtr")
    arguments = "pretrained=digits-video"
    out = simple_evaluate(
        model="vtr",
        model_args=arguments,
        tasks=["digits_video"],
        batch_size=7,
        device="cpu",
        task_manager=tasks,
        bootstrap_iters=0,
        log_samples=True,
    )
    score = out["results"]["digits_video"]["accuracy,none"]
    samples = out["samples"]["digits_video"]
    assert len(samples) == 14
    right = [s["filtered_resps"][0].strip() == s["target"] for s in samples]
    assert score == pytest.approx(sum(right) / 14)
    assert score >= 0.5, "two clips, read from files"


def test_vtr_eval_knows_the_task(task, monkeypatch):
    pytest.importorskip("lmms_eval")
    from vtr.evaluate import official
    from vtr.evaluate.tasks import video

    monkeypatch.setattr(video, "write", lambda: task)
    manager = official.manager(["digits_video"])
    official.check(["digits_video"], manager)
    assert set(manager.task_index) == {"digits_video"}, "lmms-eval's own tasks are not read for it"
