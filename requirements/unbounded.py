"""Print the requirements of pyproject.toml without upper bounds, as overrides for ``make canary``."""

import re
import tomllib
from itertools import chain
from pathlib import Path

project = tomllib.loads(Path(__file__).parent.with_name("pyproject.toml").read_text())["project"]
extras = chain.from_iterable(project["optional-dependencies"].values())
for line in dict.fromkeys([*project["dependencies"], *extras]):
    if not line.startswith("vtr["):
        print(re.sub(r",?(?:<|==)[^,;\s]+", "", line))
