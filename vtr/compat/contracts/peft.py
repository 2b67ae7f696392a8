"""Expectations of PEFT."""

from __future__ import annotations

from vtr.compat.contract import Expectation
from vtr.compat.peft import ADAPTED, HELD

CONTRACT = (
    Expectation("peft:PeftModel", "vtr/compat/around.py", calls=(HELD[0],)),
    Expectation("peft:PeftMixedModel", "vtr/compat/around.py", calls=(HELD[0],)),
    Expectation("peft.tuners.lora:LoraLayer", "vtr/core/calibration.py", calls=(ADAPTED,)),
    Expectation("peft.tuners.tuners_utils:BaseTuner", "vtr/compat/around.py", calls=(HELD[1],)),
)
