"""The body of a request, within limits of size and time, and the end of its connection."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from vtr.serve.errors import Disconnected, RequestError
from vtr.serve.limits import Limits

# Bytes of a body that is too large, in multiples of the limit, that are read and thrown away: a client that
# is still sending does not see the answer if the connection is closed.
DRAINED = 4


async def read_json(request: Request, limits: Limits) -> Any:
    """Read the JSON value of a request.

    Raises:
        RequestError: 400 for a value that is not JSON, 408 for one that does not arrive, 413 for one too large.
        Disconnected: the client has left.
    """
    try:
        async with asyncio.timeout(limits.receiving):
            body = await _body(request, limits.body)
    except TimeoutError:
        raise RequestError(
            f"the body did not arrive within {limits.receiving:g} s", status=408
        ) from None
    except ClientDisconnect:
        raise Disconnected from None
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"the body is not JSON: {reason[:200]}", code="invalid_json") from None


async def _body(request: Request, limit: int) -> bytes:
    data, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            data += chunk
        elif size > DRAINED * limit:
            break
        else:
            data.clear()
    if size > limit:
        raise RequestError(
            f"the body has more than {limit} bytes: send fewer or smaller pictures",
            status=413,
            code="request_too_large",
        )
    return bytes(data)


async def left(request: Request) -> None:
    """Wait until the client has closed the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
