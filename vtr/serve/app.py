"""The routes of the server."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from vtr.serve.errors import RequestError
from vtr.serve.service import Service, refusal


def build_app(service: Service, api_key: str | None = None) -> FastAPI:
    """Build the application: ``/v1/chat/completions``, ``/v1/models``, ``/health`` and ``/metrics``.

    Args:
        api_key: that requests to ``/v1`` must show; None asks for none.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.closing = True

    # Pages of documentation would load scripts from another server.
    app = FastAPI(title="vtr", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    created = int(time.time())
    entry = {"id": service.name, "object": "model", "created": created, "owned_by": "vtr"}

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "")
        wanted = f"Bearer {api_key}"
        if api_key is not None and not secrets.compare_digest(given.encode(), wanted.encode()):
            raise RequestError(
                "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
                status=401,
                code="invalid_api_key",
            )

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return refusal(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return refusal(RequestError(message, status=error.status_code))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        check_key(request)
        return await service.answer(request)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        check_key(request)
        return JSONResponse({"object": "list", "data": [entry]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        check_key(request)
        if name != service.name:
            raise RequestError(
                f"there is no model {name!r} here; there is: {service.name}",
                status=404,
                code="model_not_found",
            )
        return JSONResponse(entry)

    @app.get("/health")
    async def health() -> Response:
        if service.closing:
            return JSONResponse({"status": "closing"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app
