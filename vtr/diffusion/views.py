"""Read the sequence from a transformer's forward call, for each family: the grid, the text, the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int, int]


class SequenceView(NamedTuple):
    """The facts in the arguments of one forward call.

    Attributes:
        grid: (frames, height, width) in tokens.
        text_valid: (B, T) bool for joint text with padding, else None.
        extra: tokens on the other side of the grid than the text: references of another size, history.
    """

    grid: Grid
    text_valid: Tensor | None = None
    extra: int = 0

    def seen(self, text_first: bool) -> Tensor | None:
        """``text_valid`` with the extra tokens, which are all seen and at the outer end of the text."""
        if self.text_valid is None or not self.extra:
            return self.text_valid
        more = self.text_valid.new_ones(self.text_valid.shape[0], self.extra)
        return torch.cat([more, self.text_valid] if text_first else [self.text_valid, more], 1)


def _grid(size: Sequence[int], patch: Sequence[int]) -> Grid:
    """Tokens of latents (frames, height, width) in patches."""
    if any(n % p for n, p in zip(size, patch, strict=True)):
        raise ValueError(
            f"latents of {size[0]} x {size[1]} x {size[2]} (frames, height, width) do not divide "
            f"into patches of {patch[0]} x {patch[1]} x {patch[2]}: choose a size or number of frames "
            "that does, as the pipeline's own defaults do"
        )
    frames, height, width = (n // p for n, p in zip(size, patch, strict=True))
    return frames, height, width


def _padded(valid: Tensor) -> Tensor | None:
    """The mask if there is padding."""
    return None if bool(valid.all()) else valid


def _counted(count: Tensor, length: int) -> Tensor | None:
    """(B, length) bool: the first ``count`` (B,) of each row; None if that is all."""
    return _padded(torch.arange(length, device=count.device) < count[:, None])


def latent(model: Any, given: dict[str, Any]) -> SequenceView:
    """(B, C, F, H, W) and a patch size with or without time."""
    patch = model.config.patch_size
    if isinstance(patch, int):
        patch = (getattr(model.config, "patch_size_t", None) or 1, patch, patch)
    return SequenceView(_grid(given["hidden_states"].shape[-3:], patch))


def image(model: Any, given: dict[str, Any]) -> SequenceView:
    """(B, C, H, W)."""
    side = model.config.patch_size
    return SequenceView(_grid((1, *given["hidden_states"].shape[-2:]), (1, side, side)))


def unet(model: Any, given: dict[str, Any]) -> SequenceView:
    """(B, C, H, W); the grid is that of the latents, and the blocks' own are coarser."""
    height, width = given["sample"].shape[-2:]
    return SequenceView((1, height, width))


def cogvideox(model: Any, given: dict[str, Any]) -> SequenceView:
    """(B, F, C, H, W)."""
    shape, side = given["hidden_states"].shape, model.config.patch_size
    deep = getattr(model.config, "patch_size_t", None) or 1
    return SequenceView(_grid((shape[1], *shape[3:]), (deep, side, side)))


def hunyuan_video(model: Any, given: dict[str, Any]) -> SequenceView:
    """Text last; the model counts the valid tokens and takes that many from the start."""
    mask = given["encoder_attention_mask"]
    return latent(model, given)._replace(
        text_valid=_counted(mask.sum(1, dtype=torch.int64), mask.shape[1])
    )


def hunyuan_video_15(model: Any, given: dict[str, Any]) -> SequenceView:
    """Image features and two texts last; the model puts the valid tokens of all three in front."""
    masks = [given["encoder_attention_mask"].bool(), given["encoder_attention_mask_2"].bool()]
    looks = given["image_embeds"]
    # It drops the features of all samples if there is no image in the batch.
    masks.append(masks[0].new_full((masks[0].shape[0], looks.shape[1]), bool((looks != 0).any())))
    valid = torch.cat(masks, 1)
    count = valid.sum(1, dtype=torch.int64)
    return latent(model, given)._replace(text_valid=_counted(count, valid.shape[1]))


