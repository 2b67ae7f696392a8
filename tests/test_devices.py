"""Encoders and vision-language models on a simulated GPU: the CPU's results, nothing on two devices, and
how often the host waits."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

import vtr
from tests import tiny
from tests.simulated import Machine, OnDevice, gpu, moved
from tests.vision import towers
from tests.vision.vlm import models, videos
from tests.vision.vlm.picks import generate
from vtr.compat.transformers import cache_of, with_cache
from vtr.inspect.flops import count_flops
from vtr.kernels import bipartite_match
from vtr.testing.models import encoders
from vtr.video import TokenMemory, encode_frames, question
from vtr.vision.vlm.store import EntryStore

pytestmark = pytest.mark.usefixtures("without_gradients")

VLMS = {
    "llava": lambda: models.llava(2),
    "qwen2_5_vl_video": lambda: videos.VIDEOS["qwen2_5_vl_video"](2),
    "llava_onevision_mixed": lambda: videos.VIDEOS["llava_onevision_mixed"](2),
}
VIDEO = ["dycoke", "evs", "fastvid", "framefusion", "holitom", "prunevid", "uniform-frames"]
VIDEO += ["sttm", "vidcom2", "video-tome"]
IMAGE = ["cdpruner", "cls-attention", "dart", "debias", "divprune", "downsample", "evit"]
IMAGE += ["fastervlm", "fastv", "flowcut", "hired", "mustdrop", "pyramiddrop", "random"]
IMAGE += ["sparsevlm", "tofe"]
IMAGE += ["tome", "vflowopt", "vispruner", "visionzip", "vmtc", "vtc-cls"]
OPTIONS: dict[str, Any] = {
    "random": {"seed": 3},
    "mustdrop": {"overall": 0.08, "single": 0.2, "layers": (0, 2), "window": 2},
    **{name: {"keep": 5} for name in ("cdpruner", "dart", "fastervlm", "hired", "vispruner")},
}


def create(name: str) -> vtr.Method:
    return vtr.create(name, **OPTIONS.get(name, {}))


def close(found: Any, wanted: Any) -> None:
    for a, b in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert isinstance(a, OnDevice) or not a.is_cuda
        torch.testing.assert_close(a.cpu(), b, atol=1e-4, rtol=1e-4)


def agree(
    model: Any, method: Any, call: Callable[[Any, Any], Any], inputs: Any, before: bool
) -> Machine:
    """What a wrapped model gives on the CPU, on the device, and back on the CPU."""
    with vtr.apply(model, method) as handle:
        wanted, kept = call(model, inputs), [s.total.kept for s in handle.trace.stages]
        report = str(handle.report())
    bare = tiny.ours(model)  # transformers leaves hooks of its own at a first call
    with gpu() as machine:
        if not before:
            model.to("cuda")
        with vtr.apply(model, method) as handle:
            try:
                model.to("cuda")
                there = moved(inputs)
                machine.waits.clear()
                found = call(model, there)
                waits = machine.waits.copy()
                assert all(isinstance(x, OnDevice) for x in tree_leaves(found))
                close(found, wanted)
                stages = handle.trace.stages
                assert [s.total.kept.tolist() for s in stages] == [k.tolist() for k in kept]
                assert str(handle.trace)
                numbers = re.findall(r"\d[\d.]*", report)
                assert len(re.findall(r"\d[\d.]*", str(handle.report()))) == len(numbers)
            finally:
                model.to("cpu")
            close(call(model, inputs), wanted)
        machine.waits = waits
    assert tiny.ours(model) == bare
    return machine


# ---- the simulation -------------------------------------------------------------------------


def test_the_simulation_refuses_what_cuda_refuses() -> None:
    available = torch.cuda.is_available()
    with gpu() as machine:
        here, there = torch.randn(4), torch.randn(4, device="cuda")
        assert there.device == torch.device("cuda", 0) and there.is_cuda
        for mixed in (
            lambda: here + there,
            lambda: there.gather(0, torch.zeros(2, dtype=torch.long)),
            lambda: here[torch.ones(4, dtype=torch.bool, device="cuda")],
            lambda: torch.cat([here, there]),
            lambda: torch.where(there > 0, there, here),
            lambda: torch.tensor(1.0).add_(there[0]),
            lambda: there + OnDevice(here, torch.device("cuda", 1)),
            lambda: torch.nn.functional.linear(there, here[None]),
            lambda: torch.mm(torch.ones(2, 2), torch.ones(2, 2, device="cuda")),
        ):
            with pytest.raises(RuntimeError, match=r"on the same device|cpu"):
                mixed()
        with pytest.raises(RuntimeError, match="device type for generator"):
            torch.rand(3, device="cuda", generator=torch.Generator())
        with pytest.raises(RuntimeError, match="not implemented"):
            torch.ones(2, 2, dtype=torch.long, device="cuda") @ torch.ones(2, 2).long().cuda()
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(there)
        later = torch.empty(4).copy_(there, non_blocking=True)
        with pytest.raises(RuntimeError, match="may not have filled"):
            later.sum()
        torch.cuda.synchronize()
        assert torch.equal(later, there.cpu())
        # What it takes: numbers on the CPU, and indices from there.
        close(there * torch.tensor(2.0), there.cpu() * 2)
        close(there[torch.tensor([2, 0])], there.cpu()[[2, 0]])
        machine.waits.clear()
        float(there.sum()), there.tolist(), there[there > 0], torch.equal(there, there), here.cuda()
        assert sorted(kind for kind, _ in machine.waits) == sorted(
            ["item", "download", "shape", "equal", "upload"]
        )
        machine.waits.clear()
        there[there > 0] = 0.0
        here.to("cuda", non_blocking=True)
        assert not machine.waits
    assert torch.cuda.is_available() == available
    assert torch.ones(2).cpu().tolist() == [1, 1]


def test_the_simulation_is_unkind_where_cuda_promises_nothing() -> None:
    with gpu():
        assert torch.empty(3, device="cuda").isnan().all()
        equal = torch.tensor([1.0, 1, 1, 0], device="cuda")
        assert equal.topk(2).indices.tolist() == [3 - 1, 1]
        assert equal.sort(descending=True).indices.tolist() == [2, 1, 0, 3]
        assert equal.sort(descending=True, stable=True).indices.tolist() == [0, 1, 2, 3]
        x = torch.zeros(2, device="cuda")
        x[torch.tensor([0, 0], device="cuda")] = torch.tensor([1.0, 2.0], device="cuda")
        assert x.tolist() == [1, 0]


def test_a_module_moves_as_on_cuda() -> None:
    with gpu():
        layer = torch.nn.Linear(3, 2)
        weight, x = layer.weight, torch.randn(1, 3)
        wanted = layer(x)
        layer.cuda()
        assert layer.weight is weight and weight.is_cuda
        close(copy.deepcopy(layer)(x.cuda()), wanted)
        layer.cpu()
        assert layer.weight is weight and type(weight) is torch.nn.Parameter
        close(layer(x), wanted)


# ---- encoders -------------------------------------------------------------------------------

# Waits of one forward call. FlowCut's numbers of tokens are read once where it cuts, and ATS's in each of its layers.
ENCODER_WAITS = {"cls-attention": 0, "downsample": 0, "evit": 0, "random": 0, "tofe": 0, "tome": 0}
ENCODER_WAITS |= {"ats": 5, "diffrate": 0, "evo-vit": 0, "ppt": 0, "tofu": 0, "tps": 0}


@pytest.mark.parametrize("before", [True, False], ids=["applied first", "moved first"])
@pytest.mark.parametrize("name", [*ENCODER_WAITS, "flowcut"])
def test_timm(name: str, before: bool) -> None:
    machine = agree(tiny.vit(), create(name), lambda m, x: m(x), tiny.images(), before)
    if name in ENCODER_WAITS:
        assert sum(machine.waits.values()) == ENCODER_WAITS[name]


def test_swin() -> None:
    machine = agree(
        encoders.timm_swin(), vtr.SparseViT(0.4), lambda m, x: m(x), tiny.images(2, 0, 56), True
    )
    assert sum(machine.waits.values()) == 0


def test_sam() -> None:
    """Its attention brings the numbers of relative positions from the host, also without a method."""
    agree(
        encoders.sam(), vtr.Expedit(1, 9), lambda m, x: m(x)[0], tiny.images(2, 0, 80), before=False
    )


@pytest.mark.parametrize("model", ["clip", "registers-classes"])
@pytest.mark.parametrize("name", [*ENCODER_WAITS, "flowcut"])
def test_transformers(model: str, name: str) -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return towers.result(m(pixel_values=x))

    agree(towers.build(model), create(name), call, towers.pixels(), True)


def test_what_looks_at_a_run_works_on_the_device() -> None:
    model, x = tiny.vit(), tiny.images()
    pictures = []
    with gpu():
        for device in ("cpu", "cuda"):
            model.to(device)
            with vtr.apply(model, vtr.EViT(keep=0.5)) as handle:
                model(x.to(device))
                pictures.append(np.asarray(vtr.draw(handle.trace, x[0].to(device))))
        profile = vtr.profile(model, x.cuda(), ["evit", "tome"], batch=(1, 3), repeats=1)
        assert profile.device == "simulated" and len(profile.rows) == 6
        with vtr.apply(model, vtr.Random(keep=0.5)) as handle:  # its own draws, from the device
            model(x.cuda())
            assert handle.trace.kept.is_cuda
    assert np.array_equal(*pictures)


def test_matching_counts_as_much_on_a_gpu() -> None:
    a, b = torch.randn(2, 20, 8), torch.randn(2, 12, 8)
    with gpu():
        found = [count_flops(bipartite_match, a.to(d), b.to(d)) for d in ("cpu", "cuda")]
    assert found == [2 * 2 * 20 * 12 * 8] * 2


# ---- vision-language models -----------------------------------------------------------------


def answers(model: Any, inputs: Any) -> list[Tensor]:
    out = generate(model, inputs, max_new_tokens=3)
    keys = [layer.keys for layer in cache_of(out).layers]
    return [torch.stack(out.logits), out.sequences, *keys]


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    return {name: build() for name, build in VLMS.items()}


# Waits of ours in the prefill of a batch of two with padding.
PREFILL_WAITS = {
    "cls-attention": 10, "divprune": 9, "downsample": 8, "fastv": 12, "flowcut": 9, "random": 10, "tome": 9,
    "visionzip": 7, "vtc-cls": 9,
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGE)
def test_images(built: dict[str, Any], name: str) -> None:
    machine = agree(built["llava"][0], create(name), answers, built["llava"][1], name != "fastv")
    if name in PREFILL_WAITS:
        assert sum(machine.ours().values()) <= PREFILL_WAITS[name], machine.ours()


@pytest.mark.parametrize("cls", [vtr.ACT, vtr.CMAI, vtr.VAR, vtr.VHR])
def test_attention_edits(built: dict[str, Any], cls: type[vtr.Method]) -> None:
    """Beside what every prompt waits for, once for the rows of each of four layers, and for the frames that
    pictures of masks show."""
    model, inputs = built["llava"]
    machine = agree(model, cls.examples()["some"][0], answers, inputs, True)
    assert sum(machine.ours().values()) <= 10, machine.ours()


@pytest.mark.parametrize("name", [*VIDEO, "downsample", "visionzip", "flowcut", "vflowopt"])
def test_videos(built: dict[str, Any], name: str) -> None:
    agree(built["qwen2_5_vl_video"][0], create(name), answers, built["qwen2_5_vl_video"][1], True)


EVICTING = (
    "h2o",
    "a2sf",
    "scissorhands",
    "streaming-llm",
    "random-kv",
    "snapkv",
    "gui-kv",
    "d2o",
    "ems",
)


@pytest.mark.parametrize("name", EVICTING)
def test_kv_caches(built: dict[str, Any], name: str) -> None:
    """Entries are dropped after the prompt, and after every generated token."""
    model, inputs = built["llava"]
    method = vtr.create(name, keep=0.5, evict="all", every=1, recent=3)
    agree(model, method, answers, inputs, True)


@pytest.mark.parametrize("name", ["zipcache", "zipvl-cache", "staircase-kv"])
def test_packed_kv_caches(built: dict[str, Any], name: str) -> None:
    """Entries are stored with fewer bits after the prompt, and after every second generated token."""
    model, inputs = built["llava"]
    ages = {"ages": (2, 6)} if name == "staircase-kv" else {}
    agree(model, vtr.create(name, every=2, **ages), answers, inputs, True)


class Offloaded(DynamicCache):
    """A cache that keeps a layer on the CPU while the others run, as transformers' own does with streams of CUDA."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.offloading = True

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Any:
        if self.layers[layer].is_initialized:
            self.layers[layer].prefetch()
        out = self.layers[layer].update(keys, values)
        self.layers[layer].offload()
        return out


