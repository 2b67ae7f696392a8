"""The ``vtr`` command: its subcommands, and how they end."""

from __future__ import annotations

import sqlite3
import sys
from typing import Annotated, Any

import typer

from vtr.cli.builtin import demo, plot
from vtr.cli.calibrate import calibrate
from vtr.cli.doctor import doctor
from vtr.cli.draw import draw
from vtr.cli.evaluate import evaluate
from vtr.cli.explore import explore
from vtr.cli.heatmap import heatmap
from vtr.cli.listing import families, methods, models, supported
from vtr.cli.profile import profile
from vtr.cli.search import search
from vtr.cli.serve import serve
from vtr.errors import VtrError

app = typer.Typer(
    help="Visual token reduction for vision and video models.",
    pretty_exceptions_enable=False,
)

# click's UsageError; typer carries its own click since 0.20 or so, and both are reached like this.
_USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]


def main() -> None:
    """Entry point: bad input ends with status 2 and one line that says what is wrong (``docs/cli.md``)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not every terminal can show a ± or a file's name
            stream.reconfigure(errors="replace")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except _USAGE_ERROR as error:
        _fail(f"{error.format_message()} ({' '.join(['vtr', *_command(), '--help'])})")
    except (VtrError, ValueError, OSError) as error:
        _fail(str(error))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except sqlite3.Error as error:
        _fail(f"the results store cannot be written: {error} (what is in it is safe)")


def _command() -> list[str]:
    """The subcommand of this call, if there is one of that name."""
    known = {c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands}
    return [name for name in sys.argv[1:2] if name in known]


def _fail(message: str) -> None:
    line = " ".join(message.split())
    print(f"vtr: {line}", file=sys.stderr)
    sys.exit(2)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        from vtr import __version__

        print(f"vtr {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


_COMMANDS = (
    methods,
    supported,
    models,
    families,
    profile,
    draw,
    heatmap,
    calibrate,
    search,
    explore,
    serve,
    demo,
    plot,
)
for _command_function in _COMMANDS:
    app.command()(_command_function)
app.command("eval")(evaluate)
app.command("doctor")(doctor)
