"""Which tasks are said to reach outside: from YAML and source written here, and from lmms-eval's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vtr.evaluate.judged_tasks import asks_judge, leaves

SCORING = '''
import requests


def rules(doc, results):
    """Reads the letter."""
    return {"acc": float(results[0] == doc["answer"])}


def asks(doc, results):
    return {"acc": _second(doc, results)}


def _second(doc, results):
    return _asks_again(doc) or asks(doc, results)


def _asks_again(doc):
    return requests.post("https://example.org", json=doc)
'''


@pytest.fixture
def manager(tmp_path):
    (tmp_path / "scoring.py").write_text(SCORING)
    files = {
        "plain": "task: plain\nprocess_results: !function scoring.rules\n",
        "asks": "task: asks\nprocess_results: !function scoring.asks\n",
        "child": "task: child\ninclude: asks.yaml\n",
        "metric": "task: metric\nmetric_list:\n  - metric: gpt_eval_score\n",
        "mean": "task: mean\nmetric_list:\n  - metric: a\n    aggregation: !function scoring._second\n",
        "elsewhere": "task: elsewhere\nprocess_results: !function gone.asks\n",
    }
    index = {}
    for name, text in files.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        index[name] = {"type": "task", "yaml_path": str(path)}
    index["tagged"] = {"type": "tag", "task": ["plain", "child"], "yaml_path": -1}
    group = tmp_path / "group.yaml"
    group.write_text("group: group\ntask:\n  - tagged\n  - task: mean\n    limit: 3\n")
    index["group"] = {"type": "group", "task": -1, "yaml_path": str(group)}
    return SimpleNamespace(task_index=index)


def test_scoring_that_reaches_outside_is_seen_through_calls_and_includes(manager):
    found = {n: asks_judge(n, manager) for n in manager.task_index if n not in ("tagged", "group")}
    assert found == {
        "plain": False,
        "asks": True,
        "child": True,
        "metric": True,
        "mean": True,
        "elsewhere": False,
    }


def test_groups_and_tags_are_their_tasks(manager):
    pytest.importorskip("lmms_eval")
    assert list(leaves("plain", manager)) == ["plain"]
    assert list(leaves("tagged", manager)) == ["plain", "child"]
    assert list(leaves("group", manager)) == ["plain", "child", "mean"]
    assert list(leaves("nothing", manager)) == []
