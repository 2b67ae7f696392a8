"""A comparison as a plan for each method, and as Python lines that anyone can run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import vtr
from vtr.core.method import Method
from vtr.core.plan import Plan
from vtr.explore.compute import SEED, TOKENS
from vtr.explore.media import Shown
from vtr.explore.subjects import Subject, question_of


def plan_json(methods: Sequence[Method], subject: Subject) -> str:
    """Return plans as JSON: that of the one method, or an object of them by the names of the methods.

    ``vtr.Plan.from_dict`` and ``vtr.Plan.load`` take each.
    """
    notes = {"model": subject.name, "from": f"vtr explore {vtr.__version__}"}
    plans = {m.name: Plan((m,), notes=notes).to_dict() for m in methods}
    return json.dumps(next(iter(plans.values())) if len(plans) == 1 else plans, indent=2)


def python_lines(subject: Subject, shown: Shown, methods: Sequence[Method], text: str = "") -> str:
    """Return a script that prints the answer with each method, and draws what it did.

    Uploaded files are read from the folder in which it runs, under the names that they were uploaded with.
    """
    text = text or shown.text
    head, seen = ["import torch", "import vtr"], _seen(subject, shown)
    head += [line for line in subject.lines if line.startswith(("from ", "import "))]
    body = [line for line in subject.lines if not line.startswith(("from ", "import "))]
    head += [line for line in seen if line.startswith(("from ", "import "))]
    body += [line for line in seen if not line.startswith(("from ", "import "))]
    listed = ", ".join(map(spelled, methods))
    body += [f"methods = [{listed}]", "", "for method in methods:"]
    if subject.kind == "generator":
        run = [
            f"generator = torch.Generator().manual_seed({SEED})",
            f'frames = model({text!r}, generator=generator, output_type="pil").frames[0]',
            'frames[0].save(f"{method.name}.gif", save_all=True, append_images=frames[1:])',
            "print(method, handle.report())",
        ]
        body += _applied("model, method", run)
    elif subject.kind == "vlm":
        head += ["from vtr.zoo.inputs import vlm_canvas, vlm_inputs"]
        question = text or question_of(subject)
        run = [
            f"written = model.generate(**asked, max_new_tokens={TOKENS}, do_sample=False)",
            'new = written[0, asked["input_ids"].shape[1] :]',
            "answer = processor.decode(new, skip_special_tokens=True).strip()",
            "print(method, answer, handle.report())",
            *_drawn("vlm_canvas(asked, seen)" if len(shown.pictures) == 1 else "seen", shown),
        ]
        at = body.index(f"methods = [{listed}]")
        given = "[seen]" if len(shown.pictures) == 1 else "seen"
        body.insert(
            at, f"asked = vlm_inputs({subject.name!r}, model, processor, {given}, {question!r})"
        )
        body += _applied("model, method, **ref.options", run)
    else:
        head += ["from vtr.zoo.inputs import preprocess"]
        at = body.index(f"methods = [{listed}]")
        one = len(shown.pictures) == 1
        many = "seen" if not one else "[seen]"
        body.insert(
            at, f"pixels = torch.cat([preprocess(model, {subject.name!r}, p) for p in {many}])"
        )
        run = [
            "chances = model(pixels).softmax(-1)",
            "print(method, chances.argmax(-1).tolist(), chances.amax(-1).tolist())",
            "print(handle.report())",
            *_drawn("seen", shown),
        ]
        body += _applied("model, method", run)
    return "\n".join([*_imports(head), "", *body]) + "\n"


def _applied(arguments: str, run: Sequence[str]) -> list[str]:
    first = f"    with torch.inference_mode(), vtr.apply({arguments}) as handle:"
    return [first, *(f"        {line}" for line in run)]


def _drawn(canvas: str, shown: Shown) -> list[str]:
    if len(shown.pictures) > 1:  # which of them a stage belongs to depends on the method
        return []
    save = 'save(f"{method.name}.png")'
    masks = 'any("mask" in n for n in handle.trace.notes.get("attention", {}).values())'
    return [f"if handle.trace.stages or {masks}:", f"    vtr.draw(handle, {canvas}).{save}"]


def _seen(subject: Subject, shown: Shown) -> list[str]:
    """Lines that define ``seen``: a picture, a list of them, or a video."""
    if subject.kind == "generator":
        return []
    if shown.sample is not None:
        name, number = shown.sample
        lines = ["from vtr.explore.media import sample", f"shown = sample({name!r}, {number})"]
        if shown.clip is not None:
            return [*lines, f"seen = shown.video({subject.frames})"]
        return [*lines, "seen = shown.pictures[0]" if len(shown.pictures) == 1 else _LISTED]
    if shown.clip is not None:
        return [f"seen = vtr.video.load({shown.names[0]!r}, {subject.frames})"]
    lines = ["from pathlib import Path", "from vtr.zoo.inputs import read_image"]
    if len(shown.names) == 1:
        return [*lines, f"seen = read_image(Path({shown.names[0]!r}))"]
    return [*lines, f"seen = [read_image(Path(name)) for name in {list(shown.names)!r}]"]


_LISTED = "seen = list(shown.pictures)"


def spelled(method: Method) -> str:
    """Write a method as Python, with those options that are not their defaults."""
    options = []
    for f in dataclasses.fields(method):
        value: Any = getattr(method, f.name)
        if f.init and (value != f.default or type(value) is not type(f.default)):
            shown = spelled(value) if isinstance(value, Method) else repr(value)
            options.append(f"{f.name}={shown}")
    cls = type(method).__name__
    if getattr(vtr, cls, None) is type(method):
        return f"vtr.{cls}({', '.join(options)})"
    return f"vtr.create({', '.join([repr(method.name), *options])})"


def _imports(lines: Sequence[str]) -> list[str]:
    """Sorted, each once, names of one module together."""
    plain = sorted({line for line in lines if line.startswith("import ")})
    names: dict[str, set[str]] = {}
    for line in lines:
        if line.startswith("from "):
            module, _, listed = line.removeprefix("from ").partition(" import ")
            names.setdefault(module, set()).update(listed.split(", "))
    return [*plain, *(f"from {m} import {', '.join(sorted(names[m]))}" for m in sorted(names))]
