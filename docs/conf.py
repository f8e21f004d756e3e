"""The site of these pages, which `nox -s docs` builds.

Decisions:

- The source folder is the repository, and pages are its Markdown files where they lie. So a link between them is the
  same here and in a viewer of the repository, and no file has a second version.
- Nothing is fetched by a reader's browser: theme, search and MathJax are in the site. MathJax is one file of a package.
- Nothing is fetched to build it, but with `-t online` links to names of Python, NumPy, scikit-learn and PyTorch lead to
  their sites. Otherwise those names are plain text.
- Furo, because it is one column of text and one of contents on any screen, in light and dark, and little else.
- A name in single quotes is a link if there is such a name, else code, as docstrings use them.
- PyTorch and JAX are large and MPI needs a library, so `stand_ins.py` takes their place: only docstrings are read.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from numpydoc.xref import DEFAULT_LINKS

import batchnorm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for programs.py and stand_ins.py

project = "batchnorm"
version = release = batchnorm.__version__
html_show_copyright = False

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.programoutput",
    "stand_ins",
]

root_doc = "docs/index"
include_patterns = ["docs/**", "examples/README.md", "bench/*.md", "bench/results/*.md", "*.md"]
exclude_patterns = ["README.md", "docs/_*"]

# Markdown
myst_heading_anchors = 4
myst_fence_as_directive = {"math"}

# The API
default_role = "py:obj"
autodoc_mock_imports = ["jax", "mpi4py", "torch"]
autodoc_typehints = "none"  # the docstrings have them in words
autodoc_preserve_defaults = True
numpydoc_show_class_members = False
numpydoc_xref_param_type = True
numpydoc_xref_ignore = "all"
numpydoc_xref_aliases = {name: f"batchnorm.{name}" for name in batchnorm.__all__ if name[0].isupper()}
numpydoc_validation_checks = {
    *("GL03", "GL05", "GL06", "GL07", "GL09", "GL10"),  # known sections, in their order
    *("SS04", "SS06"),  # a summary of one line
    *("PR01", "PR02", "PR05", "PR06", "PR09", "PR10"),  # every parameter, and no other
    *("RT05", "SA02", "SA04"),
}
numpydoc_validation_exclude = {
    r"batchnorm\.(Diagnosis|Drift|Folded|Saved|Tangents|Pathways|\w+Gradients|Gradients)$",  # what functions return
    r"batchnorm\.(jax\.Statistics|mpi\.Communicator)$",
    r"batchnorm\.torch\.\w*BatchNorm\w*$",  # whose parameters are PyTorch's
}

if tags.has("online"):  # noqa: F821 (Sphinx puts it here)
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "sklearn": ("https://scikit-learn.org/stable", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }
    numpydoc_xref_aliases["bool"] = ":class:`python:bool`"
else:
    numpydoc_xref_aliases |= {name: name for name in DEFAULT_LINKS}

linkcheck_anchors = False  # pages make them by scripts
linkcheck_retries = 3

# The programs in examples/
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "docs/gallery",
    "filename_pattern": r"/(?!digits_mpi|torch_)\w+\.py$",
    "within_subsection_order": "FileNameSortKey",
    "reset_argv": "programs.arguments",
    "image_scrapers": ("programs.pictures",),
    "default_thumb_file": str(HERE / "distributed.png"),  # of programs that are not run
    "capture_repr": (),
    "notebook_extensions": set(),
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "abort_on_example_error": True,
}

# HTML
html_theme = "furo"
html_title = f"batchnorm {version}"
templates_path = [str(HERE / "_templates")]
mathjax_path = "tex-svg.js"
mathjax3_config = {"tex": {"macros": {"mathrm": [r"\operatorname{#1}", 1]}}}  # a space between names
(MATHJAX,) = find_spec("sphinx-mathjax-offline").submodule_search_locations
html_static_path = ["_static", f"{MATHJAX}/static/mathjax/{mathjax_path}"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
pygments_dark_style = "a11y-high-contrast-dark"
html_extra_path = ["_root"]
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"


def left_out(app, what, name, member, skip, options):
    """What a class has from scikit-learn or PyTorch is documented there; fields of a named tuple, by the class."""
    module = getattr(member, "__module__", None) or "batchnorm"
    return not module.startswith("batchnorm") or type(member).__name__ == "_tuplegetter" or None


def setup(app):
    app.connect("autodoc-skip-member", left_out)
