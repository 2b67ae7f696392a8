"""lmms-eval: the registry of its models, the layout of its requests, and its calls of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

#: The key by which a request says that it only fills up a shorter process's list.
PADDING = "__padding_only__"
#: Keys of its samples besides the scores.
SAMPLE = frozenset(
    {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts"}
    | {"doc_hash", "input_media"}
)


class AnswerRequest(NamedTuple):
    """A request for an answer.

    Attributes:
        context: the question as text; the only one of a simple task.
        visual: of a simple task, the function from a sample to its pictures.
        messages: of a chat task, the function from a sample to its turns; None of a simple one.
        generation: how to answer.
        doc, task, split: number, task and split of its sample.
    """

    context: str
    visual: Callable[[Any], Any] | None
    messages: Callable[[Any], Any] | None
    generation: Mapping[str, Any]
    doc: Any
    task: str
    split: str


def pads(request: Any) -> bool:
    """Tell whether a request only fills up a shorter process's list, and needs no answer."""
    return bool((request.metadata or {}).get(PADDING))


def place(request: Any) -> tuple[Any, str, str]:
    """Return number of the sample, task and split of a request."""
    doc, task, split = request.args[-3:]
    return doc, task, split


def asked(request: Any) -> AnswerRequest:
    """Read a request of ``generate_until`` in either layout of arguments.

    ``(context, generation, doc_to_visual, doc, task, split)`` for simple tasks,
    ``(context, doc_to_messages, generation, doc, task, split)`` for chat tasks, with or without the
    leading context.
    """
    given = request.args
    if isinstance(given[1], Mapping) and isinstance(given[0], str):
        return AnswerRequest(given[0], given[2], None, given[1], *place(request))
    return AnswerRequest("", None, given[-5], given[-4], *place(request))


def likelihood(request: Any) -> tuple[str, Any, Callable[[Any], Any] | None, Any, str, str]:
    """Read a request of ``loglikelihood``: context, target or the function from a sample to it, the function
    from a sample to its pictures, and number, task and split of the sample."""
    context, target, visual, doc, task, split = request.args
    return context, target, visual, doc, task, split


def register(manifests: list[Any]) -> None:
    """Register models in this process."""
    from lmms_eval import models

    for manifest in manifests:
        models.MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)


def prepare() -> None:
    """Run the first part of its evaluation, which needs private names of filelock (gone in 4.3)."""
    from lmms_eval import evaluator

    first = getattr(evaluator, "_enable_reentrant_filelocks", None)
    if first is not None:
        first()


@contextmanager
def without_bars() -> Iterator[None]:
    """A context in which its evaluation shows no progress bars."""
    from lmms_eval import evaluator

    bar = evaluator.tqdm
    evaluator.tqdm = lambda *args, **kwargs: bar(*args, **{**kwargs, "disable": True})
    try:
        yield
    finally:
        evaluator.tqdm = bar
