"""The command in a process of its own: parallel clients, a clean end, and mistakes in one line."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import fastapi  # noqa: F401  (what the command needs)
import openai
import prometheus_client  # noqa: F401
import pytest

from benchmarks.serve_load import load, start
from vtr.cli.serve import _chosen
from vtr.methods import FlowCut


def test_parallel_clients_lose_no_request_and_the_end_is_clean():
    process, url = start("--api-key", "secret")
    try:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="wrong").models.list()
        client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0)
        assert [m.id for m in client.models.list()] == ["digits-llava"]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    process, url = start()
    answers: list[str] = []

    def ask() -> None:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        message = {"role": "user", "content": "how many digits are there ?"}
        stream = client.chat.completions.create(
            model="digits-llava", messages=[message], max_tokens=64, temperature=2, stream=True
        )
        for chunk in stream:
            if not answers:
                process.send_signal(signal.SIGTERM)  # in the middle of the answer
            answers.append(chunk.choices[0].finish_reason or "")

    try:
        found = load(url, clients=8, seconds=4)
        assert found["answered"] >= 8 and found["lost"] == {}
        asking = threading.Thread(target=ask)
        asking.start()
        asking.join(30)
        assert answers[-1] in ("stop", "length")
        assert process.wait(30) == 0
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
        (["--method", "radial-attention"], "radial-attention"),
        (["--host", "192.0.2.1"], "cannot listen"),
    ],
)
def test_mistakes_end_with_one_line(arguments, reason):
    command = [sys.executable, "-m", "vtr", "serve", "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and reason in done.stderr
    assert "Traceback" not in done.stderr
