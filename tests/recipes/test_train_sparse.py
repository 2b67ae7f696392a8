"""The recipe that fine-tunes the built-in generator under sparse attention."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

import vtr
from recipes import train_sparse
from vtr.train.sla import load
from vtr.zoo import wan


def test_batches_follow_from_their_number():
    one, again, other = (train_sparse.batch(n) for n in (3, 3, 4))
    assert one["latents"].shape == (5, 1, wan.FRAMES, wan.HEIGHT, wan.WIDTH)
    assert one["encoder_hidden_states"].shape == (5, 2, wan.TEXT)
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not torch.equal(one["latents"], other["latents"])
    prompts = torch.cat([train_sparse.batch(n)["encoder_hidden_states"][:, 0] for n in range(40)])
    empty = (prompts == wan.words()[wan.NOTHING]).all(1).float().mean()
    assert 0.25 < empty < 0.55


@pytest.mark.parametrize("name", ["sla", "vsa", "topk"])
def test_methods_keep_one_block_in_eight(name):
    pipe = vtr.zoo.load_pipeline("digits-wan")
    model = pipe.transformer.train()
    method = train_sparse.method_of(name, 0.125)
    given = train_sparse.batch(0)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        model(
            hidden_states=given["latents"][:1], timestep=torch.tensor([900.0]),
            encoder_hidden_states=given["encoder_hidden_states"][:1],
        )  # fmt: skip
        notes = handle.trace.notes["attention"].values()
        assert [note["density"] for note in notes] == [0.125] * 5


def test_a_run_is_stopped_resumed_and_judged(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_sparse, "CLIPS", 1)
    command = ["sla", "--steps", "2", "--out", str(tmp_path), "--lora", "4"]
    train_sparse.main([*command, "--minutes", "0"])
    assert "stopped at step 0 of 2" in capsys.readouterr().out
    train_sparse.main([*command, "--resume"])
    assert f"wrote {tmp_path}" in capsys.readouterr().out
    pipe = vtr.zoo.load_pipeline("digits-wan")
    method = load(pipe, tmp_path)
    assert method.name == "sla" and method.density == 0.125 and method.dense_steps == 0.2
    row = train_sparse.generate(tmp_path, 2, dense_steps=0.9)
    assert 0 <= row["digit"] <= 1 and row["density"] == 0.125
    json.dumps(row)
    with pytest.raises(SystemExit):
        train_sparse.main(command)  # there is a run
    assert "resume=True" in capsys.readouterr().err
