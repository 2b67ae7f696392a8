"""Encoders of detectors: what is gathered, computed and given back, against dense layers with masked updates."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vtr
from tests.vision.detectors import FAMILIES, hybrid, inputs, model, outputs
from vtr import Random, UnsupportedMethodError, UnsupportedModelError
from vtr.compat.detectors import DETECTORS
from vtr.core.detector_site import DetectorSite
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.tokens import TokenMap
from vtr.testing.models import detectors
from vtr.vision.detection.wrapping import DetectorWrapping


@dataclass(frozen=True, eq=False)
class Chosen(TokenMethod):
    """Compute some tokens drawn at random, another number for each picture, from a layer on."""

    name: ClassVar[str] = "chosen"
    paper: ClassVar[str] = "a test"
    sites: ClassVar[tuple[str, ...]] = ("detector",)

    layer: int = 0
    share: float = 0.4
    original: bool = False
    factor: float = 1.0

    def stages(self, info):
        return (Stage("detector", self.layer),)

    def reduce(self, site: DetectorSite) -> Reduction:
        mask = chosen(site.n, self.share)
        rows = [row.nonzero()[:, 0] for row in mask]
        width = max(map(len, rows))
        kept = torch.stack([torch.cat([r, r.new_full((width - len(r),), -1)]) for r in rows])
        step = TokenMap.keep(kept, site.n, True)
        tokens = None if self.factor == 1 else self.factor * step.gather(site.hidden)
        return Reduction(step, tokens=tokens, values=site.first if self.original else None)


def chosen(n: int, share: float) -> torch.Tensor:
    drawn = torch.rand(2, n, generator=torch.Generator().manual_seed(5))
    return drawn < torch.tensor([[share], [share / 2]])


def layers(family: str):
    """The encoder's layers, in order."""
    kind = DETECTORS[family].layer
    return [m for m in model(family).modules() if type(m).__name__ == kind]


def dense(family: str, given, method: Chosen) -> torch.Tensor:
    """The model's own layers on all tokens, each with the update of the chosen tokens alone."""
    hooks, first = [], []

    def hidden(args, kwargs):
        return args[0] if args else kwargs["hidden_states"]

    def enter(module, args, kwargs):
        first.append(hidden(args, kwargs))

    def attend(module, args, kwargs):
        return args, {**kwargs, "encoder_hidden_states": first[0]}

    def update(module, args, kwargs, output):
        x, y = hidden(args, kwargs), output[0] if isinstance(output, tuple) else output
        y = torch.where(chosen(x.shape[1], method.share)[..., None], y, x)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    for number, layer in enumerate(layers(family)):
        hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        if number >= method.layer:
            hooks.append(layer.register_forward_hook(update, with_kwargs=True))
            if method.original:
                hook = layer.self_attn.register_forward_pre_hook(attend, with_kwargs=True)
                hooks.append(hook)
    try:
        return outputs(model(family), given)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_some_tokens_are_the_dense_layers_with_masked_updates(family):
    given, method = inputs(family), Chosen(layer=1)
    bare = outputs(model(family), given)
    wanted = dense(family, given, method)
    assert not torch.allclose(wanted, bare, atol=1e-4)
    with vtr.apply(model(family), method) as handle:
        found = outputs(model(family), given)
        n, width = (
            handle.trace.stages[0].tokens_in,
            int(chosen(handle.trace.stages[0].tokens_in, 0.4).sum(1).max()),
        )
        assert handle.trace.tokens["detector"] == {
            number: (n, n) if number < 1 else (width, width)
            for number in range(len(layers(family)))
        }
    assert torch.allclose(found, wanted, atol=1e-9)
    assert torch.equal(outputs(model(family), given), bare)


@pytest.mark.parametrize("family", ["deformable_detr", "mask2former"])
def test_layers_that_read_the_original_values(family):
    given, method = inputs(family), Chosen(original=True)
    wanted = dense(family, given, method)
    with vtr.apply(model(family), method):
        assert torch.allclose(outputs(model(family), given), wanted, atol=1e-9)
    with vtr.apply(model(family), Chosen()):
        assert not torch.allclose(outputs(model(family), given), wanted, atol=1e-4)


def test_new_hidden_states_of_the_chosen_tokens_are_what_the_layer_computes():
    """They are the queries; the values are those of before."""
    family, given, seen = "deformable_detr", inputs("deformable_detr"), []
    method = Chosen(factor=2.0)
    hook = layers(family)[0].self_attn.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with vtr.apply(model(family), method) as handle:
        outputs(model(family), given)
        step = handle.trace.stages[0].map
    with vtr.apply(model(family), method.replace(factor=1.0)):
        outputs(model(family), given)
    hook.remove()
    assert torch.equal(seen[0], 2 * seen[1]) and seen[0].shape[1] == step.n_out


