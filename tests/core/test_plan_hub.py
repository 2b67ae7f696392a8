"""Plans go to the hub and come back, through huggingface_hub and a local imitation of its HTTP API."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

pytest.importorskip("huggingface_hub")

import vtr
from vtr.core.calibration import Fingerprint
from vtr.core.plan_hub import card

MODEL = Fingerprint("VisionTransformer", {"depth": 6}, "blocks.5.norm1.weight", (4, 5), "ab" * 32)
MEASURED = {
    "loss": 0.0123, "objective": "kl", "target": {"flops": 0.5}, "seed": 0, "strategy": {"name": "p-sigmoid"},
    "costs": {"flops": {"dense": 2e8, "reduced": 1e8, "share": 0.5}},
    "schedule": {"site": "encoder", "tokens": 64, "kept": [64, 32]},
}  # fmt: skip
COMMIT = "1" * 40


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: create, commit and resolve."""

    repositories: dict[str, dict[str, bytes]] = {}

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[1:] == ["repos", "create"]:
            given = json.loads(body)
            name = "/".join(filter(None, (given.get("organization", "me"), given["name"])))
            self.repositories.setdefault(name, {})
            self._json({"url": f"{self.server.address}/{name}", "name": name})  # type: ignore[attr-defined]
        elif parts[1] == "validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "preupload" in parts:
            files = json.loads(body)["files"]
            self._json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                }
            )
        elif "commit" in parts:
            name = "/".join(parts[2:4])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repositories[name][line["value"]["path"]] = base64.b64decode(
                        line["value"]["content"]
                    )
            address = self.server.address  # type: ignore[attr-defined]
            self._json({"commitUrl": f"{address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._send(404, b"")

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api":
            name = "/".join(parts[2:4])
            found = self.repositories.get(name)
            if found is None:
                self._send(404, b"", X_Error_Code="RepoNotFound")
            else:
                self._json(
                    {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in found]}
                )
            return
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        if name not in self.repositories:
            self._send(404, b"", X_Error_Code="RepoNotFound")
        elif file not in self.repositories[name]:
            self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            body = self.repositories[name][file]
            tag = hashlib.sha256(body).hexdigest()
            self._send(200, body, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[dict[str, dict[str, bytes]]]:
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Hub.repositories = {}
    monkeypatch.setenv("HF_ENDPOINT", server.address)  # type: ignore[attr-defined]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield Hub.repositories
    server.shutdown()
    server.server_close()


def plan(tables: Any = ()) -> vtr.Plan:
    return vtr.Plan(
        (vtr.EViT(keep=0.5),), {}, MODEL, tables, {"samples": 4, "sha256": "cd" * 32, "description": "digits"},
        {"vtr": "0.1"}, MEASURED,
    )  # fmt: skip


def test_a_plan_comes_back_from_the_hub(hub, tmp_path):
    sent = plan()
    address = sent.push_to_hub("me/half", token="hf_test")
    assert address.endswith(COMMIT)
    assert set(hub["me/half"]) == {"plan.json", "README.md"}
    assert vtr.Plan.from_hub("me/half") == sent


def test_large_tables_go_as_safetensors(hub):
    sent = plan(({"density": torch.rand(10, 100, 101)},))
    sent.push_to_hub("me/large", token="hf_test")
    assert set(hub["me/large"]) == {"plan.safetensors", "README.md"}
    assert vtr.Plan.from_hub("me/large") == sent


def test_what_is_not_there_is_named(hub):
    with pytest.raises(ValueError, match="there is no repository 'me/nothing'"):
        vtr.Plan.from_hub("me/nothing")
    hub["me/other"] = {"README.md": b""}
    with pytest.raises(
        ValueError, match=r"has no plan: it has neither plan\.json nor plan\.safetensors"
    ):
        vtr.Plan.from_hub("me/other")


def test_the_card_has_a_table_of_what_was_measured():
    text = card(plan().to_dict(), "me/half")
    assert text.startswith("---\nlibrary_name: vtr\n")
    assert "| loss (kl) | 0.0123 | |" in text
    assert "| flops | 1e+08 | 50.0% |" in text
    assert "| tokens after each layer | 64 32 | |" in text
    assert 'vtr.Plan.from_hub("me/half")' in text and "sha256 `abababababababab`" in text
    plain = card(vtr.Plan(vtr.EViT()).to_dict(), "me/plain")
    assert "|" not in plain and "# evit" in plain
