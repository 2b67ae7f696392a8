"""Heatmaps of words, against a map of all tokens and all tokens in float64, and on the built-in video generator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import vtr
from tests.diffusion import pipes
from tests.diffusion.models import CASES
from vtr.diffusion.processor import SiteProcessor
from vtr.diffusion.watch import TextCall
from vtr.diffusion.words import Recorder, Tokens, cut_of, places, recorded
from vtr.inspect import heatmap as module
from vtr.inspect.heatmap_drawing import frame_of
from vtr.zoo import load_pipeline

AT = {"one": (1, 3), "two": (0,)}
STEPS = 2
# name -> tokens of the text that attention sees, whether it is in the sequence and in front, and the calls of a
# step with the prompt: all of them, the first half, or the second of each pair (one call per sample)
TEXTS: dict[str, tuple[int, bool, bool, str]] = {
    "wan": (7, False, False, "half"),
    "wan2.2": (7, False, False, "half"),
    "wan-i2v": (512, False, False, "half"),
    "hunyuan-video": (7, True, False, "all"),
    "cogvideox": (7, True, True, "all"),
    "cogvideox-1.5": (7, True, True, "all"),
    "mochi": (7, True, False, "pairs"),
    "ltx": (7, False, False, "all"),
    "flux": (7, True, True, "half"),
    "sd3": (7, True, False, "all"),
    "pixart": (6 + 1, False, False, "all"),
    "qwen-image": (6, True, True, "half"),
    "hunyuan-dit": (7, False, False, "all"),
}


def eager(
    monkeypatch: pytest.MonkeyPatch, name: str, grid: tuple[int, ...], sample: int = 0, samples: int = 1,
    dtype: torch.dtype = torch.float32, **more: Any,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Run a pipeline as it is; its result, and the mean attention to :data:`AT` from full float64 maps."""
    text, joint, first, which = TEXTS[name]
    tokens = int(np.prod(grid))
    keys = text + tokens if joint else text
    seen: list[Tensor] = []
    real = F.scaled_dot_product_attention

    def catch(*args: Any, **kwargs: Any) -> Tensor:
        names = ("query", "key", "value", "attn_mask")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, attn_mask = given["query"], given["key"], given.get("attn_mask")
        if q.shape[2] == tokens + text * joint and k.shape[2] == keys:
            scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, -torch.inf)
            elif attn_mask is not None:
                scores = scores + attn_mask
            full = scores.softmax(-1).mean(1)
            rows = full[:, text * first * joint :][:, :tokens]
            seen.append(rows[..., :text] if first or not joint else rows[..., tokens:])
        return real(*args, **kwargs)

    pipe = pipes.make(name)
    pipe.transformer.to(dtype)
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", catch)
        made = pipes.call(pipe, name, STEPS, **more)
    if which == "half":
        step = len(seen) // STEPS
        seen = [m for n, m in enumerate(seen) if n % step < step // 2]
    if which == "pairs":
        seen = seen[1::2]
    maps = torch.stack(
        [m[m.shape[0] - samples + sample] if which != "pairs" else m[0] for m in seen]
    )
    mean = maps.mean(0)
    return made, {word: mean[:, list(at)].sum(1).view(grid) for word, at in AT.items()}


def watched(pipe: Any, name: str, words: Any = AT, **more: Any) -> module.Heatmap:
    given = {**pipes.PIPES[name][1], **more}
    return vtr.heatmap(
        pipe, words=words, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0),
        **given,
    )  # fmt: skip


