"""Sphinx's configuration: `make docs`. Pages are Markdown; the API comes from docstrings, tables from the code."""

import importlib
import inspect
import sys
from pathlib import Path

from docutils import nodes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from qwen_mlx import __version__  # noqa: E402
from qwen_mlx.gguf import blocks  # noqa: E402

project, author, release = "qwen_mlx", "the qwen_mlx authors", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "_generated"]
html_theme, html_title = "furo", "qwen_mlx"
html_extra_path = ["report"]
html_show_copyright = False
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
default_role = "code"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_mock_imports = []
suppress_warnings = ["ref.python"]


def source_link(name, rawtext, text, lineno, inliner, options=None, content=None):
    """The role {src}`module.name`: a link to the highlighted source, with the line where it stands today.

    A name that is no longer there is a warning, which fails the build.
    """
    module, _, attribute = text.partition(":")
    try:
        found = importlib.import_module(module)
        for part in filter(None, attribute.split(".")):
            found = getattr(found, part)
        line = inspect.getsourcelines(found)[1] if attribute else 1
    except (ImportError, AttributeError, TypeError) as error:
        message = inliner.reporter.warning(f"no source for {text!r}: {error}", line=lineno)
        return [inliner.problematic(rawtext, rawtext, message)], [message]
    depth = inliner.document.settings.env.docname.count("/")
    target = "../" * depth + f"_modules/{module.replace('.', '/')}.html" + (f"#{attribute}" if attribute else "")
    label = f"{module.rpartition('.')[2]}.py:{line} {attribute}".strip()
    return [nodes.reference(rawtext, "", nodes.literal(text=label), refuri=target)], []


def generate(app):
    """The pages that the code writes."""
    folder = Path(app.srcdir) / "_generated"
    folder.mkdir(exist_ok=True)
    (folder / "types.md").write_text(blocks.markdown_table(), encoding="utf-8")


def setup(app):
    app.add_role("src", source_link)
    app.connect("builder-inited", generate)
