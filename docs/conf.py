"""The guide: `make docs` builds it into build/docs with Sphinx, where a warning is an error.

Pages are Markdown (MyST); those in api/ are made of docstrings, which are Google style in reStructuredText.
"""

import re
from typing import Any

import ddst

project, author = "ddst", "ddst authors"
copyright = author
version = release = ddst.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns: list[str] = []
html_theme = "furo"
html_title = "ddst"
html_copy_source = False
html_show_copyright = False
highlight_language = "none"

myst_heading_anchors = 3
# docs/results.md comes from `make paper`, and may not have been made.
suppress_warnings = ["toc.empty_glob"]

# `x` in a docstring is code, and -- in it an option's two dashes.
default_role = "code"
smartquotes = False
autodoc_default_options = {"members": True}
autodoc_member_order = "groupwise"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
# Attributes are listed as arguments are: several names may share a line.
napoleon_custom_sections = [("Attributes", "params_style")]

nitpicky = True
nitpick_ignore_regex = [
    # Other projects' objects: their inventories would have to be fetched.
    ("py:.*", r"(torch|numpy|nn|np|PIL|types|pathlib|collections|argparse|os)\..*"),
    ("py:.*", r"Tensor|Optimizer|ProcessGroup|NDArray|Path|Any|Callable|Iterable|Iterator|Mapping|Sequence|Image|IO"),
]

_LABELLED = re.compile(r"(Numerics and cost|Numerics|Cost|Source|Shapes?): (.*)")


def label(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Makes "Cost: …", whose further lines are indented as an argument's are, a paragraph with a bold label."""
    made: list[str] = []
    inside = False
    for line in lines:
        found = _LABELLED.fullmatch(line)
        inside = bool(found) or (inside and line.startswith(" "))
        made += ["", f"**{found[1]}.** {found[2]}"] if found else [line.strip() if inside else line]
    lines[:] = made


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", label, priority=400)  # before napoleon