def grid_of(name: str) -> tuple[int, int, int]:
    return CASES[{"wan2.2": "wan"}.get(name, name)].grid


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TEXTS)
def test_a_map_is_that_of_full_attention_and_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, want = eager(monkeypatch, name, grid_of(name))
    pipe = pipes.make(name)
    parts = list(pipe.transformer.modules())
    before = [p.__dict__.get("processor") for p in parts]
    found = watched(pipe, name, filter_sinks=False)
    assert torch.equal(torch.as_tensor(found.images), made)
    for word, share in want.items():
        torch.testing.assert_close(found.attention[word].double(), share, rtol=1e-4, atol=1e-6)
        low, high = share.min(), share.max()
        torch.testing.assert_close(
            found.maps[word].double(), (share - low) / (high - low), rtol=1e-3, atol=2e-3
        )
    assert [p.__dict__.get("processor") for p in parts] == before
    assert not any(isinstance(p.__dict__.get("processor"), SiteProcessor) for p in parts)
    assert torch.equal(pipes.call(pipe, name, STEPS), made)


# ---- samples, steps, layers, precision -----------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "cogvideox"])
@pytest.mark.parametrize("sample", [0, 1])
def test_one_of_several_samples(name: str, sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance in two calls, and in one batch with the negative prompt in front."""
    each = {"num_images_per_prompt" if name == "flux" else "num_videos_per_prompt": 2}
    if name == "flux":
        _, want = eager(monkeypatch, name, grid_of(name), sample, 2, **each)
        found = watched(pipes.make(name), name, sample=sample, filter_sinks=False, **each)
    else:  # a batch of embeddings, one prompt for each sample
        torch.manual_seed(4)
        batch = {f"{n}prompt_embeds": torch.randn(2, 7, 16) for n in ("", "negative_")}
        _, want = eager(monkeypatch, name, grid_of(name), sample, 2, **batch)
        found = watched(pipes.make(name), name, sample=sample, filter_sinks=False, **batch)
    for word, share in want.items():
        torch.testing.assert_close(found.attention[word].double(), share, rtol=1e-4, atol=1e-6)


def test_without_guidance_the_batch_has_the_prompt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _, want = eager(monkeypatch, "sd3", grid_of("sd3"), guidance_scale=1.0)
    found = watched(pipes.make("sd3"), "sd3", filter_sinks=False, guidance_scale=1.0)
    torch.testing.assert_close(found.attention["one"].double(), want["one"], rtol=1e-4, atol=1e-6)


def test_steps_and_layers_are_parts_of_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipes.make("wan")
    whole = watched(pipe, "wan", filter_sinks=False).attention["one"]
    for option, parts in (("steps", [0, -1]), ("layers", [0, 1, -1])):
        shares = [
            watched(pipe, "wan", filter_sinks=False, **{option: (n,)}).attention["one"]
            for n in parts
        ]
        torch.testing.assert_close(torch.stack(shares).mean(0), whole)
        assert not torch.equal(shares[0], shares[1])
    # Rows in chunks of one query are the rows.
    monkeypatch.setattr(module, "SCORES", 1)
    assert torch.allclose(watched(pipe, "wan", filter_sinks=False).attention["one"], whole)


def test_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {k: v.bfloat16() for k, v in pipes.PIPES["flux"][1].items() if isinstance(v, Tensor)}
    kind = torch.bfloat16
    made, want = eager(monkeypatch, "flux", grid_of("flux"), dtype=kind, **given)
    pipe = pipes.make("flux")
    pipe.transformer.to(kind)
    found = watched(pipe, "flux", filter_sinks=False, **given)
    assert torch.equal(found.images, made)
    assert made.dtype == kind
    assert found.attention["one"].dtype == torch.float32
    torch.testing.assert_close(found.attention["one"].double(), want["one"], rtol=1e-4, atol=1e-6)


# ---- sinks -----------------------------------------------------------------------------------------


def test_a_global_sink_is_what_nearly_all_queries_prefer_ten_times() -> None:
    """Column 0: ten times and more for all queries; 1: for 95 %, 2: for 85 %; the others share the rest."""
    n, others = 40, 6
    weight = torch.full((n, others + 3), 1.0)
    weight[:, 0] = 12.0
    weight[: int(0.95 * n), 1] = 11.0
    weight[: int(0.85 * n), 2] = 500.0
    # Queries and keys whose scores are the logarithms of the weights.
    k = torch.eye(others + 3)[None, None]
    q = weight.log()[None, None]
    call = TextCall(0, 0, 1, (1, 5, 8), q, k, slice(0, others + 3), None, 1.0)
    rows, sinks = module.text_attention(call, [0, 1, 2, 5], None)
    assert sinks == [True, True, False, False]
    want = (weight.double() / weight.double().sum(1, keepdim=True))[:, [0, 1, 2, 5]]
    torch.testing.assert_close(rows.double(), want, rtol=1e-5, atol=1e-7)
    # The median of the prompt's own tokens is another one.
    assert module.text_attention(call, [0], torch.tensor([0, 1, 2]))[1] == [False]


def test_sinks_are_left_out_of_the_calls_in_which_they_are_sinks() -> None:
    sums = module._Sums({"a": [0, 3], "b": [0]}, None, None, True)
    rows = torch.full((4, 6), 1.0)
    rows[:, 0] = 100.0
    flat = rows.clone()
    flat[:, 0] = 5.0
    for weight in (rows, flat):
        q = weight.log()[None, None]
        sums.add(TextCall(0, 0, 1, (1, 2, 2), q, torch.eye(6)[None, None], slice(0, 6), None, 1.0))
    found = sums.attention()
    # "a" keeps its other token in the first call, "b" nothing.
    assert torch.allclose(found["a"], torch.full((1, 2, 2), (1 / 105 + 6 / 10) / 2))
    assert torch.allclose(found["b"], torch.full((1, 2, 2), 5 / 10))
    assert sums.sinks() == {"a": 0.5, "b": 0.5}
    only = module._Sums({"b": [0]}, None, None, True)
    q = rows.log()[None, None]
    only.add(TextCall(0, 0, 1, (1, 2, 2), q, torch.eye(6)[None, None], slice(0, 6), None, 1.0))
    with pytest.warns(UserWarning, match="'b' is a global sink in every layer"):
        assert torch.allclose(only.attention()["b"], torch.full((1, 2, 2), 100 / 105))


# ---- words -----------------------------------------------------------------------------------------


def tokenizer(side: str = "right") -> Any:
    """A fast tokenizer of pieces: words of more than four letters are cut; one special token in front."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:<>|_"
    words = [
        "cat",
        "dog",
        "red",
        "the",
        "on",
        "a",
        "hors",
        "##e",
        "mat",
        "and",
        "user",
        "sys",
        "end",
    ]
    vocabulary = ["[PAD]", "[UNK]", "[BOS]", *words, *letters, *(f"##{c}" for c in letters)]
    made = Tokenizer(
        models.WordPiece({w: n for n, w in enumerate(dict.fromkeys(vocabulary))}, unk_token="[UNK]")
    )
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing("[BOS] $A", special_tokens=[("[BOS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", padding_side=side
    )


def read(text: str, prompt: str, phrase: str, cut: int = 0, stop: str = "", **options: Any) -> Any:
    """The tokens at the places of a phrase, as text."""
    given = tokenizer(options.pop("side", "right"))
    recorder = Recorder(given, 2)
    out = recorder([text, text + " a a a"], padding=True, return_tensors="pt", **options)
    tokens = recorder.tokens(0)
    assert tokens is not None
    found = places(tokens, prompt, phrase, frozenset(stop.split()), cut)
    front = int(out["attention_mask"][0].argmax())
    return [given.convert_ids_to_tokens(int(out["input_ids"][0, n + cut + front])) for n in found]


def test_places_of_words() -> None:
    text = "A Horse and the cat, the horses on a mat. CAT"
    assert read(text, text, "cat") == ["cat", "cat"]
    assert read(text, text, "horse") == ["hors", "##e"]  # not those of "horses"
    phrase = "The Horses  on a mat"
    assert read(text, text, phrase, stop="the on a") == ["hors", "##e", "##s", "mat"]
    assert read(text, text, "the") == ["the", "the"]
    assert read(text, text, "hors") == []
    assert read(text, text, "mat", side="left") == ["mat"]


def test_words_of_the_template_are_not_those_of_the_prompt() -> None:
    text = "sys: red cat user: a red dog end: red cat"
    # Three pieces and more in front: [BOS] sys : red cat user : = 7 tokens.
    assert read(text, "a red dog", "red", cut=7) == ["red"]
    assert read(text, "A  red DOG", "dog", cut=7) == ["dog"]
    assert read(text, "a red dog", "cat", cut=7) == []
    # Cleaned so far that it is not found as it is: all that the encoder read behind the cut.
    assert read(text, "a &amp; red dog", "cat", cut=7) == ["cat"]


def test_scripts_without_spaces() -> None:
    tokens = Tokens("一只红色的猫", [(n, n + 1) for n in range(6)], [True] * 6, 6)
    assert places(tokens, "一只红色的猫", "红色", frozenset(), 0) == [2, 3]


def test_templates_of_pipelines() -> None:
    assert cut_of(pipes.make("qwen-image"), {}) == 34
    hunyuan = pipes.make("hunyuan-video")
    assert cut_of(hunyuan, {}) == 95
    assert cut_of(hunyuan, {"prompt_template": {"template": "{}", "crop_start": 3}}) == 3
    with pytest.raises(ValueError, match="no 'crop_start'"):
        cut_of(hunyuan, {"prompt_template": {"template": "{}"}})
    assert cut_of(pipes.make("flux"), {}) == 0


class Encoder(torch.nn.Module):
    """Stands in for UMT5: a fixed vector for each id."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(200, 16), requires_grad=False)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, ids: Tensor, mask: Tensor | None = None, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.table[ids])


def wan_with_text() -> Any:
    pipe = pipes.make("wan")
    torch.manual_seed(6)
    pipe.register_modules(text_encoder=Encoder())
    pipe.__dict__["tokenizer"] = tokenizer()
    return pipe


def run(pipe: Any, prompt: Any, words: Any = None, **more: Any) -> module.Heatmap:
    return vtr.heatmap(
        pipe, prompt, words, num_inference_steps=STEPS, max_sequence_length=16,
        generator=torch.Generator().manual_seed(0), **{**pipes._VIDEO, **more},
    )  # fmt: skip


def test_words_of_a_prompt_are_places_of_its_text() -> None:
    pipe = wan_with_text()
    own = pipe.tokenizer
    found = run(pipe, "A red horse, and the cat", filter_sinks=False)
    assert list(found.maps) == ["red", "horse", "cat"]  # those that are no stop words
    assert pipe.tokenizer is own
    # [BOS] a red hors ##e , and the cat
    at = {"red": (2,), "horse": (3, 4), "cat": (8,), "the cat": (8,)}
    said = run(pipe, "A red horse, and the cat", at, filter_sinks=False)
    named = run(pipe, "A red horse, and the cat", ["the cat"], filter_sinks=False)
    for word in found.maps:
        assert torch.equal(found.attention[word], said.attention[word])
    assert torch.equal(named.attention["the cat"], said.attention["the cat"])
    both = run(pipe, "A red horse, and the cat", ["the cat"], filter_sinks=False, stop_words=())
    assert torch.equal(
        both.attention["the cat"],
        run(pipe, "A red horse, and the cat", {"x": (7, 8)}, filter_sinks=False).attention["x"],
    )


def test_each_sample_has_the_words_of_its_prompt() -> None:
    pipe, prompts = wan_with_text(), ["a red cat", "the mat and a dog"]
    second = run(pipe, prompts, "dog", sample=3, num_videos_per_prompt=2, filter_sinks=False)
    said = run(pipe, prompts, {"dog": (5,)}, sample=3, num_videos_per_prompt=2, filter_sinks=False)
    assert torch.equal(second.attention["dog"], said.attention["dog"])
    with pytest.raises(ValueError, match="'cat' is not in the prompt 'the mat and a dog'"):
        run(pipe, prompts, "cat", sample=2, num_videos_per_prompt=2)


def test_errors_of_words() -> None:
    pipe = wan_with_text()
    for words, message in (
        ("dog", "'dog' is not in the prompt 'a red cat'"),
        ("ca", "'ca' is not in the prompt"),
        ("a", "'a' is a stop word, which is filtered out: give stop_words="),
        ([], "words must be at least one word"),
        ({}, "words must map labels"),
        ({"x": (-1,)}, "words must map labels"),
        ({"x": (16,)}, "the text has 16 tokens, 'x' is said to be at"),
        ("  ", "a word must have letters"),
    ):
        with pytest.raises(ValueError, match=message):
            run(pipe, "a red cat", words)
    with pytest.raises(
        ValueError, match=r"'dog' has no token in what the text encoder reads.*behind"
    ):
        run(pipe, "a red cat " * 6 + "dog", "dog")
    with pytest.raises(ValueError, match="no word of 'the and' has a token besides stop words"):
        run(pipe, "the and")
    with pytest.raises(ValueError, match="give a prompt, or prompt_embeds"):
        vtr.heatmap(pipe)
    with pytest.raises(ValueError, match="without a prompt the tokens of words are not known"):
        vtr.heatmap(pipe, words="cat", **pipes.PIPES["wan"][1])
    # The tokenizer is the pipeline's own again after an error.
    assert type(pipe.tokenizer).__name__ != "Recorder"
    assert "processor" not in pipe.transformer.blocks[0].attn2.__dict__ or not isinstance(
        pipe.transformer.blocks[0].attn2.processor, SiteProcessor
    )


def test_a_tokenizer_that_does_not_say_its_characters() -> None:
    class Slow:
        def __call__(self, text: Any, return_offsets_mapping: bool = False, **_: Any) -> Any:
            if return_offsets_mapping:
                raise NotImplementedError
            return {"input_ids": torch.ones(len(text), 3, dtype=torch.long)}

    recorder = Recorder(Slow(), 1)
    recorder(["a cat"])
    with pytest.raises(ValueError, match="the tokenizer Slow does not say which characters"):
        recorder.tokens(0)


def test_a_recorder_is_its_tokenizer() -> None:
    pipe = SimpleNamespace(tokenizer=tokenizer(), tokenizer_2=None)
    own = pipe.tokenizer
    with recorded(pipe, "Wan", 1) as found:
        assert pipe.tokenizer is found[0]
        assert pipe.tokenizer.pad_token == "[PAD]"
        pipe.tokenizer.padding_side = "left"
    assert pipe.tokenizer is own
    assert own.padding_side == "left"


# ---- other errors ------------------------------------------------------------------------------------


def test_errors_of_numbers() -> None:
    pipe = pipes.make("wan")
    for options, message in (
        ({"steps": (9,)}, r"no attention to text in steps \[9\] of 2"),
        ({"steps": ()}, "steps must be 0-based numbers"),
        ({"layers": (3,)}, r"layers must be in 0\.\.2, got 3"),
        ({"layers": "12"}, "layers must be 0-based numbers"),
        ({"sample": 1}, r"sample must be in 0\.\.0, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            watched(pipe, "wan", **options)


def test_errors_of_pipelines() -> None:
    with pytest.raises(vtr.UnsupportedModelError, match="heatmap runs a pipeline of diffusers"):
        vtr.heatmap(pipes.make("wan").transformer, "a cat", "cat")
    with pytest.raises(vtr.UnsupportedModelError, match="DiT has no attention to words"):
        vtr.heatmap(pipes.make("dit"), "a cat", "cat", class_labels=[1])
    pipe = pipes.make("wan")
    with (
        vtr.apply(pipe, vtr.OwnFrame(0, block=16)),
        pytest.raises(vtr.UnsupportedModelError, match=r"has a method of vtr\.apply"),
    ):
        watched(pipe, "wan")


def test_a_family_whose_text_is_not_known_needs_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(module.TOKENIZERS, "Wan")
    pipe = wan_with_text()
    with pytest.raises(ValueError, match="the places of words in the text of Wan are not known"):
        run(pipe, "a red cat", "cat")
    assert run(pipe, "a red cat", {"cat": (3,)}).maps["cat"].shape == (3, 3, 5)


# ---- the built-in generator, and drawing ------------------------------------------------------------


def test_the_digit_is_where_its_word_points(tmp_path: Any) -> None:
    """The digit's 8 x 8 box has more than twice the share of the map that its area is."""
    from vtr.evaluate.digit_judge import BLACK

    pipe = load_pipeline("digits-wan")
    pipe.set_progress_bar_config(disable=True)
    shares = []
    for number, prompt in enumerate(["a 7 moving right", "a 4 moving left"]):
        word = prompt.split()[1]
        found = vtr.heatmap(
            pipe, prompt, output_type="np", generator=torch.Generator().manual_seed(number)
        )
        assert set(found.maps) == {word, prompt.split()[3]}
        pixels = torch.from_numpy(found.images[0]).mean(-1)
        ink = torch.where(pixels < BLACK, 0.0, pixels)
        sums = F.avg_pool2d(ink[:, None], 8, 1)[:, 0]
        map = found.maps[word].repeat_interleave(2, 1).repeat_interleave(2, 2)
        for frame in range(5):
            top, left = divmod(int(sums[frame].argmax()), sums.shape[2])
            inside = map[frame, top : top + 8, left : left + 8].sum()
            shares.append(float(inside / map[frame].sum()))
    assert sum(shares) / len(shares) > 2 * 64 / 512

    frames = found.draw()
    assert len(frames) == 5
    assert frames[0].size == (2 * 256 + 8, 128 + 24)
    assert found.draw(word)[0].size == (256, 128 + 24)
    for suffix, count in ((".png", 1), (".gif", 5), (".webp", 5), (".apng", 5)):
        found.save(tmp_path / f"map{suffix}")
        with Image.open(tmp_path / f"map{suffix}") as image:
            assert getattr(image, "n_frames", 1) == count
    assert Image.open(tmp_path / "map.png").size == (5 * 256 + 4 * 8, 2 * 152 + 10)
    with pytest.raises(ValueError, match="name a picture"):
        found.save(tmp_path / "map.txt")
    with pytest.raises(ValueError, match="no map of 'cat'; there are '4', 'left'"):
        found.draw("cat")
    with pytest.raises(ValueError, match="name at least one word"):
        found.draw([])
    with pytest.raises(ValueError, match="strength must be in"):
        found.draw(strength=0)
    assert repr(found) == "Heatmap('4', 'left'; 5 x 8 x 16 tokens)"


def test_latents_are_drawn_on_grey() -> None:
    found = watched(pipes.make("flux"), "flux")
    assert found.frames is None
    assert not found.video
    picture = found.draw("one", strength=1.0)
    assert isinstance(picture, Image.Image)
    assert picture.size == (7 * 16 * 2, 5 * 16 * 2 + 24)
    # The strongest token has the last colour, the weakest is grey.
    pixels, map = np.asarray(picture)[24:], found.maps["one"][0].numpy()
    y, x = np.unravel_index(map.argmax(), map.shape)
    assert np.abs(pixels[y * 32 + 16, x * 32 + 16].astype(int) - (252, 255, 164)).max() < 40
    y, x = np.unravel_index(map.argmin(), map.shape)
    assert np.abs(pixels[y * 32 + 16, x * 32 + 16].astype(int) - 128).max() < 40


def test_frames_of_tokens_behind_those_of_the_video() -> None:
    assert [frame_of(n, 9, 3) for n in range(9)] == [0, 1, 1, 1, 1, 2, 2, 2, 2]  # Wan: 1 + 4 n
    assert [frame_of(n, 5, 5) for n in range(5)] == [0, 1, 2, 3, 4]
    assert [frame_of(n, 6, 3) for n in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [frame_of(n, 4, 1) for n in range(4)] == [0, 0, 0, 0]
