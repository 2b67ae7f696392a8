"""Find the tasks of lmms-eval that ask a model or a server of somebody else when they score answers.

lmms-eval does not say so of its tasks. Their YAML files and the source of their scoring functions are
read, not run: a function asks a judge if it, or what it calls in its own file, names one of the ways
to reach a model. That is careful rather than exact: a task may be named that only asks a judge under one of
its options.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

_IN_YAML = re.compile(r"metric:\s*[\"']?gpt_eval_score|gpt_eval_model|llm_(as_)?judge")
_IN_SOURCE = re.compile(
    r"requests\.post|openai|get_chat_response|get_eval\(|get_server|server\.evaluate|chatgpt"
    r"|serverfactory|llm_judge|api_key",
    re.IGNORECASE,
)
_SCORING = re.compile(r"(?:process_results|aggregation|metric):\s*!function\s+([\w.]+)\.(\w+)")
_INCLUDE = re.compile(r"^include:\s*[\"']?([^\s\"']+)", re.MULTILINE)


def leaves(name: str, manager: Any) -> Iterator[str]:
    """The tasks of a task, tag or group, by the index of lmms-eval's task manager."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    if entry["type"] == "tag":
        parts = entry["task"]
    elif entry["type"] == "group":
        from lmms_eval.utils import load_yaml_config

        parts = load_yaml_config(entry["yaml_path"], mode="simple")["task"]
    else:
        yield name
        return
    for part in parts:
        inner = part.get("task") if isinstance(part, dict) else part
        for one in inner if isinstance(inner, list) else [inner]:
            if isinstance(one, str):
                yield from leaves(one, manager)


def asks_judge(name: str, manager: Any) -> bool:
    """Tell whether the scoring of a single task reaches outside."""
    entry = manager.task_index[name]
    if name.endswith("_static") or entry.get("yaml_path", -1) == -1:
        return False
    for file, text in _texts(Path(entry["yaml_path"])):
        if _IN_YAML.search(text):
            return True
        for module, function in _SCORING.findall(text):
            source = file.parent / (module.replace(".", "/") + ".py")
            if source.is_file() and _reaches(source, function, set()):
                return True
    return False


def _texts(file: Path) -> list[tuple[Path, str]]:
    """A YAML file and those that it includes."""
    found: list[tuple[Path, str]] = []
    while file.is_file() and file not in [path for path, _ in found]:
        text = file.read_text(encoding="utf-8")
        found.append((file, text))
        base = _INCLUDE.search(text)
        if base is None:
            break
        file = file.parent / base[1]
    return found


def _reaches(file: Path, name: str, seen: set[str]) -> bool:
    """Tell whether a function names a judge, or another one of its file that does."""
    seen.add(name)
    source = _definitions(file).get(name, "")
    if _IN_SOURCE.search(source):
        return True
    called = set(re.findall(r"\w+", source)) & _definitions(file).keys() - seen
    return any(_reaches(file, other, seen) for other in called)


@lru_cache(maxsize=64)
def _definitions(file: Path) -> dict[str, str]:
    """Source of the functions and classes of a file, by name."""
    text = file.read_text(encoding="utf-8")
    try:
        tree = ast.parse(text)
    except SyntaxError:  # lmms-eval could not run it either
        return {}
    lines = text.splitlines()
    return {
        node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }
