"""Videos of a task: read from files, cut, and answered by the built-in video model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import vtr
from vtr.evaluate.cells import Cell

pytest.importorskip("lmms_eval")
pytest.importorskip("av")

OPTIONS = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from vtr.zoo.clips import write
    from vtr.zoo.video_questions import KINDS, video_qa

    asked = video_qa(len(KINDS), seed=5, per_second=8)
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write(path, asked[0].frames)
    return str(path), asked[::2]  # of one clip, four kinds of the seven


def requests(clip):
    path, asked = clip

    def turns(doc):
        content = [{"type": "video", "url": path}, {"type": "text", "text": doc["q"]}]
        return [{"role": "user", "content": content}]

    data = {"t": {"test": [{"q": s.question} for s in asked]}}
    args = ((s.question, turns, OPTIONS, i, "t", "test") for i, s in enumerate(asked))
    return data, [SimpleNamespace(args=a, idx=0, metadata={}) for a in args]


def test_answers_to_videos_are_those_of_the_model_alone(clip):
    from vtr.evaluate.model import VTRChat

    path, asked = clip
    lm = VTRChat("digits-video", batch_size=4, frames=8)
    lm.task_dict, given = requests(clip)
    found = [r.text for r in lm.generate_until(given)]
    video = vtr.video.load(path, 8)
    for sample, answer in zip(asked, found, strict=True):
        content = [{"type": "video"}, {"type": "text", "text": sample.question}]
        text = lm.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = lm.processor(text=[text], **video.for_processor(), return_tensors="pt")
        with torch.no_grad():
            out = lm.model.generate(**inputs, **OPTIONS)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert answer == lm.processor.decode(new, skip_special_tokens=True).strip()
    assert sum(a == s.answer for a, s in zip(found, asked, strict=True)) >= len(asked) - 1
    rows = lm.store.rows(lm.cell_name, "t").values()
    assert all(r.error is None and r.batch == 1 and r.tokens_in == 289 for r in rows)

    lm.use(Cell((vtr.FastV(keep=40, layer=1),)))
    lm.generate_until(given[:2])
    first, _ = lm.store.rows(lm.cell_name, "t").values()
    assert first.error is None and first.tokens_out == 40 and first.flops < first.flops_dense


def test_the_number_of_frames_and_the_file_are_part_of_the_question(clip, tmp_path):
    from vtr.evaluate.prompts import prompt_of

    data, (request, *_) = requests(clip)
    keys = {prompt_of(request, data, frames).key for frames in (4, 8)}
    other = tmp_path / "other.mp4"
    other.write_bytes(b"another file")
    data, (moved, *_) = requests((str(other), clip[1]))
    assert len(keys | {prompt_of(moved, data, 8).key}) == 3


def test_a_video_that_cannot_be_read_is_recorded(clip, tmp_path):
    from vtr.evaluate.model import VTRChat

    lm = VTRChat("digits-video")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    lm.task_dict, (request, *_) = requests((str(broken), clip[1]))
    (result,) = lm.generate_until([request])
    row = lm.store.rows(lm.cell_name, "t")[0, 0]
    assert result.text == "" and "VideoError" in row.error and "broken.mp4" in row.error
    lm.task_dict, (request, *_) = requests((str(tmp_path / "gone.mp4"), clip[1]))
    lm.generate_until([request])
    assert "FileNotFoundError" in lm.store.rows(lm.cell_name, "t")[0, 0].error
