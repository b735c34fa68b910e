"""How Sphinx builds the site: pages lie where they are read in the repository, and the reference is the docstrings."""

import re
from typing import Any

import crp

project = "crp"
version = release = crp.__version__
author = "the authors of crp"
copyright = author

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc", "sphinx_click"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "tutorials/**.md", "tutorials/**.ipynb", "benchmarks/*.md", "tests/*.md"]
exclude_patterns = ["**/.*", "build"]

# Notebooks are shown with the outputs that they are stored with; the tests run them.
nb_execution_mode = "off"
myst_heading_anchors = 3

smartquotes = False  # options of commands begin with two hyphens
default_role = "py:obj"  # a name in single backticks is a link if the reference has it
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
numpydoc_show_class_members = False

html_theme = "furo"
html_title = f"crp {version}"
html_extra_path = ["index.html"]  # leads to the first page
html_static_path = ["site.css"]
html_css_files = ["site.css"]


def _escape_stars(_app: Any, _what: str, _name: str, _object: object, _options: Any, lines: list[str]) -> None:
    """Let shapes such as (batch, *space) be text, where a star would start emphasis; code stays as it is."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[number] = re.sub(r"(``.*?``)|(?<=[(, ])\*(?=\w)", lambda found: found[1] or r"\*", line)


def _show_public_bases(_app: Any, _name: str, documented: type, _options: Any, bases: list[Any]) -> None:
    """Let a class stand on the nearest of its bases that have public names."""
    if any(getattr(base, "__name__", "").startswith("_") for base in bases):
        bases[:] = [next(base for base in documented.__mro__[1:] if not base.__name__.startswith("_"))]


def setup(app: Any) -> None:
    """Connect what changes docstrings before numpydoc reads them, and what is said of a class's bases."""
    app.connect("autodoc-process-docstring", _escape_stars, priority=1)
    app.connect("autodoc-process-bases", _show_public_bases)
