"""``vtr serve``: an OpenAI-compatible server for a vision-language model."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vtr.cli import shared
from vtr.errors import missing
from vtr.zoo import loading

NEEDED = ("fastapi", "uvicorn", "openai", "prometheus_client", "httpx")


def serve(
    model: shared.ModelOption = "digits-llava",
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-k", help="NAME or NAME:option=value,... (default: dense)"),
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="budget of --method: 64 (tokens) or 0.5 (share)")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="file of a plan, instead of --method", dir_okay=False)
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="of the model for clients (default: --model)")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="VTR_API_KEY", help="that clients must send")
    ] = None,
    allow_fetch: Annotated[
        bool, typer.Option("--allow-fetch", help="fetch pictures from public http(s) addresses")
    ] = False,
    device: shared.DeviceOption = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    max_requests: Annotated[int, typer.Option(min=1, help="in flight, waiting included")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="new tokens of an answer")] = 1024,
    max_images: Annotated[int, typer.Option(min=0, help="in a request")] = 16,
    max_megapixels: Annotated[float, typer.Option(min=0.01, help="of a picture")] = 33.5,
    max_megabytes: Annotated[float, typer.Option(min=0.01, help="of a request")] = 32.0,
    frames: Annotated[int, typer.Option(min=1, help="read from a video")] = 32,
    grace: Annotated[
        float, typer.Option(min=1, help="seconds for requests in flight after SIGTERM")
    ] = 30.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "warning",
    as_json: shared.JsonOption = False,
) -> None:
    """Serve a vision-language model to OpenAI clients, with fewer visual tokens."""
    _configure_log(log_level)
    choice = _chosen(method or [], keep, plan)
    shared.check_device(device)
    if dtype not in loading.DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(loading.DTYPES)}, got {dtype!r}")
    try:
        from vtr.serve import running
        from vtr.serve.limits import Limits
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        raise missing(error.name, "serve", "vtr serve") from error
    limits = Limits(
        requests=max_requests,
        body=int(max_megabytes * 2**20),
        images=max_images,
        pixels=int(max_megapixels * 1e6),
        frames=frames,
        tokens=max_tokens,
    )
    with running.listen(host, port) as door:
        ref = loading.find_vlm(model)
        net, processor = loading.load_found(ref, device, dtype)
        service = running.build_service(
            name or model,
            net,
            processor,
            choice,
            options=ref.options,
            limits=limits,
            allow_fetch=allow_fetch,
        )
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{door.getsockname()[1]}/v1"
        facts = {"url": url, "model": service.name, "method": str(choice or "dense")}

        def ready() -> None:
            text = json.dumps(facts) if as_json else "{model} ({method}) at {url}".format(**facts)
            print(text, flush=True)

        running.serve(running.build_server(service, grace=grace, api_key=api_key), door, ready)


def _chosen(method: list[str], keep: str | None, plan: Path | None) -> Any:
    """Read what the server applies by default; None is dense."""
    from vtr.core.plan import Plan
    from vtr.core.text import parse

    if plan is not None:
        if method or keep is not None:
            raise ValueError("--plan says methods and budgets: leave --method and --keep out")
        return Plan.load(plan)
    if keep is not None:
        if len(method) != 1 or method[0].endswith((".json", ".safetensors")):
            raise ValueError("--keep belongs to one --method NAME")
        joint = "," if ":" in method[0] else ":"
        method = [f"{method[0]}{joint}keep={keep}"]
    chosen = [parse(text) for text in method if text != "dense"]
    return None if not chosen else chosen[0] if len(chosen) == 1 else tuple(chosen)


def _configure_log(level: str) -> None:
    levels = ("debug", "info", "warning", "error")
    if level not in levels:
        raise ValueError(f"--log-level must be one of {', '.join(levels)}, got {level!r}")
    # The processes of a server are logged by what started them: times are written in one way.
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
