"""Costs, times and pictures of sparse attention in a language model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

import vtr
from tests.vision.vlm.models import FAMILIES
from vtr.inspect.drawing_masks import BORDER, FULL, PARTIAL, RULER, TEXT
from vtr.inspect.flops import count_flops
from vtr.methods.base import PrefillMethod
from vtr.vision.encoders.blocks import linear_flops
from vtr.zoo.video_questions import prompt, video_qa

SPENT = 1e6


@dataclass(frozen=True, kw_only=True)
class OnlyDiagonal(PrefillMethod):
    """Blocks of 16 see themselves and the first block; head 1 sees all."""

    name: ClassVar[str] = "only-diagonal"
    paper: ClassVar[str] = "a test"

    block: int = 16
    last_rows: int = 1

    def blocks(self, site):
        site.spend(SPENT)
        rows, columns = (-(-x.shape[2] // self.block) for x in (site.q, site.k))
        blocks = torch.zeros(len(site.q), site.q.shape[1], rows, columns, dtype=torch.bool)
        blocks[:, 1] = True
        return blocks


def pairs(lengths, text, heads):
    """Pairs that :class:`OnlyDiagonal` computes, one by one, over those that causality allows: in a sparse head
    a row sees the blocks that hold it and the first key, as kernels compute blocks; dense rows twice."""
    done = every = 0.0
    for n, is_text in zip(lengths, text, strict=True):
        apart = [bool(t) or i == n - 1 for i, t in enumerate(is_text)]
        causal = n * (n + 1) / 2
        every += causal
        live = blocks = 0
        for h in range(heads):
            for start in range(0, n, 16):
                rows = range(start, min(start + 16, n))
                for key in range(0, rows[-1] + 1, 16):
                    width = min(16, n - key)
                    blocks += len(rows) * width
                    seen = h == 1 or key in (0, start)
                    live += len(rows) * width * (seen and not all(apart[i] for i in rows))
        done += live / blocks * causal + sum(i + 1 for i in range(n) if apart[i])
    return done / every


@pytest.fixture(scope="module")
def video():
    """The built-in video model: 8 frames of 36 tokens, and two questions of different lengths."""
    model, processor = vtr.zoo.load_vlm("digits-video")
    samples = sorted(video_qa(7, seed=3), key=lambda s: len(s.question))
    return model.float(), {**prompt(processor, [samples[0], samples[-1]]), "use_cache": True}


@pytest.fixture
def called(video):
    model, inputs = video
    with vtr.apply(model, OnlyDiagonal()) as handle, torch.no_grad():
        model(**inputs)
        yield model, inputs, handle


def visual(model, inputs, sample):
    """Which tokens of a sample are visual."""
    ids = inputs["input_ids"][sample][inputs["attention_mask"][sample].bool()]
    return ids == model.config.video_token_id


def test_the_report_counts_the_density_of_each_layer(called):
    model, inputs, handle = called
    report = handle.report()
    config, lm = model.config.text_config, model.model.language_model
    valid = inputs["attention_mask"].bool()
    lengths = valid.sum(1).tolist()
    assert len(set(lengths)) == 2
    text = [~visual(model, inputs, b) for b in range(2)]
    share = pairs(lengths, text, config.num_attention_heads)
    assert 0.3 < share < 0.9
    square = sum(4 * n * n for n in lengths) / 2 * config.num_attention_heads * config.head_dim
    layers = len(lm.layers)
    dense, reduced = report.flops["language"]
    linear = sum(linear_flops(layer) for layer in lm.layers) * sum(lengths) / 2
    head = linear_flops(model.lm_head)
    assert dense == pytest.approx(linear + layers * square + head)
    assert reduced == pytest.approx(linear + layers * (share * square + SPENT) + head)
    assert all(float(n["density"]) == pytest.approx(share) for n in
               handle.trace.notes["attention"].values())  # fmt: skip


def test_finding_masks_is_shown_apart(called):
    _, _, handle = called
    report = handle.report()
    flops, seconds = report.finding
    assert flops == len(handle.trace.notes["attention"]) * SPENT
    assert seconds == handle.trace.finding and 0 < seconds < 5
    assert report.to_dict()["finding"] == {"flops": flops, "seconds": seconds}
    (line,) = [line for line in str(report).splitlines() if "finding masks" in line]
    assert f"{flops / 1e9:.3f}" in line and f"{1e3 * seconds:.1f} ms" in line


def test_a_later_turn_of_text_leaves_the_report_of_the_prompt(video):
    model, inputs = video
    with vtr.apply(model, OnlyDiagonal()) as handle, torch.no_grad():
        out = model(**inputs)
        before, notes = handle.report(), handle.trace.notes["attention"][0]
        known = (float(notes["density"]), len(notes["finding"]), len(notes["masks"]))
        turn = torch.full((2, 5), 7)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(turn)], 1)
        model(input_ids=turn, attention_mask=mask, past_key_values=out.past_key_values)
        notes = handle.trace.notes["attention"][0]
        assert (float(notes["density"]), len(notes["finding"]), len(notes["masks"])) == known
        assert handle.report() == before


def test_without_masks_nothing_is_found(video):
    model, inputs = video
    with vtr.apply(model, vtr.Random(keep=0.5)) as handle, torch.no_grad():
        model(**inputs)
        assert handle.trace.finding is None and handle.report().finding is None
        assert "finding" not in str(handle.report())


def test_the_profile_shows_the_time_of_finding_masks(video):
    model, call = video
    result = vtr.profile(model, call, ["random", OnlyDiagonal()], warmup=0, repeats=1)
    dense, random, row = result.rows
    assert dense.finding_ms is random.finding_ms is None and 0 < row.finding_ms < row.latency_ms
    assert "masks" in str(result) and "masks" not in str(replace(result, rows=(dense, random)))
    # Both rows count causal attention as full attention.
    with torch.no_grad():
        assert dense.flops == count_flops(lambda: model(**call))
        with vtr.apply(model, OnlyDiagonal()) as handle:
            model(**call)
            whole, part = handle.report().flops["language"]
    assert row.flops == dense.flops - 2 * (whole - part)


SIDE = 400


def panel(picture, line=0, lines=1):
    """A map without its title and its strips, and the strip above it."""
    pixels = np.asarray(picture)
    height = (pixels.shape[0] - (lines - 1) * 10) // lines
    top = line * (height + 10) + height - SIDE - RULER
    return pixels[top + RULER : top + RULER + SIDE, RULER : RULER + SIDE], pixels[top, RULER:][
        :SIDE
    ]


def test_masks_are_drawn_over_frames_and_text(called):
    model, inputs, handle = called
    for sample in range(2):
        is_text = ~visual(model, inputs, sample)
        n = len(is_text)
        picture = vtr.draw(handle, sample=sample, size=SIDE, heads=(0, 1))
        count = len(handle.trace.notes["attention"])
        assert picture.width == count * (SIDE + RULER) + (count - 1) * 8
        for head in range(2):
            map_, strip = panel(picture, head, 2)
            for i in range(0, n, 5):
                at = -(-i * SIDE // n)
                assert (tuple(strip[at]) == TEXT) == bool(is_text[i])
                for j in range(0, n, 5):
                    x = -(-j * SIDE // n)
                    rows = range(i // 16 * 16, min(i // 16 * 16 + 16, n))
                    dense = all(bool(is_text[r]) or r == n - 1 for r in rows)
                    seen = head == 1 or dense or j // 16 in (0, i // 16)
                    drawn = tuple(map_[at, x]) in (FULL, PARTIAL)
                    line = tuple(map_[at, x]) == BORDER
                    assert line or drawn == (seen and j // 16 <= i // 16), (sample, head, i, j)
    mean = panel(vtr.draw(handle, sample=0, size=SIDE))[0]
    heads = model.config.text_config.num_attention_heads
    shade = np.round(255 - (255 - np.array(FULL)) / heads)
    assert (mean.reshape(-1, 3) == shade).all(1).any()


def test_frames_alternate_and_are_separated(called):
    model, inputs, handle = called
    map_, strip = panel(vtr.draw(handle, size=SIDE))
    kind = visual(model, inputs, 0)
    n, first = len(kind), int(kind.int().argmax())
    for frame in range(8):
        at = (first + 36 * frame + 18) * SIDE // n
        assert tuple(strip[at]) == ((150, 150, 150), (205, 205, 205))[frame % 2]
        if frame:
            start = (first + 36 * frame) * SIDE // n
            assert (map_[:, start] == BORDER).all() and (map_[start] == BORDER).all()


def test_images_are_told_from_text_in_every_family():
    model, inputs = FAMILIES["qwen2_5_vl"](1)
    with vtr.apply(model, OnlyDiagonal()) as handle, torch.no_grad():
        model(**inputs)
        strip = panel(vtr.draw(handle, size=SIDE))[1]
    assert {tuple(c) for c in strip} == {TEXT, (150, 150, 150)}


def test_what_cannot_be_drawn_of_masks(called):
    _, _, handle = called
    with pytest.raises(ValueError, match=r"no mask was found for sample 2"):
        vtr.draw(handle, sample=2)
    heads = handle.trace.notes["attention"][0]["mask"].pattern.shape[1]
    with pytest.raises(ValueError, match=rf"heads must be in 0\.\.{heads - 1} in layer 0, got 9"):
        vtr.draw(handle, heads=[9])
    with pytest.raises(ValueError, match="no attention layer kept a mask"):
        vtr.draw(replace(handle.trace, stages=[], notes={"attention": {0: {"density": 1.0}}}))


def test_cuts_are_drawn_and_masks_on_request(video):
    model, inputs = video
    together = [vtr.FastV(keep=0.5, layer=1), OnlyDiagonal()]
    with vtr.apply(model, together) as handle, torch.no_grad():
        model(**inputs)
        assert vtr.draw(handle, size=48).width == 8 * 48 + 7 * 4  # frames
        layers = len(handle.trace.notes["attention"])
        assert vtr.draw(handle, size=96, heads=[0]).width == layers * (96 + RULER + 8) - 8
