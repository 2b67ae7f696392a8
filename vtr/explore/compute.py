"""The answers of a model with each method, as pictures and numbers, without a web page."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vtr
from vtr.core.method import Method
from vtr.explore import pictures
from vtr.explore.media import Shown
from vtr.explore.subjects import Subject, labels, question_of
from vtr.zoo import inputs

TOKENS = 64
"""Tokens of an answer at most."""
SEED = 0
"""Of the noise that a generator starts from."""
REPEATS = 3
Titled = tuple[str, Any]
"""A caption and a PIL image."""


@dataclass(frozen=True)
class Said:
    """An answer or a class, and its probability; None for what has none."""

    text: str
    probability: float | None = None


@dataclass(frozen=True)
class ColumnCosts:
    """Costs of one way of running a model, each None if it is not known.

    Attributes:
        tokens: visual tokens after the last cut, per picture or prompt.
        flops: of a sample.
        kv_bytes: of the KV cache after the prompt.
        milliseconds: median of one call (of a vision-language model: up to its first token); of a generator,
            one run.
        density: share of the pairs of tokens that sparse attention computed.
    """

    tokens: int | None = None
    flops: float | None = None
    kv_bytes: float | None = None
    milliseconds: float | None = None
    density: float | None = None


@dataclass(frozen=True)
class Column:
    """One way of running the model.

    Attributes:
        title: the method with its options, or ``dense``.
        said: one answer, or the class of each picture.
        costs: of this way.
        dense: the same costs without a method, as this method's report counts them.
        stages: the tokens that are left after each stage, drawn on the picture.
        masks: of sparse attention, and the result of a generator.
        parts: FLOPs of each part of the model that the report counts, dense and with the method.
        note: what a reader must know.
        failed: the method could not run; ``note`` says why.
    """

    title: str
    said: tuple[Said, ...] = ()
    costs: ColumnCosts = ColumnCosts()
    dense: ColumnCosts = ColumnCosts()
    stages: tuple[Titled, ...] = ()
    masks: tuple[Titled, ...] = ()
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    note: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Compared:
    """A model with one to three methods beside the dense model, which is the first column."""

    columns: tuple[Column, ...]
    methods: tuple[Method, ...]
    text: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Maps:
    """Attention of the dense model: maps over the picture, and the sinks of a language model."""

    maps: tuple[Titled, ...] = ()
    sinks: tuple[Titled, ...] = ()
    summary: str = ""


@dataclass
class _Run:
    """A model with its inputs, ready to be run with any method."""

    subject: Subject
    call: Callable[[], tuple[tuple[Said, ...], Any]]
    canvas: Any = None
    inputs: Any = None
    video: Any = None
    text: str = ""


def compare(
    subject: Subject,
    shown: Shown,
    names: Sequence[str],
    keep: float,
    text: str = "",
    *,
    measure: bool = True,
) -> Compared:
    """Run a model dense and with each method.

    Args:
        subject: the model.
        shown: pictures, a clip, or nothing for a generator.
        names: one to three methods.
        keep: share that each keeps, in (0, 1].
        text: question or prompt; empty is that of the sample, or a plain one.
        measure: measure times as well.

    Raises:
        ValueError: no method or more than three, one that the model does not offer, or inputs that the model does
            not take.
    """
    chosen = list(dict.fromkeys(names))
    if not 1 <= len(chosen) <= 3:
        raise ValueError(f"choose one to three methods, got {len(chosen)}")
    methods = tuple(subject.method(name, keep) for name in chosen)
    start = time.perf_counter()
    with subject.lock, torch.inference_mode():
        run = _prepared(subject, shown, text)
        key = ("dense", subject.name, run.text)
        dense, output = shown.remembered(key, lambda: _dense(run))
        columns = [dense, *(_reduced(run, method, dense, output) for method in methods)]
        columns = _counted(columns)
        if (
            measure and subject.kind != "generator"
        ):  # a run of which is long, and is its own measure
            columns = _profiled(run, columns, methods)
    seconds = time.perf_counter() - start
    return Compared(tuple(columns), methods, run.text, seconds)


def attention(subject: Subject, shown: Shown, text: str = "") -> Maps:
    """Draw where the dense model attends: of an encoder the attention of the class token, of a vision-language
    model the attention that tokens receive and its sinks, of a generator the attention to the words of its prompt.

    Raises:
        ValueError: the model does not take these inputs.
    """

    def found() -> Maps:
        with subject.lock, torch.no_grad():
            run = _prepared(subject, shown, text)
            if subject.kind == "generator":
                return _words(subject, run.text)
            if subject.kind == "vlm":
                return _sinks(subject, run)
            return Maps(maps=pictures.class_attention(subject.model, run.inputs, run.canvas))

    return shown.remembered(("attention", subject.name, text), found)


def _prepared(subject: Subject, shown: Shown, text: str) -> _Run:
    text = text or shown.text
    if subject.kind == "generator":
        return _generation(subject, text)
    if not shown.pictures and shown.clip is None:
        raise ValueError("choose a sample, or upload a picture")
    if subject.kind == "vlm":
        return _asked(subject, shown, text or question_of(subject))
    if shown.clip is not None:
        raise ValueError(f"{subject.name} takes pictures: upload one or several")
    return _classified(subject, shown)


# ---- the three kinds of models ------------------------------------------------------------------


def _classified(subject: Subject, shown: Shown) -> _Run:
    model, name = subject.model, labels(subject)
    parts = [inputs.preprocess(model, subject.name, picture) for picture in shown.pictures]
    reference = next(model.parameters())
    pixels = torch.cat(parts).to(reference.device, reference.dtype)

    def call() -> tuple[tuple[Said, ...], Any]:
        out = model(pixels)
        if out.dim() == 2 and out.shape[1] == getattr(model, "num_classes", None):
            top = out.float().softmax(1).max(1)
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            return tuple(Said(name(index), value) for index, value in pairs), out
        return (), out

    return _Run(subject, call, list(shown.pictures), pixels)


def _asked(subject: Subject, shown: Shown, text: str) -> _Run:
    model, processor = subject.model, subject.processor
    if shown.clip is not None and not subject.takes_clips:
        raise ValueError(f"{subject.name} takes no clips: upload pictures")
    video = None if shown.clip is None else shown.video(subject.frames)
    seen = video if video is not None else list(shown.pictures)
    asked = inputs.vlm_inputs(subject.name, model, processor, seen, text)

    def call() -> tuple[tuple[Said, ...], Any]:
        out = model.generate(
            **asked, max_new_tokens=TOKENS, do_sample=False, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        new = out.sequences[0, asked["input_ids"].shape[1] :]
        chances = [
            float(scores[0].float().softmax(-1)[token])
            for scores, token in zip(out.scores, new, strict=True)
        ]
        answer = processor.decode(new, skip_special_tokens=True).strip()
        return (Said(answer, float(np.prod(chances))),), None

    canvas = [inputs.vlm_canvas(asked, seen[0])] if video is None and len(seen) == 1 else seen
    first = {**asked, "logits_to_keep": 1, "use_cache": True}
    return _Run(subject, call, canvas, first, video=video, text=text)


def _generation(subject: Subject, text: str) -> _Run:
    if not text:
        raise ValueError("write a prompt, such as: a 7 moving right")
    pipe = subject.model

    def call() -> tuple[tuple[Said, ...], Any]:
        generator = torch.Generator().manual_seed(SEED)
        return (), pipe(text, generator=generator, output_type="pil").frames[0]

    return _Run(subject, call, text=text)


# ---- columns ------------------------------------------------------------------------------------


def _dense(run: _Run) -> tuple[Column, Any]:
    start = time.perf_counter()
    said, out = run.call()
    costs = ColumnCosts()
    if run.subject.kind == "generator":
        costs = ColumnCosts(milliseconds=1e3 * (time.perf_counter() - start))
    return Column("dense", said, costs, masks=_result(run, out)), out


def _result(run: _Run, out: Any) -> tuple[Titled, ...]:
    """The frames of a generator."""
    return (("result", pictures.strip(out)),) if run.subject.kind == "generator" else ()


def _reduced(run: _Run, method: Method, dense: Column, output: Any) -> Column:
    title = str(method)
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            with vtr.apply(run.subject.model, method, **run.subject.options) as handle:
                start = time.perf_counter()
                said, out = run.call()
                took = 1e3 * (time.perf_counter() - start)
                trace = handle.trace
                report = handle.report()
        notes = [str(w.message) for w in heard if issubclass(w.category, UserWarning)]
        stages, why = pictures.stages(trace, run.canvas, run.video)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return Column(title, note=" ".join(str(error).split()), failed=True)
    note = "; ".join([n for n in notes if n.startswith(method.name)] + ([why] if why else []))
    if run.subject.kind == "generator":
        said = (Said(f"{_psnr(out, output):.1f} dB to dense"),)
    elif not said:
        close = torch.nn.functional.cosine_similarity(out.flatten(), output.flatten(), dim=0)
        said = (Said(f"features, cosine with dense {float(close):.3f}"),)
    costs, whole = _costs(trace, report)
    if run.subject.kind == "generator":
        costs = replace(costs, milliseconds=took)
        whole = replace(whole, milliseconds=dense.costs.milliseconds)
    masks = (*_result(run, out), *pictures.masks(trace))
    return Column(title, said, costs, whole, stages, masks, report.flops, note)


def _costs(trace: Any, report: Any) -> tuple[ColumnCosts, ColumnCosts]:
    """Costs with the method and without it, as the report of the last call counts them."""
    last = trace.stages[-1] if trace.stages else None
    found = trace.notes.get("attention", {}).values()
    seen = [float(note["density"]) for note in found if "density" in note]
    cache, held = report.kv_bytes, report.cache
    reduced = ColumnCosts(
        None if last is None else min(s.tokens_out for s in trace.stages),
        kv_bytes=held.bytes if held is not None else None if cache is None else cache[1],
        density=sum(seen) / len(seen) if seen else None,
    )
    dense = ColumnCosts(
        None if last is None else trace.stages[0].tokens_in,
        kv_bytes=held.full if held is not None else None if cache is None else cache[0],
        density=1.0 if seen else None,
    )
    return reduced, dense


def _counted(columns: Sequence[Column]) -> list[Column]:
    """Add FLOPs of the same parts of the model to all columns: a report counts the parts that a method changes."""
    every: dict[str, int] = {}
    for column in columns:
        every |= {part: pair[0] for part, pair in column.parts.items()}
    out = []
    for column in columns:
        if not column.parts:
            out.append(column)
            continue
        after = sum(column.parts.get(part, (0, dense))[1] for part, dense in every.items())
        costs, whole = replace(column.costs, flops=after), sum(every.values())
        out.append(replace(column, costs=costs, dense=replace(column.dense, flops=whole)))
    return out


def _profiled(run: _Run, columns: list[Column], methods: Sequence[Method]) -> list[Column]:
    """Add measured times, dense and with each method that ran, in alternation."""
    works = [i for i, column in enumerate(columns) if i and not column.failed]
    if not works:
        return columns
    out = list(columns)
    try:
        rows = vtr.profile(
            run.subject.model,
            run.inputs,
            [methods[i - 1] for i in works],
            repeats=REPEATS,
            **run.subject.options,
        ).rows
    except (ValueError, RuntimeError) as error:
        why = f"not measured: {' '.join(str(error).split())}"
        return [replace(c, note="; ".join(filter(None, [c.note, why]))) for c in columns]
    for i, row in zip([0, *works], rows, strict=True):
        out[i] = replace(out[i], costs=replace(out[i].costs, milliseconds=row.latency_ms))
    for i in works:
        out[i] = replace(out[i], dense=replace(out[i].dense, milliseconds=rows[0].latency_ms))
    return out


def _psnr(frames: Sequence[Any], reference: Sequence[Any]) -> float:
    """Peak signal-to-noise ratio in dB of PIL frames; 90 if they are equal."""
    a, b = (np.stack([np.asarray(f, np.float64) for f in x]) / 255 for x in (frames, reference))
    return min(90.0, -10 * float(np.log10(max(float(((a - b) ** 2).mean()), 1e-9))))


# ---- maps ---------------------------------------------------------------------------------------


def _sinks(subject: Subject, run: _Run) -> Maps:
    asked = {k: v for k, v in run.inputs.items() if k != "use_cache"}
    found = vtr.sinks(subject.model, asked)
    drawn = (("attention that each token receives, layer by layer", found.draw(size=14)),)
    received: Tensor = found.received[:, 0, found.visual[0]]
    side = round(received.shape[1] ** 0.5)
    maps: tuple[Titled, ...] = ()
    if run.video is None and len(run.canvas) == 1 and side * side == received.shape[1]:
        grids = received.reshape(-1, side, side)
        maps = pictures.over(grids, run.canvas[0], "layer")
    return Maps(maps, drawn, found.summary())


def _words(subject: Subject, prompt: str) -> Maps:
    generator = torch.Generator().manual_seed(SEED)
    found = vtr.heatmap(subject.model, prompt, generator=generator, output_type="pil")
    return Maps(tuple((word, pictures.strip(found.draw(word), 128)) for word in found.maps))
