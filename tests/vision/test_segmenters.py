"""Segmenters built on a plain encoder get every token back: Segmenter's decoder, and a linear head on DINOv2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import vtr
from tests.tiny import images, spread, vit

METHODS = [vtr.ALGM(threshold=0.3, layers=(0, 2)), vtr.ToMe(r=8), vtr.DToP(0.4, classes=2)]


class Segmenter(nn.Module):
    """Segmenter (ICCV 2021, arXiv 2105.05633, section 3.2): a ViT, then a block over patches and class embeddings,
    whose products are the masks."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.embed_dim
        self.classes = nn.Parameter(torch.randn(1, classes, width))
        self.block = nn.TransformerEncoderLayer(width, 3, 2 * width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.encoder.forward_features(x)[:, self.encoder.num_prefix_tokens :]
        both = self.block(torch.cat([tokens, self.classes.expand(len(x), -1, -1)], 1))
        patches, classes = both.split([tokens.shape[1], self.classes.shape[1]], 1)
        masks = nn.functional.normalize(patches, dim=-1) @ nn.functional.normalize(
            classes, dim=-1
        ).transpose(1, 2)
        height, width = self.encoder.patch_embed.dynamic_feat_size(x.shape[-2:])
        return masks.transpose(1, 2).unflatten(2, (height, width))


class OnBackbone(nn.Module):
    """A linear head on the last feature map of a backbone."""

    def __init__(self, backbone: Any, classes: int) -> None:
        super().__init__()
        self.encoder = backbone
        self.head = nn.Conv2d(backbone.config.hidden_size, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).feature_maps[-1])


def segmenter() -> tuple[nn.Module, Tensor]:
    return spread(Segmenter(vit(), 4)).eval(), images(2)


def dinov2() -> tuple[nn.Module, Tensor]:
    config = hf.Dinov2Config(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=3, image_size=32, patch_size=4,
        mlp_ratio=2, out_features=["stage4"],
    )  # fmt: skip
    return spread(OnBackbone(hf.Dinov2Backbone(config), 4)).eval(), images(2, size=32)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("make", [segmenter, dinov2])
def test_masks_have_their_full_size(make: Any, method: Any) -> None:
    model, x = make()
    with torch.no_grad():
        dense = model(x)
        options = {"output": "restored"} if make is segmenter else {}
        with vtr.apply(model.encoder, method, **options) as handle:
            found = model(x)
            last = handle.trace.stages[-1]
            assert last.tokens_out < 64
        assert found.shape == dense.shape and found.isfinite().all()
        assert not torch.equal(found, dense)
        assert torch.equal(model(x), dense)


def test_merged_tokens_have_one_class() -> None:
    """A head that looks at one token at a time gives all members of a slot the same."""
    model, x = dinov2()
    with vtr.apply(model.encoder, METHODS[0]) as handle, torch.no_grad():
        out = model(x).flatten(2)
        source = handle.trace.stages[-1].total.source
    for i in range(2):
        for slot in range(int(source[i].max()) + 1):
            members = out[i][:, source[i] == slot]
            torch.testing.assert_close(members, members[:, :1].expand_as(members))
