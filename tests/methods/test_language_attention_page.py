"""The code of docs/language-attention.md, run as it is printed there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import vtr
from vtr.zoo.video_questions import prompt, video_qa

PAGE = Path(__file__).parents[2] / "docs" / "language-attention.md"


def code() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def names():
    model, processor = vtr.zoo.load_vlm("digits-video")
    inputs = prompt(processor, video_qa(2, seed=1))
    return {
        "vtr": vtr,
        "model": model.float(),
        "inputs": {**inputs, "max_new_tokens": 2, "do_sample": False},
    }


def run(number, names):
    done = dict(names)
    exec(compile(code()[number], str(PAGE), "exec"), done)
    return done


def test_use(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(0, names)
    assert (tmp_path / "masks.png").stat().st_size > 1000


def test_calibration(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = {k: v for k, v in names["inputs"].items() if torch.is_tensor(v)}
    run(1, {**names, "batches": [inputs]})
    assert vtr.Plan.load("dam.safetensors").methods == (vtr.DAM(),)
    for handle in vtr.handles(names["model"]):
        handle.remove()


def test_a_method_of_your_own(names, capsys):
    """Its mask, pair by pair: frames of 36 tokens, in blocks of 16."""
    done = run(2, names)
    assert "attention[0]" in capsys.readouterr().out
    model, inputs = names["model"], names["inputs"]
    assert not vtr.handles(model)
    with vtr.apply(model, done["EveryOtherFrame"](3, block=16)) as handle, torch.no_grad():
        model(**{k: v for k, v in inputs.items() if torch.is_tensor(v)})
        note = handle.trace.notes["attention"][0]
        for sample in range(2):
            ((mask, number),) = [
                (m, 0 if of is None else of.tolist().index(sample))
                for of, m in note["masks"]
                if of is None or sample in of.tolist()
            ]
            if note["masks"][0][0] is None:
                number = sample
            ids = inputs["input_ids"][sample][inputs["attention_mask"][sample].bool()]
            visual = (ids == model.config.video_token_id).nonzero().flatten().tolist()
            frame = [-1] * len(ids)
            for rank, place in enumerate(visual):
                frame[place] = rank // 36 if rank < 288 else -1
            apart = [i not in visual or i >= len(ids) - 64 for i in range(len(ids))]
            found = mask.to_dense(blocks=True)
            found = found if found.ndim == 2 else found[number, 0]
            for i in range(0, len(ids), 16):
                rows = range(i, min(i + 16, len(ids)))
                for j in range(0, len(ids), 16):
                    keys = range(j, min(j + 16, len(ids)))
                    pairs = [(frame[a], frame[b]) for a in rows for b in keys]
                    seen = any(a - b <= 1 or b % 3 == 0 or b < 0 for a, b in pairs)
                    seen = (seen or j == 0 or i == j) and j <= i
                    expected = seen and not all(apart[a] for a in rows)
                    assert bool(found[i // 16, j // 16]) == expected, (sample, i, j)
