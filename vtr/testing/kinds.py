"""The kinds of models that the laws are held on, with what a law must know of each.

A kind builds a tiny random model of a real class and two different samples, makes one batch of them, and
calls the model. Its library is imported when the model is built.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


class SiteLayers(NamedTuple):
    """The layers of a site, and the modules in them that see the tokens.

    Attributes:
        path: end of the path of the list of layers (a regular expression).
        first: path in a layer of the module that sees the tokens of its first half; empty is the layer.
        second: the same for its second half; empty if there is no such module.
    """

    path: str
    first: str = ""
    second: str = "mlp"


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of model.

    Attributes:
        name: of the kind, for the argument ``kinds`` and for messages.
        library: what must be installed.
        layers: site -> the layers whose tokens are counted.
        prefix: tokens in front of the visual ones in the encoder.
        options: of :func:`vtr.apply`.
        sides: sides of the padding in a batch; empty if a batch has no padding.
        tolerance: absolute and relative, between float32 results of a sample alone and in a batch.
        compiles: whether torch.compile is tried with every method; it takes a second and more.
    """

    name: str
    library: str
    layers: Mapping[str, SiteLayers] = field(default_factory=dict)
    prefix: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    sides: tuple[str, ...] = ()
    tolerance: float = 2e-4
    compiles: bool = False

    #: sites whose records have one row per sample
    rows: ClassVar[tuple[str, ...]] = ("image", "encoder")
    #: a method with one of these sites leaves as many tokens as its budget says
    counted: ClassVar[frozenset[str]] = frozenset({"encoder"})

    def __str__(self) -> str:
        return self.name

    @property
    def installed(self) -> bool:
        """True if the library of the models is installed."""
        return importlib.util.find_spec(self.library) is not None

    def build(self) -> Any:
        """Return a new model in evaluation mode, float32; always the same weights."""
        raise NotImplementedError

    @functools.cached_property
    def model(self) -> Any:
        """The model of this process: laws leave it as it was."""
        return self.build()

    @property
    def longer(self) -> Kind:
        """The same kind with prompts that are long enough for methods inside attention."""
        return self

    @functools.cached_property
    def whole(self) -> Inputs:
        """One batch of all samples."""
        return self.batch(self.samples)

    @functools.cached_property
    def native(self) -> Tensor:
        """The output of that batch without a method."""
        torch.manual_seed(7)
        with torch.no_grad():
            return self.call(self.model, self.whole)

    @functools.cached_property
    def lowered(self) -> dict[torch.dtype, Any]:
        """The model in bfloat16 and in float16."""
        types = (torch.bfloat16, torch.float16)
        return {dtype: copy.deepcopy(self.model).to(dtype) for dtype in types}

    @functools.cached_property
    def plans(self) -> dict[Any, Any]:
        """Calibrated numbers by method and dtype; None for methods that need none."""
        return {}

    @functools.cached_property
    def talks(self) -> dict[Any, Any]:
        """Conversations without a method, by padding."""
        return {}

    @property
    def samples(self) -> list[Inputs]:
        """Two samples, each as the model is called with it alone."""
        raise NotImplementedError

    def changed(self, sample: Inputs) -> Inputs:
        """The sample with other pixels, of the same size."""
        raise NotImplementedError

    def batch(self, samples: list[Inputs], side: str = "left") -> Inputs:
        """One call with all samples, padded at a side where the model pads."""
        raise NotImplementedError

    def call(self, model: Any, inputs: Inputs) -> Tensor:
        """Call the model: what each sample gets, (B, ...)."""
        raise NotImplementedError

    def calls(self, inputs: Inputs) -> list[Inputs]:
        """The inputs of the calls of the model that :meth:`call` makes."""
        return [inputs]

    def forward(self, model: Any, inputs: Inputs) -> Tensor:
        """Call the model once."""
        return self.call(model, inputs)

    def steady(self, out: Tensor) -> Tensor:
        """The part of a result that rounding moves little."""
        return out

    def images(self, sample: Inputs) -> list[tuple[int, int]]:
        """The visual tokens of each image or video of a sample, and how many of them are separators."""
        raise NotImplementedError

    def visual(self, site: str, length: int, sample: Inputs) -> int:
        """The visual tokens in a sequence of ``length`` columns that a layer at ``site`` got for a sample."""
        return length - self.prefix

    def cast(self, inputs: Inputs, dtype: torch.dtype) -> Inputs:
        """The inputs with floating-point tensors of another type."""
        return {k: cast(v, dtype) for k, v in inputs.items()}


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(cast(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@dataclass(frozen=True, eq=False)
class Encoder(Kind):
    """An encoder of images or clips: one tensor of pixels."""

    make: Callable[[], nn.Module] = nn.Module
    pixels: Callable[[int, int], Tensor] = torch.empty  # (batch, seed)
    tokens: int = 64

    def build(self) -> Any:
        return self.make()

    @property
    def samples(self) -> list[Inputs]:
        return [{"x": self.pixels(1, seed)} for seed in range(2)]

    def changed(self, sample: Inputs) -> Inputs:
        return {"x": sample["x"].flip(-1) * 0.7}

    def batch(self, samples: list[Inputs], side: str = "left") -> Inputs:
        return {"x": torch.cat([s["x"] for s in samples])}

    def call(self, model: Any, inputs: Inputs) -> Tensor:
        return result(model(inputs["x"]))

    def images(self, sample: Inputs) -> list[tuple[int, int]]:
        return [(self.tokens, 0)]


def result(output: Any) -> Tensor:
    """The tensor of an encoder's output that has one row per sample whatever was cut."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "image_features" in output:
        return output["image_features"]
    for name in ("logits", "pooler_output"):
        found = getattr(output, name, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    if isinstance(output, tuple):
        return output[0]  # type: ignore[no-any-return]
    return output.last_hidden_state[:, 0]  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Windowed(Encoder):
    """An encoder whose blocks work in windows.

    Attributes (beside those of :class:`Encoder`):
        path: end of the paths of its blocks (a regular expression).
        inner: path in a block of the module that sees what the block computes: windows, or merged tokens.
    """

    path: str = r"blocks\.\d+"
    inner: str = "attn"

    rows: ClassVar[tuple[str, ...]] = ()
    counted: ClassVar[frozenset[str]] = frozenset()

    def call(self, model: Any, inputs: Inputs) -> Tensor:
        out = model(inputs["x"])
        if isinstance(out, Tensor):
            return out
        logits = getattr(out, "logits", None)
        return out.last_hidden_state if logits is None else logits  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Language(Kind):
    """A vision-language model: a prompt per sample, and three tokens generated behind it."""

    family: str = ""
    video: bool = False
    steps: int = 3
    separators: int = 0
    long: bool = False

    rows: ClassVar[tuple[str, ...]] = ("prompt", "decoder")
    counted: ClassVar[frozenset[str]] = frozenset({"prompt", "decoder"})

    def _made(self) -> tuple[Any, Inputs]:
        from vtr.testing.models import videos, vlms

        return (videos.VIDEOS if self.video else vlms.FAMILIES)[self.family](2)

    def build(self) -> Any:
        return self._made()[0]

    @functools.cached_property
    def longer(self) -> Kind:  # type: ignore[override]
        return dataclasses.replace(self, long=True)

    @functools.cached_property
    def _samples(self) -> list[Inputs]:
        from vtr.testing.models import prompts

        if self.long:
            from vtr.testing.models.long import LONG

            if self.family in LONG:
                return LONG[self.family]()
        return prompts.split(self._made()[1])

    @property
    def samples(self) -> list[Inputs]:
        return [dict(sample) for sample in self._samples]

    def changed(self, sample: Inputs) -> Inputs:
        return {
            k: v.flip(-1) * 0.7 if k.startswith("pixel_values") else v for k, v in sample.items()
        }

    def batch(self, samples: list[Inputs], side: str = "left") -> Inputs:
        from vtr.testing.models import prompts

        lengths = [s["input_ids"].shape[1] for s in samples]
        width = max(lengths)
        left = [width - n if side == "left" else 0 for n in lengths]
        return prompts.padded(samples, left, width)

    def call(self, model: Any, inputs: Inputs) -> Tensor:
        mask = inputs["attention_mask"]
        if not mask[:, -1].all():  # generate is for prompts that end in the last column
            logits = model(**inputs).logits
            last = (mask * torch.arange(mask.shape[1])).argmax(1)
            return logits[torch.arange(len(last)), last][:, None]  # type: ignore[no-any-return]
        out = model.generate(
            **inputs,
            max_new_tokens=self.steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits, 1)

    def forward(self, model: Any, inputs: Inputs) -> Tensor:
        return model(**inputs).logits  # type: ignore[no-any-return]

    def steady(self, out: Tensor) -> Tensor:
        return out[:, 0]  # another first token changes all that follows

    def images(self, sample: Inputs) -> list[tuple[int, int]]:
        from vtr.testing.models.vlms import visual

        runs = "".join("x" if v else " " for v in visual(sample["input_ids"])[0].tolist()).split()
        return [(len(run), self.separators) for run in runs]

    def visual(self, site: str, length: int, sample: Inputs) -> int:
        if site == "encoder":
            return length - self.prefix
        from vtr.testing.models.vlms import visual

        return length - int((~visual(sample["input_ids"])).sum())


@dataclass(frozen=True, eq=False)
class Detector(Kind):
    """A detector of transformers: pictures of one size, the second with padding."""

    make: Callable[[], nn.Module] = nn.Module
    seen: tuple[int, ...] = (126, 64)  # tokens of each sample without padding

    rows: ClassVar[tuple[str, ...]] = ("detector",)
    counted: ClassVar[frozenset[str]] = frozenset({"detector"})

    def build(self) -> Any:
        return self.make()

    @property
    def samples(self) -> list[Inputs]:
        from vtr.testing.models.detectors import pictures

        return [pictures(1, seed) for seed in range(2)]

    def changed(self, sample: Inputs) -> Inputs:
        return {**sample, "pixel_values": sample["pixel_values"].flip(1) * 0.7}

    def batch(self, samples: list[Inputs], side: str = "left") -> Inputs:
        return {k: torch.cat([s[k] for s in samples]) for k in samples[0]}

    def call(self, model: Any, inputs: Inputs) -> Tensor:
        out = model(**inputs)
        return torch.cat([out.logits, out.pred_boxes], -1)

    def steady(self, out: Tensor) -> Tensor:
        return out.mean(1)  # rounding may change which proposals a model of two stages chooses

    def images(self, sample: Inputs) -> list[tuple[int, int]]:
        padded = not bool(sample["pixel_mask"].all())
        return [(self.seen[int(padded)], 0)]


@dataclass(frozen=True, eq=False)
class Diffusion(Kind):
    """A diffusion transformer: one run of three denoising steps."""

    case: str = ""
    text_apart: bool = False
    times: tuple[float, ...] = (900.0, 600.0, 300.0)

    rows: ClassVar[tuple[str, ...]] = ("block",)
    counted: ClassVar[frozenset[str]] = frozenset()

    @property
    def facts(self) -> Any:
        from vtr.testing.models.diffusion import CASES, LONG
        from vtr.testing.models.diffusion_more import MORE
        from vtr.testing.models.unets import UNETS

        return LONG if self.case == "wan" else {**CASES, **MORE, **UNETS}[self.case]

    def build(self) -> Any:
        return self.facts.build()

    @property
    def samples(self) -> list[Inputs]:
        both = self.facts.call(batch=2)
        return [{k: _one(v, i) for k, v in both.items()} for i in range(2)]

    def changed(self, sample: Inputs) -> Inputs:
        if "x" in sample:  # Z-Image: a list
            return {**sample, "x": [x.flip(-1) * 0.7 for x in sample["x"]]}
        name = "sample" if "sample" in sample else "hidden_states"  # UNets
        return {**sample, name: sample[name].flip(-1) * 0.7}

    def batch(self, samples: list[Inputs], side: str = "left") -> Inputs:
        first = samples[0]
        return {
            k: type(v)(s[k][0] for s in samples) if isinstance(v, list)
            else {n: torch.cat([s[k][n] for s in samples]) for n, t in v.items() if _per_sample(t, 1)}
            if isinstance(v, dict) and any(_per_sample(t, 1) for t in v.values())
            else torch.cat([s[k] for s in samples]) if _per_sample(v, 1) else v
            for k, v in first.items()
        }  # fmt: skip

    def call(self, model: Any, inputs: Inputs) -> Tensor:
        return torch.stack([predicted(model(**given)) for given in self.calls(inputs)], 1)

    def calls(self, inputs: Inputs) -> list[Inputs]:
        shares = [t / self.times[0] for t in self.times]
        if "t" in inputs:  # Z-Image counts from noise to image
            times = [{"t": 1 - (1 - inputs["t"]) * share} for share in shares]
        else:
            times = [{"timestep": inputs["timestep"] * share} for share in shares]
        return [{**inputs, **time} for time in times]

    def visual(self, site: str, length: int, sample: Inputs) -> int:
        # Attention counts joint text, also if another module projects it.
        return length + (self.facts.text if self.text_apart else 0)


def predicted(output: Any) -> Tensor:
    """Return the prediction of a transformer, (B, ...): most return it in a tuple, Z-Image as a list in one."""
    found = output[0] if isinstance(output, tuple) else output
    return torch.stack(found) if isinstance(found, list) else found


def _one(value: Any, row: int) -> Any:
    """One sample of what a call of two is given, which may be a dict (SDXL's conditions)."""
    if isinstance(value, dict):
        return {name: _one(held, row) for name, held in value.items()}
    return value[row : row + 1] if _per_sample(value) else value


def _per_sample(value: Any, batch: int = 2) -> bool:
    return isinstance(value, (Tensor, list)) and len(value) == batch


def _timm(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from vtr.testing.models.encoders import vit

        return vit(depth=4, **options)  # type: ignore[no-any-return]

    return make


def _encoder(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from vtr.testing.models import encoders

        return getattr(encoders, name)()  # type: ignore[no-any-return]

    return make


def _images(size: int) -> Callable[[int, int], Tensor]:
    from vtr.testing.models.encoders import images

    return lambda batch, seed: images(batch, seed, size)


def _clips(batch: int, seed: int) -> Tensor:
    from vtr.testing.models.encoders import clips

    return clips(batch, seed)


def _tower(name: str, prefix: int, layers: str = "encoder.layers", **more: Any) -> Encoder:
    return Encoder(
        f"transformers-{name.replace('_', '-')}", "transformers", {"encoder": SiteLayers(layers)},
        prefix=prefix, make=_encoder(name), pixels=_images(32), **more,
    )  # fmt: skip


def _clips_of(name: str, prefix: int) -> Encoder:
    layers = {"encoder": SiteLayers("(encoder.layer|layers)", second="")}
    return Encoder(name, "transformers", layers, prefix=prefix, make=_encoder(name), pixels=_clips)


def _windowed(name: str, library: str, size: int, **more: Any) -> Windowed:
    made = _encoder(name.replace("-", "_"))
    return Windowed(name, library, make=made, pixels=_images(size), **more)


_DECODER = SiteLayers("language_model.layers", "self_attn.o_proj")
_BLOCKS = {"encoder": SiteLayers("blocks")}


def _language(name: str, family: str, tower: SiteLayers | None = None, **more: Any) -> Language:
    layers = {"decoder": _DECODER} if tower is None else {"encoder": tower, "decoder": _DECODER}
    return Language(
        name, "transformers", layers, sides=("left", "right"), family=family, **more
    )  # fmt: skip


def _detector(name: str, make: str, second: str = "mlp", **more: Any) -> Detector:
    def build() -> nn.Module:
        from vtr.testing.models import detectors

        return getattr(detectors, make)()  # type: ignore[no-any-return]

    layers = {"detector": SiteLayers("model.encoder.layers", "self_attn", second)}
    return Detector(name, "transformers", layers, make=build, **more)


def _diffusion(name: str, blocks: str, attention: str, text_apart: bool = False) -> Diffusion:
    layers = {"attention": SiteLayers(blocks, attention, "")}
    return Diffusion(
        name,
        "diffusers",
        layers,
        case=name,
        tolerance=3e-5,
        text_apart=text_apart,
    )


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Encoder("timm", "timm", _BLOCKS, 1, make=_timm(), pixels=_images(64), compiles=True),
        Encoder(
            "timm-without-class-token", "timm", _BLOCKS, pixels=_images(64),
            make=_timm(class_token=False, global_pool="avg"),
        ),
        Encoder(
            "timm-with-registers", "timm", _BLOCKS, 5, pixels=_images(64), make=_timm(reg_tokens=4)
        ),
        Encoder(
            "open_clip", "open_clip", {"encoder": SiteLayers("visual.transformer.resblocks")}, 1,
            pixels=_images(32), make=_encoder("open_clip"),
        ),
        _tower("clip", 1),
        _tower("siglip", 0),
        _tower("dinov2_registers", 4, "encoder.layer"),
        _clips_of("vivit", 1),
        _clips_of("videomae", 0),
        _windowed("timm-swin", "timm", 56, compiles=True),
        _windowed("timm-swinv2", "timm", 64),
        _windowed("swin", "transformers", 56, inner="attention"),
        _windowed("swinv2", "transformers", 64, inner="attention"),
        _windowed("timm-sam", "timm", 80, inner="mlp"),
        _windowed("sam", "transformers", 80, path=r"layers\.\d+", inner="mlp"),
        _language("llava-next", "llava_next", SiteLayers("encoder.layers", "self_attn.out_proj"), prefix=1),
        _language("qwen2.5-vl", "qwen2_5_vl"),
        _language("qwen3-vl", "qwen3_vl"),
        _language("internvl", "internvl", prefix=1),
        _language("llava-onevision-video", "llava_onevision_video", video=True, separators=1),
        _detector("deformable-detr", "deformable_detr"),
        _detector("deformable-detr-two-stage", "two_stage"),
        _detector("detr", "detr", seen=(24, 12)),
        _diffusion("wan", "blocks", "attn1.to_out.0"),
        _diffusion("cogvideox", "transformer_blocks", "attn1.to_out.0"),
        _diffusion("hunyuan-video", "transformer_blocks", "attn.to_out.0", text_apart=True),
        _diffusion("flux", "transformer_blocks", "attn.to_out.0", text_apart=True),
    )
}  # fmt: skip
"""Every kind by its name: encoders, vision-language models, detectors, then diffusion transformers."""
