"""The documentation site, built by Sphinx from the repository's Markdown files and the package's docstrings.

sphinx-build -W --keep-going -c docs . build/site

The source folder is the root of the repository, so that a relative link between two Markdown files works both here
and where the repository is hosted.
"""

from pathlib import Path

from sphinx.application import Sphinx

project = "st_clusterns"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
PAGES = {
    "Guide": [
        "docs/only-sentences",
        "docs/models",
        "docs/topics",
        "docs/many-devices",
        "docs/evaluation",
        "docs/report",
        "docs/troubleshooting",
    ],
    "Reference": ["docs/api", "docs/method", "docs/paper", "CHANGELOG"],
    "Results": ["benchmarks/README", "results/*/README", "findings/README"],
    "Contribute": ["CONTRIBUTING", "skills/st-clusterns/SKILL"],
}
include_patterns = ["README.md", *(f"{page}.md" for group in PAGES.values() for page in group)]

myst_heading_anchors = 3
default_role = "py:obj"  # `name` in a docstring is code, and a link where the name has an entry
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 80

html_theme = "furo"
html_title = "st_clusterns"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = html_show_sphinx = False


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Give the README the table of contents, which would be noise in the repository."""
    if page == root_doc:
        for title, pages in PAGES.items():
            entries = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {title}\n\n{entries}\n```\n"


def add_index(app: Sphinx, error: Exception | None) -> None:
    """Let the site's folder open at the README."""
    index = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
    (Path(app.outdir) / "index.html").write_text(index)


def setup(app: Sphinx) -> None:
    """Register the functions above."""
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_index)
