"""Compare the methods with their authors' own code on the same numbers, for ``fidelity.py --authors``.

This file contains no code of the authors. The functions that are compared are read from a checkout that the
user provides, by name, unmodified, and run on random tensors. Whole files cannot be imported,
since they need old versions of other libraries. Only the noise that some authors add to densities
(``torch.rand(...) * 1e-6``) is left out, since it decides at random between nearly equal values.
"""

from __future__ import annotations
import __future__

import ast
import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vtr


class Missing(Exception):
    """A missing checkout, or a missing file or function in it."""


class _Quiet:
    """torch without the noise that authors add to densities."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def rand(*size: Any, **options: Any) -> Tensor:
        return torch.zeros(*size, **options)


class Checkout:
    """A repository of authors on this machine.

    Args:
        folder: where checkouts are kept.
        name: ``owner/repository``; looked for as ``repository``, ``owner/repository`` and
            ``owner+repository``.
    """

    def __init__(self, folder: Path, name: str) -> None:
        owner, _, short = name.partition("/")
        places = [folder / short, folder / owner / short, folder / f"{owner}+{short}"]
        found = next((p for p in places if p.is_dir()), None)
        if found is None:
            raise Missing(f"no checkout of {name} in {folder}")
        self.name, self.root = name, found

    @property
    def commit(self) -> str:
        """The first seven digits of the commit, or ``"unknown"`` without a history."""
        command = ["git", "-C", str(self.root), "rev-parse", "--short=7", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    def _read(self, file: str) -> tuple[ast.Module, Path]:
        path = self.root / file
        if not path.is_file():
            raise Missing(f"{self.name} has no {file}")
        return ast.parse(path.read_text(encoding="utf-8")), path

    def functions(self, file: str, *names: str, **known: Any) -> SimpleNamespace:
        """Functions and classes of a file.

        Args:
            names: of functions and classes at its top; ``"Class.method"`` for a method, which becomes a
                function of that name.
            known: names that they use from elsewhere, besides torch, F, nn and math.
        """
        tree, path = self._read(file)
        chosen: list[ast.stmt] = []
        for name in names:
            body: Sequence[ast.stmt] = tree.body
            for part in name.split("."):
                found = [n for n in body if getattr(n, "name", None) == part]
                if not found:
                    raise Missing(f"{self.name} has no {name} in {file}")
                node, body = found[-1], getattr(found[-1], "body", [])
            chosen.append(node)
        space = {"torch": _Quiet(), "F": F, "nn": nn, "math": math, **known}
        self._run(chosen, path, space)
        return SimpleNamespace(**{n.split(".")[-1]: space[n.split(".")[-1]] for n in names})

    def body(self, file: str, test: str, last: str, space: dict[str, Any]) -> dict[str, Any]:
        """Run the body of the first ``if TEST:`` of a file up to the last assignment to ``last``."""
        tree, path = self._read(file)
        found = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == test]
        if not found:
            raise Missing(f"{self.name} has no 'if {test}:' in {file}")
        ends = [i for i, node in enumerate(found[0].body) if _assigns(node, last)]
        if not ends:
            raise Missing(f"{self.name} does not set {last} there in {file}")
        space = {"torch": _Quiet(), "F": F, "math": math, **space}
        self._run(found[0].body[: ends[-1] + 1], path, space)
        return space

    def assignments(self, file: str, names: Sequence[str], space: dict[str, Any]) -> dict[str, Any]:
        """Run the first assignment to each of ``names`` in a file."""
        tree, path = self._read(file)
        space = {"torch": _Quiet(), "F": F, "math": math, **space}
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Assign)]
        for name in names:
            found = next((n for n in nodes if _assigns(n, name)), None)
            if found is None:
                raise Missing(f"{self.name} does not set {name} in {file}")
            self._run([found], path, space)
        return space

    @staticmethod
    def _run(nodes: Sequence[ast.stmt], path: Path, space: dict[str, Any]) -> None:
        # Annotations name types of libraries that are not loaded.
        flags = __future__.annotations.compiler_flag
        exec(compile(ast.Module([*nodes], []), str(path), "exec", flags), space)


def _assigns(node: ast.AST, name: str) -> bool:
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return any(isinstance(t, ast.Name) and t.id == name for t in targets)


@dataclass
class Finding:
    """Result of a comparison.

    Attributes:
        largest: largest absolute difference of a number; 0 if only choices were compared.
        differ, of: choices (tokens, blocks of a mask) that differ, of how many.
    """

    largest: float = 0.0
    differ: int = 0
    of: int = 0

    def choices(self, ours: Tensor, theirs: Tensor) -> None:
        """Compare two masks or lists of indices of one shape."""
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        self.differ += int((ours != theirs).sum())
        self.of += ours.numel()

    def numbers(self, ours: Tensor, theirs: Tensor) -> None:
        """Compare two tensors of one shape."""
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        if ours.numel():
            self.largest = max(self.largest, float((ours.double() - theirs.double()).abs().max()))

    def add(self, other: Finding) -> None:
        """Add the result of another part of the comparison."""
        self.largest = max(self.largest, other.largest)
        self.differ, self.of = self.differ + other.differ, self.of + other.of

    def rows(self, ours: Tensor, theirs: Tensor, near: float = 1e-3) -> None:
        """Compare rows (N, C) and (M, C) in any order: those without a partner within ``near`` differ."""
        distance = (ours.double()[:, None] - theirs.double()[None]).abs().amax(-1)
        mine, other = distance.amin(1), distance.amin(0)
        alone = int((mine > near).sum()), int((other > near).sum())
        self.differ += max(*alone, abs(len(ours) - len(theirs)))
        self.of += max(len(ours), len(theirs))
        best = torch.cat([mine, other])
        close = best[best <= near]
        self.largest = max(self.largest, float(close.max()) if len(close) else 0.0)


def clip(frames: int, places: int, channels: int, seed: int, still: float = 0.5) -> Tensor:
    """Three scenes (T, P, C), in which a share of the places hardly changes."""
    g = torch.Generator().manual_seed(seed)
    scenes = torch.randn(3, places, channels, generator=g)
    x = scenes[torch.arange(frames) * 3 // frames]
    moving = torch.rand(frames, places, 1, generator=g) > still
    x = x + 0.9 * moving * torch.randn(frames, places, channels, generator=g)
    return x + 0.05 * torch.randn(frames, places, channels, generator=g)


def summed(stands: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """The row that each slot becomes, ascending."""
    flat = x.reshape(-1, x.shape[-1]).double()
    live = stands >= 0
    total = torch.zeros_like(flat).index_add(
        0, stands[live], weights[live, None].double() * flat[live]
    )
    return total[stands[live].unique()]


# ---- encoders ------------------------------------------------------------------------------------


def tome(code: Checkout) -> Finding:
    """Six blocks of merging with a class token, weighted by size."""
    from vtr.methods.common.matching import bipartite_soft_matching

    theirs = code.functions(
        "tome/merge.py", "do_nothing", "bipartite_soft_matching", "merge_wavg", Callable=Callable
    )
    found = Finding()
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 198, 32, generator=g)
        ours, size, order = x[:, 1:], torch.ones(2, 197), None
        other, other_size = x, None
        for _ in range(6):
            ours_metric = ours + 0.1 * ours.roll(1, -1)
            metric = other + 0.1 * other.roll(1, -1)
            step, order = bipartite_soft_matching(ours_metric, 16, order, 1)
            ours = step.merge(ours, size)
            size = torch.zeros(ours.shape[:2]).scatter_add(1, step.source, size)
            merge, _ = theirs.bipartite_soft_matching(metric, 16, class_token=True)
            other, other_size = theirs.merge_wavg(merge, other, other_size)
        for b in range(2):
            found.rows(
                torch.cat([ours[b], size[b, :, None]], 1),
                torch.cat([other[b, 1:], other_size[b, 1:]], 1),
            )
    return found


def tomesd(code: Checkout) -> Finding:
    """Merging and unmerging on grids of even sides, with the first token of each cell."""
    from vtr.methods.common.cells import merge_map

    theirs = code.functions(
        "tomesd/merge.py",
        *("do_nothing", "mps_gather_workaround", "bipartite_soft_matching_random2d"),
    )
    found = Finding()
    for seed, (h, w, ratio) in enumerate(((8, 8, 0.5), (12, 16, 0.25), (16, 10, 0.7))):
        x = torch.randn(2, h * w, 24, generator=torch.Generator().manual_seed(seed))
        step = merge_map(x, (1, h, w), (1, 2, 2), ratio)
        assert step is not None
        merge, unmerge = theirs.bipartite_soft_matching_random2d(
            x, w, h, 2, 2, int(ratio * h * w), no_rand=True
        )
        back = unmerge(merge(x))
        found.numbers(step.restore(step.merge(x)), back)
    return found


def evit(code: Checkout) -> Finding:
    """A block with the weights of a timm model, fusing and dropping."""
    import timm

    theirs = code.functions(
        *("evit.py", "Mlp", "Attention", "Block"),
        DropPath=nn.Identity,
        complement_idx=code.functions("helpers.py", "complement_idx").complement_idx,
    )
    found = Finding()
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=0, depth=2).eval()
    images = torch.randn(3, 3, 224, 224)
    for fuse, rate in ((True, 0.7), (False, 0.5)):
        method = vtr.EViT(keep=rate, layers=(1,), fuse=fuse)
        seen: list[Tensor] = []
        hook = model.blocks[0].register_forward_hook(lambda m, a, out, to=seen: to.append(out))
        with torch.no_grad(), vtr.apply(model, method):
            ours = model.forward_features(images)
        hook.remove()
        block = theirs.Block(192, 3, qkv_bias=True, keep_rate=rate, fuse_token=fuse)
        block.norm1.eps = block.norm2.eps = model.blocks[1].norm1.eps
        block.load_state_dict(model.blocks[1].state_dict())
        with torch.no_grad():
            other = model.norm(block.eval()(seen[0])[0])
        for b in range(3):
            found.rows(ours[b], other[b])
    return found


# ---- vision transformers that drop, merge and freeze ---------------------------------------------


def _small_vit(seed: int) -> tuple[Any, Tensor]:
    """A timm ViT of 196 tokens whose attention is not flat, with a last norm that has no weights; and four images."""
    from vtr.testing.models.encoders import images, vit

    model = vit(seed, img_size=112, depth=12)
    model.norm = nn.LayerNorm(48, elementwise_affine=False)
    return model, images(4, seed, 112)


def _tokens(model: Any, images: Tensor, method: Any) -> Tensor:
    """The tokens behind the last block with a method of vtr."""
    with torch.no_grad(), vtr.apply(model, method):
        return model.forward_features(images)  # type: ignore[no-any-return]


def pixelprune(code: Checkout) -> Finding:
    """Tokens of pictures of few colours in flat areas, without and with small differences."""
    from vtr.methods.pixelprune import predicted

    selector = code.functions(
        "pixelprune/methods/pred_2d.py", "_sim2d", "Pred2DSelector._select_2d_loco_fast",
        "Pred2DSelector._select_2d_loco_anchored",
    )  # fmt: skip
    theirs = selector._select_2d_loco_fast, selector._select_2d_loco_anchored
    found = Finding()
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        rows, columns = torch.randint(1, 13, (2,), generator=draw).tolist()
        colours = torch.rand(3, 96, generator=draw)
        tokens = colours[torch.randint(0, 3, (rows, columns), generator=draw)]
        tokens[: rows // 2 + 1, : columns // 2 + 1] = colours[0]
        threshold = (0.0, 0.03)[seed % 2]
        tokens = tokens + 0.6 * threshold * torch.rand(tokens.shape, generator=draw)
        tokens = tokens.reshape(rows * columns, 96)
        settings = SimpleNamespace(method="max", threshold=threshold)
        kept = theirs[seed % 2](settings, tokens, rows, columns, tokens.device)
        ours = torch.zeros(rows * columns, dtype=torch.bool)
        ours[predicted(tokens, rows, columns, threshold).unique()] = True
        found.choices(ours, torch.zeros_like(ours).index_fill(0, kept, True))
    return found


def ppt(code: Checkout) -> Finding:
    """Twelve blocks of a timm model, with thresholds that all images reach, none, or some."""
    import copy

    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    tools = ("do_nothing", "bipartite_soft_matching", "merge_source", "merge_wavg", "parse_r")
    parts = ("batch_index_select", "PPTAttention", "block", "pp_block_adaptive")
    theirs = code.functions(
        *("ppt_deit.py", *parts, "PPTVisionTransformer", "apply_patch"),
        **vars(code.functions("tome.py", *tools)),
        **{"Attention": Attention, "Block": Block, "VisionTransformer": VisionTransformer},
    )
    found = Finding()
    for seed, threshold in enumerate((0.0, 1.0, 2e-5, 3e-5, 5e-5)):
        model, images = _small_vit(seed)
        method = vtr.PPT(r=40, layers=(3, 6, 9), threshold=threshold)
        ours, other = _tokens(model, images, method), copy.deepcopy(model)
        seen: list[Tensor] = []
        other.norm.register_forward_hook(lambda m, a, out, to=seen: to.append(out))
        theirs.apply_patch(other, pp_loc_list=[3, 6, 9], threshold=threshold)
        other.r = 40
        with torch.no_grad():
            other(images)
        for b in range(len(images)):
            found.rows(ours[b], seen[0][b])
    return found


def diffrate(code: Checkout) -> Finding:
    """Twelve blocks of a timm model: published lists, and training under masks with random rates."""
    import copy

    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    tools = code.functions("DiffRate/utils.py", "STE_Min", "STE_Ceil")
    ste = {"ste_min": tools.STE_Min.apply, "ste_ceil": tools.STE_Ceil.apply}
    parts = ("DiffRateBlock", "DiffRateAttention", "make_diffrate_class", "apply_patch")
    theirs = code.functions(
        *("DiffRate/patch/deit.py", *parts),
        **ste,
        **vars(code.functions("DiffRate/ddp.py", "DiffRate", **ste)),
        **vars(code.functions("DiffRate/merge.py", "get_merge_func")),
        **{"Attention": Attention, "Block": Block, "VisionTransformer": VisionTransformer},
    )
    found = Finding()
    for seed, name in enumerate(("deit-tiny/1.0", "deit-small/2.3", "deit-small/2.9", "")):
        model, images = _small_vit(seed)
        other, seen = copy.deepcopy(model), []
        other.norm.register_forward_hook(lambda m, a, out, to=seen: to.append(out))
        theirs.apply_patch(other, prune_granularity=4, merge_granularity=4)
        for block in other.blocks:
            block.drop_path = nn.Identity()  # timm's name of the time
        if name:
            method = vtr.DiffRate.preset(name)
            assert method.prune is not None and method.merge is not None
            lists = [[n + 1 for n in numbers] for numbers in (method.prune, method.merge)]
            other.set_kept_num(*lists)
            ours = _tokens(model, images, method)
            with torch.no_grad():
                other(images)
            for b in range(len(images)):
                found.rows(ours[b], seen[0][b])
            continue
        handle = vtr.apply(model.train(), vtr.DiffRate(learn=True))
        made: Any = handle.modules[0]
        with torch.no_grad():
            made.scores.normal_(0, 2, generator=torch.Generator().manual_seed(3))
            for block, scores in zip(other.blocks[1:], made.scores, strict=True):
                block.prune_ddp.selected_probability.copy_(scores[0])
                block.merge_ddp.selected_probability.copy_(scores[1])
            ours = model.forward_features(images)
        other.train()(images)
        kept = torch.tensor(made.counts())[:, 1:] + 1
        found.choices(kept, torch.tensor(other.get_kept_num())[:, 1:])
        for b in range(len(images)):
            found.rows(ours[b], seen[0][b].detach())
        handle.remove()
    return found


def ats(code: Checkout) -> Finding:
    """The sampled tokens of images alone, with 196 samples of 196 tokens and of fewer."""
    from tests.tiny import site

    theirs = code.functions(
        "libs/models/transformers/ats_block.py", "AdaptiveTokenSampler", Attention=nn.Module
    ).AdaptiveTokenSampler
    found = Finding()
    for seed, tokens in enumerate((196, 150, 97, 40)):
        s = site(n=tokens, batch=4, heads=3, dim=16, layer=3, depth=12, seed=seed)
        s.map = vtr.TokenMap.identity(4, 196)  # of which these are left
        ours = vtr.ATS().reduce(s)
        assert ours is not None and ours.map is not None
        q, k, v = s.qkv
        attention = (q @ k.transpose(-1, -2) * 16**-0.5).softmax(-1)
        numbers = torch.arange(-1.0, tokens).expand(4, -1)[..., None]
        scores, order = theirs.score_assignment_step(attention, v)
        itself = SimpleNamespace(num_heads=3)
        itself.create_ys, itself.get_unique_indices = theirs.create_ys, theirs.get_unique_indices
        sampled, _, policy, _ = theirs.inverse_transform_sampling(
            itself, scores, order, attention, tokens + 1, numbers, 197
        )
        for b in range(4):
            other = torch.zeros(tokens, dtype=torch.bool)
            other[sampled[b, 1:, 0][policy[b, 1:, 0] > 0].long()] = True
            found.choices(ours.map.source[b] >= 0, other)
    return found


def evo_vit(code: Checkout) -> Finding:
    """Twelve blocks with the weights of a timm model: the class token, and the mean of the others."""
    from functools import partial

    parts = ("easy_gather", "Mlp", "MlpBlock", "QKAttention", "VAttention", "PatchEmbed")
    known = {"partial": partial, "to_2tuple": lambda n: (n, n), "DropPath": nn.Identity}
    known["trunc_normal_"] = nn.init.trunc_normal_
    theirs = code.functions("deit/evo_deit.py", *parts, "EvoVisionTransformer", **known)
    found = Finding()
    for seed in range(3):
        model, images = _small_vit(seed)
        model.norm = nn.Identity()
        ours = _tokens(model, images, vtr.EvoViT())
        other = theirs.EvoVisionTransformer(
            img_size=112, patch_size=8, embed_dim=48, num_heads=3, num_classes=0, qkv_bias=True
        ).eval()
        other.norm = nn.Identity()
        given = model.state_dict()
        state = {n: given[n] for n in ("cls_token", "pos_embed")}
        for n in ("proj.weight", "proj.bias"):
            state[f"patch_embed.{n}"] = given[f"patch_embed.{n}"]
        for i in range(12):
            for part in ("weight", "bias"):
                of, qkv = f"blocks.{i}", given[f"blocks.{i}.attn.qkv.{part}"]
                state[f"qks.{i}.qk.{part}"], state[f"vs.{i}.v.{part}"] = qkv[:96], qkv[96:]
                state[f"projs.{i}.{part}"] = given[f"{of}.attn.proj.{part}"]
                state[f"norms.{i}.{part}"] = given[f"{of}.norm1.{part}"]
                for name in ("norm2", "mlp.fc1", "mlp.fc2"):
                    state[f"{of}.{name}.{part}"] = given[f"{of}.{name}.{part}"]
        left = other.load_state_dict(state, strict=False)
        assert not left.unexpected_keys, left
        with torch.no_grad():
            mean, first = other.forward_features(images)
        found.numbers(ours[:, 0], first)
        found.numbers(ours[:, 1:].mean(1), mean)
    return found


def tps(code: Checkout) -> Finding:
    """The squeezing of dropped tokens into kept ones."""
    theirs = code.functions("torch_codebase/models/dynamic_vit.py", "get_sim", "TPSModule")
    from vtr.methods.common.merge import by_rank, most_similar

    found, squeeze = Finding(), theirs.TPSModule().eval()
    for seed, number in enumerate((137, 98, 20)):
        x = torch.randn(4, 196, 48, generator=torch.Generator().manual_seed(seed))
        partner, similarity = most_similar(x, number)
        step, _ = by_rank(torch.arange(196).expand(4, -1), number, partner)
        weights = torch.cat([torch.full((4, number), math.e), similarity.exp()], 1)
        ours = step.merge(x, weights)
        found.numbers(ours, squeeze(x[:, :number], x[:, number:], None, None))
    return found


# ---- language models -----------------------------------------------------------------------------


def divprune(code: Checkout) -> Finding:
    from vtr.methods.divprune import farthest_points

    theirs = code.functions(
        "LLaVA/llava/model/llava_arch.py",
        *(f"LlavaMetaForCausalLM.{n}" for n in ("pairwise_cosine_similarity", "DivPrune")),
    )
    myself = SimpleNamespace(
        pairwise_cosine_similarity=lambda x: theirs.pairwise_cosine_similarity(None, x)
    )
    found = Finding()
    for seed, (n, number) in enumerate(((576, 64), (576, 192), (100, 30))):
        x = torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))
        chosen, _ = theirs.DivPrune(myself, x, n, threshold_ratio=number / n)
        mask = torch.zeros(n, dtype=torch.bool).index_fill(0, chosen, True)
        every = torch.ones(1, n, dtype=torch.bool)
        found.choices(farthest_points(x[None], torch.tensor([number]), every)[0], mask)
    return found


def cdpruner(code: Checkout) -> Finding:
    """Relevance and subset, given embeddings in one space; the sign of CLIP's is turned round."""
    from vtr.methods.cdpruner import relevance
    from vtr.methods.common.dpp import greedy_map

    theirs = code.functions("llava/model/llava_arch.py", "LlavaMetaForCausalLM.encode_images")
    found = Finding()
    for seed, (n, number) in enumerate(((576, 64), (576, 128), (100, 32))):
        generator = torch.Generator().manual_seed(seed)
        x, seen = torch.randn(2, 1, n, 256, generator=generator)
        text = torch.randn(1, 5, 256, generator=generator)
        parts = (x, seen, -text[0])
        model = SimpleNamespace(
            get_vision_tower=lambda parts=parts: lambda images, texts=None: parts,
            mm_projector=lambda features: features,
        )
        myself = SimpleNamespace(get_model=lambda model=model: model, visual_token_num=number)
        _, mask = theirs.encode_images(myself, None)
        every = torch.ones(1, n, dtype=torch.bool)
        quality = relevance(seen, text, every, torch.ones(1, 5, dtype=torch.bool))
        found.choices(greedy_map(x, quality, torch.tensor([number]), every), mask)
    return found


