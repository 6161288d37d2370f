"""Sphinx's configuration: `make docs`. Pages are Markdown and the notebooks as they are stored; the API comes from
docstrings, tables and the commands' options from the code."""

import contextlib
import importlib
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from docutils import nodes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from qwen_mlx import __version__  # noqa: E402
from qwen_mlx.gguf import blocks  # noqa: E402
from qwen_mlx.model.activations import LAYER_TAPS  # noqa: E402

# From the bottom up, as in the map of CONTRIBUTING.md.
ROOMS = ["errors", "backend", "gguf", "text", "ops", "model", "parallel", "generation", "evaluation", "encoding"]
ROOMS += ["loading", "training", "conversion", "server", "cli"]
COMMANDS = ["generate", "chat", "convert", "lora", "fuse", "export", "evaluate", "embed", "score", "selftest", "serve"]

project, author, release = "qwen_mlx", "the qwen_mlx authors", __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "_generated", "jupyter_execute"]
html_theme, html_title = "furo", "qwen_mlx"
html_extra_path = ["report"]
html_show_copyright = False
myst_heading_anchors = 3
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence"]
default_role = "code"
smartquotes = False  # what is copied from a page has to run
html_static_path, html_css_files = ["_static"], ["narrow.css"]
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_mock_imports = []
viewcode_follow_imported_members = False  # or a module's page would link to the package that names it first
suppress_warnings = ["ref.python"]


def source_link(name, rawtext, text, lineno, inliner, options=None, content=None):
    """The role {src}`module.name`: a link to the highlighted source, with the line where it stands today.

    A name may be one that a package exports: the link leads to the module that defines it. A name that is no longer
    there is a warning, which fails the build.
    """
    module, _, attribute = text.partition(":")
    try:
        found = importlib.import_module(module)
        for part in filter(None, attribute.split(".")):
            found = getattr(found, part)
        line = inspect.getsourcelines(found)[1] if attribute else 1
        module = found.__module__ if attribute else module
    except (ImportError, AttributeError, TypeError) as error:
        message = inliner.reporter.warning(f"no source for {text!r}: {error}", line=lineno)
        return [inliner.problematic(rawtext, rawtext, message)], [message]
    depth = inliner.document.settings.env.docname.count("/")
    target = "../" * depth + f"_modules/{module.replace('.', '/')}.html" + (f"#{attribute}" if attribute else "")
    label = f"{module.rpartition('.')[2]}.py:{line} {attribute}".strip()
    return [nodes.reference(rawtext, "", nodes.literal(text=label), refuri=target)], []


# A link to the package's code: its label, which is a name in that file or the file's own, and its path.
CODE_LINK = r"\[`([\w./]+)`\]\(\.\./(qwen_mlx/[\w/]+)\.py\)"


def linked(label, path):
    """The module that a link leads to, and the name in it, or "" for the module itself."""
    return path.removesuffix("/__init__").replace("/", "."), "" if label.endswith(".py") else label


def documented(api):
    """Names that the API page describes: its modules and, by module, the names of single objects."""
    modules, names = set(), defaultdict(set)
    for label, path in re.findall(rf"^- {CODE_LINK}", api, flags=re.M):
        module, attribute = linked(label, path)
        if attribute:
            names[module].add(attribute)
        else:
            modules.add(module)
    return modules, names


def for_sphinx(app, page, source):
    """Makes Sphinx's forms of what code hosts show as well: directives stand in comments that begin with "sphinx",
    notebooks are in its own folder, links to code become the role {src}, and the API page's lists docstrings."""
    text = re.sub(r"^<!-- sphinx\n(.*?)\n-->$", r"\1", source[0], flags=re.M | re.S)
    text = text.replace("](../notebooks/", "](notebooks/")
    if page == "api":
        _, names = documented(text)

        def described(match):
            module, attribute = linked(match[1], match[2])
            members = match[3].replace("`", "").strip(": ")
            found = getattr(importlib.import_module(module), attribute, None) if attribute else None
            kind = "class" if inspect.isclass(found) else "function" if attribute else "module"
            lines = [f".. auto{kind}:: {module}" + (f".{attribute}" if attribute else "")]
            if kind != "function":
                lines.append(f"   :members: {members}".rstrip())
            if kind == "module" and not members and names[module]:
                lines.append(f"   :exclude-members: {', '.join(sorted(names[module]))}")
            return "\n".join(["```{eval-rst}", *lines, "```"])

        text = re.sub(rf"^- {CODE_LINK}(.*)$", described, text, flags=re.M)

    def role(match):
        module, attribute = linked(match[1], match[2])
        return f"{{src}}`{module}{':' if attribute else ''}{attribute}`"

    source[0] = re.sub(CODE_LINK, role, text)


