"""Settings of the documentation site, which `make site` builds into out/site."""

import inspect
import os
import pathlib
import re
import sys
import tomllib

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.util.inspect import stringify_signature

import excitation_optax

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PYPROJECT["urls"]["Repository"]
OWNER, NAME = REPOSITORY.split("/")[-2:]

# Docstrings and notebooks use this checkout. Progress bars would clutter the notebooks' output.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["TQDM_DISABLE"] = "1"

project = PYPROJECT["name"]
author = PYPROJECT["authors"][0]["name"]
copyright = author
version = release = excitation_optax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
extensions += ["sphinx.ext.intersphinx", "sphinx_copybutton", "sphinx_design", "sphinxext.opengraph"]
exclude_patterns = ["_build"]
nitpicky = True
# Names of other projects and private names have no page here.
nitpick_ignore_regex = [
    ("py:.*", r"(jax|optax|flax|numpy|collections|pathlib)\..*"),
    ("py:.*", r".*(DescribedParameter|ArrayTree)"),
]

# Links to other projects' pages need their inventories, so only a build with a network has them: ONLINE=1 make site.
if os.environ.get("ONLINE"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/stable", None),
    }

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4

# Notebooks are stored without outputs. The build runs a notebook when it changes, and fails if the notebook raises an
# error or writes to stderr.
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "out" / "notebooks")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_output_stderr = "warn"
nb_merge_streams = True

# In the docstrings, single backticks are code.
default_role = "code"
autodoc_member_order = "bysource"
# Where a project defines a class, and the name by which its pages document it.
DOCUMENTED_AS = {
    r"jax\.jaxlib\._jax\.Array \| ~numpy\.ndarray .*?complex": "jax.typing.ArrayLike",
    r"jax\.jaxlib\._jax\.": "jax.",
    r"optax\.(_src|transforms)\.\w+\.": "optax.",
    r"~flax\.(nnx|linen)\.\w+\.": r"flax.\1.",
    r"excitation_optax\._\w+\.": "excitation_optax.",
}
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_logo = html_favicon = "_static/logo.svg"
html_baseurl = ogp_site_url = f"https://{OWNER}.github.io/{NAME}/"
ogp_image = "_images/quickstart.png"
ogp_social_cards = {"enable": False}  # they cannot show an SVG logo
html_theme_options = {
    "source_repository": f"{REPOSITORY}/",
    "source_branch": "main",
    "source_directory": "docs/",
}
copybutton_exclude = ".linenos, .gp, .go"


def link_to_repository(text: str, folder: pathlib.Path) -> str:
    """Turns relative links to files outside of docs/, which work on GitHub, into links to the repository."""

    def absolute(match: re.Match) -> str:
        path = (folder / match["path"]).resolve()
        if not path.exists() or path.is_relative_to(DOCS):
            return match[0]
        kind = "tree" if path.is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{path.relative_to(ROOT)}{match['anchor'] or ''})"

    return re.sub(r"\]\((?P<path>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)", absolute, text)


def on_source_read(app, docname, source):
    """Corrects the links of a page."""
    source[0] = link_to_repository(source[0], (DOCS / docname).parent)


def on_include_read(app, path, parent, content):
    """Corrects the links of an included file, which are relative to the root."""
    text = link_to_repository(content[0], ROOT)
    content[0] = re.sub(r"\]\(docs/", "](", text)


def on_signature(app, what, name, obj, options, signature, annotation):
    """Shows functions in defaults by name, types by public names, and the arguments that NNX's metaclass hides."""
    if what == "class" and (signature or "").startswith("(*args"):
        _, *parameters = inspect.signature(obj.__init__).parameters.values()
        parameters = [p.replace(annotation=p.empty) if isinstance(p.annotation, str) else p for p in parameters]
        signature = stringify_signature(inspect.Signature(parameters), unqualified_typehints=True)
    signature = re.sub(r"<(?:function|class) '?(?:\w+\.)*(\w+)[^>]*>", r"\1", signature or "")
    signature = re.sub(r"<[^<>]* object[^<>]*>", "...", signature)
    for defined, documented in DOCUMENTED_AS.items():
        signature, annotation = (text and re.sub(defined, documented, text) for text in (signature, annotation))
    return signature, annotation


def on_skip_member(app, what, name, obj, skip, options):
    """Lists methods and properties of a class. Its fields are in its signature and docstring already."""
    field = what == "class" and not (inspect.isroutine(obj) or isinstance(obj, property))
    return True if field else None


def visit_math(self, node):
    """Renders an equation within a line."""
    self.body.append(latex2mathml.tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_math_block(self, node):
    """Renders an equation on a line of its own."""
    self.body.append(f'<div class="math">{latex2mathml.tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    """Connects the functions above to Sphinx."""
    app.connect("source-read", on_source_read)
    app.connect("include-read", on_include_read)
    app.connect("autodoc-process-signature", on_signature)
    app.connect("autodoc-skip-member", on_skip_member)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))


# MathML needs neither a script nor a network. Sphinx's own renderers need MathJax or a LaTeX installation, and no
# extension makes MathML of LaTeX, so the equations go through docutils' converter.
html_math_renderer = "mathml"
