"""Parts of the server on their own: stop words, fetching, videos."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serve.conftest import start
from vtr.serve.errors import RequestError
from vtr.serve.limits import Limits
from vtr.serve.stops import StopWords


@given(
    st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1), max_size=3)
)
def test_stop_words_cut_as_if_the_text_came_at_once(pieces, words):
    cutter = StopWords(tuple(words))
    found = "".join(cutter.feed(piece) for piece in pieces) + cutter.rest()
    text = "".join(pieces)
    # The stream ends at the word that is complete first; of words that end together, the longest cuts.
    ends = [
        (n, text[:n])
        for n in range(len(text) + 1)
        if any(text[:n].endswith(word) for word in words)
    ]
    assert cutter.found == bool(ends)
    if not ends:
        assert found == text
    else:
        assert not any(word in found for word in words) and text.startswith(found)


class Files(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/again"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/again") or "/again")
            self.end_headers()
            return
        body = b"x" * (5000 if self.path == "/large" else 10)
        self.send_response(404 if self.path == "/gone" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def files():
    server = HTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def get(url: str, **more):
    from vtr.serve.fetching import fetch

    return asyncio.run(fetch(url, Limits(body=4000, reading=5), "url", **more))


def test_a_public_address_is_fetched(files):
    seen = []

    def allowed(address: str) -> bool:
        seen.append(address)
        return True

    assert get(f"{files}/again/again/file", allowed=allowed) == b"x" * 10
    assert seen == ["127.0.0.1"] * 3  # each redirect is checked
    for path, reason in (
        ("/large", "4000 bytes"),
        ("/gone", "status 404"),
        ("/again", "redirects"),
        ("/again" + "ftp://a", "http and https"),
    ):
        with pytest.raises(RequestError, match=reason):
            get(files + path, allowed=allowed)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "10.1.2.3", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "0"],
)
def test_private_addresses_are_not_fetched(host):
    with pytest.raises(RequestError, match=r"public|cannot be fetched"):
        get(f"http://{host}:9/file")


def test_videos_are_read_and_bounded():
    av = pytest.importorskip("av")
    import numpy as np

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * i, np.uint8), "rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    url = f"data:video/mp4;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    part = {"type": "video_url", "video_url": {"url": url}}
    question = {"type": "text", "text": "which digit is blue ?"}
    request = {
        "model": "digits-video",
        "messages": [{"role": "user", "content": [part, question]}],
        "max_tokens": 4,
    }
    for server in start("digits-video", None, {"frames": 8, "pixels": 64 * 64}):
        create = server.client.chat.completions.create
        dense = create(**request).usage.model_extra["vtr"]
        cut = create(**request, extra_body={"vtr": {"method": "random", "keep": 0.5}})
        assert (
            0 < cut.usage.model_extra["vtr"]["visual_tokens_after"] < dense["visual_tokens_after"]
        )
        request["messages"][0]["content"] = [part, part, question]
        with pytest.raises(openai.BadRequestError, match="1 videos"):
            create(**request)
