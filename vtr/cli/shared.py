"""Options and checks that several commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from vtr.zoo import loading

console = Console()
PAGE = 110  # columns of tables in files

ModelArgument = Annotated[str, typer.Argument(help=loading.NAMES)]
ModelOption = Annotated[str, typer.Option("--model", "-m", help=loading.NAMES)]
MethodOption = Annotated[
    list[str],
    typer.Option(
        "--method",
        "-k",
        help="NAME, NAME:option=value,option=value, debias(NAME:...), or the file of a plan, PLAN.json or "
        "PLAN.safetensors (repeat for several)",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda")]
QuestionOption = Annotated[
    str | None, typer.Option("--question", "-q", help="to a vision-language model")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


def check_device(device: str) -> None:
    """Raise ``ValueError`` for a device that is not here."""
    import torch

    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")


def only_for_vlms(model: str, **given: Any) -> None:
    """Raise ``ValueError`` for options that an encoder does not have."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name} is for vision-language models; {model} is an encoder")
