"""Every family, on tiny random models of diffusers' classes: sparse attention and merging inside the
model equal a calculation that does not know of vtr."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtr
from tests.diffusion.models import ALL, CASES, MORE, Case, Fixed, eager, made, token_mask
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.tokens import TokenMap
from vtr.diffusion.families import family_of
from vtr.diffusion.processor import SiteProcessor
from vtr.kernels import BlockMask
from vtr.methods.common.attention import AttentionMethod

pytestmark = pytest.mark.filterwarnings("ignore:CPU Autocast", "ignore:.*autocast")


@pytest.fixture(params=ALL, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return ALL[request.param]


@pytest.fixture(scope="module")
def model(case: Case) -> Any:
    return case.build()


@torch.no_grad()
def run(model: Any, case: Case, **call: Any) -> Tensor:
    return made(model(**case.call(**call)))


def processors(model: Any, case: Case) -> list[Any]:
    return [model.get_submodule(name).processor for name in case.attention]


def test_a_full_mask_gives_the_unwrapped_output(model: Any, case: Case) -> None:
    want = run(model, case)
    with vtr.apply(model, Fixed(density=2.0)):
        assert torch.allclose(run(model, case), want, atol=2e-6)


@pytest.mark.compat
def test_a_mask_gives_what_eager_attention_gives(model: Any, case: Case) -> None:
    with eager(model, case.attention, 0.4, case):
        want = run(model, case)
    assert not torch.allclose(run(model, case), want, atol=1e-2), "the mask changes the output"
    with vtr.apply(model, Fixed()) as handle:
        assert torch.allclose(run(model, case), want, atol=2e-6)
        assert sorted(handle.trace.notes["attention"]) == list(range(len(case.attention)))


@dataclass(frozen=True)
class Look(Fixed):
    """Keeps the sites of its calls."""

    seen: list[Any] = field(default_factory=list, compare=False)

    def attend(self, site: Any) -> Tensor:
        self.seen.append(site)
        return super().attend(site)


def test_a_site_says_where_tokens_and_text_are(model: Any, case: Case) -> None:
    """A change of one patch of the latents changes the query of its token, and of no other."""
    given, look = case.call(batch=1), Look()
    name = "x" if "x" in given else "hidden_states"
    place = tuple(n // 2 for n in case.grid)
    _, height, width = case.grid
    number = (place[0] * height + place[1]) * width + place[2]
    latents = torch.stack(given[name]) if name == "x" else given[name].clone()
    if latents.ndim == 3:  # tokens already, in raster order
        latents[:, number] += 1.0
    else:
        index = [slice(None)] * latents.ndim
        for axis, at, count in zip(_axes(latents), place, case.grid, strict=True):
            if axis is not None:
                patch = latents.shape[axis] // count
                index[axis] = slice(at * patch, (at + 1) * patch)
        latents[tuple(index)] += 1.0
    with torch.no_grad(), vtr.apply(model, look):
        model(**given)
        model(**{**given, name: list(latents) if name == "x" else latents})
    one, two = (s for s in look.seen if s.layer == 0)
    assert one.grid == case.grid and (one.text_first, one.layers) == (
        case.text_first, len(case.attention),
    )  # fmt: skip
    words = case.text + case.extra
    if model.mode_blocks if hasattr(model, "mode_blocks") else False:
        words = 0  # the first blocks of Flux.3 see the image alone
    for name, alone in (("mochi", 3), ("framepack", 65), ("z-image", 61)):
        if case is ALL[name]:
            words = alone  # the valid ones of a sample
    assert one.text == words and one.q.shape[2] == case.tokens + one.text
    attention = model.get_submodule(case.attention[0])
    assert one.q.shape[:2] == (1, getattr(attention, "heads", None) or attention.num_heads)
    changed = (one.q != two.q).any(3).any(1)[0].nonzero().flatten().tolist()
    if case is ALL["z-image"] or case is ALL["lumina2"]:
        return _refined(changed, case, one)
    assert changed == [number + one.first]


def _refined(changed: list[int], case: Case, site: Any) -> None:
    """Z-Image and Lumina 2 let the image's tokens see each other before the layers with the text."""
    padding = -case.tokens % 32 if case is ALL["z-image"] else 0
    assert changed == list(range(site.first, site.first + case.tokens + padding))
    assert site.first == (case.text if case.text_first else 0)


def _axes(latents: Tensor) -> tuple[int | None, int, int]:
    """Where frames, rows and columns are: their sizes differ from those of batch and channels."""
    rows = next(i for i in range(latents.ndim - 1) if tuple(latents.shape[i : i + 2]) in _SIZES)
    if latents.ndim == 4:
        return None, rows, rows + 1
    # (B, F, H, W, C) and (B, F, C, H, W), else (B, C, F, H, W)
    return 1 if rows == 2 or latents.shape[2] == 4 else 2, rows, rows + 1


_SIZES = {(6, 10), (10, 14), (12, 12), (5, 7), (3, 5)}