def dart(code: Checkout) -> Finding:
    """The tokens kept, given states, keys and the order in which their pivots take turns."""
    from vtr.core.tokens import top_indices
    from vtr.methods.dart import least_duplicated, marked

    theirs = code.functions(
        "llava/model/language_model/modeling_llama_self.py", "DART.get_retained_image_token"
    )
    found = Finding()
    for seed, number in enumerate((64, 128, 192)):
        generator = torch.Generator().manual_seed(seed)
        start, n, length = 35, 576, 650
        x = torch.randn(1, length, 64, generator=generator)
        keys = torch.randn(1, 4, length, 16, generator=generator)
        options = {
            "K": 2, "image_token_start_index": start, "image_token_length": n,
            "max_num_trunction": number, "pivot_image_token": 4, "pivot_text_token": 4,
            "reduction_ratio": 0.5,
        }  # fmt: skip
        config = SimpleNamespace(DART_config=options, text_length=None)
        kept = theirs.get_retained_image_token(None, config, x, keys)
        norms = keys.abs().sum((1, 3))
        visual, _ = top_indices(norms[:, start : start + n], 4)
        text, _ = top_indices(norms[:, start + n :], 4)
        turns = list(set((visual[0] + start).tolist() + (text[0] + start + n).tolist()))
        ours = least_duplicated(
            x[:, start : start + n],
            x[:, turns],
            torch.ones(1, 8, dtype=torch.bool),
            marked(visual, n),
            torch.tensor([number + 4]),
            torch.ones(1, n, dtype=torch.bool),
        )
        found.choices(ours, marked(kept[None] - start, n))
    return found


