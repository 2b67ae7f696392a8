"""The exported plan and lines give the answers that the explorer shows."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import torch

import vtr
from vtr.explore import compute, export, media, subjects
from vtr.explore.limits import read_upload


def ran(lines: str, folder, monkeypatch) -> tuple[str, dict]:
    monkeypatch.chdir(folder)
    out, names = io.StringIO(), {}
    with contextlib.redirect_stdout(out):
        exec(compile(lines, "exported", "exec"), names)
    return out.getvalue(), names


def test_lines_of_an_encoder_reproduce_the_class_of_an_upload(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    media.sample("digits-vit", 2).pictures[0].save(tmp_path / "it's mine.png")
    shown = read_upload([tmp_path / "it's mine.png"])
    subject = subjects.load("digits-vit")
    found = compute.compare(subject, shown, ["random", "tome"], 0.2, measure=False)
    text, names = ran(export.python_lines(subject, shown, found.methods), tmp_path, monkeypatch)
    for column in found.columns[1:]:
        said = column.said[0]
        (line,) = [x for x in text.splitlines() if x.startswith(column.title)]
        classes, chances = line.removeprefix(column.title).split("] [")
        assert classes.strip(" []") == said.text
        assert float(chances.strip(" []")) == pytest.approx(said.probability, rel=1e-5)
    assert (tmp_path / "tome.png").is_file() and names["methods"] == list(found.methods)


@pytest.mark.parametrize("model", ["digits-llava", "digits-chat", "digits-video"])
def test_lines_of_a_vision_language_model_reproduce_its_answer(model, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    subject, shown = subjects.load(model), media.sample(model, 1)
    found = compute.compare(subject, shown, ["fastv", "random"], 0.1, measure=False)
    text, names = ran(export.python_lines(subject, shown, found.methods), tmp_path, monkeypatch)
    for column in found.columns[1:]:
        assert f"{column.title} {column.said[0].text} " in text
    assert names["answer"] == found.columns[-1].said[0].text


def test_lines_of_a_generator_reproduce_its_video(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    subject, shown = subjects.load("digits-wan"), media.sample("digits-wan", 1)
    found = compute.compare(subject, shown, ["random-sparse"], 0.5, measure=False)
    lines = export.python_lines(subject, shown, found.methods)
    _, names = ran(lines, tmp_path, monkeypatch)
    from vtr.explore.pictures import strip

    assert strip(names["frames"]).tobytes() == found.columns[1].masks[0][1].tobytes()
    assert (tmp_path / "random-sparse.gif").is_file()


def test_the_plan_is_one_that_apply_takes(tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    subject, shown = subjects.load("digits-vit"), media.sample("digits-vit", 0)
    one = (vtr.EViT(keep=0.3),)
    (tmp_path / "plan.json").write_text(export.plan_json(one, subject))
    plan = vtr.Plan.load(tmp_path / "plan.json")
    assert plan.methods == one
    with torch.no_grad(), vtr.apply(subject.model, plan) as handle:
        subject.model(torch.zeros(1, 3, 96, 96))
        assert handle.trace.stages
    two = json.loads(export.plan_json((*one, vtr.ToMe(keep=0.5)), subject))
    assert vtr.Plan.from_dict(two["tome"]).methods == (vtr.ToMe(keep=0.5),)
    assert shown.sample == ("digits-vit", 0)


def test_methods_are_written_as_python():
    for method in (
        vtr.Debias(vtr.FastV(keep=0.5, layer=1), strength=2.0),
        vtr.FastV(keep=1),
        vtr.EViT(keep=(0.5, 0.25), layers=(1, 2)),
        vtr.CDPruner(keep=0.25),
    ):
        assert eval(export.spelled(method), {"vtr": vtr}) == method
