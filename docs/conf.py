"""The site of noisefl: `python -m sphinx -W -b html docs docs/_build`.

Pages of the library (one a module, from docstrings) and of the drivers' flags are written anew
before each build, into docs/generated.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import generate  # noqa: E402

import noisefl  # noqa: E402

project, author, copyright = "noisefl", "the noisefl authors", "2026, the noisefl authors"
release = version = noisefl.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme, html_title = "furo", f"noisefl {release}"
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

myst_heading_anchors = 3
nb_execution_mode, nb_execution_timeout = "force", 600
nb_execution_raise_on_error = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True  # what a class lists among its attributes is no second object

suppress_warnings = ["ref.python"]  # "A, clients of …" is no cross-reference

generate.write(HERE / "generated")


def setup(app) -> None:
    app.connect("autodoc-process-docstring", bars)


def bars(app, what, name, obj, options, lines) -> None:
    """|x| is an absolute value in this package, and a substitution in reStructuredText."""
    lines[:] = [line.replace("|", r"\|") for line in lines]
