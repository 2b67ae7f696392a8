"""Rows in the official format of six benchmarks, made here, in a folder that stands for the hub."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

NUMBER = 12
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
HUB = "lmms-lab-encoder"


def picture(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    image = Image.new("RGB", (32, 24), tuple(draw.randrange(256) for _ in range(3)))
    file = BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{seed}.png"}


def write(root: Path, repo: str, files: dict[str, tuple[str, list[dict[str, Any]]]]) -> None:
    """``files``: configuration -> split and rows. A card says what is where, as on the hub."""
    folder = root / HUB / repo
    folder.mkdir(parents=True)
    lines = ["---", "configs:"]
    for config, (split, rows) in files.items():
        columns: dict[str, Any] = {key: [row[key] for row in rows] for key in rows[0]}
        if "image" in columns:
            columns["image"] = pa.array(columns["image"], IMAGE)
        name = f"{config}-{split}.parquet"
        features = {"image": {"_type": "Image"}} if "image" in columns else {}
        _write(pa.table(columns), features, folder / name)
        lines += [f"- config_name: {config}", "  data_files:", f"  - split: {split}"]
        lines += [f"    path: {name}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def _write(table: pa.Table, images: dict[str, Any], path: Path) -> None:
    """As the hub's files: their metadata say which column holds pictures."""
    from datasets import Features
    from datasets import Image as ImageFeature

    features = Features.from_arrow_schema(table.schema)
    for name in images:
        features[name] = ImageFeature()
    info = json.dumps({"info": {"features": features.to_dict()}})
    parquet.write_table(table.replace_schema_metadata({"huggingface": info}), path)


def gqa(root: Path) -> None:
    answers = [("left", "red", "no")[i % 3] for i in range(NUMBER)]
    questions = [
        {"id": f"q{i}", "imageId": f"i{i // 2}", "question": f"what is {i} ?", "answer": a}
        for i, a in enumerate(answers)
    ]
    images = [{"id": f"i{i}", "image": picture(i)} for i in range(NUMBER // 2)]
    write(
        root,
        "GQA",
        {
            "testdev_balanced_instructions": ("testdev", questions),
            "testdev_balanced_images": ("testdev", images),
        },
    )


def pope(root: Path) -> None:
    rows = [
        {
            "id": str(i),
            "question_id": str(i),
            "question": f"is there a {i} ?",
            "answer": ("yes", "no")[i % 2],
            "image_source": f"{i}",
            "image": picture(i),
            "category": "random",
        }
        for i in range(NUMBER)
    ]
    write(root, "POPE", {"default": ("test", rows)})


def textvqa(root: Path) -> None:
    rows = [
        {
            "image_id": f"{i}",
            "question_id": i,
            "question": f"what word is {i} ?",
            "image": picture(i),
            "answers": ["stop"] * 2 + ["go"] * 8,  # "stop" is worth 0.6: matches of the other nine
            "ocr_tokens": ["STOP"],
        }
        for i in range(NUMBER)
    ]
    write(root, "textvqa", {"default": ("validation", rows)})


def scienceqa(root: Path) -> None:
    rows = [
        {
            "image": picture(i),
            "question": f"which {i} ?",
            "choices": ["one", "two", "three"],
            "answer": i % 3,
            "hint": "",
        }
        for i in range(NUMBER)
    ]
    write(root, "ScienceQA", {"ScienceQA-IMG": ("test", rows)})


def mme(root: Path) -> None:
    rows = [
        {
            "question_id": f"{category}/{i // 2}.png",
            "image": picture(i // 2),
            "question": f"is it {i} ? Please answer yes or no.",
            "answer": ("Yes", "No")[i % 2],
            "category": category,
        }
        for category in ("color", "commonsense_reasoning")
        for i in range(NUMBER // 2)
    ]
    write(root, "MME", {"default": ("test", rows)})


def vqav2(root: Path) -> None:
    rows = [
        {
            "question_type": "what",
            "multiple_choice_answer": "two",
            "answers": [
                {"answer": "two" if a < 3 else "three", "answer_confidence": "yes", "answer_id": a}
                for a in range(10)
            ],
            "image_id": i,
            "answer_type": "number",
            "question_id": i,
            "question": f"how many {i} ?",
            "image": picture(i),
        }
        for i in range(NUMBER)
    ]
    write(root, "VQAv2", {"default": ("validation", rows)})


MAKERS: dict[str, Callable[[Path], None]] = {
    "gqa": gqa,
    "pope": pope,
    "textvqa_val": textvqa,
    "scienceqa_img": scienceqa,
    "mme": mme,
    "vqav2_val": vqav2,
}
