"""``vtr explore``: pictures, methods and the tokens that are left, in the browser."""

from __future__ import annotations

import json
import signal
import threading
from typing import Annotated, Any

import typer

from vtr.cli import shared


def explore(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="a model to offer first: built in, timm:NAME, open_clip:NAME, a folder or a hub id of a VLM "
            "(repeat for several)",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="default: the first free one from 7860")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option(help="load pretrained weights of an encoder (needs a network)")
    ] = False,
    device: shared.DeviceOption = "cpu",
    as_json: shared.JsonOption = False,
) -> None:
    """Explore in the browser what methods do to pictures, clips and generated videos; Ctrl-C ends it.

    Anyone who reaches the address can use the models. On a loopback address, the default, the page also takes
    names of other models.
    """
    shared.check_device(device)
    stop = threading.Event()

    def end(*_: Any) -> None:
        stop.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        from vtr.explore.app import LOOPBACK, serve
        from vtr.explore.subjects import BUILT_IN, Subjects

        names = [*(model or []), *BUILT_IN]
        subjects = Subjects(names, typed=host in LOOPBACK, pretrained=pretrained, device=device)
        server = serve(subjects, host=host, port=port)
        if as_json:
            print(json.dumps({"url": server.url}), flush=True)
        else:
            shared.console.print(f"{server.url} (Ctrl-C ends it)", highlight=False)
        # The first visitor need not wait for the libraries.
        threading.Thread(target=_warm, args=(subjects,), daemon=True).start()
        while not stop.wait(0.5):  # in parts, so that signals are seen on every system
            pass
        server.close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _warm(subjects: Any) -> None:
    """Load the first model; an error is shown to whoever chooses it."""
    from vtr.errors import VtrError

    try:
        subjects.get(subjects.names[0])
    except (VtrError, ValueError, OSError):
        return
