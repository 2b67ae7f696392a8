"""``vtr demo video`` and the example: a file is written, decoded, asked about, drawn."""

from __future__ import annotations

import io
import json
import runpy
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from vtr.cli import demo, demo_video
from vtr.zoo.video_questions import KINDS

EXAMPLE = Path(__file__).parents[2] / "examples" / "ask_video.py"


def test_the_demo_asks_about_the_file_it_wrote(tmp_path, monkeypatch):
    pytest.importorskip("av")
    monkeypatch.setattr(demo_video, "CLIPS", 1)
    results = demo.run(["video"], tmp_path, Console(quiet=True))["video"]
    assert json.loads((tmp_path / "results.json").read_text())["video"] == results
    names = ["dense", *demo_video.methods()]
    assert list(results["file"]["answers"]) == names
    assert results["file"]["frames"] == 8 and results["file"]["codec"] == "h264"
    hits = [
        a == b for a, b in zip(results["file"]["answers"]["dense"], results["right"], strict=True)
    ]
    assert sum(hits) >= len(KINDS) - 1
    rows = results["held out"]
    assert [r["method"] for r in rows] == names
    assert rows[0]["tokens"] == 289 and all(r["tokens"] < 100 for r in rows[1:])
    text = (tmp_path / "table.txt").read_text()
    assert all(right in text for right in results["right"]) and all(n in text for n in names)
    assert (tmp_path / "video.mp4").stat().st_size > 10_000
    with Image.open(tmp_path / "video.png") as sheet:
        # The frames as they were, and the tokens that lived of each of them, per method.
        assert sheet.width >= 8 * 96 and sheet.height >= 96 * len(names)
        assert sheet.convert("L").getextrema()[1] > 100


def test_the_example_answers_a_question_about_a_file(tmp_path, monkeypatch):
    pytest.importorskip("av")
    from vtr.zoo.clips import write
    from vtr.zoo.video_questions import video_qa

    asked = video_qa(1, seed=41, per_second=4)[0]
    file = write(tmp_path / "clip.mp4", asked.frames, rate=4)
    example = runpy.run_path(str(EXAMPLE))
    out = io.StringIO()
    wide = lambda: Console(file=out, width=200)  # noqa: E731
    monkeypatch.setitem(example["main"].__globals__, "Console", wide)
    picture = tmp_path / "tokens.png"
    example["main"]([str(file), asked.question, "--keep", "0.5", "--picture", str(picture)])
    said = out.getvalue()
    assert asked.answer in said and "all tokens" in said and "fastvid, keep=0.5" in said
    assert picture.stat().st_size > 1000


def test_the_example_wants_a_question(capsys):
    example = runpy.run_path(str(EXAMPLE))
    with pytest.raises(SystemExit):
        example["main"](["film.mp4"])
    assert "question" in capsys.readouterr().err
