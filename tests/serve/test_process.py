"""The command: a process with parallel clients and a clean end, and mistakes in one line."""

from __future__ import annotations

import signal
import sys
import threading

import fastapi  # noqa: F401  (what the command needs)
import openai
import prometheus_client  # noqa: F401
import pytest

from benchmarks.serve_load import load, start
from vtr.cli import commands
from vtr.cli.serve import _chosen
from vtr.methods import FlowCut


@pytest.mark.slow
@pytest.mark.timeout(600)  # a process that imports everything, on whatever machine this is
def test_parallel_clients_lose_no_request_and_the_end_is_clean(monkeypatch):
    monkeypatch.setenv("VTR_API_KEY", "secret")  # of the server
    process, url = start()
    client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0)
    reasons: list[str | None] = []

    def ask() -> None:
        stream = client.chat.completions.create(
            model="digits-llava",
            messages=[{"role": "user", "content": "how many digits are there ?"}],
            max_tokens=64,
            temperature=2,
            stream=True,
        )
        for chunk in stream:
            if not reasons:
                process.send_signal(signal.SIGTERM)  # in the middle of the answer
            reasons.append(chunk.choices[0].finish_reason)

    try:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="wrong").models.list()
        assert [m.id for m in client.models.list()] == ["digits-llava"]
        found = load(url, clients=8, seconds=4, key="secret")
        assert found["answered"] >= 8 and found["lost"] == {}
        asking = threading.Thread(target=ask)
        asking.start()
        asking.join(60)
        assert reasons[-1] in ("stop", "length")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_the_default_method_of_the_command():
    assert _chosen(["flowcut"], "64", None) == FlowCut(keep=64)
    assert _chosen([], None, None) is None and _chosen(["dense"], None, None) is None
    with pytest.raises(ValueError, match="--keep"):
        _chosen([], "64", None)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "no/model"], "there is no model"),
        (["--method", "radial"], "radial needs"),
        (["--host", "192.0.2.1"], "cannot listen"),
        (["--plan", "plan.json", "--keep", "3"], "--plan says"),
    ],
)
def test_mistakes_end_with_one_line(monkeypatch, capsys, arguments, reason):
    monkeypatch.setattr(sys, "argv", ["vtr", "serve", "--port", "0", *arguments])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and reason in error and error.count("\n") == 1
