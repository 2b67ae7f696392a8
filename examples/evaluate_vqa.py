"""Evaluate a model with several methods and budgets, and read the table.

    python examples/evaluate_vqa.py
    python examples/evaluate_vqa.py --model llava-hf/llava-1.5-7b-hf --tasks gqa,pope,textvqa_val

Answers are saved in a results store: a second run with more methods or samples asks only the new ones.
"""

import argparse

from rich.console import Console

import vtr
from vtr.evaluate.runner import evaluate

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="builtin")
parser.add_argument("--tasks", default="digits_vqa")
parser.add_argument("--limit", type=int, default=50)
args = parser.parse_args()

results = evaluate(
    args.model,
    args.tasks,
    methods=[vtr.FlowCut(), vtr.FastV(), [vtr.VTCCLS(keep=36), vtr.FastV(keep=18)]],
    limit=args.limit,
    store="evaluate_vqa.sqlite",
    progress=print,
)
Console(width=160).print(results)
scored = [line for line in results.lines() if line.label != "dense" and line.share is not None]
best = max(scored, key=lambda line: (line.share, -line.of_flops), default=None)
if best is not None:
    print(f"{best.method}: {best.share:.1%} of the dense score at {best.of_flops:.0%} of its FLOPs")
