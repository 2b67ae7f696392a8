"""The results as HTML. All text is escaped, and pictures are in the page itself: no file is served for them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from io import BytesIO
from typing import Any

from vtr.explore.compute import Column, ColumnCosts, Compared, Maps, Said, Titled
from vtr.explore.media import Shown
from vtr.explore.subjects import Subject
from vtr.inspect.drawing import row, stack

STYLE = """
.vtr {color: var(--body-text-color)}
.vtr-columns {display: grid; gap: 12px; grid-auto-columns: minmax(0, 1fr); grid-auto-flow: column}
.vtr-column {border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px;
  background: var(--block-background-fill); min-width: 0}
.vtr-column h3 {margin: 0 0 8px; font: 600 13px/1.3 var(--font-mono); overflow-wrap: anywhere; min-height: 34px}
.vtr-said {display: flex; justify-content: space-between; gap: 8px; font-size: 18px; font-weight: 600}
.vtr-said span {color: var(--body-text-color-subdued); font-size: 13px; font-weight: 400; white-space: nowrap}
.vtr-bar {height: 4px; border-radius: 2px; background: var(--border-color-primary); margin: 4px 0 10px}
.vtr-bar div {height: 4px; border-radius: 2px; background: #0d9488}
.vtr-wrong .vtr-bar div {background: #d97706}
.vtr-pictures {display: grid; gap: 8px; margin-top: 8px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 88px), 1fr))}
.vtr-pictures figure {margin: 0; min-width: 0}
.vtr-pictures .vtr-wide {grid-column: 1 / -1}
.vtr-pictures figcaption {font-size: 11px; color: var(--body-text-color-subdued); padding-bottom: 2px}
.vtr-pictures img {display: block; width: 100%; height: auto; border-radius: 4px; image-rendering: pixelated}
.vtr-pictures .vtr-wide img {width: auto; max-width: 100%; image-rendering: auto}
.vtr-small .vtr-pictures {grid-template-columns: repeat(auto-fill, minmax(56px, 1fr)); gap: 4px}
.vtr-small .vtr-pictures:has(figure:only-child) {max-width: 140px}
.vtr-maps .vtr-pictures {grid-template-columns: repeat(auto-fill, minmax(180px, 240px))}
.vtr-note {font-size: 12px; color: var(--body-text-color-subdued); margin: 8px 0 0; overflow-wrap: anywhere}
.vtr-failed {color: #dc2626}
.vtr table {border-collapse: collapse; margin-top: 14px; width: 100%; font-size: 13px;
  font-variant-numeric: tabular-nums}
.vtr table, .vtr tr, .vtr th, .vtr td {border-width: 0 !important}
.vtr tr {border-bottom: 1px solid var(--border-color-primary) !important}
.vtr th, .vtr td {text-align: right; padding: 5px 10px}
.vtr th:first-child, .vtr td:first-child, .vtr td.vtr-why {text-align: left}
.vtr td small {color: var(--body-text-color-subdued)}
.vtr th {font: 600 12px var(--font-mono); overflow-wrap: anywhere}
.vtr pre {font-size: 12px; overflow-x: auto}
@media (max-width: 900px) {.vtr-columns {grid-auto-flow: row}}
"""
LEGEND = "bright: kept, dark: dropped, coloured: merged, hatched: frozen"


def shown_html(shown: Shown) -> str:
    """Small pictures of what the model is shown."""
    found = shown.thumbnails()
    return (
        f'<div class="vtr vtr-small">{_pictures([("", p) for p in found])}</div>' if found else ""
    )


def comparison_html(found: Compared, shown: Shown) -> str:
    """The columns and the table of costs."""
    first = found.columns[0]
    small = shown.thumbnails(side=240)
    pictures = [("input", p) for p in small[:4]] if shown.clip is None else _sheet(small)
    right = shown.answer if not found.text or found.text == shown.text else ""
    cells = [_column(c, right, pictures if c is first else []) for c in found.columns]
    return (
        f'<div class="vtr"><div class="vtr-columns">{"".join(cells)}</div>{_table(found.columns)}'
        f'<p class="vtr-note">{LEGEND}</p></div>'
    )


def maps_html(maps: Maps) -> str:
    """The attention maps, and the sinks with their numbers."""
    parts = [_pictures(maps.maps)]
    if maps.sinks:
        parts.append(_pictures(maps.sinks))
        parts.append(f"<pre>{escape(maps.summary)}</pre>")
    if not maps.maps and not maps.sinks:
        parts.append('<p class="vtr-note">no map: the tokens form no known grid</p>')
    return f'<div class="vtr vtr-maps">{"".join(parts)}</div>'


def refused_html(subject: Subject) -> str:
    """The methods that do not work on a model, with the reasons."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td class='vtr-why'>{escape(why)}</td></tr>"
        for name, why in subject.refused.items()
    )
    return f'<div class="vtr"><table>{rows}</table></div>'


