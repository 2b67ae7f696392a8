"""A law of attention methods that needs no model: it is the same whether text is first or last."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtr.core.method import Method
from vtr.core.site import ModelInfo

#: (frames, height, width) of 128 tokens: whole blocks of every size
GRID = (4, 4, 8)


def check_text_place(method: Method, steps: tuple[int, ...] = (40, 41)) -> None:
    """Give the same tokens to a method with their text first and last, and compare each token's output.

    A mask that takes the first tokens of the sequence for the first of the grid is right in families
    whose text is last, and wrong in the others. Grid and text are whole blocks here, so that masks whose
    blocks are cut over both have the same blocks.

    Args:
        method: an attention method.
        steps: denoising steps of 50 in which it is called; by then it should not be dense.

    Raises:
        AssertionError: the outputs differ; the message says of which tokens.
    """
    text, tokens = getattr(method, "block", 16), torch.Size(GRID).numel()
    draw = torch.Generator().manual_seed(0)
    valid = torch.ones(2, text, dtype=torch.bool)
    valid[1, text // 2 :] = False
    states: tuple[dict[str, Any], ...] = ({}, {})
    if method.calibrated:
        table = _calibrated(method, steps, text)
        states = {"table": table}, {"table": table}
    for step in steps:
        grid = [torch.randn(2, 2, tokens, 16, generator=draw) for _ in range(3)]
        words = [torch.randn(2, 2, text, 16, generator=draw) for _ in range(3)]
        last = _attend(method, [torch.cat(p, 2) for p in zip(grid, words, strict=True)],
                       False, valid, step, states[0])  # fmt: skip
        first = _attend(method, [torch.cat(p, 2) for p in zip(words, grid, strict=True)],
                        True, valid, step, states[1])  # fmt: skip
        apart = (first.roll(-text, 2) - last).abs().amax((1, 3))  # (B, tokens + text)
        apart[:, tokens:] *= valid  # what the padding gets is nobody's
        wrong = (apart > 1e-4).sum(0)
        if bool(wrong.any()):
            raise AssertionError(
                f"{int(wrong[:tokens].count_nonzero())} of {tokens} tokens of the grid and "
                f"{int(wrong[tokens:].count_nonzero())} of {text} of the text get another output if "
                f"text is first instead of last (up to {float(apart.max()):.1e}). The first token "
                "of the grid is site.first. If the mask follows from the grid, derive from "
                "MaskedAttention and write grid_mask(grid): the base adds the text"
            )


def _calibrated(method: Method, steps: tuple[int, ...], text: int) -> dict[str, Tensor]:
    """The table of a calibrated method, measured on other tokens in these steps."""
    draw, length = torch.Generator().manual_seed(1), torch.Size(GRID).numel() + text
    looks = frozenset({"qkv", "denoising", "frames"})
    found = method.calibrator(ModelInfo("test", {"attention": 4}, {"attention": looks}))
    valid = torch.ones(2, text, dtype=torch.bool)
    for step in steps:
        qkv = [torch.randn(2, 2, length, 16, generator=draw) for _ in range(3)]
        found.see(_site(method, qkv, False, valid, step, {}))
    return found.finish()


def _attend(
    method: Any,
    qkv: list[Tensor],
    text_first: bool,
    valid: Tensor,
    step: int,
    state: dict[str, Any],
) -> Tensor:
    with torch.no_grad():
        out: Tensor = method.attend(_site(method, qkv, text_first, valid, step, state))
    return out


def _site(
    method: Any,
    qkv: list[Tensor],
    text_first: bool,
    valid: Tensor,
    step: int,
    state: dict[str, Any],
) -> Any:
    from vtr.diffusion.site import CallFacts, DiffusionAttentionSite

    q, k, v = qkv
    rest = torch.ones(2, q.shape[2] - valid.shape[1], dtype=torch.bool)
    seen = torch.cat([valid, rest] if text_first else [rest, valid], 1)[:, None, None]

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.25)

    facts = CallFacts(
        run=0, step=step, steps=50, timestep=1000.0 - step, branch="0", grid=GRID,
        text_first=text_first, text_valid=valid, expert_step=step,
    )  # fmt: skip
    # The grid's hidden states are those of the step, wherever the text is.
    draw = torch.Generator().manual_seed(step)
    hidden = torch.randn(2, torch.Size(GRID).numel(), 32, generator=draw)
    return DiffusionAttentionSite(
        call=facts, hidden=hidden, layer=1, layers=4, q=q, k=k, v=v, scale=0.25, dense=dense,
        state=state.setdefault("state", {}), shared=state.setdefault("shared", {}), memory={},
        notes={}, modules=_modules(method), table=state.get("table"),
        backend=getattr(method, "backend", "auto"),
    )  # fmt: skip


def _modules(method: Method) -> nn.Module | None:
    """The modules of a method that learns, with random numbers."""
    if not method.learned:
        return None
    built = method.build(ModelInfo("a site", {"attention": 4}, {}, dim=32, heads=2, head_dim=16))
    draw = torch.Generator().manual_seed(1)
    for parameter in () if built is None else built.parameters():
        parameter.data.normal_(std=0.3, generator=draw)
    return built
