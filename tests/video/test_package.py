"""Importing the package costs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import vtr.video

CODE = """
import json, sys
import vtr
vtr.video.VideoError, vtr.video.TokenMemory, vtr.video.Video
print(json.dumps([m for m in ("av", "decord", "transformers", "PIL.Image") if m in sys.modules]))
"""


def test_names_are_there_and_no_library_is_loaded() -> None:
    for name in vtr.video.__all__:
        assert getattr(vtr.video, name) is not None
    assert set(vtr.video.__all__) <= set(dir(vtr.video))
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert json.loads(done.stdout) == []