def _sheet(frames: Sequence[Any]) -> list[Titled]:
    """Frames of a clip as one picture, four beside each other."""
    small = [frame.resize((72, 72)) for frame in frames]
    return [("input", stack([row(small[i : i + 4], 4) for i in range(0, len(small), 4)], 4))]


def _column(column: Column, right: str, before: Sequence[Titled]) -> str:
    wrong = bool(right) and any(s.text != right for s in column.said)
    parts = [f"<h3>{escape(column.title)}</h3>", *map(_said, column.said)]
    parts.append(_pictures([*before, *column.stages]))
    parts.append(_pictures(column.masks))
    if column.note:
        failed = " vtr-failed" if column.failed else ""
        parts.append(f'<p class="vtr-note{failed}">{escape(column.note)}</p>')
    marked = " vtr-wrong" if wrong and column.said[0].probability is not None else ""
    return f'<div class="vtr-column{marked}">{"".join(parts)}</div>'


def _said(said: Said) -> str:
    share = said.probability
    if share is None:
        return f'<div class="vtr-said">{escape(said.text)}</div>'
    return (
        f'<div class="vtr-said">{escape(said.text) or "(nothing)"}<span>{share:.1%}</span></div>'
        f'<div class="vtr-bar"><div style="width:{100 * share:.1f}%"></div></div>'
    )


def _table(columns: Sequence[Column]) -> str:
    """Costs: what, dense, and each method with its share of dense."""
    rows: list[tuple[str, str, Callable[[ColumnCosts], float | None]]] = [
        ("tokens", "{:.0f}", lambda c: c.tokens),
        ("pairs computed", "{:.1%}", lambda c: c.density),
        ("GFLOPs", "{:.3f}", lambda c: None if c.flops is None else c.flops / 1e9),
        ("KV cache, KiB", "{:.0f}", lambda c: None if c.kv_bytes is None else c.kv_bytes / 1024),
        ("time, ms", "{:.1f}", lambda c: c.milliseconds),
    ]
    heads = "".join(f"<th>{escape(c.title.partition('(')[0])}</th>" for c in columns)
    lines = []
    for name, form, read in rows:
        whole = next((v for c in columns[1:] if (v := read(c.dense)) is not None), None)
        if whole is None and all(read(c.costs) is None for c in columns):
            continue
        cells = [f"<td>{_number(form, whole)}</td>"]
        for column in columns[1:]:
            value, dense = read(column.costs), read(column.dense)
            cell = _number(form, value)
            if value is not None and dense and name != "pairs computed":
                cell += f" <small>{value / dense:.0%}</small>"
            cells.append(f"<td>{cell}</td>")
        lines.append(f"<tr><td>{name}</td>{''.join(cells)}</tr>")
    return f"<table><tr><th></th>{heads}</tr>{''.join(lines)}</table>" if lines else ""


def _number(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _pictures(titled: Iterable[Titled]) -> str:
    figures = []
    for caption, picture in titled:
        wide = ' class="vtr-wide"' if picture.width > 1.3 * picture.height else ""
        figures.append(
            f"<figure{wide}><figcaption>{escape(caption)}</figcaption>"
            f'<img src="{_source(picture)}" alt="{escape(caption)}"></figure>'
        )
    return f'<div class="vtr-pictures">{"".join(figures)}</div>' if figures else ""


def _source(picture: Any) -> str:
    """A PIL image as a data URL."""
    out = BytesIO()
    picture.convert("RGB").save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