@pytest.mark.parametrize(("height", "width"), [(64, 96), (50, 71)])
@pytest.mark.parametrize("family", ["deformable_detr", "detr", "rt_detr", "mask2former"])
def test_facts_of_the_call(family, height, width):
    """Levels (ragged ones too), valid tokens and the sizes of pictures."""
    if family in ("rt_detr", "mask2former") and height % 32:
        pytest.skip("its maps must double")
    given = inputs(family, height=height, width=width)
    with vtr.apply(model(family), Random(keep=0.5, seed=1)) as handle:
        outputs(model(family), given)
        call = handle.trace.notes["detector"]
    tokens = handle.trace.stages[0].tokens_in
    assert call.tokens == tokens and call.size == (height, width)
    strides = {
        "deformable_detr": (8, 16, 32),
        "detr": (16,),
        "rt_detr": (32,),
        "mask2former": (32, 16, 8),
    }
    assert call.levels == tuple((-(-height // s), -(-width // s)) for s in strides[family])
    assert call.sizes.tolist() == [[height, width], [height * 3 // 4, width * 2 // 3]]
    if family in ("rt_detr", "mask2former"):  # they know no padding
        assert call.valid is None and call.counts == [tokens] * 2
    else:
        assert call.valid[0].all() and call.counts == [tokens, int(call.valid[1].sum())]
        left = handle.trace.stages[0].map.kept
        assert all(call.valid[1, j] for j in left[1].tolist() if j >= 0)


def test_one_level_of_deformable_attention():
    network = detectors.deformable_detr(
        num_feature_levels=1, backbone_config=detectors.backbone(("stage3",))
    )
    given = detectors.pictures()
    bare = outputs(network, given)
    with vtr.apply(network, Random(keep=0.5, seed=1)) as handle:
        assert not torch.equal(outputs(network, given), bare)
        assert handle.trace.stages[0].grid == (4, 6)
    with vtr.apply(network, Random(keep=1.0)):
        assert torch.equal(outputs(network, given), bare)


@pytest.mark.parametrize("family", ["deformable_detr", "detr", "rt_detr", "oneformer"])
def test_flops_are_those_of_the_layers(family):
    """torch counts all but the sampling, four values and their weights for each channel and point."""
    network, given = FAMILIES[family]().double().requires_grad_(False), inputs(family)
    given = {k: v[:1] for k, v in given.items()}

    def counted() -> int:
        with FlopCounterMode(display=False) as counter:
            outputs(network, given)
        return counter.get_total_flops()

    whole = counted()
    with vtr.apply(network, Random(keep=0.4, seed=1, layers=(1,))) as handle:
        saved = whole - counted()
        sizes = handle.trace.tokens["detector"].values()
        tokens = handle.trace.stages[0].tokens_in
        dense, reduced = handle.report().flops["encoder"]
    points = 4 * 3 if family in ("deformable_detr", "oneformer") else 0
    saved += 10 * points * 32 * sum(tokens - queries for queries, _ in sizes)
    assert dense - reduced == saved > 0


def test_training_records_what_the_decoder_reads_and_the_boxes():
    network = detectors.deformable_detr()
    boxes = [torch.tensor([[0.3, 0.3, 0.2, 0.2]]), torch.zeros(0, 4)]
    labels = [{"boxes": b, "class_labels": torch.zeros(len(b), dtype=torch.long)} for b in boxes]
    given = detectors.pictures()
    with vtr.apply(network, vtr.SparseDETR(keep=0.4, untrained=True)) as handle:
        network(**given)
        assert not handle.trace.notes["detector"].sampling
        network.train()(**given, labels=labels)
        call = handle.trace.notes["detector"]
        assert call.boxes == boxes and len(call.sampling) == 2
        points, weights = call.sampling[0]
        assert points.shape == (2, 6, 4, 3, 4, 2) and weights.shape == (2, 6, 4, 3, 4)
        assert torch.allclose(weights.sum((3, 4)), torch.ones(2, 6, 4)) and not points.requires_grad
    with vtr.apply(network, Random(keep=0.4)) as handle:  # it asks for no samples
        network(**given)
        assert not handle.trace.notes["detector"].sampling


def test_class_logits_are_those_of_the_proposals():
    """In a model of two stages the head gives what the model itself gives for its proposals."""
    network, seen = detectors.two_stage(), []
    network.model.decoder.class_embed[-1].register_forward_hook(
        lambda m, args, out: seen.append(out)
    )
    given = {k: v[:1] for k, v in detectors.pictures().items()}
    with torch.no_grad():
        hidden = network(**given).encoder_last_hidden_state
        found = DetectorWrapping(network).classify(hidden)
    assert torch.allclose(found, seen[0], atol=1e-5)


def test_class_logits_of_detr_are_relative_to_no_object():
    network = detectors.detr()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = network.class_labels_classifier(x)
        found = DetectorWrapping(network).classify(x)
    pair = torch.stack([whole[..., :-1], whole[..., -1:].expand_as(found)], -1)
    assert torch.allclose(found.sigmoid(), pair.softmax(-1)[..., 0], atol=1e-6)


@pytest.mark.parametrize(
    ("family", "signals"),
    [
        ("deformable_detr", {"hidden", "class_logits", "sampling"}),
        ("grounding_dino", {"hidden", "sampling"}),
        ("mask2former", {"hidden"}),
        ("detr", {"hidden", "class_logits"}),
        ("rt_detr", {"hidden"}),
    ],
)
def test_the_signals_of_each_family(family, signals):
    assert DetectorWrapping(model(family)).info.signals == {"detector": signals}


def test_the_inner_model_can_be_wrapped():
    inner = detectors.deformable_detr().model
    given = detectors.pictures()
    with vtr.apply(inner, Random(keep=0.5, seed=1)) as handle, torch.no_grad():
        inner(**given)
        assert handle.report().flops["encoder"][0] > handle.report().flops["encoder"][1]
    with pytest.raises(UnsupportedMethodError, match="objectness needs class_logits"):
        vtr.apply(inner, vtr.Objectness(by="class"))


def test_gradient_checkpointing_is_refused():
    network = detectors.deformable_detr().train()
    network.gradient_checkpointing_enable()
    with vtr.apply(network, Random(keep=0.5)):
        with pytest.raises(UnsupportedMethodError, match="gradient_checkpointing_disable"):
            network(**detectors.pictures())
        network.gradient_checkpointing_disable()
        network(**detectors.pictures())


def test_gradients_reach_the_chosen_and_the_other_tokens():
    network = detectors.deformable_detr()
    with vtr.apply(network, Random(keep=0.3, seed=1)):
        network(**detectors.pictures()).logits.sum().backward()
    missing = [
        name
        for name, p in network.named_parameters()
        if p.requires_grad and p.grad is None and ".encoder." in name
    ]
    assert not missing


def test_features_without_their_shape_are_refused():
    network = detectors.detr()
    refused = pytest.raises(UnsupportedMethodError, match="feature map of unknown shape")
    with vtr.apply(network, Random(keep=0.5)), refused:
        network(pixel_values=None, inputs_embeds=torch.zeros(1, 16, 32))


def test_a_mask_without_rows_is_refused():
    network = detectors.detr()
    layer = network.model.encoder.layers[0]
    with vtr.apply(network, Random(keep=0.5)):
        network(**detectors.pictures())
        with pytest.raises(UnsupportedMethodError, match="set_attn_implementation"):
            layer(torch.zeros(2, 24, 32), torch.ones(2, 24))


def test_a_layer_outside_of_its_encoder_is_refused():
    network = detectors.detr()
    outside = pytest.raises(RuntimeError, match="called outside of its encoder")
    with vtr.apply(network, Random(keep=0.5)), outside:
        network.model.encoder.layers[0](torch.zeros(1, 4, 32), None)


def test_several_maps_with_self_attention_are_refused():
    network = hybrid("RTDetr", encode_proj_layers=[1, 2])
    with pytest.raises(UnsupportedModelError, match="2 feature maps with self-attention"):
        vtr.apply(network, Random())


def test_an_encoder_without_layers_is_refused():
    with pytest.raises(UnsupportedModelError, match="has no layers in its encoder"):
        vtr.apply(detectors.deformable_detr(encoder_layers=0), Random())


def test_a_layer_of_another_class_is_refused():
    network = detectors.deformable_detr()
    network.model.encoder.layers[1] = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="a layer is a Identity"):
        vtr.apply(network, Random())
    network = detectors.deformable_detr()
    network.model.encoder.layers[1].self_attn = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="has no sampling_offsets"):
        vtr.apply(network, Random())


def test_two_methods_at_one_encoder():
    network = detectors.deformable_detr()
    with pytest.raises(ValueError, match="cannot be combined"):
        vtr.apply(network, [vtr.SparseDETR(untrained=True), Random(layers=(1,))])
    with vtr.apply(
        network, [Random(keep=0.7, seed=1), vtr.Objectness(keep=0.3, layers=(2,))]
    ) as handle:
        with torch.no_grad():
            network(**detectors.pictures())
        assert [(r.layer, r.tokens_in, r.tokens_out) for r in handle.trace.stages] == [
            (0, 126, 89),
            (2, 126, 38),
        ]


def test_every_family_of_the_table_is_tested():
    assert set(FAMILIES) == set(DETECTORS)
    for family, names in DETECTORS.items():
        taken = inspect.signature(type(layers(family)[0]).forward).parameters
        assert names.positions in taken
