"""ImageBlocks against a loop over rows and keys; no image sees another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vtr
from tests.methods.prefill_sites import allowed, attention, attention_site, tensors
from vtr.methods.common.image_mask import PromptImages, image_blocks, image_mask


def prompt(lengths, text=(3, 2, 6)):
    """(S,) images of so many tokens, with text before, between and after them."""
    first, between, last = text
    parts = [torch.full((first,), -1)]
    for number, length in enumerate(lengths):
        parts += [torch.full((length,), number), torch.full((between,), -1)]
    return torch.cat([*parts, torch.full((last,), -1)])


def brute_force(image, length, *, sinks=0, window=None):
    """(L, S) bool: what visual rows see; rows of text see text and sinks."""
    keys, count, place = len(image), 0, []
    for j in range(keys):
        count = count + 1 if j and image[j] == image[j - 1] else 0
        place.append(count)
    seen = np.zeros((length, keys), dtype=bool)
    for i in range(length):
        row = keys - length + i
        for j in range(row + 1):
            if window is not None and row - j >= window:
                continue
            seen[i, j] = image[j] < 0 or image[j] == image[row] or place[j] < sinks
    return seen


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize(("length", "window"), [(None, None), (77, None), (None, 90)])
@pytest.mark.parametrize("sides", [(16, 16), (32, 16), (16, 64)])
def test_the_mask_is_exact_to_the_token(sides, length, window, sinks):
    image = prompt([37, 64, 1, 90, 50, 30])
    length = length or len(image)
    given = PromptImages(image, length, sinks, window)
    order, mask = image_mask(given, sides)
    expected = brute_force(image.tolist(), length, sinks=sinks, window=window)
    np.testing.assert_array_equal(mask.to_dense().numpy(), expected[:, order.numpy()])
    blocks = image_blocks(given, sides)
    rows, columns = np.nonzero(expected)
    assert bool(blocks[rows // sides[0], columns // sides[1]].all())
    assert not bool(blocks.all())


def test_text_between_images_fills_few_blocks():
    """32 images of 100 tokens with text around each: live blocks are those of the image and of the text."""
    image = prompt([100] * 32, text=(10, 4, 20))
    _, mask = image_mask(PromptImages(image, len(image)), (64, 64))
    live = mask.to_dense(blocks=True).sum(1).float().mean()
    assert live < 2.5 + 1 + 3  # its images, a straddling block, and the blocks of 158 text tokens


@pytest.mark.parametrize("unit", ["image", "frame"])
@pytest.mark.parametrize("key_heads", [1, 2])
def test_output_of_a_batch_with_other_images_and_padding(unit, key_heads):
    images = [prompt([40, 30, 50]), prompt([70, 50]), prompt([40, 30, 50])]
    keys = max(map(len, images))
    image = torch.stack([torch.cat([torch.full((keys - len(i),), -1), i]) for i in images])
    valid = torch.stack([torch.arange(keys) >= keys - len(i) for i in images])
    frame = torch.where(image < 0, -1, image * 100 + torch.arange(keys) // 20)
    q, k, v = tensors(keys, batch=3, heads=2, key_heads=key_heads)
    site = attention_site(q, k, v, image=image, frame=frame, valid=valid)
    method = vtr.ImageBlocks(unit=unit, sinks=1, block=16, last_rows=2)
    out = method.attend(site)
    seen = allowed(valid, keys)
    for b, marks in enumerate(image if unit == "image" else frame):
        start = keys - int(valid[b].sum())
        rows = torch.from_numpy(brute_force(marks[start:].tolist(), keys - start, sinks=1))
        apart = image[b, start:] < 0
        apart[-2:] = True
        seen[b, start:, start:] &= rows | apart[:, None]
    expected = attention(q, k, v, seen[:, None], site.scale)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert 0 < site.notes["work"] < site.pairs * 1.1


def test_no_image_leaks_into_another():
    """A changed image changes the rows of no later image, and those of the text after it."""
    image = prompt([45, 45, 45])[None]
    keys = image.shape[1]
    q, k, v = tensors(keys)
    other = v.clone()
    other[:, :, image[0] == 0] += 1.0
    method = vtr.ImageBlocks(block=16, last_rows=1)
    a, b = (method.attend(attention_site(q, k, x, image=image)) for x in (v, other))
    changed = (a != b).any(-1).any(1)[0]
    assert torch.equal(changed[image[0] > 0], torch.zeros(90, dtype=torch.bool))
    assert bool(changed[image[0] == 0].all())
    assert bool(changed[-6:].all())


def test_a_later_turn_sees_its_own_image_and_all_text():
    image = prompt([40, 40])[None]
    keys, length = image.shape[1], 60
    q, k, v = tensors(length, keys)
    site = attention_site(q, k, v, image=image)
    out = vtr.ImageBlocks(block=16, last_rows=1).attend(site)
    seen = torch.from_numpy(brute_force(image[0].tolist(), length))
    apart = image[0, -length:] < 0
    apart[-1] = True
    seen = (seen | apart[:, None]) & allowed(site.valid, length)[0]
    torch.testing.assert_close(out, attention(q, k, v, seen, site.scale), atol=1e-5, rtol=1e-5)


def test_masks_are_built_once_per_call():
    image = prompt([40, 40])[None]
    q, k, v = tensors(image.shape[1])
    method = vtr.ImageBlocks(block=16)
    first, second = (attention_site(q, k, v, image=image, layer=n) for n in (0, 1))
    second.memory = first.memory
    method.attend(first), method.attend(second)
    assert len(first.notes["finding"]) == 1
    assert "finding" not in second.notes
    # A layer that sees another prompt (tokens were cut) does not take the mask of the first.
    third = attention_site(q, k, v, image=image.roll(3, 1))
    third.memory = first.memory
    alone = method.attend(attention_site(q, k, v, image=image.roll(3, 1)))
    assert torch.equal(method.attend(third), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sinks_of_whole_images_are_dense(dtype):
    image = prompt([40, 40])[None]
    q, k, v = (x.to(dtype) for x in tensors(image.shape[1]))
    site = attention_site(q, k, v, image=image)
    out = vtr.ImageBlocks(sinks=40, block=16, last_rows=1).attend(site)
    expected = attention(q, k, v, allowed(site.valid, image.shape[1])[:, None], site.scale)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(out.float(), expected.float(), atol=tolerance, rtol=tolerance)


def test_gradients_flow():
    image = prompt([40, 40])[None]
    q, k, v = (x.requires_grad_() for x in tensors(image.shape[1]))
    vtr.ImageBlocks(block=16).attend(attention_site(q, k, v, image=image)).sum().backward()
    assert all(bool(torch.isfinite(x.grad).all()) for x in (q, k, v))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"unit": "video"}, "unit must be"), ({"sinks": -1}, "sinks must be an int >= 0")],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        vtr.ImageBlocks(**options)