def fastv(code: Checkout) -> Finding:
    """Their ranking, given the eager attention map of the layer before the cut in a tiny LLaVA."""
    from tests.vision.vlm.models import IMAGE, llava

    model, inputs = llava(1)
    model.set_attn_implementation("eager")
    columns = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    found = Finding()
    for layer, keep in ((1, 8), (2, 8), (3, 5)):
        with torch.no_grad():
            maps = model(**inputs, output_attentions=True).attentions
            with vtr.apply(model, vtr.FastV(keep=keep, layer=layer)) as handle:
                model(**inputs)
        names = ["last_layer_attention", "last_layer_attention_avg"]
        names += [f"last_layer_attention_avg_last_tok{end}" for end in ("", "_image")]
        space = code.assignments(
            "src/transformers/src/transformers/models/llama/modeling_llama_fastv_kvcache.py",
            [*names, "top_attention_rank_index"],
            {
                "layer_outputs": (None, maps[layer - 1]),
                "SYS_LENGTH": int(columns[0]),
                "IMAGE_TOKEN_LENGTH": len(columns),
                "ATTENTION_RANK": keep,
            },
        )
        theirs = (space["top_attention_rank_index"] - columns[0]).sort().values
        found.choices(handle.trace.stages[-1].total.kept[0], theirs)
    return found


