"""Methods for video in tiny models of every family: budgets, batches, images beside videos, positions."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

import vtr
from tests.vision.vlm.models import ENCODES_FIRST, IMAGE, VIDEO, Inputs, llava
from tests.vision.vlm.videos import VIDEOS, compressed
from vtr.core.budget import count

METHODS: dict[str, Any] = {
    "evs": lambda keep: vtr.EVS(keep=keep),
    "uniform-frames": lambda keep: vtr.UniformFrames(keep=keep),
    "vidcom2": lambda keep: vtr.VidCom2(keep=keep),
    "video-tome": lambda keep: vtr.VideoToMe(keep=keep, window=2),
    "dycoke": lambda keep: vtr.DyCoke(keep=keep, kv=None),
    "fastvid": lambda keep: vtr.FastVID(keep=keep, segments=1, threshold=-1.0),
    "holitom": lambda keep: vtr.HoliTom(keep=keep, inner=None),
    "prunevid": lambda keep: vtr.PruneVid(keep=keep, inner=None),
}
INNER: dict[str, vtr.Method] = {
    "holitom": vtr.HoliTom(keep=0.6, layer=2),
    "prunevid": vtr.PruneVid(layer=2),
    "framefusion": vtr.FrameFusion(keep=0.5),
    "framefusion-rows": vtr.FrameFusion(keep=0.5, rows=4),
    "dycoke": vtr.DyCoke(layer=1),
}
ALL = [*METHODS, "framefusion"]


@functools.cache
def built(family: str, batch: int) -> tuple[Any, Inputs]:
    return VIDEOS[family](batch)


def make(name: str, keep: Any) -> vtr.Method:
    return vtr.FrameFusion(keep=keep) if name == "framefusion" else METHODS[name](keep)


def run(family: str, batch: int, method: vtr.Method) -> tuple[torch.Tensor, vtr.Trace, Inputs]:
    model, inputs = built(family, batch)
    with torch.no_grad(), vtr.apply(model, method, video=True) as handle:
        return model(**inputs).logits, handle.trace, inputs


def facts(trace: vtr.Trace, sample: int) -> tuple[list[Any], list[int]]:
    """A sample's videos, and how many of its tokens are in no frame of a video."""
    frames = trace.stages[0].frames
    assert frames is not None
    spans = frames.videos[sample]
    clips = [span for span in spans if span.kind == "video"]
    visual = sum(span.length for span in spans)
    return clips, [visual - sum(s.frames * s.grid[0] * s.grid[1] for s in clips if s.grid)]


def expected(name: str, method: Any, frames: int, tokens: int) -> int:
    if name in ("evs", "uniform-frames", "dycoke"):
        return int(method.retained(frames, tokens))
    return count(method.keep, frames * tokens)


@pytest.mark.parametrize("family", VIDEOS)
@pytest.mark.parametrize("name", METHODS)
def test_counts_are_what_the_budget_says(family: str, name: str) -> None:
    """Per video; separators and still images stay whole, whatever the batch."""
    for keep in (0.5, 6):
        method = METHODS[name](keep)
        _, trace, _ = run(family, 2, method)
        if not trace.stages:  # six tokens are a whole frame of these
            assert name == "dycoke" and keep == 6
            continue
        (record,) = trace.stages
        for b in range(2):
            clips, (others,) = facts(trace, b)
            want = [expected(name, method, s.frames, s.grid[0] * s.grid[1]) for s in clips]
            left = int(record.total.valid[b].sum())
            if name == "uniform-frames":  # the class tokens of Video-LLaVA go with their frames
                gone = [
                    s.frames - w // (s.grid[0] * s.grid[1])
                    for s, w in zip(clips, want, strict=True)
                ]
                others -= sum(gone) if family == "video_llava" else 0
            assert left == sum(want) + others, (family, name, b)
            kept = record.total.kept[b]
            kept = kept[kept >= 0]
            assert kept.tolist() == sorted(set(kept.tolist()))
            frames = record.frames
            assert frames is not None
            for v, span in enumerate(frames.videos[b]):
                mine = (frames.video[b] == v).nonzero()[:, 0]
                if span.kind == "image":
                    assert set(mine.tolist()) <= set(kept.tolist())


@pytest.mark.parametrize("name", METHODS)
def test_mass_is_conserved_by_pure_merges(name: str) -> None:
    _, trace, _ = run("llava_next_video", 2, METHODS[name](0.5))
    merges = name in ("video-tome", "prunevid")
    total = trace.stages[0].total
    for b, n in enumerate((12, 64)):
        assert (int(total.size[b].sum()) == n) == merges or name in ("fastvid", "holitom")


