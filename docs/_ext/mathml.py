"""Write formulas as MathML, which browsers show without a script from another site."""

from __future__ import annotations

from typing import Any

from docutils import nodes


def mathml(formula: str, display: str) -> str:
    """Convert LaTeX; ``display`` is ``"inline"`` or ``"block"``."""
    from latex2mathml.converter import convert

    # It knows no "gathered": lines below one another, each in the middle.
    rows = formula.replace(r"\begin{gathered}", r"\begin{array}{c}")
    return convert(rows.replace(r"\end{gathered}", r"\end{array}"), display=display)


def inline(writer: Any, node: nodes.math) -> None:
    """Write a formula within a sentence."""
    writer.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def block(writer: Any, node: nodes.math_block) -> None:
    """Write a formula in its own lines; a wide one scrolls by itself."""
    formula = mathml(node.astext(), "block")
    writer.body.append(writer.starttag(node, "div", CLASS="math-block"))
    writer.body.append(f"{formula}</div>\n")
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    """Register the renderer with Sphinx, as ``html_math_renderer = "mathml"``."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True}
