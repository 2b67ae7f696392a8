"""Drawings of what a method does on one fixed input of a built-in model, for ``recipes.method_pictures``."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import vtr
from vtr.inspect.drawing import row, stack, titled
from vtr.zoo import load, load_pipeline, load_vlm, samples

if TYPE_CHECKING:
    from PIL import Image

SEED = 123  # of the held-out pictures
FRAMES = 8
DARK, TEXT = np.array((31, 58, 95)), np.array((226, 135, 40))
GREYS = np.array(((150, 150, 150), (205, 205, 205)))
BITS = {
    2: 0.3,
    4: 0.5,
    8: 0.75,
}  # how dark an entry of so many bits is; others are as dark as can be


@cache
def _digit() -> tuple[Any, Tensor, Any]:
    from vtr.zoo import data

    pixels = samples("digits-vit", 1, seed=SEED)[0]
    return load("digits-vit"), pixels, data.denormalise(pixels[0])


@cache
def _vlm(name: str) -> tuple[Any, Any]:
    return load_vlm(name)


def picture(method: Any) -> Image.Image:
    """Draw the last cuts in the built-in ViT."""
    model, pixels, view = _digit()
    with torch.inference_mode(), vtr.apply(model, method) as handle:
        model(pixels)
        return vtr.draw(handle, view, panels=3, size=192)


def pairs(method: Any, layer: int = 2) -> Image.Image:
    """Draw the pairs that a method keeps in one block of the built-in ViT."""
    found: list[Tensor] = []

    class Probe(type(method)):  # type: ignore[misc]
        def attend(self, site: Any) -> Tensor:
            masked = site.masked

            def seen(mask: Tensor, share: Any) -> Tensor:
                if site.layer == layer:
                    found.append(mask)
                out: Tensor = masked(mask, share)
                return out

            site.masked = seen
            out: Tensor = super().attend(site)
            return out

    model, pixels, _ = _digit()
    with torch.inference_mode(), vtr.apply(model, Probe(**_options(method))):
        model(pixels)
    return _map(found[0][0].float().mean(0).numpy(), 2)


def question(method: Any) -> Image.Image:
    """Draw the last cuts in the built-in LLaVA."""
    from vtr.zoo.questions import prompt, vqa

    model, processor = _vlm("digits-llava")
    samples = vqa(40, seed=SEED)
    sample = max(samples, key=lambda s: float(np.asarray(s.image, dtype=np.float32).mean()))
    inputs = prompt(processor, [sample])
    with torch.inference_mode(), vtr.apply(model, method, positions="original") as handle:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
        return vtr.draw(handle, sample.image, panels=3, size=192)


def clip(method: Any) -> Image.Image:
    """Draw the last cut in the built-in video model."""
    from vtr.zoo.video_questions import answers, video_qa

    model, processor = _vlm("digits-video")
    sample = video_qa(1, seed=5)[0]
    with vtr.apply(model, method, positions="original") as handle:
        answers(model, processor, [sample])
        return vtr.draw(handle, sample.frames.numpy(), size=88, panels=1)


def _long(method: Any, words: int = 8) -> Any:
    """Ask the built-in model for long videos; returns the handle and the prompt's inputs."""
    from vtr.evaluate.prefill import calibrated
    from vtr.zoo.slide_questions import slides_qa
    from vtr.zoo.video_questions import prompt

    model, processor = _vlm("digits-long")
    inputs = prompt(processor, slides_qa(1, seed=99))
    with torch.inference_mode():
        handle = vtr.apply(model, calibrated(model, processor, method))
        try:
            model.generate(**inputs, max_new_tokens=words, min_new_tokens=words, do_sample=False)
        finally:
            handle.remove()
    return handle, inputs


def prefilled(method: Any) -> Image.Image:
    """Draw two masks of a sparse prefill."""
    handle, _ = _long(method, words=1)
    return vtr.draw(handle, panels=2, size=256)


def edited(method: Any) -> Image.Image:
    """Draw the attention of the prompt's last row before and behind an edit."""
    found: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    class Probe(type(method)):  # type: ignore[misc]
        def attend(self, site: Any) -> Tensor:
            edit = site.edit

            def seen(change: Any, rows: Tensor) -> Tensor:
                def both(attention: Tensor, part: Tensor) -> Tensor:
                    after: Tensor = change(attention.clone(), part)
                    if site.phase == "prefill":  # the last part has the last row
                        where, visual = int(part[0].argmax()), site.visual[0]
                        for head, maps in enumerate(zip(attention[0], after[0], strict=True)):
                            found[site.layer, head] = tuple(x[where, visual] for x in maps)
                    return after

                out: Tensor = edit(both, rows)
                return out

            site.edit = seen
            out: Tensor = super().attend(site)
            return out

    _long(Probe(**_options(method)), words=1)
    before, after = max(found.values(), key=lambda pair: float((pair[0] - pair[1]).abs().sum()))
    top = float(torch.maximum(before, after).max())
    panels = [
        titled(_frames(x / top), f"{title}: {100 * float(x.sum()):.0f} % on visual tokens")
        for title, x in (("before", before), ("behind the edit", after))
    ]
    return row(panels)