@pytest.mark.parametrize("family", ["llava_onevision_mixed", "video_llava", "qwen3_vl_video"])
@pytest.mark.parametrize("method", [*(METHODS[n](0.5) for n in METHODS), *INNER.values()], ids=str)
def test_a_batch_gives_each_sample_what_it_gets_alone(family: str, method: vtr.Method) -> None:
    both, trace, inputs = run(family, 2, method)
    alone, own, single = run(family, 1, method)
    n = single["input_ids"].shape[1]
    ends = trace.stages[-1].total.kept[0]
    assert ends[ends >= 0].tolist() == own.stages[-1].total.kept[0].tolist()
    torch.testing.assert_close(both[0, -3:], alone[0, -3:], atol=2e-4, rtol=2e-4)
    assert inputs["input_ids"].shape[1] >= n


@pytest.mark.parametrize("name", ALL)
def test_keeping_everything_changes_no_bit(name: str) -> None:
    model, inputs = built("llava_onevision_mixed", 2)
    with torch.no_grad():
        native = model(**inputs).logits
    out, trace, _ = run("llava_onevision_mixed", 2, make(name, 1.0))
    assert torch.equal(out, native) and not trace.stages


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model, inputs = copy.deepcopy(built("llava_onevision_video", 2))
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad(), vtr.apply(model.to(dtype), make(name, 0.5)) as handle:
        out = model(**inputs).logits
    assert out.dtype == dtype and out.isfinite().all() and handle.trace.stages


@pytest.mark.parametrize("name", ALL)
def test_prompts_of_images_are_left_whole_and_say_so(name: str) -> None:
    model, inputs = llava(2)
    with torch.no_grad():
        native = model(**inputs).logits
        with vtr.apply(model, make(name, 0.5)) as handle:
            assert torch.equal(model(**inputs).logits, native)
    assert "still images are left whole" in handle.trace.notes[name]


@pytest.mark.skipif(not ENCODES_FIRST, reason="this version takes no features from elsewhere")
@pytest.mark.parametrize("name", ALL)
def test_frames_that_nobody_tells_are_refused(name: str) -> None:
    """Features made before the method was applied say nothing of their frames."""
    model, inputs = built("llava_onevision_video", 1)
    inputs = dict(inputs)
    with torch.no_grad():
        made = model.model.get_video_features(inputs.pop("pixel_values_videos"), return_dict=True)
        with (
            vtr.apply(model, make(name, 0.5)),
            pytest.raises((ValueError, RuntimeError), match="the vision tower did not run"),
        ):
            model(**inputs, mm_encoder_outputs={"video": made})


def test_images_that_are_frames_need_to_be_called_so() -> None:
    model, inputs = built("internvl_video", 1)
    with torch.no_grad(), vtr.apply(model, vtr.EVS()) as handle:
        model(**inputs)
        assert "apply the method with video=True" in handle.trace.notes["evs"]
        assert not handle.trace.stages


def test_a_video_without_some_of_its_tokens_is_refused() -> None:
    model, inputs = compressed(2)
    with (
        torch.no_grad(),
        vtr.apply(model, vtr.EVS()),
        pytest.raises(ValueError, match="a video has 15 tokens with a place for 3 frames"),
    ):
        model(**inputs)
    with torch.no_grad(), vtr.apply(model, vtr.FrameFusion(keep=0.5)) as handle:
        model(**inputs)
    assert handle.trace.stages[0].tokens_in == 35, "compares a token with the one left at its place"


@pytest.mark.parametrize("name", ["llava_next_video", "qwen2_vl_video"])
def test_positions_of_evs_are_those_of_the_survivors(name: str) -> None:
    model, inputs = built(name, 1)
    lm = model.model.language_model
    given: list[torch.Tensor | None] = []
    hook = lm.register_forward_pre_hook(
        lambda m, a, k: given.append(k["position_ids"]), with_kwargs=True
    )
    with torch.no_grad(), vtr.apply(model, vtr.EVS(keep=0.5)) as handle:
        rope: list[Any] = []
        hooked = lm.layers[0].register_forward_pre_hook(
            lambda m, a, k: rope.append(k["position_embeddings"][0].clone()), with_kwargs=True
        )
        model(**inputs)
        hooked.remove()
    hook.remove()
    kept = handle.trace.stages[0].total.kept[0]
    ids = inputs["input_ids"][0]
    visual = ((ids == IMAGE) | (ids == VIDEO)).nonzero()[:, 0]
    stays = torch.ones(len(ids), dtype=torch.bool)
    stays[visual] = False
    stays[visual[kept]] = True
    positions = torch.arange(len(ids))[None] if given[0] is None else given[0]
    with torch.no_grad():
        hidden = torch.zeros(1, len(ids), lm.config.hidden_size)
        whole = positions[-3:] if positions.dim() == 3 else positions
        cos, _ = lm.rotary_emb(hidden, whole)
    torch.testing.assert_close(rope[0][0], cos[0][stays])


