"""transformers' server: the parts of ``transformers serve`` that do not depend on its routes.

``transformers.cli`` is no public interface. Its application is not used: it loads and unloads whatever model a
client names, reads files and addresses that a request names, and has no limits. Its thread for ``generate`` and
its streamer are, because a compiled model must stay on one thread, and because incremental decoding is easy to
get wrong.
"""

from __future__ import annotations

import copy
from typing import Any

from vtr.compat.contract import required

HOME = "transformers.cli.serving.utils"
THREAD, STREAMER = f"{HOME}:InferenceThread", f"{HOME}:DirectStreamer"


def inference_thread() -> Any:
    """Start the thread that runs ``generate``; its ``submit(function, *arguments)`` returns a future.

    Raises:
        UnsupportedModelError: the installed transformers has no such thread.
    """
    return required(THREAD)()


def streamer(tokenizer: Any, sink: Any) -> Any:
    """Build a streamer for ``generate`` that decodes each token as it comes.

    Args:
        tokenizer: of :func:`decoder`.
        sink: gets each piece of text in the thread of ``generate``: its ``call_soon_threadsafe(put, text)``
            is called, and its ``put_nowait`` is passed as ``put``. An event loop and its queue have these names.
    """
    return required(STREAMER)(tokenizer, sink, sink)


def decoder(processor: Any) -> Any:
    """Copy the tokenizer of a processor for decoding in another thread than the one that encodes.

    A tokenizer that sets its padding for one call cannot be read by another thread at that moment.

    Raises:
        ValueError: the tokenizer is not one of the library tokenizers.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} is not based on the library tokenizers, whose incremental decoding "
            "answers are streamed with"
        )
    return copy.deepcopy(backend)
