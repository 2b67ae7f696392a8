"""Fetching of pictures and videos that a request names by address: off unless the operator allows it.

A server that fetches what strangers name can be turned against its own network. So every address that a name
resolves to must be public, the connection goes to the very address that was checked, and each redirect is checked
like the first address.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

import httpx

from vtr.serve.errors import RequestError
from vtr.serve.limits import Limits

Allowed = Callable[[str], bool]


def public(address: str) -> bool:
    """Tell whether an IP address is reachable by everybody."""
    found = ipaddress.ip_address(address)
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    if inner is not None and not inner.is_global:
        return False
    return found.is_global and not found.is_multicast


async def fetch(url: str, limits: Limits, param: str, allowed: Allowed = public) -> bytes:
    """Fetch the bytes at an address.

    Args:
        allowed: decides about each IP address.

    Raises:
        RequestError: the address is not allowed or gives no answer of status 200 within the limits of size,
            time and redirects.
    """
    try:
        async with asyncio.timeout(limits.reading):
            return await _followed(url, limits, param, allowed)
    except TimeoutError:
        reason = f"no complete answer within {limits.reading:g} s"
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise _failed(param, reason)


async def _followed(url: str, limits: Limits, param: str, allowed: Allowed) -> bytes:
    # trust_env: a proxy of the environment would connect to addresses that were never checked.
    async with httpx.AsyncClient(trust_env=False, timeout=limits.reading) as client:
        for _ in range(limits.redirects + 1):
            pinned, host = await _pinned(url, param, allowed)
            headers = {"Host": host, "Accept-Encoding": "identity", "User-Agent": "vtr"}
            name = urlsplit(url).hostname or ""
            request = client.build_request(
                "GET", pinned, headers=headers, extensions={"sni_hostname": name}
            )
            answer = await client.send(request, stream=True)
            try:
                if answer.is_redirect:
                    url = urljoin(url, answer.headers["location"])
                    continue
                if answer.status_code != 200:
                    raise _failed(param, f"status {answer.status_code}")
                return await _received(answer, limits, param)
            finally:
                await answer.aclose()
    raise _failed(param, f"more than {limits.redirects} redirects")


async def _pinned(url: str, param: str, allowed: Allowed) -> tuple[str, str]:
    """Return the address with its host replaced by the checked IP address, and the value of the Host header."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise _failed(param, "only http and https addresses without a password are fetched")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(allowed(address) for address in addresses):
        raise _failed(param, f"{parts.hostname} is not a public address")
    ip = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
    pinned = parts._replace(netloc=f"{ip}:{port}", fragment="").geturl()
    return pinned, parts.netloc


async def _received(answer: httpx.Response, limits: Limits, param: str) -> bytes:
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise _failed(param, "the answer is compressed, though that was not asked for")
    data = bytearray()
    async for chunk in answer.aiter_raw():
        data += chunk
        if len(data) > limits.body:
            raise _failed(param, f"more than {limits.body} bytes")
    return bytes(data)


def _failed(param: str, reason: str) -> RequestError:
    return RequestError(
        f"{param}: the address cannot be fetched ({reason})", param=param, code="invalid_image_url"
    )
