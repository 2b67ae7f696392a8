"""Write vtr/__init__.pyi: the public names of vtr, in the form that type checkers read.

    python recipes/public_names.py

The names are those of ``vtr._PUBLIC``; methods are in it by ``vtr.methods.TABLE`` alone.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import vtr

PACKAGE: Any = vtr  # its stub, which is written here, shows no private names


def stub() -> str:
    """The text of ``vtr/__init__.pyi``."""
    by_module: dict[str, list[str]] = defaultdict(list)
    for name, module in PACKAGE._PUBLIC.items():
        by_module[module].append(name)
    lines = [
        "# Written by `python recipes/public_names.py`; a test compares it with vtr._PUBLIC.",
        "",
    ]
    lines += [f"from vtr import {package} as {package}" for package in sorted(PACKAGE._PACKAGES)]
    for module in sorted(by_module):
        lines += [f"from {module} import {n} as {n}" for n in sorted(by_module[module])]
    lines += ["", "__version__: str", "__all__: list[str]", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    Path(PACKAGE.__file__).with_suffix(".pyi").write_text(stub())