def _llava() -> tuple[Any, Any, Any]:
    """A narrow LLaVA of 24 x 24 patches and six encoder layers, its inputs, and its tower's outputs."""
    from tests.vision.vlm.models import IMAGE, build, llama, prompts, transformers
    from tests.vision.vlm.models import clip as tower

    vision = tower()
    vision.image_size, vision.num_hidden_layers = 168, 6
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=llama(), image_token_id=IMAGE, image_seq_length=576,
        vision_feature_layer=-2,
    )  # fmt: skip
    model = build(transformers.LlavaForConditionalGeneration, config)
    model.set_attn_implementation("eager")
    pixels = torch.randn(1, 3, 168, 168, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = model.model.vision_tower(
            pixels, output_hidden_states=True, output_attentions=True
        )
    return model, {"pixel_values": pixels, **prompts([[576]])}, outputs


def vtc_cls(code: Checkout) -> Finding:
    """The score of their tower, and its best tokens, for three windows of layers."""
    file = "llava/model/multimodal_encoder/clip_encoder.py"
    theirs = code.functions(file, "CLIPVisionTower.cls_token_only").cls_token_only
    model, inputs, outputs = _llava()
    myself = SimpleNamespace(
        vision_tower=lambda *_, **__: outputs, feature_select=lambda out: out.hidden_states[-2],
        device="cpu", dtype=torch.float32,
    )  # fmt: skip
    found = Finding()
    for start, keep in ((4, 64), (2, 128), (0, 256)):
        score, _ = theirs(myself, inputs["pixel_values"], start_layer=start)
        with torch.no_grad(), vtr.apply(model, vtr.VTCCLS(keep=keep, window=5 - start)) as handle:
            model(**inputs)
        kept = handle.trace.stages[-1].total.kept[0]
        found.choices(kept, score.topk(keep).indices.sort().values)
    return found


def _visual(code: Checkout, method: Any, **known: Any) -> Finding:
    """The tokens that ``encode_images`` of FasterVLM and VisPruner keeps of one crop."""
    theirs = code.functions("llava/model/llava_arch.py", "LlavaMetaForCausalLM.encode_images")
    model, inputs, outputs = _llava()
    features = outputs.hidden_states[-2][:, 1:], outputs.attentions[-2][:, :, 0, 1:]
    inner = SimpleNamespace(
        get_vision_tower=lambda: lambda *_, **__: features, mm_projector=lambda x: x
    )
    found = Finding()
    for number in (64, 128, 288):
        myself = SimpleNamespace(
            get_model=lambda: inner, get_visual_token_num=lambda number=number: number, **known
        )
        mask = theirs.encode_images(myself, None)[1]
        with torch.no_grad(), vtr.apply(model, method.replace(keep=number)) as handle:
            model(**inputs)
        found.choices(handle.trace.stages[-1].total.kept[0], mask[0].nonzero()[:, 0])
    return found


def fastervlm(code: Checkout) -> Finding:
    """The tokens kept of one crop."""
    return _visual(code, vtr.FasterVLM())


def vispruner(code: Checkout) -> Finding:
    """The tokens kept of one crop, half of them important ones, three quarters, and none."""
    found = Finding()
    for share in (0.5, 0.75, 0.0):
        method = vtr.VisPruner(important=share)
        found.add(_visual(code, method, get_important_ratio=lambda share=share: share))
    return found


def hired(code: Checkout) -> Finding:
    """The tokens kept of a picture with two tiles, one above the other, whose regions are stripes."""
    from tests.vision.vlm.models import prompts

    file = "transformers/src/transformers/models/llava_next/modeling_llava_next.py"
    theirs = code.functions(
        file,
        *(f"LlavaNextForConditionalGeneration.HiRED_{n}" for n in ("sub_img_budgets", "token_selection")),
        get_anyres_image_grid_shape=lambda *_: (1, 2),
    )  # fmt: skip
    model, inputs, _ = _llava_next()
    model.config.image_grid_pinpoints = [[168, 84]]
    pixels = inputs["pixel_values"][:, :3]
    with torch.no_grad():
        seen = model.model.vision_tower(pixels[0], output_attentions=True).attentions
    config = SimpleNamespace(
        image_grid_pinpoints=None, vision_config=SimpleNamespace(image_size=84)
    )
    myself = SimpleNamespace(
        config=config, HiRED_sub_img_budgets=lambda *a: theirs.HiRED_sub_img_budgets(myself, *a)
    )
    given = {
        "pixel_values": pixels, "image_sizes": torch.tensor([[168, 84]]),
        **prompts([[144 + 24 * 13]]),
    }  # fmt: skip
    found = Finding()
    # With a third of the tokens no share is broken, which theirs would round down.
    for alpha in (0.25, 0.5, 0.75):
        (mask,) = theirs.HiRED_token_selection(
            myself, seen[0], seen[-2], [3], 0, 144, 144.5 / 432, alpha, [None]
        )
        with torch.no_grad(), vtr.apply(model, vtr.HiRED(keep=144, alpha=alpha)) as handle:
            model(**given)
        kept = handle.trace.stages[-1].total.kept[0]
        content = torch.where(kept < 144, kept, 144 + (kept - 144) // 13 * 12 + (kept - 144) % 13)
        found.choices(content, mask.flatten().nonzero()[:, 0])
    return found


def visionzip(code: Checkout) -> Finding:
    """The input of the language model, with equally many dominant tokens and without their class token."""
    theirs = code.functions(
        "visionzip/clip_encoder.py", "CLIPVisionTower_VisionZip.forward"
    ).forward
    model, inputs, outputs = _llava()
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    layer = tower.encoder.layers[-2]
    found = Finding()
    for keep, contextual in ((64, 10), (128, 20), (192, 30)):
        with torch.no_grad():
            keys = layer.self_attn.k_proj(layer.layer_norm1(outputs.hidden_states[-3]))
            metric = keys.unflatten(-1, (4, -1)).mean(2)
            layers = [None, SimpleNamespace(metric=metric), None]

            class Tower(SimpleNamespace):
                def __call__(self, *_: Any, **__: Any) -> Any:
                    return outputs

            shown = Tower(
                vision_model=SimpleNamespace(encoder=SimpleNamespace(layers=layers)),
                _info={"dominant": keep - contextual, "contextual": contextual},
            )
            myself = SimpleNamespace(vision_tower=shown, device="cpu", dtype=torch.float32)
            tokens, _ = theirs(myself, inputs["pixel_values"])
            other = model.model.multi_modal_projector(tokens[:, 1:])[0]
            seen: list[Tensor] = []
            first = model.model.language_model.layers[0]
            hook = first.register_forward_pre_hook(lambda m, a, to=seen: to.append(a[0]))
            with vtr.apply(model, vtr.VisionZip(keep=keep, contextual=contextual)):
                model(**inputs)
            hook.remove()
        start = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0, 0])
        found.rows(seen[0][0, start : start + keep], other)
    return found