@pytest.mark.parametrize("name", ["h2o", "d2o", "zipcache"])
def test_offloaded_kv_caches(built: dict[str, Any], name: str) -> None:
    model, inputs = built["llava"]
    options = {} if name == "zipcache" else {"keep": 0.5}
    method = vtr.create(name, every=2, **options)

    def call(model: Any, inputs: Any) -> list[Tensor]:
        cache = Offloaded(model.config.get_text_config())
        given = with_cache(type(model).forward, cache)
        out = generate(model, {**inputs, **given}, max_new_tokens=5)
        assert not any(isinstance(layer.keys, OnDevice) for layer in cache.layers)
        assert all(isinstance(layer, EntryStore) for layer in cache.layers)
        return [torch.stack(out.logits), out.sequences]

    agree(model, method, call, inputs, True)
    with vtr.apply(model, method):
        wanted = torch.stack(generate(model, inputs, max_new_tokens=5).logits)
        assert torch.equal(call(model, inputs)[0], wanted)


@pytest.mark.parametrize("name", ["dycoke", "sparsevlm", "fastvid"])
def test_images_and_videos_in_one_batch(built: dict[str, Any], name: str) -> None:
    model, inputs = built["llava_onevision_mixed"]
    agree(model, create(name), answers, inputs, True)