def hunyuan_image(model: Any, given: dict[str, Any]) -> SequenceView:
    """One text or two, last; with two the model puts the valid tokens in front."""
    sizes, patch = given["hidden_states"].shape[2:], model.config.patch_size
    valid = given["encoder_attention_mask"].bool()
    second = given.get("encoder_attention_mask_2")
    if model.context_embedder_2 is not None and given.get("encoder_hidden_states_2") is not None:
        both = torch.cat([valid, second.bool()], 1)  # type: ignore[union-attr]
        padding = _counted(both.sum(1, dtype=torch.int64), both.shape[1])
    else:
        padding = _padded(valid)
    fill = (1,) * (3 - len(sizes))
    return SequenceView(_grid((*fill, *sizes), (*fill, *patch)), padding)


def framepack(model: Any, given: dict[str, Any]) -> SequenceView:
    """History in three resolutions before the video, image features and text behind it."""
    extra = 0
    parts = (("latents_clean", (1, 2, 2)), ("latents_history_2x", (2, 4, 4)),
             ("latents_history_4x", (4, 8, 8)))  # fmt: skip
    for name, patch in parts:
        history = given.get(name)
        if history is not None and given.get(f"indices_{name}") is not None:
            # The model pads the history to whole patches.
            frames, height, width = (
                -(-n // p) for n, p in zip(history.shape[-3:], patch, strict=True)
            )
            extra += frames * height * width
    mask, looks = given["encoder_attention_mask"], given["image_embeds"].shape[1]
    valid = None
    if mask.shape[0] > 1:  # it cuts the text of one sample to its valid tokens
        count = mask.sum(1, dtype=torch.int64) + looks
        valid = _counted(count, mask.shape[1] + looks)
    return SequenceView(latent(model, given).grid, valid, extra)


def ltx(model: Any, given: dict[str, Any]) -> SequenceView:
    """Packed tokens; the sizes are arguments."""
    sizes = [given.get(name) for name in ("num_frames", "height", "width")]
    known = [int(n) for n in sizes if n is not None]
    if len(known) < 3:
        raise RuntimeError(
            "the LTX transformer was called without num_frames, height and width (conditions are "
            "packed with the video): the place of its tokens is not known; use LTXPipeline"
        )
    return SequenceView((known[0], known[1], known[2]))


def skyreels(model: Any, given: dict[str, Any]) -> SequenceView:
    """As Wan, if all frames are at one noise level and see each other."""
    time = given["timestep"]
    if time.ndim > 1 and bool((time != time[:, :1]).any()):
        raise RuntimeError(
            "each frame has its own noise level (asynchronous diffusion forcing, or a video "
            "that is extended), so that there is no denoising step: generate the whole video with "
            "ar_step=0, or with SkyReelsV2Pipeline"
        )
    if model.config.num_frame_per_block > 1:
        raise RuntimeError(
            "frames are attended to block by block, causally, which a sparse mask does not know: "
            "set causal_block_size=1 (and ar_step=0)"
        )
    return latent(model, given)


def kandinsky(model: Any, given: dict[str, Any]) -> SequenceView:
    """(B, F, H, W, C) in raster order, unless its own sparse attention has put it in tiles."""
    if given.get("sparse_params") is not None:
        raise RuntimeError(
            "this Kandinsky transformer has its own sparse attention, with tokens in tiles: "
            'set transformer.config.attention_type to "regular", or leave vtr off'
        )
    return SequenceView(_grid(given["hidden_states"].shape[1:4], model.config.patch_size))


def _raster(ids: Tensor) -> tuple[int, int] | None:
    """(height, width) if positions (N, 2) are those of an image in raster order."""
    low = ids.amin(0)
    height, width = (int(n) + 1 for n in (ids.amax(0) - low).tolist())
    if height * width != ids.shape[0]:
        return None
    at = torch.arange(height * width, device=ids.device)
    place = torch.stack([at // width, at % width], 1).to(ids.dtype)
    return (height, width) if torch.equal(ids - low, place) else None


def _images(ids: Tensor) -> SequenceView:
    """Positions (N, 3 or more): image number, row, column. The generated image is first; others are
    further frames if all are of its size, else extra tokens."""
    ids = ids[0] if ids.ndim == 3 else ids
    ids = ids[:, :3].detach().to("cpu", torch.float64)
    _, counts = torch.unique_consecutive(ids[:, 0], return_counts=True)
    sizes = [_raster(part[:, 1:]) for part in ids.split(counts.tolist())]
    if sizes[0] is None:
        raise RuntimeError(
            f"img_ids names {int(counts[0])} tokens of the first image that are no height x width grid "
            "in raster order: attention over them cannot be thinned out"
        )
    if all(size == sizes[0] for size in sizes):
        return SequenceView((len(sizes), *sizes[0]))
    return SequenceView((1, *sizes[0]), extra=int(counts[1:].sum()))


def flux(model: Any, given: dict[str, Any]) -> SequenceView:
    """Text first; positions of the images in ``img_ids``."""
    if given.get("kv_cache_mode") is not None:
        raise RuntimeError(
            "Flux.2 keeps keys and values of the references from the first step on (kv_cache_mode), "
            "and its later steps attend to other tokens than their own: use Flux2Pipeline, which "
            "gives the references in every step"
        )
    return _images(given["img_ids"])


def flux3(model: Any, given: dict[str, Any]) -> SequenceView:
    """Text first, references behind the image."""
    more = given.get("image_cond_hidden_states")
    return _images(given["img_ids"])._replace(extra=0 if more is None else more.shape[1])


def chroma(model: Any, given: dict[str, Any]) -> SequenceView:
    """As Flux, with a mask of the text's padding."""
    mask, view = given.get("attention_mask"), flux(model, given)
    if mask is None:
        return view
    if mask.dtype != torch.bool and not bool((mask == 1).all()):
        raise RuntimeError(
            f"attention_mask is {mask.dtype}, which attention adds to the scores instead of leaving out "
            "padding, and a sparse mask does not know that: call encode_prompt, and give the pipeline "
            "prompt_embeds with prompt_attention_mask.bool() (and the same for the negative prompt)"
        )
    text = given["encoder_hidden_states"].shape[1]
    return view._replace(text_valid=_padded(mask[:, :text].bool()))


def lumina(model: Any, given: dict[str, Any]) -> SequenceView:
    """Text first; the image of each sample begins right behind its valid text."""
    count = given["encoder_attention_mask"].sum(1)
    if count.numel() > 1 and bool((count != count[0]).any()):
        raise RuntimeError(
            "the prompts of a batch have several lengths, and Lumina 2 puts each image behind its own "
            "prompt, at another place for each sample: generate one image at a time"
        )
    return image(model, given)


def krea(model: Any, given: dict[str, Any]) -> SequenceView:
    """Text first, with a mask; positions of text and image in ``position_ids``."""
    text, mask = given["encoder_hidden_states"].shape[1], given.get("encoder_attention_mask")
    valid = None if mask is None else _padded(mask.bool())
    return _images(given["position_ids"][text:])._replace(text_valid=valid)


def z_image(model: Any, given: dict[str, Any]) -> SequenceView:
    """A list of latents (C, F, H, W), each padded to 32 tokens, and then its caption, likewise."""
    images, captions = given["x"], given["cap_feats"]
    if isinstance(images[0], list):
        raise RuntimeError(
            "several images of one sample are in the sequence (Z-Image Omni), each padded: "
            "attention over them cannot be thinned out; use ZImagePipeline"
        )
    if len({tuple(x.shape) for x in images}) != 1:
        raise RuntimeError("the images of a batch have several sizes: call the model for each size")
    side, frames = given.get("patch_size", 2), given.get("f_patch_size", 1)
    grid = _grid(images[0].shape[1:], (frames, side, side))
    padding = -(grid[0] * grid[1] * grid[2]) % 32  # padding of images is seen, as text is
    lengths = [padding + -(-len(c) // 32) * 32 for c in captions]
    count = torch.tensor(lengths, device=images[0].device)
    return SequenceView(grid, _counted(count, max(lengths)))


def qwen(model: Any, given: dict[str, Any]) -> SequenceView:
    """Text first; the generated image is the first of ``img_shapes``."""
    shapes = given["img_shapes"]
    rows = shapes if isinstance(shapes[0], list) else [[s] for s in shapes]
    images = [tuple(int(n) for n in s) for s in rows[0]]
    if any([tuple(int(n) for n in s) for s in row] != images for row in rows):
        raise RuntimeError(
            "the samples of a batch have images of several sizes: call one at a time"
        )
    mask = given.get("encoder_hidden_states_mask")
    valid = None if mask is None else _padded(mask.bool())
    frames, height, width = images[0]
    if _one(size[1:] for size in images):
        return SequenceView((sum(size[0] for size in images), height, width), valid)
    extra = sum(f * h * w for f, h, w in images[1:])
    return SequenceView((frames, height, width), valid, extra)


def _one(things: Iterable[Any]) -> bool:
    return len(set(things)) == 1
