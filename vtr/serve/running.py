"""Starting and stopping the server."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from vtr.serve.app import build_app
from vtr.serve.choosing import Choice
from vtr.serve.engine import AnswerJob, Engine
from vtr.serve.errors import RequestError
from vtr.serve.limits import Limits
from vtr.serve.preparing import Preparing
from vtr.serve.schema import read_request
from vtr.serve.service import Service

log = logging.getLogger(__name__)


def build_service(
    name: str,
    model: Any,
    processor: Any,
    default: Choice = None,
    *,
    options: dict[str, Any] | None = None,
    limits: Limits | None = None,
    allow_fetch: bool = False,
) -> Service:
    """Build the service of a loaded model, and put its method on once.

    Args:
        name: of the model, as clients name it.
        model, processor: of transformers, in eval mode.
        default: what is applied if a request names nothing; None is dense.
        options: of :func:`vtr.apply`.

    Raises:
        VtrError, ValueError: the method does not fit the model, or its tokenizer cannot be used for streaming.
    """
    limits = limits or Limits()
    engine = Engine(model, processor, options or {})
    engine.check(default)
    preparing = Preparing(model, processor, limits.tokens)
    return Service(name, engine, preparing, default, limits, allow_fetch)


async def warm_up(service: Service) -> None:
    """Answer a question about a grey picture, so that the first client does not wait for lazy work."""
    from PIL import Image

    part = {"type": "image_url", "image_url": {"url": "data:"}}
    content = [part, {"type": "text", "text": "?"}]
    body = {"model": service.name, "messages": [{"role": "user", "content": content}]}
    asked = read_request({**body, "max_tokens": 1})
    picture = Image.new("RGB", (224, 224), (128, 128, 128))
    try:
        prepared = service.preparing.prepare(asked, [picture], [])
    except RequestError as error:  # a model of videos alone, or with an unusual template
        log.warning("no warm-up: %s", error)
        return
    items = service.engine.start(AnswerJob(prepared, service.default))
    while isinstance(item := await items.get(), str):
        pass
    if isinstance(item, Exception):
        raise item


class Server(uvicorn.Server):
    """uvicorn's server, which says when it listens and refuses new requests while it ends."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await warm_up(self.service)
        await super().startup(sockets)
        if self.started:
            self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.closing = True
        await super().shutdown(sockets)


def build_server(service: Service, *, grace: float = 30.0, api_key: str | None = None) -> Server:
    """Build a server that is not listening yet.

    Args:
        grace: seconds that requests in flight get to finish after SIGTERM or SIGINT.
        api_key: that clients must show; None asks for none.
    """
    config = uvicorn.Config(
        build_app(service, api_key),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(grace)),
    )
    return Server(config, service)


def listen(host: str, port: int) -> socket.socket:
    """Open the socket, before a model is loaded for it.

    Raises:
        OSError: the address is taken or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} ({error.strerror or error})") from error


def serve(server: Server, door: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are finished within the time of grace.

    Args:
        ready: called once, when clients can connect.
    """

    async def run() -> None:
        task = asyncio.ensure_future(server.serve([door]))
        while not (server.ready.is_set() or task.done()):
            await asyncio.sleep(0.01)
        if server.ready.is_set():
            ready()
        await task

    # uvicorn raises the signal again when it has ended, which would make a clean end look like a crash.
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        started = time.monotonic()
        asyncio.run(run())
        log.info("served for %.0f s", time.monotonic() - started)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