def rooms(folder):
    """A section for every room of the package, with the modules of it that the API page does not describe."""
    modules, names = documented((folder / "api.md").read_text(encoding="utf-8"))
    pages = []
    for room in ROOMS:
        package = importlib.import_module(f"qwen_mlx.{room}")
        lines = [f"## {room}", "", inspect.getdoc(package).partition("\n\n")[0], ""]
        found = [f"qwen_mlx.{room}"]
        if hasattr(package, "__path__"):
            found += sorted(module.name for module in pkgutil.walk_packages(package.__path__, f"qwen_mlx.{room}."))
        for name in found:
            module = importlib.import_module(name)
            own = any(getattr(value, "__module__", "") == name for value in vars(module).values())
            if name in modules or (hasattr(module, "__path__") and not own):
                continue
            title = name.removeprefix("qwen_mlx.")
            if title == room:  # its docstring says more than the line above, and takes its place
                lines = lines[:2]
            else:
                lines += [f"### {title}", ""]
            lines += ["```{eval-rst}", f".. automodule:: {name}", "   :members:"]
            if names[name]:
                lines.append(f"   :exclude-members: {', '.join(sorted(names[name]))}")
            lines += ["```", ""]
        pages.append("\n".join(lines))
    return "\n".join(pages)


def plain(app, what, name, obj, options, lines):
    """Makes reStructuredText of a docstring, in which these have a meaning: `code` between single backticks; an
    indented paragraph, which is code; and a paragraph of arguments, each with its name and a colon on its own line."""
    paragraphs = "\n".join(lines).split("\n\n")
    arguments = ()
    if what in ("function", "method", "class"):
        with contextlib.suppress(ValueError):  # a class of Python's own has no signature
            arguments = inspect.signature(obj).parameters
    for n, paragraph in enumerate(paragraphs):
        if n and paragraph.startswith("    "):
            paragraphs[n] = f"::\n\n{paragraph}"
            continue
        items = re.split(r"^(\w+): ", paragraph, flags=re.M)
        if not items[0] and all(name in arguments for name in items[1::2]):
            names = [f":param {name}: {' '.join(text.split())}" for name, text in zip(items[1::2], items[2::2])]
            paragraph = "\n".join(names)
        pieces = paragraph.split("`")
        for i, piece in enumerate(pieces):
            pieces[i] = rf"\ ``{piece.strip()}``\ " if i % 2 else re.sub(r"[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", piece)
        paragraphs[n] = "".join(pieces)
    lines[:] = "\n\n".join(paragraphs).split("\n")


def help_of(command):
    """The text of `qwen-mlx COMMAND --help`, as a code block."""
    program = "from qwen_mlx.cli.main import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "86"}
    arguments = [sys.executable, "-c", program, *command, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    return f"```text\n{done.stdout.rstrip()}\n```\n"


def generate(app):
    """The pages that the code writes."""
    source = Path(app.srcdir)
    folder = source / "_generated"
    folder.mkdir(exist_ok=True)
    (folder / "types.md").write_text(blocks.markdown_table(), encoding="utf-8")
    taps = [f"| `{name}` | {what} |" for name, what in LAYER_TAPS.items()]
    (folder / "taps.md").write_text("\n".join(["| name | what |", "|---|---|", *taps]) + "\n", encoding="utf-8")
    (folder / "rooms.md").write_text(rooms(source), encoding="utf-8")
    shutil.copytree(ROOT / "notebooks", source / "notebooks", dirs_exist_ok=True)  # Sphinx reads its own folder only
    for command in COMMANDS:
        (folder / f"{command}.md").write_text(help_of([command]), encoding="utf-8")


def setup(app):
    app.add_role("src", source_link)
    app.connect("builder-inited", generate)
    app.connect("source-read", for_sphinx)
    app.connect("autodoc-process-docstring", plain)