def flowcut(code: Checkout) -> Finding:
    """The whole tower, whose layers prune one after the other: one crop, and five crops of one image."""
    model, inputs, outputs = _llava()
    tower = _flowcut_tower(code, model)
    found = Finding()
    for keep in (64, 128, 192):
        with torch.no_grad():
            done, kept = tower(outputs.hidden_states[0], keep)
            seen: list[Tensor] = []
            first = model.model.language_model.layers[0]
            hook = first.register_forward_pre_hook(lambda m, a, to=seen: to.append(a[0]))
            with vtr.apply(model, vtr.FlowCut(keep=keep)) as handle:
                model(**inputs)
            hook.remove()
            other = model.model.multi_modal_projector(done.hidden_states[-2][:, 1:])[0]
        found.choices(handle.trace.stages[-1].total.kept[0], kept[0])
        start = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0, 0])
        found.numbers(seen[0][0, start : start + keep], other)
    model, inputs, outputs = _llava_next()
    tower = _flowcut_tower(code, model)
    for keep in (160, 80, 40):  # of every crop they leave half of the image's number
        with torch.no_grad(), vtr.apply(model, vtr.FlowCut(keep=keep)) as handle:
            model(**inputs)
        cuts = [stage for stage in handle.trace.stages if stage.site == "encoder"]
        with torch.no_grad():
            _, kept = tower(outputs.hidden_states[0], keep // 2)
        found.choices(cuts[-1].total.kept, kept)
    return found


def _llava_next() -> tuple[Any, Any, Any]:
    """A narrow LLaVA-NeXT whose attention is peaked, with five crops of one image."""
    from tests.vision.vlm.models import IMAGE, build, clip, llama, prompts, transformers

    vision = clip()
    vision.image_size, vision.num_hidden_layers = 84, 14
    config = transformers.LlavaNextConfig(
        vision_config=vision, text_config=llama(), image_token_id=IMAGE, image_seq_length=144,
        image_grid_pinpoints=[[168, 168]], vision_feature_layer=-2,
    )  # fmt: skip
    model = build(transformers.LlavaNextForConditionalGeneration, config)
    model.set_attn_implementation("eager")
    for layer in getattr(
        model.model.vision_tower, "vision_model", model.model.vision_tower
    ).encoder.layers:
        layer.self_attn.q_proj.weight.data *= 12
    pixels = torch.randn(1, 5, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    pixels *= torch.tensor([1.0, 3.0, 0.1, 1.0, 1.0])[:, None, None, None]
    with torch.no_grad():
        outputs = model.model.vision_tower(pixels[0], output_hidden_states=True)
    text = prompts([[144 + 24 * 25]])
    return (
        model,
        {"pixel_values": pixels, "image_sizes": torch.tensor([[168, 168]]), **text},
        outputs,
    )


class _Called(SimpleNamespace):
    """A module whose forward is one of the authors' functions."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(self, *args, **options)


def _flowcut_tower(code: Checkout, model: Any) -> Callable[[Tensor, int], Any]:
    """Their encoder on the weights of a CLIP tower: states before it, and patches to keep."""
    file = "flowcut/modeling_clip_flowcut.py"
    rules = code.functions("flowcut/utils_flowcut.py", "compute_score", "adaptive_prune_ratio")
    theirs = code.functions(
        *(file, "CLIPAttention_forward", "CLIPEncoderLayer_forward", "CLIPEncoder_forward"),
        **vars(rules),
        BaseModelOutput=SimpleNamespace,
    )

    def attention(module: Any) -> _Called:
        heads, width = module.num_heads, module.head_dim
        return _Called(
            function=theirs.CLIPAttention_forward,
            **{n: getattr(module, n) for n in ("q_proj", "k_proj", "v_proj", "out_proj", "scale")},
            num_heads=heads, head_dim=width, dropout=0.0, training=False,
            _shape=lambda x, n, b: x.view(b, -1, heads, width).transpose(1, 2).contiguous(),
        )  # fmt: skip

    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    layers = [
        _Called(
            function=theirs.CLIPEncoderLayer_forward,
            self_attn=attention(layer.self_attn),
            **{n: getattr(layer, n) for n in ("layer_norm1", "layer_norm2", "mlp")},
        )
        for layer in tower.encoder.layers
    ]

    def run(states: Tensor, keep: int) -> Any:
        myself = SimpleNamespace(
            layers=layers, target=keep + 1, select_layer=len(layers) - 2,
            gradient_checkpointing=False, training=False,
        )  # fmt: skip
        every = dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict"), True)
        return theirs.CLIPEncoder_forward(myself, states, **every)

    return run


def pyramiddrop(code: Checkout) -> Finding:
    """One cut before each of three layers, from the states that enter it."""
    from tests.vision.vlm.models import IMAGE, build, clip, llama, prompts, transformers

    file = "llava/model/modeling_llama_pdrop.py"
    theirs = code.functions(
        *(file, "rotate_half", "apply_rotary_pos_emb", "LlamaModel.pdrop_rank_drop"),
        IGNORE_INDEX=-100,
        _prepare_4d_causal_attention_mask=lambda mask, size, x, **_: torch.full(
            (size[0], 1, size[1], size[1]), -math.inf
        ).triu(1),
    )
    text = llama()
    text.num_key_value_heads = text.num_attention_heads  # theirs has no grouped queries
    config = transformers.LlavaConfig(
        vision_config=clip(), text_config=text, image_token_id=IMAGE, image_seq_length=16,
        vision_feature_layer=-2,
    )  # fmt: skip
    model = build(transformers.LlavaForConditionalGeneration, config)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": pixels, **prompts([[16]])}
    lm, ids = model.model.language_model, inputs["input_ids"][0]
    start, width = int((ids == IMAGE).nonzero()[0, 0]), text.hidden_size // text.num_attention_heads
    found = Finding()
    for layer, share in ((1, 0.5), (2, 0.25), (3, 0.5)):
        with torch.no_grad():
            x = model(**inputs, output_hidden_states=True).hidden_states[layer]
            rope = lm.rotary_emb(x, torch.arange(len(ids))[None])
            block = lm.layers[layer]
            heads = SimpleNamespace(
                num_heads=text.num_attention_heads, num_key_value_heads=text.num_key_value_heads,
                head_dim=width, rotary_emb=lambda *_, seq_len, rope=rope: (rope[0][0], rope[1][0]),
                **{n: getattr(block.self_attn, n) for n in ("q_proj", "k_proj", "v_proj")},
            )  # fmt: skip
            shown = SimpleNamespace(self_attn=heads, input_layernorm=block.input_layernorm)
            myself = SimpleNamespace(
                config=SimpleNamespace(tokenizer_padding_side="right"), training=False,
                image_token_ratio_list=[1.0, share], image_tokens=[16], image_token_posi=[start],
                prompt_len=[len(ids) - 16], layers=dict.fromkeys([layer], shown),
            )  # fmt: skip
            _, _, other, _ = theirs.pdrop_rank_drop(myself, 0, layer, x, None, None, None)
            with vtr.apply(model, vtr.PyramidDrop(keep=(share,), layers=(layer,))) as handle:
                model(**inputs)
        kept = handle.trace.stages[-1].total.kept[0]
        stays = torch.ones(len(ids), dtype=torch.bool)
        stays[start : start + 16] = torch.zeros(16, dtype=torch.bool).index_fill(0, kept, True)
        same = (x[0, stays] == other[0]).all(1)
        found.choices(same, torch.ones_like(same))
    return found


def debias(code: Checkout) -> Finding:
    """The released weights of PyramidDrop and SparseVLM, by the strength fitted to each file."""
    import numpy

    from vtr.methods.debias import fit_recency

    found = Finding()
    files = [
        path
        for name in ("PyramidDrop", "SparseVLMs")
        for path in sorted((code.root / "playground/data/weight" / name).glob("*.npy"))
    ]
    if not files:
        raise Missing(f"{code.name} has no weights in playground/data/weight")
    for path in files:
        weight = torch.from_numpy(numpy.load(path, allow_pickle=False)).double().flatten()
        mu, strength = fit_recency(1 / weight)
        x = torch.linspace(0, 1, len(weight), dtype=torch.float64)
        found.numbers(1 / (mu * torch.exp(strength * x)), weight)
    return found


# ---- video ---------------------------------------------------------------------------------------


def evs(code: Checkout) -> Finding:
    """Choices and counts of the server, the counts by ``rounding="vllm"``."""
    from vtr.methods.evs import changed, dissimilarity

    names = "compute_retained_tokens_count", "compute_retention_mask"
    theirs = code.functions("vllm/multimodal/evs.py", *names)
    found = Finding()
    for seed, (t, h, w, q) in enumerate(
        ((8, 14, 14, 0.75), (5, 4, 6, 0.8), (10, 10, 10, 0.9), (10, 10, 10, 0.8), (4, 3, 5, 0.3))
    ):
        x = clip(t, h * w, 32, seed)
        mask = theirs.compute_retention_mask(x.reshape(-1, 32), (t, 2 * h, 2 * w), 2, q)
        number = vtr.EVS(keep=round(1 - q, 9), rounding="vllm").retained(t, h * w)
        found.choices(changed(dissimilarity(x), number).flatten(), mask)
    return found


def dycoke(code: Checkout) -> Finding:
    """Every frame but the last window's third, which their code leaves whole."""
    from vtr.methods.dycoke import thin

    theirs = code.functions("llava/model/llava_arch.py", "dycole_ttm").dycole_ttm
    found = Finding()
    for seed, (t, p, k) in enumerate(((8, 196, 0.7), (12, 49, 0.5), (32, 196, 0.3))):
        x = clip(t, p, 16, seed)
        marked = torch.cat([x.flatten(0, 1), torch.arange(t * p)[:, None]], 1)
        with _numbered(theirs, channels=16):
            rows = theirs(marked, p, k)[:, -1].long()
        mask = torch.zeros(t * p, dtype=torch.bool).index_fill(0, rows, True).view(t, p)
        mine = thin(x, int((1 - k) * p))
        frames = [f for f in range(t) if f != t - 2]
        found.choices(mine[frames], mask[frames])
    return found


@contextmanager
def _numbered(function: Any, channels: int) -> Iterator[None]:
    """Make a function compare only the first ``channels`` channels; the others number the tokens."""
    space = function.__globals__
    kept = space["torch"]
    cosine = F.cosine_similarity

    def first(a: Tensor, b: Tensor, dim: int) -> Tensor:
        return cosine(a[:, :channels], b[:, :channels], dim)

    functional = SimpleNamespace(
        normalize=lambda x, **_: torch.cat(
            [F.normalize(x[:, :channels], dim=1), x[:, channels:]], 1
        ),
        cosine_similarity=first,
    )
    space["torch"] = SimpleNamespace(
        nn=SimpleNamespace(functional=functional), stack=torch.stack, cat=torch.cat,
        tensor=lambda x: x,
    )  # fmt: skip
    try:
        yield
    finally:
        space["torch"] = kept


def fastvid(code: Checkout) -> Finding:
    """The whole method for LLaVA-OneVision, at the released settings."""
    from vtr.methods.fastvid import segments

    file = "fastvid_llavaonevision/LLaVA-NeXT/llava/model/language_model/modeling_qwen2.py"
    found = Finding()
    for seed, (t, share) in enumerate(((16, 19 / 196), (24, 29 / 196), (16, 0.25))):
        x = clip(t, 196, 48, seed)
        g = torch.Generator().manual_seed(seed)
        score, frames = torch.rand(t, 196, generator=g), clip(t, 1, 32, seed + 9, still=1.0)[:, 0]
        hidden = torch.cat([torch.randn(1, 5, 48, generator=g), x.reshape(1, -1, 48),
                            torch.randn(1, 7, 48, generator=g)], 1)  # fmt: skip
        settings = SimpleNamespace(
            video_start_idx=5, video_token_len=t * 196, frame_num=t, frame_attn_weights=score,
            frame_global_features=frames, fastvid_retention_ratio=share + 1e-9, fastvid_DySeg_c=8,
            fastvid_DySeg_tau=0.9, fastvid_STPrune_d=0.4, fastvid_DTM_p=4, fastvid_DTM_beta=0.6,
        )  # fmt: skip
        space = code.body(
            *(file, "seq_length > 1", "keep_indexs"),
            {"self": settings, "hidden_states": hidden, "seq_length": hidden.shape[1]},
        )
        index = space["keep_indexs"]
        inside = (index >= 5) & (index < 5 + t * 196)
        made = vtr.FastVID(keep=share, longest=None).compress(x, score, frames)
        own = torch.arange(t * 196)
        mine = (made.stands == own).nonzero()[:, 0]
        theirs = index[inside] - 5
        masks = [
            torch.zeros(t * 196, dtype=torch.bool).index_fill(0, i, True) for i in (mine, theirs)
        ]
        # Anchors that their rounding down leaves out exist only in ours.
        found.differ += int((masks[1] & ~masks[0]).sum())
        found.of += int(masks[1].sum())
        values = torch.zeros(t * 196, 48).index_copy(0, theirs, space["hidden_states"][0, inside])
        for start, stop in segments(frames, 8, 0.9):
            part = slice(start * 196, stop * 196)
            kept = masks[0][part]
            if torch.equal(kept, masks[1][part]):
                found.numbers(made.values[part][kept], values[part][kept])
    return found


def holitom(code: Checkout) -> Finding:
    """Before the language model, both given their numbers of tokens, and the merge inside it."""
    from vtr.methods import holitom as mine

    names = ("cluster_dpc_knn", "select_static_windows", "merge_tokens_by_clustering",
             "merge_tokens_by_attention_density", "merge_tokens_by_density", "holitom",
             "get_static_dynamic_features")  # fmt: skip
    theirs = code.functions(
        "holitom/llava_arch.py", *(f"LlavaMetaForCausalLM_holitom.{n}" for n in names)
    )
    myself = SimpleNamespace()
    for name in names:
        setattr(myself, name, getattr(theirs, name).__get__(myself))
    found = Finding()
    for seed, (t, p, keep, tau) in enumerate(
        ((16, 196, 0.25, 0.8), (16, 196, 0.15, 0.8), (24, 196, 0.10, 0.65))
    ):
        x = clip(t, p, 48, seed, still=0.7)
        score = torch.rand(t, p, generator=torch.Generator().manual_seed(seed))
        alike = F.cosine_similarity(x[:-1], x[1:], dim=-1)
        windows, gone = myself.select_static_windows(alike, t, tau, 1024)
        ratio = min(keep / ((t * p - gone) / (t * p)), 1)
        static, dynamic, _, attention, static_at, dynamic_at = myself.get_static_dynamic_features(
            x, score, windows, alike, tau
        )
        parts = [
            myself.holitom(
                static[i], dynamic[i], attention[i], static_at[i], dynamic_at[i], stop - start + 1,
                ratio, 0.0, 0.6, 7, torch.float32, "one_token",
            )
            for i, (start, stop) in enumerate(windows)
        ]  # fmt: skip
        assert mine.windows(alike > tau) == [(a, b + 1) for a, b in windows]

        def their_counts(total: int, sizes: Sequence[int], ratio: float = ratio) -> list[int]:
            kinds = zip(sizes, count(), strict=False)
            return [math.ceil(n * ratio) if i % 2 else round(n * ratio) for n, i in kinds]

        kept = mine.shares
        mine.shares = their_counts
        try:
            made = vtr.HoliTom(keep=keep, threshold=tau).compress(x, score)
        finally:
            mine.shares = kept
        found.rows(summed(made.stands, made.weights, x).float(), torch.cat(parts))
    _holitom_inner(code, found)
    return found


def _holitom_inner(code: Checkout, found: Finding) -> None:
    """The merge inside the language model, of random states and a random attention map."""
    from vtr.methods.holitom import merge_into_nearest

    g = torch.Generator().manual_seed(0)
    hidden, attention = torch.randn(1, 60, 32, generator=g), torch.rand(1, 4, 60, 60, generator=g)
    space = code.body(
        *("holitom/modeling_qwen2.py", "layer_idx == HOLITOM_k and position_ids.size(1) > 1"),
        "keep_indexs",
        {
            "layer_outputs": (None, attention), "hidden_states": hidden.clone(),
            "HOLITOM_image_token_start_index": 5, "HOLITOM_image_token_length": 48,
            "HOLITOM_r": 0.5, "seq_length_with_past": 60, "print": lambda *_: None,
        },
    )  # fmt: skip
    index = space["keep_indexs"]
    stays = torch.zeros(1, 60, dtype=torch.bool).index_fill(1, index, True)
    moving = (torch.arange(60) >= 5) & (torch.arange(60) < 53)
    step = merge_into_nearest(hidden, moving & ~stays, moving & stays, stays)
    assert step.map is not None
    merged = step.map.merge(hidden, step.weights, step.normalize)
    found.numbers(merged[0], space["hidden_states"][0, index])


def prunevid(code: Checkout) -> Finding:
    """Before the language model, then the choice inside it, with shares that are whole numbers."""
    from vtr.methods.prunevid import best_of_groups

    names = "compute_cluster_vectors", "spatial_merge_tokens", "merge_frames_dynamic"
    theirs = code.functions(
        "models/pllava/modeling_pllava.py",
        *("index_points", "cluster_dpc_knn", "refine_clusters", "segment_lengths"),
        *(f"PllavaForConditionalGeneration.{n}" for n in names),
        einsum=_einsum,
    )
    found = Finding()
    for seed, (t, h) in enumerate(((16, 12), (16, 8), (24, 10))):
        x = clip(t, h * h, 48, seed, still=0.6)
        config = SimpleNamespace(
            num_frames=t, pooling_shape=(t, h, h), temporal_segment_ratio=0.25, cluster_ratio=0.5
        )
        myself = SimpleNamespace(config=config)
        for name in names:
            setattr(myself, name, getattr(theirs, name).__get__(myself))
        merged, *_ = myself.merge_frames_dynamic(x.reshape(1, -1, 48))
        made = vtr.PruneVid().compress(x)
        found.rows(summed(made.stands, made.weights, x).float(), merged[0])
    import numpy

    choose = code.functions(
        "models/pllava/elastic_cache.py", "VTPWindowCache.process_attention", np=numpy
    ).process_attention
    rows = torch.rand(1, 4, 6, 60, generator=torch.Generator().manual_seed(0))
    # One segment of two frames: 20 static tokens, 20 others of each frame.
    index = choose(SimpleNamespace(alpha=0.4), rows, [20], [40], [2])
    mask = torch.zeros(60, dtype=torch.bool).index_fill(0, index, True)
    groups = torch.arange(60) // 20
    found.choices(best_of_groups(rows.amax((0, 1, 2)), groups, 0.4), mask)
    return found


def vidcom2(code: Checkout) -> Finding:
    """The tokens of each frame, given their numbers, and the numbers where rounding gives the budget's sum."""
    from vtr.methods.vidcom2 import unique

    names = ("select_low_var_channels", "compute_gaussian_scores", "_multi_scale_gaussian")
    names += ("compute_scales", "select_outlier_indices")
    known = {name: Any for name in ("List", "Tuple", "Optional", "Dict")}
    theirs = code.functions("token_compressor/vidcom2/vidcom2.py", *names, **known)
    found, compared = Finding(), 0
    for seed in range(60):
        x = clip(16, 49, 64, seed)
        number = 16 * (6 + seed % 20)
        video, frame = theirs.compute_gaussian_scores(
            theirs.select_low_var_channels(x.flatten(0, 1)), 49
        )
        scales = theirs.compute_scales(-video.mean(-1), number / (16 * 49))
        kept = theirs.select_outlier_indices(video + frame, scales, 49)
        if sum(map(len, kept)) != number:
            continue  # theirs leaves another number
        mask = torch.stack([torch.zeros(49, dtype=torch.bool).index_fill(0, i, True) for i in kept])
        found.choices(unique(x, number), mask)
        compared += 1
    assert compared > 9, compared
    return found


def sttm(code: Checkout) -> Finding:
    """Trees of frames with even sides, the links between frames, and the means of what is linked."""
    try:
        import einops
    except ImportError as error:
        raise Missing("HYUNJS/STTM needs einops: pip install einops") from error
    folder = "token_merging_utils/quadtree"
    spatial = code.functions(
        f"{folder}_spatial_merger.py",
        "avgpool_to_even_side_feature", "sumpool_to_even_side_feature", "pool_to_even_side_index_video",
        einops=einops, stride=2,
    )  # fmt: skip
    joined = code.functions(
        f"{folder}_temporal_merger.py",
        "get_cross_frame_node_pairs_fast", "filter_cross_frame_node_pairs", "agg_feature_and_metadata",
        einops=einops,
    )  # fmt: skip
    build = code.functions(
        f"{folder}_builder.py", "quadtree_build_iteration_video", "quadtree_build_video",
        einops=einops, cross_frame_node_merging_fast=None, cross_frame_node_merging_slow=None,
        **vars(spatial),
    ).quadtree_build_video  # fmt: skip
    found = Finding()
    for seed, (side, root) in enumerate(((8, 0), (16, 1), (16, 0))):
        small = clip(6, (side // 4) ** 2, 24, seed).view(6, side // 4, side // 4, 24)
        x = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        x = x + 0.4 * noise * torch.arange(1, side + 1)[:, None] / side
        value, number, corners = build(x.permute(0, 3, 1, 2), 0.9, root_level=root)
        places = (corners[:, :3] * torch.tensor([side * side, side, 1])).sum(1).long()
        for temporal in (None, 0.7):
            theirs, kept = value, places
            if temporal is not None:
                pairs = joined.get_cross_frame_node_pairs_fast(corners)
                pairs = joined.filter_cross_frame_node_pairs(value, pairs, temporal)
                group = list(range(len(value)))
                for a, b in pairs.tolist():  # theirs stops before all are joined
                    new, old = sorted((group[a], group[b]))
                    group = [new if g == old else g for g in group]
                merged = joined.agg_feature_and_metadata(
                    value, number, corners, torch.tensor(group), False
                )
                theirs, kept = merged["feature"], places[sorted(set(group))]
            stands, weights = vtr.STTM(0.9, temporal, root=root).merge(x)
            found.choices(stands.unique(), kept.sort().values)
            found.numbers(summed(stands, weights, x), theirs[kept.argsort()])
    return found


class _OnCPU(_Quiet):
    """torch whose new tensors stay on the CPU."""

    @staticmethod
    def tensor(value: Any, **options: Any) -> Any:
        return SimpleNamespace(cuda=lambda device: torch.tensor(value, **options))


def mustdrop(code: Checkout) -> Finding:
    """Merged windows of random states, and what text drops behind a layer of a model."""
    import numpy

    from tests.tiny import site
    from tests.vision.vlm.models import IMAGE
    from vtr.methods.common.alike import merge_windows

    try:
        from einops import rearrange
    except ImportError as error:
        raise Missing("liuting20/MustDrop needs einops: pip install einops") from error
    merging = code.functions(
        "llava/model/multimodal_encoder/local_merge.py", "conditional_pooling", "merge_wavg",
        rearrange=rearrange, np=numpy, torch=_OnCPU(),
    )  # fmt: skip
    found = Finding()
    for seed in range(4):
        x = clip(8, 8, 24, seed)[:, None].expand(-1, 3, -1, -1).repeat_interleave(3, 2)
        x = x.reshape(1, 576, 24)
        noise = torch.rand(1, 576, 1, generator=torch.Generator().manual_seed(seed))
        x = x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(9 + seed))
        both = torch.cat([x[:, :1], x], 1)
        merged, _ = merging.merge_wavg(merging.conditional_pooling(both, 0.8, (3, 3)), both)
        here = site(n=576, batch=1)
        here.hidden, here.grid = x, (24, 24)
        step, _ = merge_windows(here, 3, 0.8, False)
        assert step is not None
        found.rows(step.merge(x)[0], merged[0, 1:])
    file = "llava/model/language_model/modelling_sparse_llama.py"
    filtered = code.functions(file, "LlamaDynamicvitModel.dual_attention_filter")
    model, inputs, outputs = _llava()
    first = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    key = int(outputs.attentions[-2][0, :, 0, 1:].mean(0).argmax())
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    for layer, overall, single in ((0, 0.00174, 0.002), (1, 0.0018, 0.0019), (2, 0.00172, 0.003)):
        kept, _ = filtered.dual_attention_filter(None, maps[layer], first, 576, overall, single)
        kept = torch.cat([kept, torch.tensor([key])]).unique()
        method = vtr.MustDrop(overall, single, layers=(layer,), key=1e-6, window=None)
        with torch.no_grad(), vtr.apply(model, method) as handle:
            model(**inputs)
        assert 1 < len(kept) < 576, len(kept)
        found.choices(handle.trace.stages[-1].total.kept[0], kept)
    return found


def _einsum(*given: Any) -> Tensor:
    """Rearrange a tensor by an einops pattern, whose axes are words."""
    pattern, *tensors = given if isinstance(given[0], str) else (given[-1], *given[:-1])
    return torch.einsum(pattern.replace(" ", ""), *tensors)


def framefusion(code: Checkout) -> Finding:
    """A prefill of 28 layers, on eager attention, with all queries, and with the last row."""
    from tests.vision.vlm.models import VIDEO, build, llama, prompts, transformers
    from tests.vision.vlm.models import clip as tower

    names = ("TEXT_TOKEN", "IGNORE_TOKEN")
    space = code.assignments("framefusion/main.py", names, {})
    theirs = code.functions(
        *(
            "framefusion/main.py",
            "FrameFusion",
            "cosine_similarity",
            "find_contigious_latter_index",
        ),
        List=list,
        **{n: space[n] for n in names},
    )
    text = llama()
    text.num_hidden_layers = 28
    config = transformers.LlavaNextVideoConfig(
        vision_config=tower(), text_config=text, image_token_id=1, video_token_id=VIDEO,
        video_seq_length=32, vision_feature_layer=-2,
    )  # fmt: skip
    model = build(transformers.LlavaNextVideoForConditionalGeneration, config)
    model.set_attn_implementation("eager")
    found = Finding()
    # Budgets at which both roundings leave the same number: of merges theirs is rounded down, of tokens
    # that the cut leaves to the nearest, where ours always rounds the tokens down.
    for noise, cost, similarity, rows in (
        (0.02, 0.5, 0.6, None),
        (1.0, 0.5, 0.95, None),
        (1.0, 0.4, 0.95, 1),
        (0.5, 0.5, 0.93, 3),
        (0.4, 0.46, 0.93, None),
    ):
        frames = torch.randn(1, 8, 3, 28, 28, generator=torch.Generator().manual_seed(0))
        frames = frames[:, :1] + noise * frames
        inputs = {"pixel_values_videos": frames, **prompts([[(32, VIDEO)]])}
        method = vtr.FrameFusion(keep=cost, similarity=similarity, rows=rows)
        fusion = theirs.FrameFusion(cost, similarity, 0.1)
        with torch.no_grad():
            other, kept = _their_prefill(model, inputs, fusion, VIDEO, rows)
            with vtr.apply(model, method) as handle:
                ours = model(**inputs).logits[0]
        last = handle.trace.stages[-1].total.kept[0]
        masks = [torch.zeros(32, dtype=torch.bool).index_fill(0, i, True) for i in (last, kept)]
        found.choices(*masks)
        if torch.equal(*masks):
            found.numbers(ours[-3:], model.lm_head(other)[-3:].detach())
    return found


def _their_prefill(
    model: Any, inputs: Any, fusion: Any, video: int, rows: int | None
) -> tuple[Tensor, Tensor]:
    """The language model's layers with their module at its place in each, and the tokens left."""
    lm, ids = model.model.language_model, inputs["input_ids"][0]
    features = model.model.get_video_features(inputs["pixel_values_videos"])
    x = lm.embed_tokens(ids)
    columns = (ids == video).nonzero()[:, 0]
    x[columns] = getattr(features, "pooler_output", features)[0]
    kind = torch.full((1, len(ids)), -1)
    kind[0, columns] = torch.arange(len(columns)) % 4
    start, length = columns[:1], torch.tensor([len(columns)])
    fusion.prepare(kind, 4, start, columns[-1:], length, len(ids))
    index = torch.arange(len(ids))[None]
    rope = list(lm.rotary_emb(x[None], index))
    # Their handler of positions carries the tokens' numbers along.
    tables = [torch.cat([rope[0], index[..., None].to(x)], -1), rope[1]]
    x, tables, _ = fusion(x[None], tables, None)
    for layer in lm.layers:
        n = x.shape[1]
        mask = torch.full((n, n), -math.inf).triu(1)[None, None]
        pair = tables[0][..., :-1], tables[1]
        out, weights = layer.self_attn(
            layer.input_layernorm(x), position_embeddings=pair, attention_mask=mask
        )
        x, tables, _ = fusion(
            x + out, tables, None, weights if rows is None else weights[:, :, -rows:]
        )
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    left = tables[0][0, :, -1].long()
    left = left[(left >= columns[0]) & (left <= columns[-1])] - columns[0]
    return lm.norm(x)[0], left


# ---- attention of language models ----------------------------------------------------------------


def var(code: Checkout) -> Finding:
    """The map that they edit, and which of its rows change, for prompts of three text tokens, an image and text."""
    from collections import defaultdict
    from copy import deepcopy

    from tests.methods.language_sites import Prompt

    facts = SimpleNamespace(
        segments={"begin_pos": {"image": 3}},
        metadata={"vis_len": 20},
        model_config={"num_attention_heads": 4, "num_hidden_layers": 32},
    )
    theirs = code.functions(
        *("src/logic/logic.py", "DefaultVars", "LogicEngine"),
        *("DimProspector", "HeadFork", "VARProcessor"),
        **{"MetadataStation": facts, "defaultdict": defaultdict, "MODEL_LLM": {}},
        **{"DIM_SINK": {"llama-v2-7b": torch.tensor([3, 7])}},
        ValueMonitor=SimpleNamespace(get_output_token_count=lambda: -1),
        copy=SimpleNamespace(deepcopy=deepcopy),
    )
    theirs.LogicEngine.activate(tau=1.5, rho=0.5, summ=0.2, p=0.6)
    method = vtr.VAR(0.6, dims=(3, 7), tau=1.5, dense_layers=0)
    found = Finding()
    for seed in range(30):
        prompt = Prompt("ttt" + "v" * 20 + "t" * 9, seed=seed, sharp=2.5)
        site, every = prompt.site(), torch.arange(32)[None]
        method.attend(site)
        rows = method.rows(site)
        assert rows is not None
        before = site.attention_rows(every)
        ours = before.index_copy(2, rows[0], method.edit(site, before[:, :, rows[0]], rows))
        theirs.DimProspector.run_logic(prompt.hidden, 2)
        theirs.HeadFork.run_logic(before.clone(), 2)
        edited = theirs.VARProcessor.attn_redist(before.clone(), 2)
        found.choices((ours != before).any(-1), (edited != before).any(-1))
        found.numbers(ours, edited)
    return found


def act(code: Checkout) -> Finding:
    """The map of a head that they edit, for prompts whose first token is a sink."""
    from copy import deepcopy

    from tests.methods.language_sites import Prompt
    from vtr.methods.common.sinks import hidden_sinks, move_mass

    theirs = code.functions(
        *("models/llama_modelling_aug.py", "atten_process_cal"),
        **{"BETA": 0.4, "THRES": 0.12, "HEAD_NUM": 0},
        copy=SimpleNamespace(deepcopy=deepcopy),
    )
    found = Finding()
    for seed in range(60):
        site = Prompt("t" * 30, seed=seed).site()
        before = site.attention_rows(torch.arange(30)[None])
        if before[0, 0, :, 0].mean() <= 0.12:
            continue  # theirs takes the first sink that it finds for the first token
        sinks = hidden_sinks(site, 0.12)[:, :, None]
        ours = move_mass(before, sinks, ~sinks, 0.4)[0, 0, 1:]
        edited = theirs.atten_process_cal(before.clone())[0, 0, 1:]
        found.choices((ours != before[0, 0, 1:]).any(-1), (edited != before[0, 0, 1:]).any(-1))
        found.numbers(ours, edited)
    return found


# ---- KV caches -----------------------------------------------------------------------------------


def same_entries(ours: Any, kv_heads: int, theirs: Callable[..., Tensor], seed: int) -> Finding:
    """Compare the columns that heads hold after a prompt of 30 tokens and each of 12 decoding steps.

    Args:
        ours: an eviction method.
        theirs: called with the attention (H, L, columns held) of each call and the columns (H, K) that are
            held, those of the call among them; returns the columns (H, n) that stay.
    """
    from tests.methods.kv_sites import Cache

    cache = Cache("t" + "v" * 20 + "t" * 21, heads=kv_heads, kv_heads=kv_heads, seed=seed)
    found, held = Finding(), torch.zeros(kv_heads, 0, dtype=torch.long)
    for rows in (30, *[1] * 12):
        site = cache.call(rows)
        ours.watch(site)
        kept = ours.compress(site).kept
        held = torch.cat(
            [held, torch.arange(cache.length - rows, cache.length).expand(kv_heads, -1)], 1
        )
        at = torch.arange(cache.length - rows, cache.length)
        q, k = cache.q[0, :, at], cache.k[0].gather(1, held[..., None].expand(-1, -1, 8))
        scores = (q @ k.transpose(1, 2) * cache.scale).masked_fill(
            held[:, None] > at[:, None], -torch.inf
        )
        held = theirs(scores.softmax(-1), held)
        found.choices(site.columns[kept].view(kv_heads, -1), held)
        cache.keep(kept)
    return found


def h2o(code: Checkout) -> Finding:
    """The cache of their version that frees memory: 6 heavy entries, and the 5 newest."""
    module = code.functions(
        "h2o_hf/utils_real_drop/modify_llama.py", "H2OKVCache_LayerWise", print=lambda *_: None
    )
    found = Finding()
    for seed in range(20):
        their_cache = module.H2OKVCache_LayerWise(6, 5)

        def theirs(attention: Tensor, held: Tensor, cache: Any = their_cache) -> Tensor:
            values = held[None, ..., None]
            kept: Tensor = cache((values, values), attention[None])[0]
            return kept[0, ..., 0]

        method = vtr.H2O(11, evict="all", every=1, first=0, recent=5, scoring="sum")
        found.add(same_entries(method, 4, theirs, seed))
    return found


def streaming_llm(code: Checkout) -> Finding:
    """The cache of 4 sinks and a window of 7."""
    module = code.functions(
        *("streaming_llm/kv_cache.py", "slice1d", "slice2d", "slice3d", "StartRecentKVCache"),
        print=lambda *_: None,
        DIM_TO_SLICE={2: lambda x, start, end: x[:, :, start:end, ...]},
    )
    found = Finding()
    their_cache = module.StartRecentKVCache(4, 7)

    def theirs(attention: Tensor, held: Tensor) -> Tensor:
        values = held[None, ..., None]
        kept: Tensor = their_cache([[values, values]])[0][0]
        return kept[0, ..., 0]

    for seed in range(5):
        method = vtr.StreamingLLM(11, evict="all", every=1, first=4, recent=0)
        found.add(same_entries(method, 2, theirs, seed))
    return found


def a2sf(code: Checkout) -> Finding:
    """The 40 entries of 121 that stay after a prompt, the newest 16 among them, with grouped heads."""
    from tests.methods.kv_sites import Cache

    folder = "utils_real_drop"
    names = {"Optional": object, "Tuple": object}
    base = code.functions(f"{folder}/policies/base.py", "CompressionPolicy", **names)
    policies = code.functions(
        f"{folder}/policies/a2sf.py", "A2SFPolicy", CompressionPolicy=base.CompressionPolicy
    )
    attend = code.functions(f"{folder}/attention.py", "compressed_attention", **names)
    found = Finding()
    for seed in range(20):
        for alpha in (0.0, 0.3, 0.95, 1.0):
            cache = Cache("t" + "v" * 60 + "t" * 60, seed=seed)
            site = cache.call(121)
            method = vtr.A2SF(40, alpha=alpha, evict="all", first=0, recent=16, scoring="sum")
            method.watch(site)
            k, v = (x.repeat_interleave(2, 1) for x in (cache.k, cache.v))
            policy = policies.A2SFPolicy(2, 40, alpha)
            _, theirs = attend.compressed_attention(
                cache.q, k, v, policy=policy, attn_mask=None, head_dim=8
            )
            ours = site.columns[method.compress(site).kept].view(2, -1)
            found.choices(ours, theirs[0])
    return found


# ---- diffusion -----------------------------------------------------------------------------------


def radial(code: Checkout) -> Finding:
    """The released mask at 3,840 tokens per frame, for both kinds of models."""
    from vtr.kernels import masks

    theirs = code.functions(
        "radial_attn/attn_mask.py",
        *("shrinkMaskStrict", "get_diagonal_split_mask", "get_window_width"),
        "gen_log_mask_shrinked",
        print=lambda *_: None,
    )
    found = Finding()
    for kind, decay, frames in (("wan", 0.2, 7), ("hunyuan", 0.95, 6)):
        n = 3840 * frames
        mask = theirs.gen_log_mask_shrinked(
            torch.zeros(1), n, n, frames, 128, "radial", decay, kind
        )
        ours = masks.radial(
            frames, 3840, block=128, decay=decay, sink=kind == "wan", rule="released"
        )
        found.choices(ours.to_dense(blocks=True), mask)
    return found


def sliding_tile(code: Checkout) -> Finding:
    """The token mask of their FlexAttention reference, windows of odd numbers of tiles, with text."""
    from vtr.kernels import masks

    theirs = code.functions("fastvideo-kernel/tests/support_flex_sta.py", "generate_sta_mask")
    found = Finding()
    for shape, window, tile, text in (
        ((18, 8, 24), (3, 1, 3), (6, 8, 8), 0),
        ((8, 10, 12), (3, 5, 3), (2, 2, 4), 20),
        ((6, 20, 8), (1, 3, 1), (2, 4, 4), 7),
    ):
        n = math.prod(shape) + text
        index = torch.arange(n)
        rule = theirs.generate_sta_mask(shape, window, tile, text)
        mask = rule(None, None, index[:, None], index[None])
        found.choices(masks.sliding_tile(shape, tile, window, text=text).to_dense(), mask)
    return found


def neighborhood(code: Checkout) -> Finding:
    """The token mask of their FlexAttention backend, at 200 settings drawn at random."""
    import functools

    from vtr.kernels import masks

    file, found = "src/natten/backends/flex.py", Finding()
    g = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    for _ in range(200):
        axes = draw(1, 3)
        shape = tuple(draw(2, 30 // axes) for _ in range(axes))
        dilation = tuple(draw(1, max(1, min(3, n // 2))) for n in shape)
        window = tuple(draw(1, n // d) for n, d in zip(shape, dilation, strict=True))
        stride = tuple(draw(1, w) for w in window)
        causal = tuple(draw(0, 3) == 0 for _ in shape)
        theirs = code.functions(
            *(file, "idx2crd", "get_na_flex_mask.single_dim_tiling_mask"),
            na_dim=axes,
            functools=functools,
        )
        index = torch.arange(math.prod(shape))
        rows = index[:, None].expand(-1, len(index))
        mask = theirs.single_dim_tiling_mask(
            *(None, None, rows, rows.T, shape, window, stride, dilation, causal)
        )
        ours = masks.neighborhood(shape, window, stride=stride, dilation=dilation, causal=causal)
        found.choices(ours.to_dense(), mask)
    return found


def zipcache(code: Checkout) -> Finding:
    """Keys and values of one class of bits, stored and read: one KV head, 4 and 2 bits."""
    from vtr.core.packed_entries import PackedEntries

    file = "zipcache/models/CompressUtils/compress_function.py"
    kinds = ("true_channelwise_{}", "true_channel_tokenwise_{}")
    names = [kind.format(way) for kind in kinds for way in ("compress", "decompress")]
    names += ["true_channel_wise_quantize", "true_channel_tokenwise_quantize"]
    names += ["tokenwise_dequantization_w_channelscale"]
    names += [f"transfer_8bit_to_{b}bit_batchwise" for b in (4, 2)]
    names += [f"transfer_{b}bit_to_8bit_batchwise" for b in (4, 2)]
    theirs, found = code.functions(file, *names), Finding()
    g = torch.Generator().manual_seed(0)
    for bits in (4, 2):
        for _ in range(20):
            k = torch.randn(1, 1, 64, 16, generator=g) + 9 * torch.randn(1, 1, 1, 16, generator=g)
            v = torch.randn(1, 1, 64, 16, generator=g) * torch.randn(16, generator=g).exp()
            valid = torch.ones(1, 1, 64, dtype=torch.bool)
            ours = PackedEntries.pack(k, v, valid, bits).unpack()
            size = torch.float32, k.shape
            key = theirs.true_channelwise_compress(k.clone(), bits)
            found.numbers(ours[0], theirs.true_channelwise_decompress(*key, bits, *size))
            *value, factor = theirs.true_channel_tokenwise_compress(v.clone(), bits)
            value = theirs.true_channel_tokenwise_decompress(*value, bits, factor, *size)
            found.numbers(ours[1], value)
    return found


COMPARISONS: dict[str, tuple[str, Callable[[Checkout], Finding]]] = {
    "a2sf": ("Dirac-Notation/A2SF", a2sf),
    "act": ("GATECH-EIC/ACT", act),
    "ats": ("adaptivetokensampling/ATS", ats),
    "cdpruner": ("Theia-4869/CDPruner", cdpruner),
    "dart": ("ZichenWen1/DART", dart),
    "debias": ("intcomp/attention-bias", debias),
    "diffrate": ("OpenGVLab/DiffRate", diffrate),
    "divprune": ("vbdi/divprune", divprune),
    "dycoke": ("KD-TAO/DyCoke", dycoke),
    "evit": ("youweiliang/evit", evit),
    "evo-vit": ("YifanXu74/Evo-ViT", evo_vit),
    "evs": ("vllm-project/vllm", evs),
    "fastervlm": ("Theia-4869/FasterVLM", fastervlm),
    "fastv": ("pkunlp-icler/FastV", fastv),
    "fastvid": ("LunarShen/FastVID", fastvid),
    "flowcut": ("TungChintao/FlowCut", flowcut),
    "framefusion": ("thu-nics/FrameFusion", framefusion),
    "h2o": ("FMInference/H2O", h2o),
    "hired": ("hasanar1f/HiRED", hired),
    "holitom": ("cokeshao/HoliTom", holitom),
    "mustdrop": ("liuting20/MustDrop", mustdrop),
    "neighborhood": ("SHI-Labs/NATTEN", neighborhood),
    "pixelprune": ("OPPO-Mente-Lab/PixelPrune", pixelprune),
    "ppt": ("xjwu1024/PPT", ppt),
    "prunevid": ("Visual-AI/PruneVid", prunevid),
    "pyramiddrop": ("Cooperx521/PyramidDrop", pyramiddrop),
    "radial": ("mit-han-lab/radial-attention", radial),
    "sliding-tile": ("hao-ai-lab/FastVideo", sliding_tile),
    "streaming-llm": ("mit-han-lab/streaming-llm", streaming_llm),
    "sttm": ("HYUNJS/STTM", sttm),
    "tome": ("facebookresearch/ToMe", tome),
    "tomesd": ("dbolya/tomesd", tomesd),
    "tps": ("megvii-research/TPS-CVPR2023", tps),
    "var": ("seilk/VisAttnSink", var),
    "vidcom2": ("xuyang-liu16/VidCom2", vidcom2),
    "vispruner": ("Theia-4869/VisPruner", vispruner),
    "visionzip": ("dvlab-research/VisionZip", visionzip),
    "vtc-cls": ("THU-MIG/VTC-CLS", vtc_cls),
    "zipcache": ("ThisisBillhe/ZipCache", zipcache),
}
