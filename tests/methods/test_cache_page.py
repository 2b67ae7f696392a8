"""The code of docs/cache.md, run as it is printed there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import vtr
from vtr.core.registry import registry
from vtr.methods.base import EvictionMethod
from vtr.zoo.video_questions import prompt, video_qa

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cache.md"


@pytest.fixture(scope="module")
def names():
    model, processor = vtr.zoo.load_vlm("digits-video")
    inputs = prompt(processor, video_qa(2, seed=1))
    given = {**inputs, "max_new_tokens": 2, "do_sample": False}
    return {"vtr": vtr, "model": model.float(), "inputs": given}


def run(number, names):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    done = dict(names)
    exec(compile(blocks[number], str(PAGE), "exec"), done)
    return done


def test_use(names, capsys):
    handle = run(0, names)["handle"]
    written = capsys.readouterr().out
    assert "KV MiB held, all samples" in written and str(handle.report().cache.entries) in written


def test_a_method_of_your_own(names, capsys):
    """The entries that it keeps, head by head."""
    method = run(1, names)["KnormKV"](keep=0.25)
    assert "kv[0]: " in capsys.readouterr().out
    model, inputs = names["model"], names["inputs"]
    inputs = {k: v for k, v in inputs.items() if torch.is_tensor(v)}
    with torch.no_grad():
        keys = model(**inputs, use_cache=True)
        with vtr.apply(model, method):
            held = model(**inputs, use_cache=True)
    (keys,), (held,) = ([c.layers[0]] for c in map(cache, (keys, held)))
    visual = inputs["input_ids"] == model.config.video_token_id
    columns = held.columns()
    for b in range(2):
        place = visual[b].nonzero().flatten()
        for h in range(columns.shape[1]):
            norms = keys.keys[b, h, place].norm(dim=-1)
            stays = set(place[norms.argsort()[: -(-len(place) // 4)]].tolist())
            text = set(
                (inputs["attention_mask"][b].bool() & ~visual[b]).nonzero().flatten().tolist()
            )
            assert set(columns[b, h][columns[b, h] >= 0].tolist()) == stays | text


def cache(out):
    from vtr.compat.transformers import cache_of

    return cache_of(out)


def test_the_page_names_every_such_method():
    text = PAGE.read_text(encoding="utf-8")
    evicting = [c for c in registry().values() if issubclass(c, EvictionMethod)]
    assert len(evicting) >= 6
    assert not [c.__name__ for c in evicting if f"`{c.__name__}(keep)`" not in text]