@pytest.mark.parametrize(
    "name", ["fastv", "visionzip", "dycoke", "h2o", "scissorhands", "zipcache"]
)
def test_a_decoding_step_waits_for_nothing(built: dict[str, Any], name: str) -> None:
    """DyCoke asks once whether to choose again, and no more where it does not."""
    model, inputs = built["qwen2_5_vl_video"]
    with gpu() as machine:
        model.to("cuda")
        found = []
        with vtr.apply(model, create(name)):
            for steps in (2, 5):
                machine.waits.clear()
                generate(model, moved(inputs), max_new_tokens=steps)
                found.append(sum(machine.ours().values()))
        model.to("cpu")
    assert found[1] - found[0] <= (3 if name == "dycoke" else 0)


@pytest.mark.parametrize("name", ["divprune", "fastv"])
def test_outputs_take_their_columns_without_waiting(built: dict[str, Any], name: str) -> None:
    """Of all tokens, of the last ones, and of some; as many waits as for the outputs that are left."""
    model, inputs = built["llava"]
    columns = torch.tensor([3, 20, 7])

    def outputs(inputs: Any, keep: Any) -> list[Tensor]:
        out = model(**inputs, logits_to_keep=keep, output_hidden_states=True)
        return [out.logits, *out.hidden_states]

    with vtr.apply(model, create(name)):
        wanted = [outputs(inputs, keep) for keep in (0, 5, columns)]
    found: dict[str, list[int]] = {"aligned": [], "reduced": []}
    with gpu() as machine:
        model.to("cuda")
        for output in found:
            with vtr.apply(model, create(name), output=output) as handle:
                for keep, want in zip((0, 5, columns.cuda()), wanted, strict=True):
                    if output == "reduced" and not isinstance(keep, int):
                        continue
                    machine.waits.clear()
                    got = outputs(moved(inputs), keep)
                    found[output].append(sum(machine.ours().values()))
                    if output == "aligned":
                        close(got, want)
                assert handle.columns.is_cuda
        model.to("cpu")
    assert found["aligned"][:2] == found["reduced"]


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="torch asks the driver for a second GPU")
@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("dycoke", 1), ("dycoke", 3), ("framefusion", 1), ("fastv", 2), ("pyramiddrop", 2)),
        *(("sparsevlm", 3), ("evs", 2), ("downsample", 2)),
    ],
)
def test_layers_on_two_gpus(name: str, split: int) -> None:
    """As ``device_map="auto"`` spreads them: the tower on the second device, as are the last layers."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = VLMS["qwen2_5_vl_video"]()
    method = create(name)
    with vtr.apply(model, method):
        wanted = answers(model, inputs)
    layers = model.model.language_model.layers
    places = {
        f"model.language_model.layers.{i}": f"cuda:{int(i >= split)}" for i in range(len(layers))
    }
    for part, _ in model.model.language_model.named_children():
        if part != "layers":
            places[f"model.language_model.{part}"] = "cuda:0"
    places |= {"model.visual": "cuda:1", "lm_head": "cuda:1"}
    with gpu():
        accelerate.dispatch_model(model, places, main_device="cuda:0", force_hooks=True)
        with vtr.apply(model, method) as handle:
            found = answers(model, moved(inputs))
            assert str(handle.report())
        assert {str(keys.device) for keys in found[2:]} == {"cuda:0", "cuda:1"}
        close(found, wanted)


@pytest.mark.parametrize("name", ["holitom", "downsample", "dycoke", "uniform-frames", "vflowopt"])
def test_a_default_device_changes_nothing(built: dict[str, Any], name: str) -> None:
    model, inputs = built["qwen2_5_vl_video"]
    with vtr.apply(model, create(name)):
        wanted = answers(model, inputs)
    with gpu():
        model.to("cuda")
        try:
            with torch.device("cuda"), vtr.apply(model, create(name)):
                close(answers(model, moved(inputs)), wanted)
        finally:
            model.to("cpu")


@pytest.mark.parametrize("name", ["llava_onevision_video", "qwen2_5_vl_video"])
def test_a_question_about_a_memory(name: str) -> None:
    """Ids come from a tokenizer and a memory may lie on the CPU; the arguments are on the model's device."""
    model, inputs = videos.VIDEOS[name](1)
    pixels = {k: inputs[k] for k in ("pixel_values_videos", "video_grid_thw") if k in inputs}
    ids = torch.tensor([[5, 6, models.VIDEO, 7, 8]])

    def answer(device: str, memory_on: str) -> Tensor:
        found = encode_frames(model, **moved(pixels, device))
        memory = TokenMemory(9, similarity=0.9)
        memory.add(found.tokens.to(memory_on), grid=found.grid)
        given = question(model, memory, ids, seconds_per_frame=0.5 if "qwen" in name else None)
        return torch.stack(generate(model, given).logits)

    wanted = answer("cpu", "cpu")
    with gpu():
        model.to("cuda")
        for memory_on in ("cuda", "cpu"):
            close(answer("cuda", memory_on), wanted)
