"""The comparison on the built-in video model: its results are stored, taken up again, and shown."""

from __future__ import annotations

import json

import pytest

import vtr
from recipes import evaluate_video
from vtr.evaluate import clips
from vtr.zoo import load_vlm
from vtr.zoo.video_questions import KINDS, video_qa


@pytest.fixture(scope="module")
def built_in():
    return load_vlm("digits-video")


@pytest.fixture(scope="module")
def samples():
    return video_qa(12 * len(KINDS), seed=31)


def test_results_are_written_and_taken_up_again(built_in, samples, tmp_path, monkeypatch):
    methods = {"random tokens": vtr.Random(keep=0.25, site="prompt", seed=0)}
    few = samples[: len(KINDS)]
    store = tmp_path / "docs" / "table.json"
    facts = {"weights": "digits-video"}
    results = clips.evaluate(
        *built_in,
        few,
        (0.25,),
        methods=lambda share: methods,
        report=lambda done: evaluate_video.write(done, store, facts),
    )
    assert [r.name for r in results] == ["dense", "random tokens"]
    assert results[1].tokens == 73 and results[1].flops[1] < 0.4 * results[1].flops[0]
    for r in results:
        assert r.accuracy == pytest.approx(sum(r.kinds.values()) / len(KINDS))
    assert json.loads(store.read_text())["weights"] == "digits-video"
    assert evaluate_video.read(store) == results

    def fails(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(clips, "measure", fails)
    again = clips.evaluate(
        *built_in, few, (0.25,), methods=lambda share: methods, known=evaluate_video.read(store)
    )
    assert again == results
    page = evaluate_video.markdown(results, len(few))
    assert f"{results[1].accuracy:.1%} (73)" in page
    pytest.importorskip("matplotlib")
    evaluate_video.plot(results, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 5000


def test_results_of_something_else_are_not_mixed(tmp_path, capsys):
    (tmp_path / "t.json").write_text(json.dumps({"weights": "other", "results": []}))
    with pytest.raises(SystemExit):
        evaluate_video.main(["--out", str(tmp_path / "t"), "--clips", "1"])
    assert "something else" in capsys.readouterr().err


def test_other_shares_are_kept_beside_those_that_are_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def measured(model, processor, samples, name, method, share=1.0):
        text = "dense" if method is None else str(method)
        return clips.ClipsResult(name, text, share, 9.0, 0.5, dict.fromkeys(KINDS, 0.5))

    monkeypatch.setattr(clips, "measure", measured)
    prefix = tmp_path / "run-1.5"  # no ending to cut off
    for shares in (("0.5", "0.25"), ("0.5",)):
        evaluate_video.main(["--out", str(prefix), "--clips", "1", "--shares", *shares])
    found = evaluate_video.read(tmp_path / "run-1.5.json")
    assert {r.share for r in found} == {1.0, 0.5, 0.25}
    assert sorted(p.suffix for p in tmp_path.glob("run-1.5.*")) == [".json", ".md", ".png"]
