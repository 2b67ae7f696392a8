"""Sparsifiner: each row of attention reads the keys that a small trained predictor names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtr.core.trace import Trace
from vtr.errors import UnsupportedMethodError
from vtr.kernels import BlockMask
from vtr.methods.base import (
    EncoderAttentionMethod,
    EncoderAttentionSite,
    Examples,
    ModelInfo,
    check_count,
    check_flag,
    check_number,
    check_share,
    count,
    register,
)
from vtr.methods.common.attention import BACKENDS
from vtr.methods.common.connectivity import (
    Connectivity,
    ConnectivityModules,
    chosen_blocks,
    chosen_keys,
    sparse_coefficients,
)


@register
@dataclass(frozen=True, kw_only=True)
class Sparsifiner(EncoderAttentionMethod):
    r"""Sparsifiner (CVPR 2023, arXiv 2303.13755): sparse attention, whose pairs a predictor chooses per image and head.

    In each block, and for each head, a small trained module guesses the attention map as a product of low rank
    (:class:`~vtr.methods.common.connectivity.Connectivity`). Of the guess, the ``coefficients`` largest factors of
    a row and the entries of the basis above ``threshold`` are used. Each row then attends, exactly, to the
    ceil(``density`` T) keys with the largest guess; the rows of protected tokens (the class token) attend to all. The
    choice has no gradient.

    .. math::

        \hat A = \sum_{r} W_{ir} B_{rj} \;\text{ (low rank, sparse)}, \qquad
        A_{ij} = \operatorname{softmax}_{j \in \operatorname{top}(\hat A_i)}(q_i \cdot k_j / \sqrt{d})

    **This is a claim of FLOPs.** As in the authors' code, the attention of all pairs is computed and then masked;
    ``handle.report()`` counts the pairs that are kept, and the guess with ``coefficients`` factors in each row.
    ``block`` (ours) saves time on long sequences: whole blocks of pairs are chosen by their mean guess, the map is
    never built, and the block-sparse kernel skips the others. At 197 tokens it is slower than dense attention.

    Training has two parts, as the authors': with ``reconstruct=True`` attention stays dense, and the
    modules learn by :meth:`training_losses` to guess it (5 epochs); then, with ``reconstruct=False``, attention is
    masked, and the model adapts (45 epochs). The authors' target is the attention of a frozen copy of the
    model, ours that of the block itself, which is the same as long as the model is frozen. Their sum of squares is
    over the batch; ours is per image, so that its weight does not depend on the size of the batch.

    The modules belong to the model's own number of tokens: images of another size are refused. Tokens that another
    method has cut are left out of the basis, and rows keep as many keys as before, as the authors' do.

    Args:
        density: share of the keys that a row keeps, of the tokens of the model's input.
        rank: rows of the basis; None is a sixth of the tokens, as the authors have it.
        coefficients, threshold: of the guess; see above.
        block: 16, 32, 64 or 128 tokens; None chooses single pairs.
        reconstruct: what training mode does; see above.
        weight: of the loss of :meth:`training_losses`.
        weights: a safetensors file with trained modules, or the name of built-in ones (``"digits-sparsifiner"``).
        untrained: compute with new modules outside of training too.
        backend: of :func:`vtr.kernels.block_sparse_attention`.
    """

    name: ClassVar[str] = "sparsifiner"
    paper: ClassVar[str] = "Sparsifiner, CVPR 2023, arXiv 2303.13755"
    training: ClassVar[str] = "required"
    learned: ClassVar[bool] = True
    carries_gradients: ClassVar[bool] = True

    density: float = field(default=0.25, kw_only=False)
    rank: int | None = None
    coefficients: int = 8
    threshold: float = 0.02
    block: int | None = None
    reconstruct: bool = True
    weight: float = 0.01
    weights: str | None = None
    untrained: bool = False
    backend: str = "auto"

    @classmethod
    def examples(cls) -> Examples:
        some = (cls(0.3, untrained=True), cls(0.3, untrained=True, block=16))
        return {"some": some, "everything": (cls(1.0, untrained=True),)}

    def validate(self) -> None:
        super().validate()
        check_share(self.density, "density")
        check_count(self.rank, "rank", none=True)
        check_count(self.coefficients, "coefficients")
        check_number(self.threshold, "threshold", 0.0, float("inf"))
        check_number(self.weight, "weight", 0.0, float("inf"))
        check_flag(self.reconstruct, "reconstruct")
        check_flag(self.untrained, "untrained")
        if isinstance(self.block, bool) or self.block not in (None, 16, 32, 64, 128):
            raise ValueError(f"block must be 16, 32, 64, 128 or None, got {self.block!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")

    def build(self, info: ModelInfo) -> nn.Module:
        if info.tokens is None or info.dim is None or info.heads is None:
            raise UnsupportedMethodError(
                f"{self.name} has modules for a fixed number of tokens, heads and channels, and {info.family} does "
                "not fix one of them"
            )
        tokens = info.prefix + info.tokens
        rank = max(1, tokens // 6) if self.rank is None else self.rank
        size = info.head_dim or info.dim // info.heads
        layers = self.working_layers(info, "attention")
        modules = ConnectivityModules({n: Connectivity(size, tokens, rank) for n in layers})
        if self.weights is not None:
            modules.load(self.weights)
        return modules

    def attend(self, site: EncoderAttentionSite) -> Tensor:
        module = self.module(site)
        if site.training and self.reconstruct:
            site.notes["reconstruction"] = self.error(site, module)
            if site.layer == self.working_layers(site.info, "attention")[0]:
                site.modules.count()  # type: ignore[union-attr,operator]
            return site.dense()
        if self.density == 1.0:
            return site.dense()
        with torch.no_grad():
            basis = module.basis(site.index, self.threshold)
            rows = module(site.q, site.k, site.index, site.valid)
            rows = sparse_coefficients(rows, self.coefficients)
        tokens, prefix = site.tokens, site.prefix
        if self.block is not None:
            blocks = -(-tokens // self.block)
            self.spend(site, module, module.down.shape[1] * blocks**2)
            live = chosen_blocks(rows, basis, count(self.density, blocks), self.block)
            out = site.sparse(
                BlockMask.from_blocks(
                    live, q_len=tokens, k_len=tokens, block=self.block, share=False
                )
            )
            site.count(site.notes["density"] + prefix / tokens)
            first = (site.rows(0, prefix) @ site.v.float()).to(out.dtype)
            return torch.cat([first, out[:, :, prefix:]], 2)
        number = min(tokens, count(self.density, prefix + site.map.n_in))
        self.spend(site, module, self.coefficients * tokens**2)
        mask = chosen_keys(rows, basis, number, prefix, site.valid)
        return site.masked(mask, (prefix * tokens + (tokens - prefix) * number) / tokens**2)

    def module(self, site: EncoderAttentionSite) -> Connectivity:
        """Return the module of a block.

        Raises:
            UnsupportedMethodError: it was never trained, and does not learn now.
            ValueError: the model got another number of tokens, or has heads of another size.
        """
        modules: Any = site.modules
        learns = site.training and self.reconstruct
        if not (learns or self.untrained or self.density == 1.0 or modules.trained):
            raise UnsupportedMethodError(
                f"{self.name} computes with trained modules, and these are new: give weights= or modules=, or train "
                "them with reconstruct=True (vtr.train)"
            )
        module: Connectivity = modules.at(site.layer)
        found = site.prefix + site.map.n_in, site.q.shape[-1]
        wanted = module.down.shape[0], module.queries.in_features
        if found != wanted:
            raise ValueError(
                f"the modules of {self.name} are for {wanted[0]} tokens and {wanted[1]} channels in a head, and block "
                f"{site.layer} has {found[0]} and {found[1]}: give images of the model's own size"
            )
        return module

    def spend(self, site: EncoderAttentionSite, module: Connectivity, last: int) -> None:
        """Count what the guess costs; its last product has ``last`` multiplications in each head."""
        (_, heads, tokens, dim), rank = site.q.shape, module.down.shape[1]
        half = dim // 2
        site.spend(2 * heads * (2 * tokens * dim * half + 2 * tokens * half * rank + last))

    def error(self, site: EncoderAttentionSite, module: Connectivity) -> Tensor:
        """Sum the squared errors of the guess of all rows of visual tokens, per image."""
        rows = module(site.q.detach(), site.k.detach(), site.index, site.valid)
        wanted = site.rows(site.prefix, site.tokens).detach()
        apart = module.guess(rows[:, :, site.prefix :], site.index) - wanted
        if site.valid is not None:
            apart = apart * site.valid[:, None, site.prefix :, None] * site.valid[:, None, None]
        return apart.square().sum() / len(apart)

    def training_losses(self, trace: Trace, modules: nn.Module | None) -> dict[str, Tensor]:
        """Return ``reconstruction``: the mean over layers of the squared error of the guess, times ``weight``."""
        notes = trace.notes.get("attention", {}).values()
        found = [note["reconstruction"] for note in notes if "reconstruction" in note]
        return {"reconstruction": self.weight * torch.stack(found).mean()} if found else {}
