"""How Sphinx builds the site: `make docs`.

The source folder is the project's root, so that a link to configs/README.md or to a source file is
the same in the site and on the forge. Any warning (a dead link or anchor, a page that the
navigation lacks, a docstring that is not well formed) fails the build; nothing is downloaded.
"""

import re
from pathlib import Path

import fpn_ext  # noqa: F401  before detectron2, where that is not compiled
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

project = "fpn_ext"
copyright = ""
html_show_copyright = False
html_show_sphinx = False
html_title = "fpn_ext"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    *("docs/**", "configs/README.md", "datasets/README.md", "examples/*.md", "results/**.md")
]
exclude_patterns = [".*", "output", "site", "datasets/[!R]*"]

myst_heading_anchors = 4  # the anchors that a forge gives to headings
highlight_language = "none"
suppress_warnings = ["misc.highlighting_failure"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_extra_path = ["redirect"]  # index.html of the site: on to docs/index.html
html_show_sourcelink = False
html_copy_source = False


def check_that_nothing_is_fetched(app: Sphinx, exception: Exception | None) -> None:
    """No page may load a script, style, font or image from elsewhere."""
    in_html = r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["'](?:https?:)?//"""
    in_css = r"""@import|url\(["']?(?:https?:)?//"""
    for file in Path(app.outdir).rglob("*"):
        if exception is None and file.suffix in (".html", ".css"):
            found = re.search(f"{in_html}|{in_css}", file.read_text(encoding="utf-8"))
            if found:
                raise ExtensionError(f"{file} loads from elsewhere: {found.group()}")


def setup(app: Sphinx) -> None:
    app.connect("build-finished", check_that_nothing_is_fetched)
