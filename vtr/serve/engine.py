"""One model, one thread, one request after the other: each with the method that it names."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vtr.api import Handle, apply
from vtr.compat import serving
from vtr.errors import VtrError
from vtr.evaluate.answering import tokens_left
from vtr.serve.choosing import Choice
from vtr.serve.errors import Disconnected, RequestError
from vtr.serve.preparing import Prepared, moved
from vtr.serve.stops import StopWords

log = logging.getLogger(__name__)


@dataclass(eq=False)
class AnswerJob:
    """One answer to generate.

    Attributes:
        prepared: the inputs.
        choice: what is applied.
        stops: words that end the answer.
        seed: of an answer that is drawn; None draws another one each time.
        cancelled: set by the server when the client has left.
    """

    prepared: Prepared
    choice: Choice = None
    stops: tuple[str, ...] = ()
    seed: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Done:
    """The end of an answer.

    Attributes:
        reason: ``"stop"`` or ``"length"``.
        tokens: of the answer, its end included.
        left: visual tokens in the last layer of the model.
    """

    reason: str
    tokens: int
    left: int


Item = str | Done | Exception
"""A piece of text, the end of the answer, or what went wrong."""


class Sink:
    """Takes text from the streamer in the model's thread, and hands items to the event loop.

    The streamer takes it for an event loop and a queue: see :func:`vtr.compat.serving.streamer`.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.queue: asyncio.Queue[Item] = asyncio.Queue()
        self.words = StopWords(stops)
        self._loop = asyncio.get_running_loop()

    def call_soon_threadsafe(self, put: Callable[[str | None], None], piece: str | None) -> None:
        put(piece)

    def put_nowait(self, piece: str | None) -> None:
        text = self.words.rest() if piece is None else self.words.feed(piece)
        if text:
            self.send(text)

    def send(self, item: Item) -> None:
        """Hand an item to the event loop; a loop that has ended needs none."""
        try:
            self._loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:
            log.debug("the event loop has ended before an answer")


class Engine:
    """A model that answers jobs in the order of their arrival, on a separate thread.

    Methods patch the model, so that two of them cannot be on it for two requests at a time. The thread takes
    one request, puts its method on if another one is on, and generates.

    Args:
        model, processor: of transformers, in eval mode.
        options: of :func:`vtr.apply`.

    Raises:
        ValueError: the tokenizer cannot be used for streaming.
    """

    def __init__(self, model: Any, processor: Any, options: dict[str, Any]) -> None:
        self.model, self.options = model, options
        self._decoder = serving.decoder(processor)
        self._thread = serving.inference_thread()
        self._on: Choice = None
        self._handle: Handle | None = None
        ends = model.generation_config.eos_token_id
        self._ends = set(ends) if isinstance(ends, list) else {ends}

    def start(self, job: AnswerJob) -> asyncio.Queue[Item]:
        """Queue a job; its text, and then its end or an exception, come out of the queue that is returned."""
        sink = Sink(job.stops)
        self._thread.submit(self._run, job, sink)
        return sink.queue

    def check(self, choice: Choice) -> None:
        """Put a method on the model, to see whether it fits.

        Raises:
            VtrError, ValueError: as :func:`vtr.apply` does.
        """
        self._thread.submit(self._put_on, choice).result()

    def _run(self, job: AnswerJob, sink: Sink) -> None:
        try:
            if job.cancelled.is_set():
                raise Disconnected
            sink.send(self._generate(job, sink))
        except Exception as error:
            # A call that was interrupted may leave its state behind; the next one begins afresh.
            self._take_off()
            sink.send(error)

    @torch.inference_mode()
    def _generate(self, job: AnswerJob, sink: Sink) -> Done:
        try:
            self._put_on(job.choice)
        except (VtrError, ValueError) as error:
            raise RequestError(f"vtr: {error}", param="vtr") from error
        if job.seed is None:
            torch.seed()
        else:
            torch.manual_seed(job.seed)

        def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            over = job.cancelled.is_set() or sink.words.found
            return torch.full((len(ids),), over, dtype=torch.bool, device=ids.device)

        written = self.model.generate(
            **moved(job.prepared.inputs, self.model),
            generation_config=job.prepared.config,
            stopping_criteria=[stop],
            streamer=serving.streamer(self._decoder, sink),
        )[0, job.prepared.length :].tolist()
        if job.cancelled.is_set():
            raise Disconnected
        ended = sink.words.found or bool(written and written[-1] in self._ends)
        return Done("stop" if ended else "length", len(written), self._left(job.prepared))

    def _left(self, prepared: Prepared) -> int:
        if self._handle is None or not prepared.visual:
            return prepared.visual
        left, _ = tokens_left(self._handle, torch.tensor([prepared.visual], device="cpu"))
        return int(left[0])

    def _put_on(self, choice: Choice) -> None:
        if choice == self._on:
            return
        self._take_off()
        if choice is not None:
            self._handle = apply(self.model, choice, **self.options)
        self._on = choice

    def _take_off(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._on = None, None
