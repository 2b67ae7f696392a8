"""One of two processes that fine-tune together, run by ``test_sla_parallel.py``."""

from __future__ import annotations

import dataclasses
import sys

from tests.train.test_sla import FAST, METHOD, WAN, batch
from vtr.train.sla import SparseTuner

if __name__ == "__main__":
    settings = dataclasses.replace(FAST, steps=2, accumulate=int(sys.argv[2]))
    with SparseTuner(WAN.build(), METHOD, batch, sys.argv[1], settings) as tuner:
        tuner.run()
