"""How `make docs` makes the site: the pages here, and the reference out of the docstrings."""

import importlib.metadata

project = "mergefleet"
release = version = importlib.metadata.version(project)
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
html_theme = "furo"
html_title = project

myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]

default_role = "code"  # docstrings write names between single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": True}
# pydantic's own methods and fields of a model's making
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