@pytest.mark.parametrize(
    "method", [INNER["holitom"], vtr.PruneVid(keep=0.7, layer=2, trim=False)], ids=str
)
def test_inner_cuts_keep_the_positions_of_the_entry(method: vtr.Method) -> None:
    """Numbered anew before the language model, kept in it, as the authors do; in later steps too."""
    model, inputs = built("llava_next_video", 1)
    lm = model.model.language_model
    calls: list[list[torch.Tensor]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        if module is lm.layers[0]:
            calls.append([])
        calls[-1].append(kwargs["position_embeddings"][0][0].clone())

    with torch.no_grad(), vtr.apply(model, method) as handle:
        hooks = [x.register_forward_pre_hook(look, with_kwargs=True) for x in lm.layers]
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        for hook in hooks:
            hook.remove()
        outer, inner = handle.trace.stages[:2]
    prompt, step = calls
    n = len(prompt[0])
    with torch.no_grad():
        table, _ = lm.rotary_emb(torch.zeros(1, n + 1, 1), torch.arange(n + 1)[None])
    torch.testing.assert_close(prompt[0], table[0, :n])  # anew at the entry
    ids = inputs["input_ids"][0]
    start = int(((ids == IMAGE) | (ids == VIDEO)).nonzero()[0])
    stays = torch.ones(n, dtype=torch.bool)
    stays[start : start + outer.tokens_out] = False
    stays[start + inner.map.kept[0]] = True
    assert 0 < int((~stays).sum()) == inner.tokens_in - inner.tokens_out
    torch.testing.assert_close(prompt[2], table[0, :n][stays])
    for seen in step:
        torch.testing.assert_close(seen, table[0, n:])


def test_framefusion_spends_its_budget() -> None:
    """The mean over layers of the tokens that enter their attention is the cost; early merges count."""
    for keep, noise in ((0.3, 0.0), (0.5, 1.0), (0.7, 0.0), (0.9, 1.0), (4, 1.0)):
        model, inputs = built("video_llava", 1)
        clip = inputs["pixel_values_videos"]
        inputs = {**inputs, "pixel_values_videos": clip[:, :1] + noise * clip}
        with torch.no_grad(), vtr.apply(model, vtr.FrameFusion(keep=keep)) as handle:
            model(**inputs)
        # Two class tokens stay; of layer 0, those left by the visit before it.
        counts = [handle.trace.tokens["decoder"][i][0] - 2 for i in range(4)]
        budget = keep * 32 if isinstance(keep, float) else keep
        assert budget - 1 < sum(counts) / 4 <= budget + 1e-6, (keep, noise, counts)


def test_holitom_scores_by_the_last_layer_read() -> None:
    model, _ = built("llava_onevision_video", 1)
    with vtr.apply(model, vtr.HoliTom(layer=2)) as handle:
        info = handle._wrapping.info
    stages = vtr.HoliTom(layer=2).stages(info)
    assert stages[0] == vtr.Stage("encoder", info.last_layer, "end", cuts=False)
    assert stages[2] == vtr.Stage("decoder", 1, "end")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((vtr.DyCoke, {"kv": 0}), "kv must be an int >= 1"),
        ((vtr.DyCoke, {"evicted": "gpu"}), "evicted must be 'cpu' or 'drop'"),
        ((vtr.DyCoke, {"layer": -1}), "layer must be an int >= 0 or None"),
        ((vtr.FastVID, {"contextual": 1.5}), r"contextual must be a number in \[0, 1\]"),
        ((vtr.FastVID, {"step": 0}), "step must be an int >= 1"),
        ((vtr.FastVID, {"longest": 0}), "longest must be an int >= 1 or None"),
        ((vtr.HoliTom, {"beta": 2}), r"beta must be a number in \[0, 1\]"),
        ((vtr.HoliTom, {"inner": 0.0}), "inner must be an int >= 1"),
        ((vtr.PruneVid, {"trim": 1}), "trim must be True or False"),
        ((vtr.PruneVid, {"ratio": True}), r"ratio must be a number in \[0, 1\]"),
        ((vtr.FrameFusion, {"similarity": 2}), r"similarity must be a number in \[-1, 1\]"),
        ((vtr.FrameFusion, {"rows": 0}), "rows must be an int >= 1 or None"),
        ((vtr.EVS, {"rounding": "up"}), "rounding must be 'exact' or 'vllm'"),
        ((vtr.VideoToMe, {"window": 0}), "window must be an int >= 1 or None"),
    ],
    ids=str,
)
def test_bad_options(options: Any, message: str) -> None:
    cls, given = options
    with pytest.raises(ValueError, match=message):
        cls(**given)


@pytest.mark.parametrize("cls", [vtr.HoliTom, vtr.PruneVid])
def test_layers_that_do_not_exist(cls: Any) -> None:
    model, _ = built("llava_next_video", 1)
    with pytest.raises(ValueError, match=r"layer must be in 1\.\.3 for 4 layers, got 4"):
        vtr.apply(model, cls(layer=4))
