"""The guard of the web server: it answers the page and its events, and no path or address beside them."""

from __future__ import annotations

import json
import re
from typing import Any

MOST = 2**20
"""Bytes of an event; uploads have another path."""
PREFIX = "/gradio_api"
OPEN = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?"
    r"|/(assets|static|svelte)/.*"
    r"|/gradio_api/(queue/(join|data)|upload|upload_progress|heartbeat/\w+|startup-events|app_id|info"
    r"|theme\.css|cancel|reset)/?"
)
"""Paths that are answered. Gradio's others start functions by name, read files, or fetch addresses."""


class PathGuard:
    """ASGI middleware that answers 404 to every path but :data:`OPEN`, and 403 to events with addresses.

    Gradio downloads files whose address is in an event; here an event names uploaded files alone, which
    Gradio itself checks to be in its folder of uploads.

    Args:
        app: what is guarded.
        upload: bytes of one upload at most, all its files together.
    """

    def __init__(self, app: Any, upload: int) -> None:
        self.app, self.upload = app, upload

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await (self.app(scope, receive, send) if scope["type"] == "lifespan" else _close(send))
            return
        path = re.sub(r"/{2,}", "/", scope["path"])
        if not OPEN.fullmatch(path):
            await _answer(send, 404, "not found")
            return
        if path.rstrip("/") == f"{PREFIX}/upload":
            size = dict(scope["headers"]).get(b"content-length", b"")
            if not size.isdigit() or int(size) > self.upload:
                status = 413 if size.isdigit() else 411
                await _answer(send, status, f"an upload has at most {self.upload} bytes")
                return
        if path.rstrip("/") != f"{PREFIX}/queue/join":
            await self.app(scope, receive, send)
            return
        body, ended = b"", False
        while not ended:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            ended = not message.get("more_body")
            if len(body) > MOST:
                await _answer(send, 413, f"an event has at most {MOST} bytes")
                return
        try:
            address = names_address(json.loads(body))
        except (ValueError, RecursionError):  # of deeply nested JSON
            await _answer(send, 400, "an event is JSON")
            return
        if address:
            await _answer(send, 403, "files are uploaded, not fetched from an address")
            return
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return given.pop() if given else await receive()

        await self.app(scope, again, send)


def names_address(value: Any, depth: int = 0) -> bool:
    """Tell whether a file in JSON is an address (``http://``, ``file://``) instead of an upload.

    Raises:
        ValueError: it is nested more than 32 deep.
    """
    if depth > 32:
        raise ValueError("an event is nested too deeply")
    if isinstance(value, dict):
        path = value.get("path")
        foreign = isinstance(path, str) and re.match(r"\s*[A-Za-z][\w+.-]*:/", path)
        return bool(foreign) or any(names_address(v, depth + 1) for v in value.values())
    if isinstance(value, list):
        return any(names_address(v, depth + 1) for v in value)
    return False


async def _answer(send: Any, status: int, text: str) -> None:
    body = json.dumps({"detail": text}).encode()
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _close(send: Any) -> None:
    await send({"type": "websocket.close", "code": 1008})
