"""Importing vtr costs next to nothing, and loads no optional library."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = (
    "transformers",
    "timm",
    "diffusers",
    "open_clip",
    "decord",
    "matplotlib",
    "sklearn",
    "rich",
)

IMPORT = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import vtr
vtr.__version__
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "loaded": sorted(set(sys.modules) - before)}))
"""

# What a program that wraps a model touches first; none of it may load a library that is not there yet.
USE = """
import json, sys, time
import torch
before = set(sys.modules)
import vtr
vtr.apply, vtr.supported, vtr.Handle, vtr.TokenMap, vtr.Plan, vtr.ToMe(r=8)
assert vtr.list_methods()
try:
    vtr.apply(torch.nn.Linear(2, 2), "evit")
except vtr.UnsupportedModelError:
    pass
print(json.dumps({"loaded": sorted(set(sys.modules) - before)}))
"""


def run(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_takes_less_than_50_ms_on_top_of_torch():
    # Of the processor, the least of a few: other programs on the machine only make it slower.
    results = []
    for _ in range(5):
        results.append(run(IMPORT))
        if results[-1]["seconds"] < 0.05:
            break
    assert min(r["seconds"] for r in results) < 0.05


def test_import_loads_no_optional_library():
    loaded = run(IMPORT)["loaded"]
    assert [m for m in loaded if m.partition(".")[0] in HEAVY] == []
    assert "vtr" in loaded


def test_first_use_loads_no_optional_library():
    loaded = run(USE)["loaded"]
    assert [m for m in loaded if m.partition(".")[0] in HEAVY] == []
    assert "vtr.methods.tome" in loaded


def test_every_public_name_exists():
    import vtr

    for name in vtr.__all__:
        assert getattr(vtr, name) is not None
    assert set(vtr.__all__) <= set(dir(vtr))
