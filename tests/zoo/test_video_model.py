"""The built-in video model answers held-out questions; few tokens; a file; its table."""

from __future__ import annotations

import json

import pytest
import torch

import vtr
from recipes import evaluate_video
from recipes.evaluate_video import RandomFrames, methods_at
from vtr.zoo import load_vlm, video_questions
from vtr.zoo.video_questions import KINDS, VideoSample, video_qa


@pytest.fixture(scope="module")
def built_in():
    return load_vlm("digits-video")


@pytest.fixture(scope="module")
def samples():
    return video_qa(12 * len(KINDS), seed=31)


def test_answers_held_out_questions_freely(built_in, samples):
    scores = video_questions.evaluate_video_vlm(*built_in, samples)
    assert scores["mean"] >= 0.80
    assert set(scores) == {*KINDS, "mean"}


def test_padding_changes_nothing(built_in, samples):
    together = video_questions.answers(*built_in, samples[:7], batch_size=7)
    alone = video_questions.answers(*built_in, samples[:7], batch_size=1)
    assert together == alone


def test_a_file_is_answered_like_its_frames(built_in, tmp_path):
    pytest.importorskip("av")
    from vtr.zoo.clips import write

    asked = video_qa(len(KINDS), seed=32, per_second=4)
    file = write(tmp_path / "clip.mp4", asked[0].frames, rate=4)
    seen = vtr.video.load(file, frames=8)
    assert len(seen) == 8
    frames = torch.from_numpy(seen.frames)
    read = [VideoSample(frames, s.question, s.answer, s.kind) for s in asked]
    plain = [VideoSample(s.frames[1::4], s.question, s.answer, s.kind) for s in asked]
    same = [
        a == b
        for a, b in zip(
            *(video_questions.answers(*built_in, x) for x in (read, plain)), strict=True
        )
    ]
    assert sum(same) >= 6, "the codec may cost an answer, not more"


def site_of(built_in, method, sample):
    model, processor = built_in
    with vtr.apply(model, method, positions="original") as handle:
        video_questions.answers(model, processor, [sample])
        return handle.trace.stages[-1]


def test_whole_frames_stay_or_go(built_in, samples):
    torch.manual_seed(0)
    chosen = []
    for _ in range(3):
        stage = site_of(built_in, RandomFrames(keep=80), samples[0])
        numbers, counts = stage.frames.frame[0][stage.total.kept[0]].unique(return_counts=True)
        assert counts.tolist() == [1, 36, 36] and numbers[0] == -1, "two frames, and the newline"
        chosen.append(tuple(numbers[1:].tolist()))
    assert len(set(chosen)) > 1
    stage = site_of(built_in, vtr.UniformFrames(keep=80), samples[0])
    assert stage.total.kept.shape[1] == 73


@pytest.mark.parametrize("share", evaluate_video.SHARES)
def test_methods_keep_what_was_asked_for(built_in, samples, share):
    """In the mean over layers; whole frames, one frame at least, and the newline aside."""
    for name, method in methods_at(share).items():
        with vtr.apply(built_in[0], method, positions="original") as handle:
            video_questions.answers(*built_in, samples[:2])
            layers = handle.trace.tokens["decoder"].values()
            tokens = sum(entering for entering, _ in layers) / len(layers)
        assert tokens <= max(share * 289 + 7, 37), (name, tokens)
        assert tokens >= 0.3 * share * 289 or "frames" in name, (name, tokens)


def test_results_are_written_and_taken_up_again(built_in, samples, tmp_path, monkeypatch):
    methods = {"random tokens": vtr.Random(keep=0.25, site="prompt", seed=0)}
    few = samples[: len(KINDS)]
    store = tmp_path / "docs" / "table.json"
    facts = {"weights": "digits-video"}
    results = evaluate_video.evaluate(
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

    monkeypatch.setattr(evaluate_video, "measure", fails)
    again = evaluate_video.evaluate(
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
        return evaluate_video.Result(name, text, share, 9.0, 0.5, dict.fromkeys(KINDS, 0.5))

    monkeypatch.setattr(evaluate_video, "measure", measured)
    prefix = tmp_path / "run-1.5"  # no ending to cut off
    for shares in (("0.5", "0.25"), ("0.5",)):
        evaluate_video.main(["--out", str(prefix), "--clips", "1", "--shares", *shares])
    found = evaluate_video.read(tmp_path / "run-1.5.json")
    assert {r.share for r in found} == {1.0, 0.5, 0.25}
    assert sorted(p.suffix for p in tmp_path.glob("run-1.5.*")) == [".json", ".md", ".png"]