def test_only_the_layers_that_are_not_dense_change(model: Any, case: Case) -> None:
    sparse = case.attention[1:]
    with eager(model, sparse, 0.4, case):
        want = run(model, case)
    with vtr.apply(model, Fixed(dense_layers=1)):
        assert torch.allclose(run(model, case), want, atol=2e-6)


@pytest.mark.compat
def test_dense_calls_and_removal_are_bit_identical(model: Any, case: Case) -> None:
    want, before = run(model, case), processors(model, case)
    keys = list(model.state_dict())
    handle = vtr.apply(model, Fixed(dense_steps=1))
    assert torch.equal(run(model, case), want), "the first step is dense"
    assert list(model.state_dict()) == keys
    handle.pause()
    assert all(a is b for a, b in zip(processors(model, case), before, strict=True))
    handle.resume()
    assert all(isinstance(p, SiteProcessor) for p in processors(model, case))
    handle.remove()
    assert all(a is b for a, b in zip(processors(model, case), before, strict=True))
    assert "cache_context" not in model.__dict__ and not model._forward_pre_hooks
    assert torch.equal(run(model, case), want)


def test_a_sample_gets_in_a_batch_what_it_gets_alone(model: Any, case: Case) -> None:
    given = case.call(batch=2)
    one = case.call(batch=1)
    alone = {k: v[:1] if _batched(v, one[k]) else v for k, v in given.items()}
    with torch.no_grad(), vtr.apply(model, Own()):
        both, one = made(model(**given)), made(model(**alone))
    assert torch.allclose(both[:1], one, atol=2e-6)


def _batched(both: Any, one: Any) -> bool:
    return isinstance(both, (Tensor, list)) and len(both) == 2 and len(one) == 1


@dataclass(frozen=True)
class Own(AttentionMethod):
    """Random attention within the grid, which does not depend on the length of the text; text is dense."""

    name: ClassVar[str] = "own"
    paper: ClassVar[str] = "none"

    def attend(self, site: Any) -> Tensor:
        grid = slice(site.first, site.first + site.tokens)
        seen = torch.ones(site.q.shape[2], site.q.shape[2], dtype=torch.bool)
        seen[grid, grid] = token_mask(site.tokens, 0.4)
        out: Tensor = site.sparse(BlockMask.from_dense(seen, block=16))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    model = case.build().to(dtype)
    given = {k: _cast(v, dtype) if _is_state(k) else v for k, v in case.call().items()}
    if any(case is ALL[name] for name in _BY_TIME):  # the timestep has the dtype
        given["timestep"] = given["timestep"].to(dtype)
    for name, module in model.named_modules():
        if case is MORE["kandinsky5"] and ("time_embed" in name or "modulation" in name):
            module.float()  # as from_pretrained leaves them
    with torch.no_grad():
        with eager(model, case.attention, 0.4, case):
            want = made(model(**given)).float()
        with vtr.apply(model, Fixed()):
            out = made(model(**given))
    assert out.dtype == dtype
    assert torch.allclose(out.float(), want, atol=3e-2, rtol=3e-2)


