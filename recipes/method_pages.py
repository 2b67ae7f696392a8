"""``python -m recipes.method_pages``: the pages of docs/methods, one for every method, and their index.

    python -m recipes.method_pages                   # writes docs/methods/*.md, in a few seconds
    python -m recipes.method_pages --pictures        # draws the pictures again as well, in minutes

Everything is derived: from the registry, the docstrings, ``recipes.method_pictures``, benchmarks/fidelity.toml, and
committed measurements. The build of the documentation calls :func:`write`; the pages are not committed, the pictures are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import textwrap
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from recipes import method_numbers, method_pictures, method_text
from recipes.method_pictures import CLIP, PICTURE, QUESTION, REASONS, scenes
from recipes.method_text import methods
from vtr.core.method import Method
from vtr.core.registry import with_presets
from vtr.evaluate.prefill import GIVEN
from vtr.methods.common.decode import DecodeMethod
from vtr.methods.common.kv import KVMethod
from vtr.methods.common.language_attention import LanguageAttentionMethod
from vtr.methods.common.prefill import PrefillMethod

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs/methods"
PRESETS = 12  # on a page; the command line lists all

FAMILIES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "Vision encoders": (
        "Inside a vision transformer, or in front of it.",
        ("results.md", "train-tokens.md", "speed.md"),
    ),
    "Vision-language models": (
        "In the tower, at the entry of the language model, or between its layers.",
        ("evaluation.md", "results.md", "models.md"),
    ),
    "Video": (
        "Over the frames of a video, in video language models.",
        ("video-methods.md", "video-digits.md", "video.md"),
    ),
    "Sparse prefill": (
        "Pairs of tokens are skipped while a language model reads the prompt; all tokens are kept.",
        ("language-attention.md", "prefill-digits.md", "calibration.md"),
    ),
    "Attention edits": (
        "Whom a language model attends to, or how much its heads count, is changed; nothing is skipped.",
        ("language-attention.md", "prefill-digits.md", "calibration.md"),
    ),
    "KV cache and decoding": (
        "Entries of the cache are dropped, merged or stored with fewer bits, or a decoding step reads some of them.",
        ("cache.md", "cache-digits.md", "language-attention.md"),
    ),
    "Detectors and windows": (
        "Which tokens of a detector's encoder, or which windows, are computed.",
        ("detection-digits.md", "train-tokens.md"),
    ),
    "Diffusion transformers": (
        "Sparse attention, or fewer tokens, in generators of images and videos.",
        ("diffusion-methods.md", "diffusion-digits.md", "diffusion.md"),
    ),
}
"""Families in the order of the index: what their methods have in common, and pages about them."""


TRY: Mapping[str, str] = {
    "digits-vit": """
        import torch
        import vtr
        import vtr.zoo

        model = vtr.zoo.load("digits-vit")
        images, _ = vtr.zoo.samples("digits-vit", n=4, seed=123)
        with torch.inference_mode(), vtr.apply(model, METHOD) as handle:
            model(images)
        print(handle.trace.summary())
        """,
    "digits-llava": """
        import torch
        import vtr
        from vtr.zoo import load_vlm
        from vtr.zoo.questions import prompt, vqa

        model, processor = load_vlm("digits-llava")
        inputs = prompt(processor, vqa(4, seed=123))
        with torch.inference_mode(), vtr.apply(model, METHOD) as handle:
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
        print(handle.trace.summary())
        """,
    "digits-video": """
        import vtr
        from vtr.zoo import load_vlm
        from vtr.zoo.video_questions import answers, video_qa

        model, processor = load_vlm("digits-video")
        with vtr.apply(model, METHOD) as handle:
            print(answers(model, processor, video_qa(7, seed=5)))
        print(handle.trace.summary())
        """,
    "digits-long": """
        import vtr
        from vtr.zoo import load_vlm, slides_qa
        from vtr.zoo.video_questions import answers

        model, processor = load_vlm("digits-long")
        with vtr.apply(model, METHOD) as handle:
            print(answers(model, processor, slides_qa(2, seed=99)))
        print(handle.trace.summary())
        """,
    "digits-long, calibrated": """
        import vtr
        from vtr.zoo import load_vlm, slides_qa
        from vtr.zoo.video_questions import answers, prompt

        model, processor = load_vlm("digits-long")
        batches = [dict(prompt(processor, slides_qa(6, seed=1000, split="train")))]
        plan = vtr.calibrate(model, batches, METHOD)
        with vtr.apply(model, plan) as handle:
            print(answers(model, processor, slides_qa(2, seed=99)))
        print(handle.trace.summary())
        """,
    "digits-chat": """
        import vtr
        from vtr.zoo import chat_qa, load_vlm
        from vtr.zoo.chat_questions import converse

        model, processor = load_vlm("digits-chat")
        with vtr.apply(model, METHOD) as handle:
            print(converse(model, processor, chat_qa(2, "pictures", seed=99)).answers)
        print(handle.trace.summary())
        """,
    "digits-detr": """
        import torch
        import vtr
        import vtr.zoo

        model = vtr.zoo.load("digits-detr")
        with torch.inference_mode(), vtr.apply(model, METHOD) as handle:
            model(torch.zeros(1, 3, 160, 160))
        print(handle.trace.summary())
        """,
    "digits-wan": """
        import vtr
        from vtr.zoo import load_pipeline

        pipe = load_pipeline("digits-wan")
        with vtr.apply(pipe, METHOD) as handle:
            video = pipe("a 7 moving right", output_type="np").frames[0]
        print(handle.trace.summary())
        """,
}
"""Lines that try a method, by the built-in model."""

SYMBOLS = r"""
The formulas say what a method decides; the text beside them, and the code, say the rest.

