"""A server of the built-in LLaVA in this process, on a free port of 127.0.0.1."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import vtr
from vtr.zoo import load_vlm, vqa


class Started:
    """A running server with what it serves."""

    def __init__(self, service: Any, server: Any, url: str) -> None:
        import openai

        self.service, self.server, self.url = service, server, url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def start(name: str, default: Any, limits: dict[str, int], **more: Any) -> Iterator[Started]:
    """Serve a built-in model until the generator is closed."""
    from vtr.serve import running
    from vtr.serve.limits import Limits

    model, processor = load_vlm(name)
    options = {"positions": "original"}
    service = running.build_service(
        name, model, processor, default, options=options, limits=Limits(**limits)
    )
    server = running.build_server(service, grace=5, **more)
    with running.listen("127.0.0.1", 0) as door:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([door])))
        thread.start()
        assert server.ready.wait(60)
        yield Started(service, server, f"http://127.0.0.1:{door.getsockname()[1]}")
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def served() -> Iterator[Started]:
    yield from start("digits-llava", vtr.FlowCut(keep=36), {"body": 2**21, "pixels": 2**20})


@pytest.fixture(scope="session")
def twin() -> Any:
    """The same model and processor once more, for what generate answers without a server."""
    return load_vlm("digits-llava")


@pytest.fixture(scope="session")
def samples() -> Any:
    return vqa(10, seed=5)


def picture_url(picture: Any, kind: str = "png") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def ask(picture: Any, question: str) -> list[dict[str, Any]]:
    """The messages of one question about one picture, or about what a URL names."""
    url = picture if isinstance(picture, str) else picture_url(picture)
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]