def test_autocast(model: Any, case: Case) -> None:
    """Norms make queries and keys float32 there, and values have the lower precision."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with eager(model, case.attention, 0.4, case):
            want = run(model, case)
        with vtr.apply(model, Fixed()):
            out = run(model, case)
    assert out.dtype == want.dtype
    assert torch.allclose(out.float(), want.float(), atol=3e-2, rtol=3e-2)


_BY_TIME = (
    "hunyuan-dit", "hunyuan-video-1.5", "hunyuan-video-1.5-i2v", "hunyuan-image", "kandinsky5",
)  # fmt: skip


def _is_state(name: str) -> bool:
    states = ("hidden_states", "pooled_projections", "image_embeds", "x", "cap_feats", "latents_")
    return "mask" not in name and any(name == s or (s in name and len(s) > 1) for s in states)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_cast(v, dtype) for v in value]
    return value.to(dtype) if value.is_floating_point() else value


def test_copies_are_independent(model: Any, case: Case) -> None:
    want = run(model, case)
    handle = vtr.apply(model, Fixed())
    sparse = run(model, case)
    twin = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(run(model, case), want)
    assert torch.equal(run(twin, case), sparse)
    (other,) = vtr.handles(twin)
    other.remove()
    assert torch.equal(run(twin, case), want)


# ---- merging around attention and MLP ------------------------------------------------------------


def chosen(batch: int, tokens: int) -> Tensor:
    """(B, M) ascending tokens that stay, another half for each sample; the first always."""
    generator = torch.Generator().manual_seed(3)
    rank = torch.rand(batch, tokens, generator=generator)
    rank[:, 0] = 2
    return rank.topk(tokens // 2).indices.sort(1).values


@dataclass(frozen=True)
class Half(TokenMethod):
    """Attention of half the tokens among themselves; the others copy the one before them."""

    name: ClassVar[str] = "half"
    paper: ClassVar[str] = "none"
    sites: ClassVar[tuple[str, ...]] = ("block",)
    everything: bool = False
    around: str = "attention"

    def parts(self) -> frozenset[str]:
        return frozenset({self.around})

    def stages(self, info: Any) -> tuple[Stage, ...]:
        return tuple(Stage("block", n) for n in range(info.depth["block"]))

    def reduce(self, site: Any) -> Reduction:
        batch, tokens = site.hidden.shape[:2]
        if self.everything:
            return Reduction(TokenMap.identity(batch, tokens))
        return Reduction(TokenMap.keep(chosen(batch, tokens), tokens))


@pytest.fixture
def merged(model: Any, case: Case) -> Any:
    """The model, if its blocks have the tokens of the grid and of text alone."""
    family = family_of(model)
    if family is not None and not family.merges:
        with pytest.raises(vtr.UnsupportedMethodError, match="another kind in front"):
            vtr.apply(model, Half())
        pytest.skip(f"the blocks of {family.name} cannot merge, and say so")
    if case.extra:
        with (
            pytest.raises(RuntimeError, match="something else is in the sequence"),
            vtr.apply(model, Half()),
        ):
            run(model, case)
        pytest.skip("references are in the sequence, and merging says so")
    return model


def test_merging_nothing_changes_nothing(merged: Any, model: Any, case: Case) -> None:
    want = run(model, case)
    with vtr.apply(model, Half(everything=True)):
        assert torch.allclose(run(model, case), want, atol=2e-6)


def test_attention_of_some_tokens(
    merged: Any, model: Any, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens left out are keys that nobody sees; their own result is the one before them."""
    kept = chosen(2, case.tokens)
    first = {False: 0, True: case.text}[case.text_first]
    source = torch.zeros(2, case.tokens, dtype=torch.long).scatter(1, kept, kept).cummax(1).values

    def seen(length: int, density: float) -> Tensor:
        mask = torch.ones(2, 1, length, length, dtype=torch.bool)
        start = first if length > case.tokens else 0
        mask[..., start : start + case.tokens] = False
        for b in range(2):
            mask[b, :, :, start + kept[b]] = True
        return mask if monkey["sample"] is None else mask[monkey["sample"] : monkey["sample"] + 1]

    monkey: dict[str, Any] = {"sample": None}
    if case is CASES["mochi"]:  # calls attention once per sample
        calls = {"n": 0}
        whole = seen

        def seen(length: int, density: float) -> Tensor:
            monkey["sample"] = calls["n"] % 2
            calls["n"] += 1
            return whole(length, density)

    monkeypatch.setattr("vtr.testing.masked.token_mask", seen)

    def copies(module: Any, args: Any, out: Any) -> Any:
        image = out[0] if isinstance(out, tuple) else out
        start = first if image.shape[1] > case.tokens else 0
        part = image[:, start : start + case.tokens]
        part = part.gather(1, source[..., None].expand_as(part))
        image = torch.cat([image[:, :start], part, image[:, start + case.tokens :]], 1)
        return (image, *out[1:]) if isinstance(out, tuple) else image

    hooks = [model.get_submodule(n).register_forward_hook(copies) for n in case.attention]
    with eager(model, case.attention, 1.0, case):
        want = run(model, case)
    for hook in hooks:
        hook.remove()
    with vtr.apply(model, Half()) as handle:
        assert torch.allclose(run(model, case), want, atol=2e-6)
        stages = handle.trace.stages
    assert {(s.tokens_in, s.tokens_out) for s in stages} == {(case.tokens, case.tokens // 2)}


def test_the_mlp_of_some_tokens(merged: Any, model: Any, case: Case) -> None:
    """An MLP sees one token at a time: merged, the tokens left out copy the one before them."""
    family = family_of(model)
    name = None if family is None else family.mlp
    if name is None:
        with pytest.raises(vtr.UnsupportedMethodError, match="without an MLP"):
            vtr.apply(model, Half(around="mlp"))
        return
    kept = chosen(2, case.tokens)
    source = torch.zeros(2, case.tokens, dtype=torch.long).scatter(1, kept, kept).cummax(1).values

    def copies(module: Any, args: Any, out: Tensor) -> Tensor:
        start = case.text if out.shape[1] > case.tokens and case.text_first else 0
        part = out[:, start : start + case.tokens]
        part = part.gather(1, source[..., None].expand_as(part))
        return torch.cat([out[:, :start], part, out[:, start + case.tokens :]], 1)

    blocks = {n.rpartition(".")[0] for n in case.attention}
    hooks = [model.get_submodule(f"{b}.{name}").register_forward_hook(copies) for b in blocks]
    want = run(model, case)
    for hook in hooks:
        hook.remove()
    assert not torch.allclose(want, run(model, case), atol=1e-3)
    with vtr.apply(model, Half(around="mlp")):
        assert torch.allclose(run(model, case), want, atol=2e-6)


def test_merging_and_sparse_attention_divide_the_layers(
    merged: Any, model: Any, case: Case
) -> None:
    with pytest.raises(ValueError, match="merges tokens around attention layer"):
        vtr.apply(model, [Half(), Fixed()])
    assert torch.equal(run(model, case), run(model, case))


def test_the_masks_of_the_tests_differ_between_rows() -> None:
    mask = token_mask(45, 0.4)
    assert 0.3 < mask.float().mean() < 0.6
    assert BlockMask.from_dense(mask, block=16).to_dense().equal(mask)
