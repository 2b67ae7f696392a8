"""The server of the explorer: what it answers, what it refuses, and that it calls nobody."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from urllib.parse import urlsplit

import pytest

from vtr.explore import guard
from vtr.explore.subjects import Subjects


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server in this process, and the hosts that the process connected to while it started."""
    pytest.importorskip("gradio")
    from vtr.explore import app

    hosts: list[str] = []
    connect = socket.socket.connect

    def heard(self, address):
        hosts.append(str(address[0]) if isinstance(address, tuple) else "unix")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", heard)
        patch.setenv("GRADIO_ALLOWED_PATHS", "/")  # of another application
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("other")))
        started = app.serve(Subjects(), app.UploadLimits(bytes=20_000))
        yield started, hosts
        started.close()


def get(url: str, path: str, method: str = "GET", body: bytes | None = None, **headers: str):
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    names = {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request(method, path, body, names)
    answer = connection.getresponse()
    return answer.status, answer.read()


def upload(url: str, name: str, content: bytes):
    body = (
        (
            f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
            "Content-Type: image/png\r\n\r\n"
        ).encode()
        + content
        + b"\r\n--x--\r\n"
    )
    return get(
        url, "/gradio_api/upload", "POST", body, Content_Type="multipart/form-data; boundary=x"
    )


def test_it_listens_on_this_machine_alone_and_calls_nobody(server):
    started, hosts = server
    assert urlsplit(started.url).hostname == "127.0.0.1"
    status, text = get(started.url, "/")
    assert status == 200 and b"vtr explore" in text
    for asset in (b"fonts.googleapis", b"fonts.gstatic", b"cdnjs", b"huggingface.co"):
        assert asset not in text
    assert set(hosts) <= {"127.0.0.1", "unix"}
    config = json.loads(get(started.url, "/config")[1])
    assert config["analytics_enabled"] is False and not config.get("is_space")


def test_no_path_of_the_machine_can_be_read(server, tmp_path, monkeypatch):
    url = server[0].url
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("secret")
    paths = [
        "/etc/passwd",
        "secret.txt",
        str(tmp_path / "secret.txt"),
        "../secret.txt",
        "%2fetc%2fpasswd",
    ]
    for path in paths:
        for route in ("file=", "file/", "proxy=", "stream/"):
            for prefix in ("/gradio_api/", "/", "//gradio_api/", "/gradio_api//"):
                status, text = get(url, f"{prefix}{route}{path}")
                assert status in (403, 404), (prefix, route, path)
                assert b"secret" not in text.replace(path.encode(), b"") and b"root:" not in text
    for path in ("/static/../../../../etc/passwd", "/assets/..%2f..%2f..%2f..%2fetc/passwd",
                 "/static/%2e%2e/%2e%2e/__init__.py"):  # fmt: skip
        status, text = get(url, path)
        assert status in (403, 404) and b"root:" not in text and b"import" not in text


def test_no_address_is_fetched(server):
    url, hosts = server[0].url, server[1]
    before = len(hosts)
    for path in (
        "/gradio_api/file=http://example.com/a.png",
        "/gradio_api/proxy=http://example.com",
    ):
        assert get(url, path)[0] == 404
    for name in (
        "http://example.com/a.png",
        "HTTPS://example.com",
        "file:///etc/passwd",
        " ftp://a/b",
    ):
        event = {"data": [[{"path": name, "meta": {"_type": "gradio.FileData"}}]], "fn_index": 0}
        event |= {"session_hash": "s"}
        body = json.dumps(event).encode()
        status, text = get(
            url, "/gradio_api/queue/join", "POST", body, Content_Type="application/json"
        )
        assert status == 403 and b"not fetched from an address" in text
    new = [h for h in hosts[before:] if h not in ("127.0.0.1", "unix")]
    assert not new


def test_an_upload_is_read_by_no_other_request(server):
    """Its path is known to who sent it alone; and whoever knows it is refused as well."""
    url = server[0].url
    status, text = upload(url, "mine.png", b"mine" * 10)
    (path,) = json.loads(text)
    assert status == 200 and path.endswith("/mine.png")
    for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/"):
        assert get(url, route + path)[0] == 404
    # As the input of an event, a path outside of the uploads is refused before a function is called.
    event = {"data": [[{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}], None]}
    config = json.loads(get(url, "/config")[1])
    read = [d["id"] for d in config["dependencies"] if any(t[1] == "upload" for t in d["targets"])]
    event |= {"fn_index": read[0], "session_hash": "thief"}
    body = json.dumps(event).encode()
    assert (
        get(url, "/gradio_api/queue/join", "POST", body, Content_Type="application/json")[0] == 200
    )
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.request("GET", "/gradio_api/queue/data?session_hash=thief")
    answer, told = connection.getresponse(), b""
    while b"process_completed" not in told:
        line = answer.readline()
        assert line, told
        told += line
    assert b'"success":false' in told.replace(b" ", b"") and b"root:" not in told


def test_large_uploads_and_events_are_refused(server):
    url = server[0].url
    assert upload(url, "a.png", b"x" * 10_000)[0] == 200
    assert upload(url, "a.png", b"x" * 30_000)[0] in (400, 413)
    assert upload(url, "a.png", b"x" * 90_000)[0] == 413
    body = b"[" + b" " * (guard.MOST + 10) + b"]"
    assert (
        get(url, "/gradio_api/queue/join", "POST", body, Content_Type="application/json")[0] == 413
    )
    for body in (b"{", b"[" * 100 + b"]" * 100, b"[" * 30_000):
        found = get(url, "/gradio_api/queue/join", "POST", body, Content_Type="application/json")
        assert found[0] == 400


def test_another_site_cannot_reach_it_through_the_browser(server):
    url = server[0].url
    port = urlsplit(url).port
    assert get(url, "/", Host=f"evil.example:{port}")[0] == 400
    assert get(url, "/", Host=f"localhost:{port}")[0] == 200


def test_functions_cannot_be_called_by_name(server):
    url = server[0].url
    for path in ("/gradio_api/run/predict", "/gradio_api/call/run", "/gradio_api/api/run", "/monitoring",
                 "/monitoring/summary", "/gradio_api/vibe-code", "/docs", "/openapi.json",
                 "/gradio_api/openapi.json", "/gradio_api/mcp/"):  # fmt: skip
        for method in ("GET", "POST"):
            assert get(url, path, method, b"{}", Content_Type="application/json")[0] == 404, path


def test_uploads_are_deleted_with_the_server(tmp_path):
    pytest.importorskip("gradio")
    from pathlib import Path

    from vtr.explore import app

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
        started = app.serve(Subjects())
        (path,) = json.loads(upload(started.url, "b.png", b"12")[1])
        assert Path(path).read_bytes() == b"12" and tmp_path not in Path(path).parents
        port = urlsplit(started.url).port
        with pytest.raises(OSError, match=str(port)):
            app.serve(Subjects(), port=port)
        started.close()
        assert not Path(path).exists()
    with pytest.raises(OSError):
        get(started.url, "/")


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
def test_other_protocols(kind):
    """Websockets are closed: the page uses none. The start of the application is passed on."""
    sent, called = [], []

    async def app(scope, receive, send):
        called.append(scope["type"])

    async def send(message):
        sent.append(message["type"])

    asyncio.run(guard.PathGuard(app, 10)({"type": kind, "path": "/"}, None, send))
    assert (called, sent) == (([kind], []) if kind == "lifespan" else ([], ["websocket.close"]))
