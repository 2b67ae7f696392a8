"""FrameFusion in a model, against its algorithm written out layer by layer on eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.methods.video.by_hand import cos, top
from tests.vision.vlm.models import VIDEO, Inputs
from tests.vision.vlm.videos import VIDEOS

FRAMES, PLACES = 3, 4


def scene(noise: float) -> tuple[Any, Inputs]:
    """A clip whose frames differ from the first by noise."""
    model, inputs = VIDEOS["llava_next_video"](1)
    model.set_attn_implementation("eager")
    clip = inputs["pixel_values_videos"]
    return model, {**inputs, "pixel_values_videos": clip[:, :1] + noise * clip}


class Plain:
    """The prefill of one sample, whose tokens are listed with their place in the grid (None: text)."""

    def __init__(self, model: Any, inputs: Inputs, method: vtr.FrameFusion) -> None:
        self.lm, self.method = model.model.language_model, method
        ids = inputs["input_ids"][0]
        with torch.no_grad():
            features = model.model.get_video_features(inputs["pixel_values_videos"])
        x = self.lm.embed_tokens(ids).detach()
        found = getattr(features, "pooler_output", features)  # a tensor, or one per video
        video = torch.cat([part.reshape(-1, x.shape[1]) for part in found])
        self.places: list[int | None] = [None] * len(ids)
        for i, column in enumerate((ids == VIDEO).nonzero()[:, 0].tolist()):
            x[column], self.places[column] = video[i], i % PLACES
        self.x, self.position = x, list(range(len(ids)))
        self.spent: list[int] = []
        self.merging, self.done = True, False
        self.visits: list[str] = []

    def run(self) -> Tensor:
        depth = len(self.lm.layers)
        self.visit(None, depth)
        for i, layer in enumerate(self.lm.layers):
            n = len(self.position)
            rope = self.lm.rotary_emb(self.x[None], torch.tensor([self.position]))
            mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
            normed = layer.input_layernorm(self.x[None])
            out, weights = layer.self_attn(normed, position_embeddings=rope, attention_mask=mask)
            self.x = self.x + out[0]
            if i < depth - 1:
                rows = weights[0, :, -self.method.rows :] if self.method.rows else weights[0]
                self.visit(rows.mean((0, 1)).tolist(), depth)
            self.x = self.x + layer.mlp(layer.post_attention_layernorm(self.x[None]))[0]
        return self.lm.norm(self.x)

    def visit(self, received: list[float] | None, depth: int) -> None:
        if self.done:
            return
        moving = [i for i, place in enumerate(self.places) if place is not None]
        rest = self.method.keep * FRAMES * PLACES * depth - sum(self.spent)
        left = max(1, int(rest / (depth - len(self.spent)) + 1e-9))
        if not self.merging:
            assert received is not None
            stays = {moving[i] for i in top([received[i] for i in moving], left)}
            self.keep([i for i in range(len(self.places)) if i not in moving or i in stays])
            self.done = True
            self.visits.append("prune")
            return
        before = {i: max((j for j in moving if j < i and self.places[j] == self.places[i]), default=None)
                  for i in moving}  # fmt: skip
        alike = {i: cos(self.x[i], self.x[j]) for i, j in before.items() if j is not None}
        joins = [i for i in alike if alike[i] >= self.method.similarity]
        over = len(moving) - left
        if over <= 0:
            joins, self.done = [], True
        elif len(joins) >= over:
            joins, self.done = sorted(alike, key=lambda i: (-alike[i], i))[:over], True
        elif len(joins) < self.method.least * len(moving):
            self.merging = False
        chain = {i: [i] for i in range(len(self.places)) if i not in joins}
        head: dict[int, int] = {}
        for i in sorted(joins):
            head[i] = head.get(before[i], before[i])  # type: ignore[arg-type,assignment]
            chain[head[i]].append(i)
        old = self.x
        self.x = old.clone()
        for i, members in chain.items():
            self.x[i] = old[members].mean(0)
        self.keep(sorted(chain))
        self.spent.append(len(moving) - len(joins))
        self.visits.append(f"merge {len(joins)}")

    def keep(self, stays: list[int]) -> None:
        self.x = self.x[stays]
        self.places = [self.places[i] for i in stays]
        self.position = [self.position[i] for i in stays]


@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize(
    ("noise", "keep", "similarity", "visits"),
    [
        (0.0, 0.5, 0.6, ["merge 6"]),  # the budget is met by merging
        (1.0, 0.6, 0.9, ["merge 0", "prune"]),
        (0.5, 0.6, 0.9, ["merge 2", "merge 2", "merge 0", "prune"]),
    ],
)
def test_framefusion(
    rows: int | None, noise: float, keep: float, similarity: float, visits: list[str]
) -> None:
    model, inputs = scene(noise)
    method = vtr.FrameFusion(keep=keep, similarity=similarity, rows=rows)
    plain = Plain(model, inputs, method)
    with torch.no_grad():
        want = model.lm_head(plain.run())
        with vtr.apply(model, method) as handle:
            got = model(**inputs).logits[0]
    assert plain.visits == visits
    last = handle.trace.stages[-1].total.kept[0]
    text = sum(place is None for place in plain.places)
    assert len(last) == len(plain.places) - text
    torch.testing.assert_close(got[-3:], want[-3:], atol=1e-5, rtol=1e-4)


def test_the_last_rows_rank_in_a_batch_as_alone() -> None:
    """Padded left, with an image before the video of the second sample."""
    model, inputs = VIDEOS["llava_next_video"](2)
    one, alone = VIDEOS["llava_next_video"](1)
    method = vtr.FrameFusion(keep=0.5, similarity=1.0, rows=4)
    with torch.no_grad():
        with vtr.apply(model, method):
            both = model(**inputs).logits[0, -3:]
        with vtr.apply(one, method):
            single = one(**alone).logits[0, -3:]
    torch.testing.assert_close(both, single, atol=2e-4, rtol=2e-4)


def test_rows_before_the_video_see_none_of_it() -> None:
    """Three text tokens follow the video: more rows than that rank as those three."""
    model, inputs = scene(1.0)
    outs = []
    for rows in (3, 4, 50):
        method = vtr.FrameFusion(keep=0.6, similarity=0.9, rows=rows)
        with torch.no_grad(), vtr.apply(model, method):
            outs.append(model(**inputs).logits)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_rows_need_text_behind_the_video() -> None:
    model, inputs = scene(1.0)
    end = int((inputs["input_ids"][0] == VIDEO).nonzero()[-1, 0]) + 1
    cut = {k: v[:, :end] if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
    with (
        torch.no_grad(),
        vtr.apply(model, vtr.FrameFusion(keep=0.5, similarity=1.0, rows=1)),
        pytest.raises(ValueError, match="ends with its image"),
    ):
        model(**cut)
