"""Plans on the Hugging Face hub: a file of the plan, and a card with what was measured."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtr.errors import missing

FILES = ("plan.json", "plan.safetensors")
CARD = "README.md"


def push(
    write: Any, facts: Mapping[str, Any], repo_id: str, *, large: bool, private: bool | None,
    token: str | None, revision: str | None, message: str,
) -> str:  # fmt: skip
    """Upload a plan and its card in one commit; returns the address of the commit.

    Args:
        write: path to None, writes the plan.
        facts: the plan without its tables, as plain JSON values.
        large: whether tables are too large for JSON.
    """
    hub = _hub()
    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    name = FILES[1] if large else FILES[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        write(path)
        operations = [
            hub.CommitOperationAdd(name, path.read_bytes()),
            hub.CommitOperationAdd(CARD, card(facts, repo_id).encode()),
        ]
    done = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return str(done.commit_url)


def fetch(repo_id: str, *, revision: str | None, token: str | None) -> str:
    """Download the file of a plan into the cache of the hub; returns its path.

    Raises:
        ValueError: the repository has no file of a plan, or does not exist.
    """
    hub = _hub()
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    for name in FILES:
        try:
            return str(
                hub.hf_hub_download(
                    repo_id,
                    name,
                    revision=revision,
                    token=token,
                    endpoint=os.environ.get("HF_ENDPOINT"),
                )
            )
        except EntryNotFoundError:
            continue
        except RepositoryNotFoundError as error:
            raise ValueError(f"there is no repository {repo_id!r} on the hub: {error}") from error
    raise ValueError(
        f"the repository {repo_id!r} has no plan: it has neither {' nor '.join(FILES)}"
    )


def card(facts: Mapping[str, Any], repo_id: str) -> str:
    """Write the card of a plan: what it is for, and a table of what was measured."""
    methods = ", ".join(m["name"] for m in facts["methods"])
    model, measured = facts.get("model"), facts.get("measured", {})
    lines = [
        "---",
        "library_name: vtr",
        "tags: [visual-token-reduction]",
        "---",
        "",
        f"# {methods}",
        "",
    ]
    lines += [
        "```python",
        "import vtr",
        "",
        f'vtr.apply(model, vtr.Plan.from_hub("{repo_id}"))',
        "```",
        "",
    ]
    if model:
        sizes = ", ".join(f"{name} {size}" for name, size in model["sizes"].items())
        lines += [
            f"For one model alone: a `{model['model']}` ({sizes}), sha256 `{model['sha256'][:16]}`.",
            "",
        ]
    rows = _rows(measured)
    if rows:
        lines += ["| measured | value | of dense |", "|---|---:|---:|", *rows, ""]
        data = facts.get("data", {})
        lines += [
            f"Strategy {measured['strategy']['name']}, seed {measured['seed']}, target "
            f"`{measured['target']}`, {data.get('samples')} samples (sha256 `{str(data.get('sha256'))[:16]}`"
            f"{', ' + data['description'] if data.get('description') else ''}), versions "
            f"{', '.join(f'{k} {v}' for k, v in facts.get('versions', {}).items())}.",
            "",
        ]
    return "\n".join(lines)


def _rows(measured: Mapping[str, Any]) -> Sequence[str]:
    if not measured:
        return ()
    rows = [f"| loss ({measured['objective']}) | {measured['loss']:.4g} | |"]
    for name, cost in measured.get("costs", {}).items():
        rows.append(f"| {name} | {cost['reduced']:.4g} | {cost['share']:.1%} |")
    kept = measured.get("schedule", {}).get("kept")
    if kept:
        rows.append(f"| tokens after each layer | {' '.join(map(str, kept))} | |")
    return rows


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise missing("huggingface_hub", "search", "a plan on the hub") from error
    return huggingface_hub