def read(method: Any, steps: int = 6) -> Image.Image:
    """Draw the keys that decoding steps read."""
    lines: dict[int, list[np.ndarray]] = {}

    class Probe(type(method)):  # type: ignore[misc]
        def attend(self, site: Any) -> Tensor:
            self.shown(site, np.ones(site.k.shape[2]))
            out: Tensor = super().attend(site)
            return out

        def read(self, site: Any, *args: Any) -> Tensor:
            out: Tensor = super().read(site, *args)
            share = np.zeros(site.k.shape[2])
            for head in out[0]:
                share[head[head >= 0].numpy()] += 1 / out.shape[1]
            self.shown(site, share, again=True)
            return out

        def shown(self, site: Any, share: np.ndarray, again: bool = False) -> None:
            if site.phase == "decode":
                seen = lines.setdefault(site.layer, [])
                lines[site.layer] = [*(seen[:-1] if again else seen), share]

    _long(Probe(**_options(method)), words=steps + 1)
    panels = []
    for layer, shares in lines.items():
        found = np.stack([share[: len(shares[0])] for share in shares])
        panels.append(
            titled(_image(_dark(found).repeat(8, 0)), f"layer {layer}: {len(found)} steps")
        )
    return stack(panels)


def cached(method: Any) -> Image.Image:
    """Draw the entries of each KV head behind a prompt."""
    from vtr.compat.transformers import cache_of
    from vtr.zoo.chat_questions import chat_qa, prompt

    model, processor = _vlm("digits-chat")
    inputs = prompt(processor, chat_qa(1, "pictures", seed=SEED))
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode(), vtr.apply(model, method):
        out = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
        )
    ids = inputs["input_ids"][0]
    visual = (ids == model.config.image_token_id).numpy()
    shade = np.concatenate([_shades(layer, len(ids)) for layer in cache_of(out).layers])
    pixels = _dark(shade).repeat(8, 0).repeat(3, 1)
    pixels[7::8] = 235  # a line below each head
    first = visual & ~np.concatenate([[False], visual[:-1]])
    strip = np.where(visual[:, None], GREYS[first.cumsum() % 2], TEXT)[None].repeat(8, 0)
    framed = np.concatenate([strip.repeat(3, 1), np.full((2, pixels.shape[1], 3), 255), pixels])
    return _image(framed)


def _shades(layer: Any, tokens: int) -> np.ndarray:
    """Shade each entry of each KV head, (Hk, tokens) in [0, 1]: 0 if it is not held."""
    heads = layer.keys.shape[1]
    if not hasattr(layer, "columns"):
        return np.ones((heads, tokens))
    columns, bits = layer.columns()[0], layer.bits()[0]
    shade = np.zeros((heads, tokens))
    for head in range(heads):
        for column, size in zip(columns[head].tolist(), bits[head].tolist(), strict=True):
            if 0 <= column < tokens:
                shade[head, column] = BITS.get(size, 1.0)
    return shade


def detected(method: Any) -> Image.Image:
    """Draw the tokens that the last layer of the built-in detector's encoder computes."""
    from vtr.zoo import data, detection

    model = load("digits-detr")
    pixels = detection.pictures(1, torch.Generator().manual_seed(3), "heldout").images
    with torch.inference_mode(), vtr.apply(model, method) as handle:
        model(pixels)
    kept = handle.trace.stages[-1].total.kept[0]
    view = data.denormalise(pixels[0]).permute(1, 2, 0).numpy()
    side = view.shape[0]
    panels = [titled(_resized(view), "input")]
    start = 0
    for stride in (8, 16, 32, 64):
        cells = -(-side // stride)
        number = cells * cells
        live = np.isin(np.arange(start, start + number), kept.numpy()).reshape(cells, cells)
        at = np.arange(side) * cells // side
        bright = np.where(live[at[:, None], at[None]], 1.0, 0.22)
        title = f"{cells} x {cells}: {int(live.sum())} of {number}"
        panels.append(titled(_resized(view * bright[..., None]), title))
        start += number
    if start != handle.trace.stages[0].tokens_in:
        raise ValueError(
            f"the levels have {start} tokens, the encoder {handle.trace.stages[0].tokens_in}"
        )
    return row(panels)


def _resized(view: np.ndarray, size: int = 176) -> Image.Image:
    from PIL import Image

    return _image(view * 255).resize((size, size), Image.Resampling.BICUBIC)


def groups(method: Any) -> Image.Image:
    """Draw the merged tokens of the built-in generator, on the video that it draws."""
    pipe = load_pipeline("digits-wan")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    with vtr.apply(pipe, method) as handle:
        frames = pipe("a 7 moving right", generator=generator, output_type="np").frames[0]
        video = (frames * 255).round().astype(np.uint8)
        return vtr.draw(handle, video, panels=1, size=112)


def _options(method: Any) -> dict[str, Any]:
    import dataclasses

    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}


def _image(pixels: np.ndarray) -> Image.Image:
    from PIL import Image

    return Image.fromarray(pixels.round().astype(np.uint8))


def _dark(shares: np.ndarray) -> np.ndarray:
    """Colour shares in [0, 1]: white for 0."""
    return 255 - shares[..., None] * (255 - DARK)


def _map(shares: np.ndarray, side: int) -> Image.Image:
    """Draw a map of shares in [0, 1], ``side`` pixels for each."""
    pixels = _dark(shares)
    return _image(np.pad(pixels.repeat(side, 0).repeat(side, 1), ((1, 1), (1, 1), (0, 0))))


def _frames(values: Tensor, side: int = 4, across: int = 8, pixels: int = 8) -> Image.Image:
    """Draw one number in [0, 1] per token, the tokens of a frame as a square, frames in lines."""
    squares = values[: len(values) // side**2 * side**2].view(-1, side, side).float().sqrt()
    lines = [
        row([_map(s.cpu().numpy(), pixels) for s in squares[i : i + across]], 3)
        for i in range(0, len(squares), across)
    ]
    return stack(lines, 3)