| symbol | meaning |
| --- | --- |
| $x_j$, $q_j$, $k_j$, $v_j$ | hidden state, query, key and value of token $j$; of $N$ tokens |
| $s_{ij}$ | the logit of query $i$ and key $j$, scaled by $1 / \sqrt{d}$ |
| $A_h[i, j]$ | attention of query $i$ to key $j$ in head $h$ of $H$; $A^l$ in layer $l$ of $L$; without a head, the mean over heads |
| $s_j$ | the score of token $j$ (in ToMe and its relatives, its size) |
| $I$, $J$ | blocks, tiles or clusters of queries and of keys |
| $\bar q_I$, $\bar k_J$, $\bar v_J$, $\bar x$ | means |
| $\operatorname{top}_k(s)$ | the $k$ tokens of highest score |
| $M_{ij}$, $M_{IJ}$ | 1 for pairs that are computed |
| $[\,\cdot\,]$ | 1 if the condition holds, else 0 |
| $i \to j$ | token $i$ is merged into token $j$ |
"""

DRAW: Mapping[str, str] = {
    PICTURE.model: "vtr draw photo.jpg --method {}",
    QUESTION.model: 'vtr draw photo.jpg --model digits-llava --question "which digit is red ?" --method {}',
    CLIP.model: 'vtr draw clip.mp4 --model digits-video --question "which digit is blue ?" --method {}',
}


def family(cls: type[Method]) -> str:
    """Name the family of a method."""
    signals = {s for needs in cls.needs.values() for s in needs}
    scene = scenes().get(cls.name, (None,))[0]
    if (
        "block" in cls.sites
        or signals & {"denoising"}
        or cls.needs.get("attention") == {"frames", "qkv"}
    ):
        return "Diffusion transformers"
    if issubclass(cls, PrefillMethod):
        return "Sparse prefill"
    if issubclass(cls, (KVMethod, DecodeMethod)):
        return "KV cache and decoding"
    if issubclass(cls, LanguageAttentionMethod):
        return "Attention edits"
    if {"windows", "detector"} & {*cls.sites[:1]}:
        return "Detectors and windows"
    if scene is CLIP:
        return "Video"
    encoders = scene is not None and scene.model == PICTURE.model
    return (
        "Vision encoders" if encoders or set(cls.sites) == {"encoder"} else "Vision-language models"
    )


def paper(cls: type[Method]) -> str:
    """Write the paper with a link to arXiv, if it is there."""
    return re.sub(
        r"(?:arXiv )(\d{4}\.\d{5}(?:v\d)?)", r"[arXiv \1](https://arxiv.org/abs/\1)", cls.paper
    )


def page(name: str) -> str:
    """Write the page of a method."""
    cls = methods()[name]
    text = method_text.read(cls)
    where = family(cls)
    parts = [f"# {cls.__name__}", _sentence(text.lead)]
    parts += [f"Paper: {paper(cls)}.  \nFamily: [{where}](index.md#{anchor(where)})."]
    parts += ["## Idea"]
    if text.title != text.lead:
        parts += [text.title]
    parts += [text.idea] if text.idea else []
    parts += [f"$$\n{in_lines(formula)}\n$$" for formula in text.formulas]
    parts += ["[What the symbols mean](index.md#symbols)"]
    parts += ["## Picture", picture(name)]
    if text.more:
        parts += ["## In detail", *text.more]
    parts += ["## Options", options(cls), acts(cls)]
    if name in with_presets():
        parts += ["## Published settings", presets(cls)]
    parts += ["## Try it", trial(name)]
    parts += ["## Differences from the authors' code", *text.differs, fidelity(name)]
    numbers = method_numbers.markdown(cls.__name__, "../")
    parts += ["## Numbers", numbers or "No committed measurement is about this method."]
    parts += ["## More", links(cls, where)]
    return "\n\n".join(parts) + "\n"


def in_lines(formula: str) -> str:
    r"""Write the parts of a formula, which ``\qquad`` separates, below each other: a page is narrow."""
    parts, depth, start = [], 0, 0
    for token in re.finditer(r"\\begin|\\end|\\qquad|\\?[{}]", formula):
        depth += {"\\begin": 1, "{": 1, "\\end": -1, "}": -1}.get(token[0], 0)
        if token[0] == "\\qquad" and depth == 0:
            parts.append(formula[start : token.start()])
            start = token.end()
    parts = [part.strip().removesuffix(",") for part in [*parts, formula[start:]]]
    if len(parts) == 1:
        return formula
    return "\\begin{gathered}\n" + " \\\\\n".join(parts) + "\n\\end{gathered}"


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def anchor(title: str) -> str:
    """Name the anchor of a heading, as GitHub and MyST do."""
    return title.lower().replace(" ", "-")


def picture_file(name: str) -> Path:
    """The committed picture of a method; masks of generators that have one are in docs/masks."""
    return FOLDER / "pictures" / f"{name}.webp"


def picture(name: str) -> str:
    """Show the picture of a method, with what it was drawn of, or say why it has no picture."""
    if name in REASONS:
        return f"No picture: {REASONS[name][0].lower()}{REASONS[name][1:]}"
    scene, method = scenes()[name]
    return (
        f"![{methods()[name].__name__} on {scene.model}](pictures/{picture_file(name).name})\n\n"
        f"`{method}` on `{scene.model}`. {scene.caption}"
    )


def options(cls: type[Method]) -> str:
    """Write the table of options: those of the dataclass, in its order."""
    described = method_text.option_texts(cls)
    lines = ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        if field.init:
            kind = field.type if isinstance(field.type, str) else field.type.__name__
            kind = re.sub(r"\bKeep\b", "int | float", kind)
            cells = [f"`{field.name}`", f"`{kind}`", method_text.default(field)]
            cells.append(
                described[field.name].replace("`DEFAULT`", f"`{getattr(cls, 'DEFAULT', None)}`")
            )
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines)


def acts(cls: type[Method]) -> str:
    """Say where a method acts, what it reads, and whether it is trained."""
    reads = [
        f"{', '.join(f'`{signal}`' for signal in sorted(signals))} at `{site}`"
        for site, signals in cls.needs.items()
        if signals
    ]
    training = {
        "none": "It needs no training.",
        "optional": "It works without training, and can be trained.",
        "required": "It has to be trained.",
    }[cls.training]
    sites = ", ".join(f"`{site}`" for site in cls.sites)
    read = f" It reads {'; '.join(reads)}." if reads else ""
    return f"It acts at {sites}.{read} {training}"


def presets(cls: Any) -> str:
    """List the published settings of a method."""
    found = cls.presets()
    lines = ["| preset | is |", "| --- | --- |"]
    lines += [f"| `{n}` | `{m}` |".replace("||", "") for n, m in list(found.items())[:PRESETS]]
    first = next(iter(found))
    rest = len(found) - PRESETS
    more = f"\n\n{rest} more: `vtr methods --presets` lists all of them." if rest > 0 else ""
    return (
        f"```python\nimport vtr\n\nmethod = vtr.{cls.__name__}.preset({first!r})\n```\n\n"
        + "\n".join(lines)
        + more
    )


def python(method: Any) -> str:
    """Write a method as Python, its nested ones too."""
    return re.sub(r"\b([A-Z]\w+)(?=\()", r"vtr.\1", str(method))


def command(method: Any) -> str:
    """Write a method as the command line takes it (:func:`vtr.core.text.parse`)."""
    inner, said = "", []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if isinstance(value, Method):
            inner = f"({command(value)})"
        elif field.init and repr(value) != method_text.default(field).strip("`"):
            many = isinstance(value, tuple)
            said.append(f"{field.name}={'+'.join(map(str, value)) if many else value}")
    words = f"{method.name}{inner}" + (f":{','.join(said)}" if said else "")
    return f"'{words}'" if inner else words


def trial(name: str) -> str:
    """Write the lines of Python, and the command, that try a method."""
    if name not in scenes():
        cls = methods()[name].__name__
        return (
            f"```python\nimport vtr\n\nmethod = vtr.{cls}()\n```\n\n"
            f"`vtr.apply(model, method)` puts it on a model; `vtr.supported(model)` says whether it works there."
        )
    scene, method = scenes()[name]
    how = f"{scene.model}, calibrated"
    measured = how in TRY and getattr(method, "calibrated", False) and name not in GIVEN
    how = how if measured else scene.model
    lines = textwrap.dedent(TRY[how]).strip().replace("METHOD", python(method))
    out = f"```python\n{lines}\n```"
    if scene.model in DRAW:
        out += f"\n\n```sh\n{DRAW[scene.model].format(command(method))}\n```"
    if measured:
        out += "\n\nThe plan holds numbers that it needs of this model: [calibration](../calibration.md)."
    return out


@cache
def _fidelity() -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    import tomllib

    said = tomllib.loads((ROOT / "benchmarks/fidelity.toml").read_text(encoding="utf-8"))
    measured = json.loads((ROOT / "benchmarks/results/fidelity.json").read_text(encoding="utf-8"))
    return said, measured["methods"]


def fidelity(name: str) -> str:
    """Say what a method was compared with, from the source of docs/fidelity.md."""
    rows, measured = _fidelity()
    row, found = rows[name], measured.get(name, {})
    whole = {k: " ".join(v.split()) for k, v in row.items() if isinstance(v, str)}
    verdict = {
        "exact": "**Exact**: the same choices and numbers as the authors' code",
        "explained": "**Explained**: the same as the authors' code, except for what follows",
        "not comparable": "**Not comparable** with code of the authors",
    }[whole["verdict"]]
    source = ""
    if authors := whole.get("authors"):
        source = f" ([{authors}](https://github.com/{authors}), commit `{whole['commit']}`)"
    lines = [f"{verdict}{source}. {whole['compared']}"]
    if differs := whole.get("differs"):
        lines.append(differs)
    if said := whole.get("found"):
        lines.append(f"Found by hand: {said}.")
    if (theirs := found.get("authors")) and "largest" in theirs:
        lines.append(
            f"Beside the authors' functions, {theirs['differ']} of {theirs['of']} choices differ; "
            f"the largest difference of a number is {_small(theirs['largest'])}."
        )
    if plain := found.get("plain"):
        lines.append(
            f"Beside plain calculations of the formulas in {plain['tests']} tests, the largest difference is "
            f"{_small(plain['largest'])}."
        )
    lines.append("All methods: [fidelity](../fidelity.md).")
    return "\n\n".join(lines).replace("``", "`")


def _small(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def links(cls: type[Method], where: str) -> str:
    """List related pages, and the source."""
    module = cls.__module__.replace(".", "/")
    lines = [f"- [{_title(page)}](../{page})" for page in FAMILIES[where][1]]
    lines.append(f"- the code: `{module}.py`")
    return "\n".join(lines)


@cache
def _title(name: str) -> str:
    for line in (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            return line[2:].strip()
    raise ValueError(f"docs/{name} has no title")


def index() -> str:
    """Write the index, grouped by family."""
    groups: dict[str, list[str]] = {title: [] for title in FAMILIES}
    for name, cls in sorted(methods().items(), key=lambda item: item[1].__name__.lower()):
        text = method_text.read(cls)
        named, _, rest = text.lead.partition(": ")
        line = rest if named.replace("-", "").lower() == cls.__name__.lower() else text.lead
        groups[family(cls)].append(f"- [{cls.__name__}]({name}.md): {line}")
    parts = [
        "# Methods",
        f"{len(methods())} methods in groups. Each page has the idea, the formula, a picture, the options, "
        "the differences from the authors' code, and numbers. `vtr.supported(model)` says which ones "
        "work on a model.",
    ]
    for title, lines in groups.items():
        parts += [f"## {title}", FAMILIES[title][0], "\n".join(lines)]
    parts += ["## Symbols", SYMBOLS.strip()]
    parts += [
        "```{toctree}\n:hidden:\n\n" + "\n".join(name for name in sorted(methods())) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def write(folder: Path = FOLDER) -> list[Path]:
    """Write all pages and the index into a folder; files that did not change are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {f"{name}.md": page(name) for name in methods()} | {"index.md": index()}
    for name, content in made.items():
        file = folder / name
        if not file.exists() or file.read_text(encoding="utf-8") != content:
            file.write_text(content, encoding="utf-8")
    for file in folder.glob("*.md"):
        if file.name not in made:  # of a method that was renamed
            file.unlink()
    return [folder / name for name in made]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.method_pages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--pictures", action="store_true", help="draw the pictures again, too")
    options = parser.parse_args(arguments)
    if options.pictures:
        method_pictures.write(options.out / "pictures")
    print(f"wrote {len(write(options.out))} pages to {options.out}")


if __name__ == "__main__":
    main()
