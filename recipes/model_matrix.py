"""Write the support matrix of vision-language models into ``docs/models.md`` (five minutes of one core).

python -m recipes.model_matrix
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vtr.compat.tested import installed
from vtr.vision.vlm.coverage import markdown

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
START, END = "<!-- vtr models -->\n", "\n<!-- vtr models: end -->"


def main(argv: Sequence[str] | None = None) -> None:
    """Replace the table of the page."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.model_matrix", description=(__doc__ or "").splitlines()[0]
    )
    parser.parse_args(argv)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    made = f"transformers {installed('transformers')}\n\n{markdown()}"
    PAGE.write_text(f"{before}{START}{made}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
