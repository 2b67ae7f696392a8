"""Expectations of accelerate."""

from __future__ import annotations

from vtr.compat.accelerate import FORWARD, HOOK
from vtr.compat.contract import Expectation

CONTRACT = (
    Expectation(
        "accelerate.hooks:add_hook_to_module",
        "vtr/vision/encoders/blocks.py, vtr/core/wrapping.py",
        calls=(HOOK, FORWARD, "forward"),
    ),
    Expectation(
        "accelerate.hooks:remove_hook_from_module",
        "vtr/vision/encoders/blocks.py, vtr/core/wrapping.py",
        calls=(HOOK, FORWARD, "forward"),
    ),
    Expectation("accelerate:Accelerator", "vtr/evaluate/launch.py", has=("num_processes",)),
)
