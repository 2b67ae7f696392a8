"""Visits of methods inside an encoder: what they see, and how their cuts are carried out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.core.method import Reduction
from vtr.core.recompute import repeated
from vtr.core.site import Site
from vtr.core.tokens import TokenMap
from vtr.core.trace import PolicyRecord, StageRecord
from vtr.core.wrapping import Entry
from vtr.vision.encoders.attention import Probe
from vtr.vision.encoders.blocks import EncoderRun
from vtr.vision.encoders.pooling import Pooling, has_pooling

if TYPE_CHECKING:
    from vtr.vision.encoders.session import EncoderSession


def visit(
    session: EncoderSession,
    run: EncoderRun,
    layer: int,
    place: str,
    x: Tensor,
    probe: Probe | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Call the methods that act at a place of a block; returns the sequence x, shortened by their cuts.

    Args:
        place: ``middle`` or ``end``.
        kwargs: the block's keyword arguments as the model gave them.
    """
    for number, entry in enumerate(session.visits.get((layer, place), ())):
        site = _site(session, run, entry, layer, x, probe, kwargs)
        reduction = entry.token_method.reduce(site)
        at = (layer, place, number)
        if run.first is not None:
            sizes = site.map.size
            reduction = repeated(entry.method.name, reduction, run.cuts[at], sizes)
        elif run.watched:
            run.cuts[at] = None if reduction is None else reduction.map
        if reduction is not None:
            x = _commit(session, run, entry, layer, place, x, reduction)
    return x


def _site(
    session: EncoderSession,
    run: EncoderRun,
    entry: Entry,
    layer: int,
    x: Tensor,
    probe: Probe | None,
    kwargs: dict[str, Any],
) -> Site:
    hidden = x[:, run.prefix :]
    now = run.map
    if now is None:
        now = TokenMap.identity(run.batch, run.tokens, x.device)

    def opened() -> Probe:
        if layer not in session.probed and session.runners[layer].split:
            raise RuntimeError(
                f"{entry.method.name} reads the attention of block {layer}, which it has not asked for: name the "
                f'signal in its needs, such as needs = {{"encoder": frozenset({{"keys"}})}}'
            )
        if probe is None or probe.qkv is None or probe.qkv[1].shape[2] != x.shape[1]:
            raise RuntimeError(
                f"{entry.method.name} looks at the attention of block {layer}, which another "
                "method has shortened before: give them different layers, or apply one of them"
            )
        return probe

    def qkv() -> tuple[Tensor, Tensor, Tensor]:
        found = opened().qkv
        assert found is not None
        return found

    def outputs() -> Tensor:
        found = opened().out
        assert found is not None
        return found

    return Site(
        site="encoder",
        layer=layer,
        info=session.owner.info,
        hidden=hidden,
        front=x[:, : run.prefix],
        map=now,
        memory=run.memory.setdefault(session.owner.entries.index(entry), {}),
        valid=now.valid if now.has_padding else None,
        grid=run.grid,
        qkv=qkv,
        scale=None if probe is None else probe.scale,
        prefix=run.prefix,
        key_bias=None if probe is None else probe.key_bias,
        training=run.training,
        modules=entry.modules_like(x),
        keys_of=lambda features, index: session.runners[layer].keys_of(features, index, kwargs),
        notes=run.trace.notes,
        pixels=run.pixels,
        crops=run.crops,
        pool=Pooling(session.tower) if has_pooling(session.tower) else None,
        mask=lambda: session.runners[layer].mask(kwargs),
        outputs=outputs,
        cls=session.runners[layer].more,
        mass=run.mass,
    )


def _commit(
    session: EncoderSession,
    run: EncoderRun,
    entry: Entry,
    layer: int,
    place: str,
    x: Tensor,
    reduction: Reduction,
) -> Tensor:
    p = run.prefix
    front = x[:, :p] if reduction.front is None else reduction.front.to(x.dtype)
    if reduction.map is None:  # nothing moves: new values, or a policy for training
        if reduction.policy is not None or run.policy is not None:
            record = PolicyRecord(layer, place, entry.method.name, reduction.policy)
            run.trace.policies.append(record)
        run.policy = reduction.policy
        run.mass = run.mass if reduction.mass is None else reduction.mass
        if reduction.tokens is None and reduction.front is None:
            return x
        tokens = x[:, p:] if reduction.tokens is None else reduction.tokens
        return torch.cat([front, tokens], 1)
    step = reduction.map
    if run.restoring:
        run.base = run.widened(x)
    before = x.shape[1] - p
    whole = step.with_prefix(p)
    if reduction.tokens is not None:
        x = torch.cat([front, reduction.tokens.to(x.dtype)], 1)
    elif reduction.weights is None:
        x = whole.gather(x)
    else:
        ones = reduction.weights.new_ones(run.batch, p)
        weights = torch.cat([ones, reduction.weights], 1)
        x = whole.merge(x, weights, reduction.normalize, reduction.keep_norm)
    run.map = step if reduction.absolute or run.map is None else run.map.then(step)
    if reduction.mass is not None:
        run.mass = reduction.mass
    elif run.mass is not None:
        run.mass = step.total(run.mass)
    run.merged = run.merged or entry.token_method.size_weighted
    if x.shape[1] - p != run.map.n_out:
        raise RuntimeError(f"{entry.method.name} returned {x.shape[1] - p} tokens for {run.map!r}")
    run.trace.stages.append(
        StageRecord(
            "encoder",
            layer,
            entry.method.name,
            before,
            run.map.n_out,
            step,
            run.total(run.map),
            run.grid if run.image is None else run.image.before,
        )
    )
    return x
