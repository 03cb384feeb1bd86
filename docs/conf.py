"""The guide: `make docs` builds it into build/docs with Sphinx, where a warning is an error.

Pages are Markdown (MyST); those in api/ are made of docstrings, which are Google style in reStructuredText.
"""

import contextlib
import inspect
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

default_role = "code"
smartquotes_action = "D"  # dashes only: a quoted word is a value that is typed as it stands
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
# Attributes are listed as arguments are: several names may share a line.
napoleon_custom_sections = [("Attributes", "params_style")]

nitpicky = True
nitpick_ignore_regex = [
    # Other projects' objects: their inventories would have to be fetched.
    ("py:.*", r"(torch|numpy|nn|np|PIL|types|pathlib|collections|argparse|os)\..*"),
    # Types of arguments without an entry, and one whose default (of a dataclass) ends Sphinx's reading of it.
    ("py:.*", r"(.*\.)?(LayerT|Result)|Axes|PathLike|SafetensorError|int64|dict\[str"),
    ("py:.*", r"Tensor|Optimizer|ProcessGroup|NDArray|Path|Any|Callable|Iterable|Iterator|Mapping|Sequence|Image|IO"),
]

_LABELLED = re.compile(r"(Numerics and cost|Numerics|Cost|Source|Shapes?): (.*)")


def arrange(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Our docstrings in napoleon's words.

    "Cost: …", whose further lines are indented as an argument's are, is a paragraph with a bold label. Arguments and
    attributes that share a line get one each. What stands before the first colon of a property, or of what is returned,
    is no type: an empty comment comes first.
    """
    names = "|".join(names_of(obj)) or "$"
    another = re.compile(rf"(?<=[.;]) (?=(?:{names})(?:, (?:{names}))*: )")
    made = ["..", ""] if what in ("attribute", "data", "property") else []
    section = ""
    for line in lines:
        found = _LABELLED.fullmatch(line)
        if line and not line.startswith(" "):
            section = "label" if found else line
        if found:
            made += ["", f"**{found[1]}:** {found[2]}"]
        elif section == "label":
            made.append(line.strip())
        elif section in ("Args:", "Attributes:"):
            first, *more = another.split(line)
            made += [first, *(f"    {entry}" for entry in more)]
        elif line in ("Returns:", "Yields:"):
            made += [line, "    ..", ""]
        else:
            made.append(line)
    lines[:] = made


def names_of(obj: Any) -> list[str]:
    """Names that a docstring's arguments and attributes may have."""
    named = [*getattr(obj, "__annotations__", {})]
    with contextlib.suppress(TypeError, ValueError):  # no function, or one without a signature
        named += inspect.signature(obj).parameters
    return [re.escape(name) for name in named]


def is_field_of_tuple(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out what a NamedTuple says of its fields, their numbers."""
    return True if str(obj.__doc__).startswith("Alias for field number") else None


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", arrange, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", is_field_of_tuple)
