"""How `make docs` builds the site: Sphinx reads the Markdown of this directory (MyST) and the notebook, furo lays it out.

The pages are plain Markdown that also reads well where it lies, so what only the site needs is here: the order of the pages, drawings
put into the page itself so that they follow its light and dark, and links to directories. Nothing is fetched from another host, by the
build or by a reader's browser. Warnings are errors (`make docs`), and a link to a page or heading that is not there is one.

Why Sphinx: MkDocs 1 has had no release since 2024, its Material theme is in maintenance only and what follows both is before its first
stable release; Sphinx is kept, checks anchors by itself and reads notebooks and docstrings.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

DOCS = Path(__file__).parent
ROOT = DOCS.parent

NAV: dict[str, tuple[str, ...]] = {
    "Start": ("concepts", "walkthrough", "models"),
    "Guides": (
        "guides/onnx", "guides/streamable", "guides/fleet", "gpu", "guides/triton", "guides/observability", "security",
        "http", "web",
    ),
    "Trouble": ("errors",),
    "Reference": (
        "reference/sessions", "reference/tasks", "reference/inside", "reference/inference", "reference/model_config", "reference/python",
        "reference/configuration", "reference/cli", "metrics", "conformance",
    ),
    "Run it": ("deploy", "load", "bench"),
    "Train": ("training", "distributed", "series"),
    "Behind it": ("project/architecture", "log", "project/changelog"),
}  # fmt: skip
"""The pages by heading, in order. One that is not there (yet) is left out; one that is there and not named fails the build."""

MADE = DOCS / "project"  # git-ignored
ELSEWHERE = {
    ROOT / "ARCHITECTURE.md": MADE / "architecture.md",
    ROOT / "CHANGELOG.md": MADE / "changelog.md",
    **{card: MADE / "cards" / f"{card.parts[-3]}-{card.parts[-2]}.md" for card in sorted(ROOT.glob("models/*/*/README.md"))},
}
"""Markdown that lies elsewhere in the repository, and its page."""

project = "seqserve"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
copyright = "the seqserve authors, Apache 2.0"  # a name that Sphinx gives
root_doc = "index"
exclude_patterns = ["examples"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
show_warning_types = True

myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the notebook is stored with its outputs, and run by tests/test_walkthrough.py
nb_merge_streams = True

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
python_display_short_literal_types = True

html_theme = "furo"
html_title = f"seqserve {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f5fa8", "color-brand-content": "#1f5fa8"},
    "dark_css_variables": {"color-brand-primary": "#7db4f0", "color-brand-content": "#7db4f0"},
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_prompt_text = "$ "


def _take_in(_app: Sphinx) -> None:
    """Pages of what lies elsewhere: each includes its file, whose links are read from where it lies."""
    for file, page in ELSEWHERE.items():
        page.parent.mkdir(parents=True, exist_ok=True)
        there = os.path.relpath(file, page.parent)
        orphan = "---\norphan: true\n---\n\n" if page.parent.name == "cards" else ""  # found from docs/models.md, not from the contents
        text = f"{orphan}```{{include}} {there}\n:relative-images:\n```\n"
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def _nav(_app: Sphinx, name: str, source: list[str]) -> None:
    """The contents at the end of the first page, which Markdown has no word for."""
    if name != root_doc:
        return
    for heading, pages in NAV.items():
        there = [page for page in pages if any((DOCS / page).with_suffix(s).exists() for s in (".md", ".ipynb"))]
        source[0] += "\n```{toctree}\n:hidden:\n:caption: " + heading + "\n\n" + "\n".join(there) + "\n```\n"


def _links(here: Path, text: str, page: Path) -> str:
    """Links of a text that lies in `here` and is shown by `page`: to Markdown elsewhere that has a page, that page; to a directory,
    what they say without a link."""

    def led(found: re.Match[str]) -> str:
        link, _, anchor = found[2].partition("#")
        there = Path(os.path.normpath(here / link))
        if not link or "://" in link or not there.exists():
            return found[0]
        if there.is_dir():
            return f"`{found[1].strip('`')}`"
        to = ELSEWHERE.get(there, there)
        to_page = f"/{to.relative_to(DOCS)}" if to.is_relative_to(DOCS) else os.path.relpath(to, page.parent)
        return f"[{found[1]}]({to_page}{anchor and '#' + anchor})"

    return re.sub(r"(?<!!)\[([^\]\n]+)\]\(([^)\s]+)\)", led, text)


def _source(_app: Sphinx, name: str, source: list[str]) -> None:
    if not (DOCS / name).with_suffix(".ipynb").exists():
        source[0] = _links((DOCS / name).parent, source[0], DOCS / name)


def _included(_app: Sphinx, path: Path, parent: str, source: list[str]) -> None:
    source[0] = _links((DOCS / path).resolve().parent, source[0], DOCS / parent)


def _docstring(_app: Sphinx, _what: str, _name: str, _thing: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings are as Markdown has it: code in single backticks, or indented. reStructuredText wants two backticks and no letter
    right behind them, and a word before what is indented."""
    made: list[str] = []
    within = False
    for line in lines:
        inside = line.startswith("    ") or (within and not line)
        if inside and not within:
            made += ["", ".. code-block:: text" if re.search("[├└]", line + "".join(lines)) else ".. code-block:: python", ""]
        within = inside
        made.append(line if inside else re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``\\ ", line))
    lines[:] = made


class InPage(SphinxPostTransform):
    """Drawings become part of the page, where its colours reach them; elsewhere they are pictures with colours of their own."""

    default_priority = 5

    def run(self, **_: Any) -> None:
        for image in list(self.document.findall(nodes.image)):
            uri = str(image["uri"])
            if self.app.builder.format == "html" and uri.endswith(".svg") and "drawings/" in uri:
                text = (DOCS / uri).read_text(encoding="utf-8")
                image.replace_self(nodes.raw("", f'<div class="drawing">{text}</div>', format="html"))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", _take_in)
    app.connect("source-read", _source)
    app.connect("source-read", _nav)
    app.connect("include-read", _included)
    app.connect("autodoc-process-docstring", _docstring)
    app.add_post_transform(InPage)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
