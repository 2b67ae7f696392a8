"""Answering of a request for a chat completion, from its arrival to its last byte."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from vtr.serve.answers import END, AnswerWriter
from vtr.serve.choosing import Choice, chosen
from vtr.serve.engine import AnswerJob, Done, Engine, Item
from vtr.serve.errors import Disconnected, RequestError
from vtr.serve.limits import Limits
from vtr.serve.media import data_url, read_picture, read_video
from vtr.serve.metrics import Metrics
from vtr.serve.preparing import Preparing
from vtr.serve.receiving import left, read_json
from vtr.serve.schema import ChatRequest, ImagePart, VideoPart, read_request

log = logging.getLogger(__name__)
T = TypeVar("T")
GONE = 499  # the status that nginx logs for a client that has left


class Visit:
    """One request in flight: its time, and what it is counted as when it ends."""

    def __init__(self, service: Service) -> None:
        self._service, self._start = service, time.perf_counter()
        self._open, self._silent = True, True
        service.visits += 1
        service.metrics.in_flight.inc()

    def spoken(self) -> None:
        """Note the first text."""
        if self._silent:
            self._silent = False
            self._service.metrics.first.observe(time.perf_counter() - self._start)

    def end(self, status: int) -> None:
        """Count the request, once."""
        if not self._open:
            return
        self._open = False
        self._service.visits -= 1
        metrics = self._service.metrics
        metrics.in_flight.dec()
        metrics.requests.labels(str(status)).inc()
        metrics.whole.observe(time.perf_counter() - self._start)


class Events(StreamingResponse):
    """A stream of events that says when it is over, also if the client leaves before its first byte."""

    def __init__(self, content: AsyncIterator[bytes], over: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


@dataclass(eq=False)
class Service:
    """A model that answers requests.

    Attributes:
        name: of the model, as clients name it.
        engine, preparing: run the model and its processor.
        default: what is applied if a request names nothing.
        limits: of requests.
        allow_fetch: fetch pictures and videos from public addresses.
    """

    name: str
    engine: Engine
    preparing: Preparing
    default: Choice
    limits: Limits
    allow_fetch: bool = False

    def __post_init__(self) -> None:
        self.metrics = Metrics()
        self.visits = 0
        self.closing = False
        # Decoding releases the interpreter lock, so that two pictures are decoded while the model runs.
        self._workers = ThreadPoolExecutor(2, "vtr-prepare")

    async def answer(self, request: Request) -> Response:
        """Answer a request; refusals have OpenAI's format."""
        if self.closing or self.visits >= self.limits.requests:
            why = "is shutting down" if self.closing else f"has {self.visits} requests in flight"
            refused = RequestError(
                f"the server {why}: try again later", status=503, code="overloaded"
            )
            self.metrics.requests.labels("503").inc()
            return refusal(refused)
        visit = Visit(self)
        try:
            response = await self._answered(request, visit)
        except Exception as error:
            response = failure(error)
        except BaseException:  # the server has stopped waiting for this request
            visit.end(GONE)
            raise
        if not isinstance(response, Events):
            visit.end(response.status_code)
        return response

    async def _answered(self, request: Request, visit: Visit) -> Response:
        asked = read_request(await read_json(request, self.limits))
        if asked.model != self.name:
            raise RequestError(
                f"there is no model {asked.model!r} here; there is: {self.name}",
                status=404,
                param="model",
                code="model_not_found",
            )
        gone = asyncio.ensure_future(left(request))
        job: AnswerJob | None = None
        handed_on = False
        try:
            job = await _unless(gone, self._job(asked))
            items = self.engine.start(job)
            first = await _unless(gone, items.get())
            if isinstance(first, Exception):
                raise first
            answer = AnswerWriter(self.name, job)
            if asked.stream:
                usage = asked.stream_options is not None and asked.stream_options.include_usage
                handed_on = True
                return self._streamed(answer, first, items, usage, visit)
            pieces: list[str] = []
            item: Item = first
            while isinstance(item, str):
                visit.spoken()
                pieces.append(item)
                item = await _unless(gone, items.get())
            return JSONResponse(answer.whole("".join(pieces), self._counted(job, item)))
        finally:
            gone.cancel()
            if job is not None and not handed_on:
                job.cancelled.set()  # nothing to stop if the answer is complete

    def _streamed(
        self,
        answer: AnswerWriter,
        first: Item,
        items: asyncio.Queue[Item],
        usage: bool,
        visit: Visit,
    ) -> Events:
        status = GONE

        async def events() -> AsyncIterator[bytes]:
            nonlocal status
            yield answer.piece({"role": "assistant", "content": ""})
            item = first
            while isinstance(item, str):
                visit.spoken()
                yield answer.piece({"content": item})
                item = await items.get()
            try:
                done = self._counted(answer.job, item)
            except Exception as error:
                response = failure(error)
                status = response.status_code
                yield b"data: " + bytes(response.body) + b"\n\n"
                return
            yield answer.piece({}, done.reason)
            if usage:
                yield answer.end(done)
            yield END
            status = 200

        def over() -> None:
            answer.job.cancelled.set()
            visit.end(status)

        return Events(events(), over)

    def _counted(self, job: AnswerJob, item: Item) -> Done:
        """Count a finished answer. Raises what went wrong instead of an end."""
        if not isinstance(item, Done):
            raise item if isinstance(item, Exception) else RuntimeError("an answer without an end")
        self.metrics.before.inc(job.prepared.visual)
        self.metrics.after.inc(item.left)
        self.metrics.prompt.inc(job.prepared.length)
        self.metrics.completion.inc(item.tokens)
        return item

    # ---- the inputs -------------------------------------------------------------------------

    async def _job(self, asked: ChatRequest) -> AnswerJob:
        choice = chosen(asked.vtr, self.default)
        images, videos = await self._media(asked)
        prepared = await self._aside(self.preparing.prepare, asked, images, videos)
        return AnswerJob(prepared, choice, asked.stops, asked.seed)

    async def _media(self, asked: ChatRequest) -> tuple[list[Any], list[Any]]:
        """Read the pictures and videos of a request, in their order."""
        places = [
            (f"messages.{i}.content.{j}", part)
            for i, message in enumerate(asked.messages)
            for j, part in enumerate(message.parts)
        ]
        limits = self.limits
        for kind, what, most in (
            (ImagePart, "pictures", limits.images),
            (VideoPart, "videos", limits.videos),
        ):
            count = sum(isinstance(part, kind) for _, part in places)
            if count > most:
                raise RequestError(
                    f"a request may have {most} {what}, got {count}", param="messages"
                )
        images, videos = [], []
        for place, part in places:
            if isinstance(part, ImagePart):
                param = f"{place}.image_url.url"
                data = await self._bytes(part.image_url.url, param)
                images.append(await self._aside(read_picture, data, limits, param))
            elif isinstance(part, VideoPart):
                param = f"{place}.video_url.url"
                data = await self._bytes(part.video_url.url, param)
                videos.append(await self._aside(read_video, data, limits, param))
        return images, videos

    async def _bytes(self, url: str, param: str) -> bytes:
        if not url[:8].lower().startswith(("http://", "https://")):
            return await self._aside(data_url, url, param)
        if not self.allow_fetch:
            raise RequestError(
                f"{param}: this server fetches nothing; send the file as a data URL, or start the server with "
                "--allow-fetch",
                param=param,
            )
        from vtr.serve.fetching import fetch

        return await fetch(url, self.limits, param)

    async def _aside(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *arguments)


async def _unless(gone: asyncio.Future[None], work: Awaitable[T]) -> T:
    """Wait for work, or raise :class:`Disconnected` as soon as the client has left."""
    task = asyncio.ensure_future(work)
    try:
        both: set[asyncio.Future[Any]] = {task, gone}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        task.cancel()


def refusal(error: RequestError) -> JSONResponse:
    """Write a refusal; a client may try again a second after an overload."""
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error.to_dict(), error.status, headers)


def failure(error: Exception) -> JSONResponse:
    """Write what went wrong; faults of the server are logged, and their details are not sent."""
    if isinstance(error, RequestError):
        return refusal(error)
    if isinstance(error, Disconnected):
        return JSONResponse({}, GONE)
    if isinstance(error, torch.OutOfMemoryError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("out of memory: %s", error)
        return refusal(
            RequestError(
                "the server has not enough memory for this request: send fewer or smaller pictures",
                status=503,
                code="out_of_memory",
            )
        )
    log.error("a request failed", exc_info=error)
    return refusal(RequestError("the server failed to answer; its log has the reason", status=500))
