"""Signals of a site, against loops over its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap


def test_value_norms_and_mean_keys_leave_the_prefix_out() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 1 + 5, 4)  # a class token in front of five
    site = Site(
        site="encoder",
        layer=0,
        info=ModelInfo("test", {"encoder": 1}, {}),
        hidden=torch.zeros(2, 5, 12),
        map=TokenMap.identity(2, 5),
        memory={},
        qkv=lambda: (q, k, v),
        prefix=1,
    )
    norms, keys = site.value_norm(), site.key_mean()
    for b in range(2):
        for j in range(5):
            value = torch.cat([v[b, h, 1 + j] for h in range(3)])  # heads side by side
            torch.testing.assert_close(norms[b, j], value.square().sum().sqrt())
            mean = sum(k[b, h, 1 + j] for h in range(3)) / 3
            torch.testing.assert_close(keys[b, j], mean)


def test_attention_received_of_many_frames_takes_few_rows_at_a_time() -> None:
    """The map of a long video's frames would be larger than all that the tower holds."""
    torch.manual_seed(0)
    frames, n = 130, 70
    q, k, v = torch.randn(3, frames, 2, n, 4)
    site = Site(
        site="encoder",
        layer=0,
        info=ModelInfo("test", {"encoder": 1}, {}),
        hidden=torch.zeros(frames, n, 8),
        map=TokenMap.identity(frames, n),
        memory={},
        qkv=lambda: (q, k, v),
    )
    sizes: list[int] = []
    look = site.attention_from

    def spy(*args: Tensor | None) -> Tensor:
        rows = look(*args)
        sizes.append(rows.shape[0] * rows.shape[2])
        return rows

    site.attention_from = spy  # type: ignore[method-assign]
    got = site.attention_received()
    assert max(sizes) <= 4096 and sum(sizes) == frames * n
    want = ((q @ k.mT) / 2).softmax(-1).mean((1, 2))
    torch.testing.assert_close(got, want)
