"""Sparse attention in tiny random transformers (:mod:`vtr.testing.models.diffusion`), calculated apart.

The reference (:mod:`vtr.testing.masked`) never looks at vtr: it lets torch's attention function see an additive mask
while one of the named attention modules runs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vtr.testing.masked import FixedMask as Fixed
from vtr.testing.masked import eager as eager
from vtr.testing.masked import replaced as replaced
from vtr.testing.masked import token_mask as token_mask
from vtr.testing.models.diffusion import CASES as CASES
from vtr.testing.models.diffusion import Case as Case
from vtr.testing.models.diffusion_more import MORE as MORE

__all__ = ["ALL", "CASES", "MORE", "Case", "Fixed", "eager", "made", "replaced", "token_mask"]

pytest.importorskip("diffusers")

ALL = {**CASES, **MORE}


def made(out: Any) -> Tensor:
    """What a transformer returns, (B, ...): most give a tuple, Z-Image a list in one."""
    out = out[0] if isinstance(out, tuple) else out
    return torch.stack(out) if isinstance(out, list) else out
