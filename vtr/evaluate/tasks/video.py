"""The built-in video benchmark as a task of lmms-eval: questions about clips of moving digits.

The questions are :func:`vtr.zoo.video_questions.video_qa`'s. Clips are written once as MP4 files, beside
the task's YAML, into the cache folder of :mod:`vtr.evaluate.tasks`; lmms-eval's models read the files.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from importlib import resources
from pathlib import Path

VIDEO = "digits_video"
CLIPS = 50
SEED = 2027  # unlike those of training and of the zoo's own evaluation
PER_SECOND = 2  # frames in the file; the built-in model reads one a second


def write(clips: int = CLIPS, seed: int = SEED, to: str | Path | None = None) -> Path:
    """Write the task's files if they are missing; return their folder (lmms-eval's include path).

    Args:
        clips: number of clips; seven questions are asked about each.
        seed: the same seed gives the same clips and questions.
        to: a folder; None is :func:`vtr.evaluate.tasks.folder`.

    Raises:
        ValueError: ``clips`` is not positive.
        MissingDependencyError: PyAV is not installed.
    """
    from vtr.evaluate.tasks import folder

    target = folder() if to is None else Path(to)
    if (target / f"{VIDEO}.yaml").is_file():
        return target
    if clips < 1:
        raise ValueError(f"clips must be at least 1, got {clips}")
    target.mkdir(parents=True, exist_ok=True)
    # Another process may do the same: each file appears at once, the one that is looked for last.
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        scratch = Path(name)
        _clips(scratch, clips, seed)
        source = resources.files("vtr.evaluate.tasks")
        last = (f"{VIDEO}.jsonl", f"{VIDEO}_utils.py", f"{VIDEO}.yaml")
        for name in last[1:]:
            with resources.as_file(source.joinpath(name)) as path:
                shutil.copyfile(path, scratch / name)
        (target / VIDEO).mkdir(exist_ok=True)
        films = [f"{VIDEO}/{path.name}" for path in sorted((scratch / VIDEO).iterdir())]
        for name in (*films, *last):
            os.replace(scratch / name, target / name)
    return target


def _clips(folder: Path, clips: int, seed: int) -> None:
    from vtr.zoo.clips import write as write_clip
    from vtr.zoo.video_questions import KINDS, video_qa

    (folder / VIDEO).mkdir()
    rows = []
    for i, sample in enumerate(video_qa(clips * len(KINDS), seed=seed, per_second=PER_SECOND)):
        film = f"{VIDEO}/{i // len(KINDS):04d}.mp4"
        if i % len(KINDS) == 0:
            write_clip(folder / film, sample.frames, rate=PER_SECOND)
        asked = {"question": sample.question, "answer": sample.answer, "kind": sample.kind}
        rows.append(json.dumps({"video": film, **asked}))
    (folder / f"{VIDEO}.jsonl").write_text("\n".join(rows) + "\n")
