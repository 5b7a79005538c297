"""The documentation site: `make site` builds it into out/site. Its name and address are those of pyproject."""

import inspect
import os
import pathlib
import re
import sys
import tomllib
import unicodedata

import latex2mathml.converter
from docutils import nodes

import excitation_optax

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PYPROJECT["urls"]["Repository"]

# The docstrings, and what the notebooks import, are those of this checkout; a progress bar is not for reading.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["TQDM_DISABLE"] = "1"

project = PYPROJECT["name"]
author = PYPROJECT["authors"][0]["name"]
copyright = author
version = release = excitation_optax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
extensions += ["sphinx_copybutton", "sphinx_design"]
exclude_patterns = ["_build"]
nitpicky = True
# Other sites have the names of other projects; private names have no page.
nitpick_ignore_regex = [("py:.*", r"(jax|optax|flax)\..*"), ("py:.*", r"excitation_optax\._.*")]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4

# A notebook is text without outputs. The build runs it once, and again when it changes; an error, a warning that it
# prints, or anything else on its stderr stops the build.
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "out" / "notebooks")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_output_stderr = "warn"
nb_merge_streams = True

# In the docstrings, single backticks are code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # Args says shapes, which annotations do not
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_theme_options = {
    "source_repository": f"{REPOSITORY}/",
    "source_branch": "main",
    "source_directory": "docs/",
}
copybutton_exclude = ".linenos, .gp, .go"


def link_to_repository(text: str, folder: pathlib.Path) -> str:
    """Relative links to files outside of docs/, which work on GitHub, made into links to the repository."""

    def absolute(match: re.Match) -> str:
        path = (folder / match["path"]).resolve()
        if not path.exists() or path.is_relative_to(DOCS):
            return match[0]
        kind = "tree" if path.is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{path.relative_to(ROOT)}{match['anchor'] or ''})"

    return re.sub(r"\]\((?P<path>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)", absolute, text)


def on_source_read(app, docname, source):
    """The page's own text."""
    source[0] = link_to_repository(source[0], (DOCS / docname).parent)


def on_include_read(app, path, parent, content):
    """A file of the root that a page includes, whose links are relative to the root."""
    text = link_to_repository(content[0], ROOT)
    content[0] = re.sub(r"\]\(docs/", "](", text)


def to_mathml(latex: str, display: str) -> str:
    """MathML, which browsers show without a script and offline.

    Of mathvariant they know "normal" only, so other alphabets become the letters that Unicode has for them. As in
    LaTeX, capital Greek letters stand upright.
    """

    def letter(match: re.Match) -> str:
        alphabet, tag, character = match["alphabet"].upper(), match["tag"], match["character"]
        kind, _, name = unicodedata.name(character).removeprefix("LATIN ").partition(" LETTER ")
        name = f"{alphabet} {kind} {name}" if name else f"{alphabet} {kind}"
        for prefix in ("MATHEMATICAL ", ""):
            try:
                return f"<{tag}>{unicodedata.lookup(prefix + name)}</{tag}>"
            except KeyError:
                continue
        raise ValueError(f"No letter {name} for {latex!r}")

    variant = r'<(?P<tag>m[in]) mathvariant="(?P<alphabet>script|double-struck)">(?P<character>.)</(?P=tag)>'
    mathml = re.sub(variant, letter, latex2mathml.converter.convert(latex, display=display))
    return re.sub(r"<mi>(&#x003(?:9[1-9A-F]|A[0-9]);</mi>)", r'<mi mathvariant="normal">\1', mathml)


def on_signature(app, what, name, obj, options, signature, annotation):
    """A function as a default stands under its name, and NNX's metaclass does not hide what a module takes."""
    if signature == "(*args, **kwargs)" and what == "class":
        _, *parameters = inspect.signature(obj.__init__).parameters.values()
        signature = str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))
    signature = re.sub(r"<(?:function|class) '?(?:\w+\.)*(\w+)[^>]*>", r"\1", signature or "")
    return re.sub(r"<[^<>]* object[^<>]*>", "...", signature), annotation


def on_skip_member(app, what, name, obj, skip, options):
    """Fields of a class stand in its signature and its docstring; what is listed are methods and properties."""
    field = what == "class" and not (inspect.isroutine(obj) or isinstance(obj, property))
    return True if field else None


def visit_math(self, node):
    """An equation within a line."""
    self.body.append(to_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_math_block(self, node):
    """An equation in a line of its own."""
    self.body.append(f'<div class="math">{to_mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app):
    """What this file adds to Sphinx."""
    app.connect("source-read", on_source_read)
    app.connect("include-read", on_include_read)
    app.connect("autodoc-process-signature", on_signature)
    app.connect("autodoc-skip-member", on_skip_member)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))


html_math_renderer = "mathml"
