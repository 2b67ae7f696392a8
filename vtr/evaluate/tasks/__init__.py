"""The built-in benchmark as a task of lmms-eval: generated questions about scenes of digits.

The questions are :func:`vtr.zoo.vqa`'s. They are written once, as a parquet file beside the task's
YAML, into a cache folder; lmms-eval reads them there without a network.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from importlib import resources
from io import BytesIO
from pathlib import Path

BUILTIN = "digits_vqa"
QUESTIONS = 2000
SEED = 2026  # unlike those of training and of the zoo's own evaluation
_VERSION = 2  # of what is written; a new number makes new files


def folder() -> Path:
    """The folder that the task is written to: ``$VTR_CACHE``, else ``vtr`` in the user's cache folder."""
    root = os.environ.get("VTR_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(root).expanduser() if root else Path(base).expanduser() / "vtr"
    return home / f"tasks-{_VERSION}"


def write(questions: int = QUESTIONS, seed: int = SEED, to: str | Path | None = None) -> Path:
    """Write the task's files if they are missing; return their folder (lmms-eval's include path).

    Args:
        questions: number of questions, in groups of five about one picture.
        seed: the same seed gives the same questions.
        to: a folder; None is :func:`folder`.

    Raises:
        ValueError: ``questions`` is not positive.
        MissingDependencyError: pyarrow is not installed.
    """
    target = folder() if to is None else Path(to)
    if (target / "digits_vqa.yaml").is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    # Another process may do the same: each file appears at once, the one that is looked for last.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        _parquet(Path(scratch) / "digits_vqa.parquet", questions, seed)
        source = resources.files("vtr.evaluate.tasks")
        for name in ("digits_vqa_utils.py", "digits_vqa.yaml"):
            with resources.as_file(source.joinpath(name)) as path:
                shutil.copyfile(path, Path(scratch) / name)
        for name in ("digits_vqa.parquet", "digits_vqa_utils.py", "digits_vqa.yaml"):
            os.replace(Path(scratch) / name, target / name)
    return target


def _parquet(path: Path, questions: int, seed: int) -> None:
    from vtr.errors import missing
    from vtr.zoo import vqa

    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise missing("pyarrow", "eval", "the built-in benchmark") from error
    rows: dict[str, list[object]] = {"image": [], "question": [], "answer": [], "kind": []}
    for sample in vqa(questions, seed=seed):
        file = BytesIO()
        sample.image.save(file, "PNG")
        rows["image"].append({"bytes": file.getvalue(), "path": None})
        rows["question"].append(sample.question)
        rows["answer"].append(sample.answer)
        rows["kind"].append(sample.kind)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({**rows, "image": pa.array(rows["image"], image)})
    # datasets reads from this that the column holds pictures.
    columns: dict[str, dict[str, str]] = {
        name: {"dtype": "string", "_type": "Value"} for name in ("question", "answer", "kind")
    }
    features = json.dumps({"info": {"features": {"image": {"_type": "Image"}, **columns}}})
    parquet.write_table(
        table.replace_schema_metadata({"huggingface": features}), path, compression="zstd"
    )
