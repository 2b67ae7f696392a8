"""Configure the documentation site: ``make docs`` builds it from the pages of the repository.

The source folder of Sphinx is the repository itself, so that a link between two pages is the same relative path on
the site, in an editor and on a code host.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

import vtr  # noqa: E402
from recipes import method_pages  # noqa: E402

method_pages.write()  # the pages of the methods are not committed
project = "vtr"
author = "the vtr authors"
copyright = "the vtr authors, Apache-2.0"
version = release = vtr.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "public_names",
    "results",
]

# ---- pages ---------------------------------------------------------------------------------------

root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "vtr/zoo/cards/*.md",
    "benchmarks/results/**.md",
    "examples/notebooks/*.ipynb",
]
exclude_patterns = [".*", "build", "dist", "demo", "gpu_first", "runs", "requirements", "tests"]
templates_path = ["_templates"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # tests run the notebooks and the code of the pages
suppress_warnings = ["myst.header"]  # a card of a model begins with a heading of level 2

# ---- reference -----------------------------------------------------------------------------------

autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Class attributes", "attributes")]
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

# The inventories of other projects are on their sites: VTR_DOCS_ONLINE=1 links the reference to them.
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "numpy": ("https://numpy.org/doc/stable", None),
    }
    if os.environ.get("VTR_DOCS_ONLINE")
    else {}
)

# ---- looks ---------------------------------------------------------------------------------------

html_theme = "furo"
html_title = "vtr"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "to_index.html"}
html_show_sourcelink = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

linkcheck_timeout = 20
linkcheck_anchors = False
