"""What is refused, with its reason in OpenAI's format; and that the server answers afterwards."""

from __future__ import annotations

import base64
import json
import socket
import struct
import time
import zlib

import httpx
import pytest
from PIL import Image

from tests.serve.conftest import ask, picture_url


def post(served, body, **more):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{served.url}/v1/chat/completions", content=content, timeout=30, **more)


def bomb() -> str:
    """A PNG of some bytes that says it has 900 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


SMALL = Image.new("RGB", (96, 96), (90, 90, 90))
GOOD = {
    "model": "digits-llava",
    "messages": ask(SMALL, "how many digits are there ?"),
    "max_tokens": 4,
}
HUGE = picture_url(Image.new("RGB", (2000, 2000)))
CUT = picture_url(Image.effect_noise((96, 96), 50))[:4000]


def _with(**fields):
    return {**GOOD, **fields}


def _url(url):
    return _with(messages=ask(url, "how many digits are there ?"))


REFUSED = {
    "garbage": (b"\x00{not json", 400, "JSON"),
    "nested": (b"[" * 100_000, 400, "JSON"),
    "list": (b"[]", 400, "object"),
    "no messages": (_with(messages=[]), 400, "messages"),
    "empty content": (_with(messages=[{"role": "user", "content": ""}]), 400, "empty"),
    "no parts": (_with(messages=[{"role": "user", "content": []}]), 400, "empty"),
    "role": (_with(messages=[{"role": "tool", "content": "a"}]), 400, "messages.0.role"),
    "last turn": (_with(messages=[{"role": "assistant", "content": "a"}]), 400, "last message"),
    "special token": (
        _with(messages=[{"role": "user", "content": "<image>"}]),
        400,
        "special token",
    ),
    "audio": (
        _with(messages=[{"role": "user", "content": [{"type": "input_audio"}]}]),
        400,
        "input_audio",
    ),
    "unknown model": (_with(model="gpt"), 404, "digits-llava"),
    "unknown field": (_with(top_k=3), 400, "top_k"),
    "n": (_with(n=2), 400, "n is not supported"),
    "logprobs": (_with(logprobs=True), 400, "logprobs is not"),
    "tools": (_with(tools=[{"type": "function"}]), 400, "tools is not"),
    "format": (_with(response_format={"type": "json_object"}), 400, "response_format is not"),
    "bias": (_with(logit_bias={"1": 5}), 400, "logit_bias is not"),
    "temperature": (_with(temperature=3), 400, "temperature"),
    "nan": (json.dumps(_with(temperature=float("nan"))).encode(), 400, "temperature"),
    "tokens": (_with(max_tokens=0), 400, "max_tokens"),
    "many tokens": (_with(max_tokens=10**6), 400, "limited to"),
    "method": (_with(vtr={"method": "flow"}), 400, "there is no method"),
    "plan of the server": (_with(vtr={"method": "/etc/plan.json"}), 400, "there is no method"),
    "file of the server": (
        _with(vtr={"method": "tofe", "options": {"weights": "/etc/passwd"}}),
        400,
        "only numbers",
    ),
    "keep": (_with(vtr={"method": "flowcut", "keep": 0}), 400, "keep"),
    "wrong method": (_with(vtr={"method": "radial"}), 400, "radial needs"),
    "broken base64": (_url("data:image/png;base64,@@@"), 400, "base64"),
    "broken picture": (_url("data:image/png;base64,AAAA"), 400, "cannot be read"),
    "cut picture": (_url(CUT), 400, "messages.0.content.0"),
    "huge picture": (_url(HUGE), 400, "too large"),
    "bomb": (_url(bomb()), 400, "too large"),
    "fetch": (_url("http://127.0.0.1:1/a.png"), 400, "--allow-fetch"),
    "file": (_url("file:///etc/passwd"), 400, "data URL"),
    "many pictures": (
        _with(messages=[{"role": "user", "content": GOOD["messages"][0]["content"][:1] * 17}]),
        400,
        "16 pictures",
    ),
    "large body": (b" " * (2**21 + 1), 413, "2097152 bytes"),
    "video": (
        _with(
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "video_url", "video_url": {"url": "data:;base64,AAAA"}}],
                }
            ]
        ),
        400,
        "video",
    ),
}


@pytest.mark.parametrize(("body", "status", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_a_reason(served, body, status, reason):
    answer = post(served, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and reason in error["message"]
    assert post(served, GOOD).status_code == 200


def test_unknown_routes_have_the_format(served):
    answer = httpx.get(f"{served.url}/v1/nothing")
    assert answer.status_code == 404 and "error" in answer.json()
    assert httpx.get(f"{served.url}/v1/chat/completions").status_code == 405


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_generation(served, stream):
    """The client goes without a word, in the middle of an answer that would go on."""
    engine = served.service.engine
    before = engine._ends, served.service.preparing.defaults.eos_token_id
    served.service.preparing.defaults.eos_token_id = None  # answers never end by themselves
    try:
        body = json.dumps(_with(stream=stream, max_tokens=300)).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        address = served.url.removeprefix("http://").split(":")
        counter = served.service.metrics.requests.labels("499")
        gone = counter._value.get()
        with socket.create_connection((address[0], int(address[1]))) as wire:
            wire.sendall(head.encode() + body)
            if stream:
                assert b"200 OK" in wire.recv(100)
            while not served.service.visits:
                time.sleep(0.005)
            # Closing with unread data resets the connection, as the end of a killed process does.
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end = time.monotonic() + 20
        while served.service.visits and time.monotonic() < end:
            time.sleep(0.02)
        assert served.service.visits == 0 and counter._value.get() == gone + 1
    finally:
        engine._ends, served.service.preparing.defaults.eos_token_id = before
    assert post(served, GOOD).status_code == 200
