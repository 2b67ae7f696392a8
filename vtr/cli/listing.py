"""``vtr methods``, ``vtr supported``, ``vtr models`` and ``vtr families``: which methods there are, and what they work on."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from vtr.cli import shared
from vtr.errors import VtrError
from vtr.zoo import loading


def methods(
    presets: Annotated[
        bool, typer.Option("--presets", help="list the published settings instead")
    ] = False,
    as_json: shared.JsonOption = False,
) -> None:
    """List every method: paper, sites, signals, options; or its published settings."""
    import vtr

    if presets:
        _presets(as_json)
        return
    rows = vtr.list_methods()
    if as_json:
        print(json.dumps([vars(r) for r in rows], indent=2))
        return
    table = Table(title="methods", show_lines=True)
    for column in ("name", "paper, options, signals", "sites", "training"):
        table.add_column(column, no_wrap=column == "name", overflow="fold")
    for r in rows:
        about = f"{escape(r.paper)}\n[dim]options: {', '.join(r.options)}"
        about += f"\nreads: {', '.join(r.needs)}" if r.needs else ""
        table.add_row(r.name, about, ", ".join(r.sites), r.training)
    shared.console.print(table)


def _presets(as_json: bool) -> None:
    from vtr.core.registry import with_presets

    made: dict[str, dict[str, Any]] = {k: cls.presets() for k, cls in with_presets().items()}
    if as_json:
        print(
            json.dumps(
                {k: {p: m.to_dict() for p, m in v.items()} for k, v in made.items()}, indent=2
            )
        )
        return
    table = Table(title="published settings: METHOD:preset=NAME", show_lines=False)
    for column in ("method", "preset", "is"):
        table.add_column(column, overflow="fold")
    for name, found in made.items():
        for preset, method in found.items():
            table.add_row(name, preset, escape(str(method)))
        table.add_section()
    shared.console.print(table)


def supported(model: shared.ModelArgument, as_json: shared.JsonOption = False) -> None:
    """Say which methods work on a model, and why the others do not."""
    import vtr

    net = _skeleton(model)
    rows = vtr.supported(net)
    if as_json:
        print(json.dumps([vars(r) for r in rows], indent=2))
        return
    table = Table(title=model)
    for column in ("method", "works", "why not, or what for"):
        table.add_column(column, no_wrap=column == "method")
    for r in rows:
        table.add_row(r.name, "yes" if r.supported else "no", escape(r.reason or r.note))
    shared.console.print(table)


def families(as_json: shared.JsonOption = False) -> None:
    """List the transformers of the installed diffusers: wrapped, refused and why, not wrapped yet."""
    try:
        from vtr.diffusion.coverage import coverage

        rows = coverage()
    except ImportError as error:
        raise VtrError(
            f'diffusers cannot be imported ({error}): pip install "vtr[diffusion]"'
        ) from error
    if as_json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
        return
    table = Table(title="transformers of diffusers")
    for column in ("class", "state", "family, or why not"):
        table.add_column(column, no_wrap=column != "family, or why not")
    for row in rows:
        table.add_row(row.name, row.state, escape(row.about))
    shared.console.print(table)


def models(
    names: Annotated[
        list[str] | None, typer.Argument(help="classes of the libraries; all by default")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="vlm, tower, dit or unet, may be repeated; all by default"),
    ] = None,
    as_json: shared.JsonOption = False,
) -> None:
    """Try the model classes of the installed libraries on tiny random models: works, partly, or refused and why."""
    from vtr.testing.matrix import KINDS_OF_ROWS, Row, matrix

    unknown = sorted({*(kind or ())} - {*KINDS_OF_ROWS})
    if unknown:
        raise VtrError(
            f"--kind must be one of {', '.join(KINDS_OF_ROWS)}, got {', '.join(unknown)}"
        )
    rows: list[Row] = []
    for each in kind or KINDS_OF_ROWS:
        left = sorted({*(names or ())} - {row.name for row in rows})
        if names and not left:
            break
        try:
            for row in matrix(each, left or None):
                rows.append(row)
                print(f"{each} {row.name}: {row.state}", file=sys.stderr)
        except ImportError as error:
            if kind:
                raise VtrError(f'{error}: pip install "vtr[vision,vlm,diffusion]"') from error
            print(f"no classes of the kind {each}: {error}", file=sys.stderr)
    missing = sorted({*(names or ())} - {row.name for row in rows})
    if missing:
        raise VtrError(
            f"the installed libraries have no class {', '.join(missing)} of these kinds: "
            "vtr models lists all"
        )
    if as_json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
        return
    number = sum(row.state != "refused" for row in rows)
    table = Table(title=f"{number} of {len(rows)} classes work")
    for column in ("kind", "class", "state", "sites (methods), what is closed, or why not"):
        table.add_column(column, no_wrap=column in ("kind", "state"), overflow="fold")
    for row in rows:
        sites = f"{', '.join(row.sites)} ({row.methods}) " if row.sites else ""
        table.add_row(row.kind, f"{row.library} {row.name}", row.state, escape(sites + row.about))
    shared.console.print(table)


def _skeleton(model: str) -> Any:
    """A model for what only asks about its form: a vision-language model without weights."""
    if loading.is_vlm(model):
        return loading.vlm_skeleton(loading.find_vlm(model))
    return loading.load_encoder(model)
