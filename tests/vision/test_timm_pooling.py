"""What a timm model pools after tokens were merged, dropped or padded."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import timm
import torch

import vtr
from tests.tiny import images, vit
from tests.vision.timm_models import build
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap, top_indices

POOLS = [
    ("deit_tiny_patch16_224", {"global_pool": "avg"}),
    ("deit_tiny_patch16_224", {"global_pool": "avgmax"}),
    ("deit_tiny_patch16_224", {"global_pool": "max"}),
    ("deit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}),
    ("vit_base_patch16_siglip_gap_224", {}),
    ("vit_base_patch16_siglip_224", {}),
    ("vit_so150m_patch16_reg4_map_256", {}),
    ("vit_pe_core_tiny_patch16_384", {}),
    ("vit_betwixt_patch16_rope_reg4_gap_256", {}),
    ("beit_base_patch16_224", {}),
    ("vit_relpos_base_patch16_224", {}),
    ("naflexvit_base_patch16_gap", {}),
    ("naflexvit_base_patch16_map", {}),
]


@pytest.mark.parametrize(("name", "more"), POOLS, ids=str)
def test_pooling_counts_merged_tokens_by_size(name: str, more: dict[str, Any]) -> None:
    model, x = build(name, more), images()
    plain = copy.deepcopy(model)
    with vtr.apply(model, vtr.ToMe(r=10)) as handle, torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features)
        torch.testing.assert_close(model(x), pooled)
        whole = handle.trace.stages[-1].total.with_prefix(model.num_prefix_tokens)
    assert whole.size.max() > 2
    expected = plain.forward_head(whole.restore(features))
    torch.testing.assert_close(pooled, expected, atol=1e-4, rtol=1e-4)


def test_pooling_of_a_pruned_sequence_is_the_plain_one() -> None:
    model, x = vit(global_pool="avg"), images()
    with vtr.apply(model, vtr.Random(keep=9, seed=0)), torch.no_grad():
        features, out = model.forward_features(x), model(x)
    with torch.no_grad():
        torch.testing.assert_close(out, model.forward_head(features))


@dataclass(frozen=True)
class ByScore(TokenMethod):
    """Keeps a number of tokens that is each sample's own."""

    name: ClassVar[str] = "by-score"
    paper: ClassVar[str] = "none"
    sites: ClassVar[tuple[str, ...]] = ("encoder",)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Stage("encoder", 2),)

    def reduce(self, site: Site) -> Reduction | None:
        score = site.hidden[..., 0]
        kept, padded = top_indices(score, (score > 0).sum(1))
        return Reduction(TokenMap.keep(kept, site.n, padded))


@pytest.mark.parametrize("pool", ["avg", "avgmax", "max", "token", "map"])
def test_padding_is_not_pooled(pool: str) -> None:
    model, x = vit(global_pool=pool), images(4)
    with vtr.apply(model, ByScore()) as handle, torch.no_grad():
        together = model(x)
        last = handle.trace.stages[-1].total
        assert last.has_padding and len(set(last.valid.sum(1).tolist())) > 1
        for b in range(4):
            torch.testing.assert_close(
                model(x[b : b + 1]), together[b : b + 1], atol=1e-4, rtol=1e-4
            )


def test_a_pool_that_cannot_weigh_says_so() -> None:
    try:
        model = vit(global_pool="prr", class_token=False)
    except AssertionError:  # how timm refuses a pool that it does not know
        pytest.skip(f"timm {timm.__version__} has no pool 'prr'")
    x = images()
    with (
        vtr.apply(model, vtr.ToMe(r=8)),
        pytest.raises(vtr.UnsupportedMethodError, match="output='restored'"),
    ):
        model(x)
    with vtr.apply(model, vtr.ToMe(r=8), output="restored"):
        assert model(x).isfinite().all()
    with vtr.apply(model, vtr.Random(keep=8)):
        assert model(x).isfinite().all()


def test_a_head_in_another_thread_than_the_blocks() -> None:
    """There it is not known by what merged tokens are weighed; a mean over others needs no weights."""
    model, x = vit(class_token=False, global_pool="avg"), images()
    with torch.no_grad(), ThreadPoolExecutor(1) as other:
        for method in (vtr.ToMe(r=3), vtr.Random(keep=0.5, seed=0)):
            with vtr.apply(model, method):
                features = model.forward_features(x)
                wanted = model.forward_head(features)
                if method.name == "tome":
                    with pytest.raises(RuntimeError, match="ran in another thread"):
                        other.submit(model.forward_head, features).result()
                else:
                    got = other.submit(model.forward_head, features).result()
                    torch.testing.assert_close(got, wanted)
                assert torch.equal(other.submit(model, x).result(), wanted)
