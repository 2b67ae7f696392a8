"""``vtr demo vlm``: the built-in LLaVA on held-out questions, dense and with few visual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import vtr
from vtr.cli.shared import PAGE
from vtr.core.report import as_text
from vtr.evaluate import vlm as questions
from vtr.inspect.drawing import row, stack
from vtr.zoo import load_vlm
from vtr.zoo.questions import prompt, vqa

QUESTIONS, ALL_QUESTIONS = 50, 200  # by default, and with --full


def run(out: Path, console: Console, full: bool = False) -> tuple[Any, str]:
    """Measure the built-in LLaVA on held-out questions, dense and with an eighth of the visual tokens."""
    number = ALL_QUESTIONS if full else QUESTIONS
    model, processor = load_vlm("digits-llava")
    methods = questions.methods_at(17)
    samples = vqa(number, seed=123)
    results = questions.evaluate(model, processor, methods, samples, progress=console.is_terminal)
    table = questions.table(
        results, f"built-in LLaVA, {number} held-out questions, 17 of 144 tokens"
    )
    console.print(table)
    columns: list[Any] = []
    asked = samples[0], samples[6]
    for method in methods:
        with vtr.apply(model, method, positions="original") as handle, torch.no_grad():
            inputs = prompt(processor, list(asked))
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
            least = min(reversed(handle.trace.stages), key=lambda stage: stage.tokens_out)
            one, first = vtr.Trace([least]), not columns
            columns.append(
                stack(
                    [
                        vtr.draw(one, s.image, sample=i, size=144, show_input=first)
                        for i, s in enumerate(asked)
                    ]
                )
            )
    row(columns).save(out / "vlm.png")
    return questions.to_dicts(results), as_text(table, PAGE)
