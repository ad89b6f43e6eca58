"""Settings of the site: `make docs`."""

from __future__ import annotations

import ast
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE / "_ext")]
# Tutorials have small tensors, and neither bars nor other libraries' warnings belong to their output.
os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", category=FutureWarning)

import pl_sparse  # noqa: E402

project = "pl_sparse"
author = "pl_sparse maintainers"
copyright = "pl_sparse maintainers, Apache-2.0"
version = release = pl_sparse.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_gallery.gen_gallery", "generated"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build", "_ext", "_static", "tutorials/*.py", "**/GALLERY_HEADER.rst", "**/README.rst"]

myst_enable_extensions = ["colon_fence", "attrs_inline", "attrs_block", "deflist"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
suppress_warnings = ["myst.header", "config.cache"]

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # those of Lightning are in its own markup
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

linkcheck_ignore = [
    r"https?://localhost",
    r"https://ossci-datasets\.s3\.amazonaws\.com/mnist/$",  # what names of files are appended to
    r"http://fashion-mnist\.s3-website\.eu-central-1\.amazonaws\.com/$",
]
linkcheck_anchors_ignore_for_url = [r"https://github\.com/.*"]  # made by scripts
linkcheck_retries = 2
linkcheck_timeout = 15
linkcheck_workers = 4

html_theme = "furo"
html_title = f"pl_sparse {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
html_theme_options = {"navigation_with_keys": True}


def has_header(path: Path) -> bool:
    """Whether a script's docstring begins with a heading, as the gallery wants it."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    lines = doc.splitlines()
    return len(lines) > 1 and bool(re.fullmatch(r"[=#*-]{3,}", lines[1].strip()))


QUICK = (
    *("accelerate_loop.py", "bert_hugging_face.py", "fabric.py", "llama_moe.py", "lottery_ticket.py"),
    *("lstm_forecaster.py", "own_scorer.py", "plain_loop.py", "rigl_from_scratch.py", "sparse_int8.py"),
    *("two_four_tensorrt.py", "vit_heads.py"),
)
"""Tutorials that take up to ten seconds each: building the site runs them. The others say that they were not run."""

_scripts = sorted((ROOT / "examples").glob("*.py"))
_others = [re.escape(path.name) for path in _scripts if not has_header(path)]
_quick = [re.escape(path.name) for path in _scripts if path.name in QUICK]
sphinx_gallery_conf: dict[str, Any] = {
    "examples_dirs": "../examples",
    "gallery_dirs": "tutorials",
    "filename_pattern": f"/({'|'.join(_quick)})$" if _quick else r"^$",
    "ignore_pattern": f"/({'|'.join(['__init__.py', *_others])})$",
    "remove_config_comments": True,
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 1,
    "capture_repr": (),
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "reset_argv": "generated.no_arguments",
    "reset_modules": ("matplotlib",),
    "copyfile_regex": r"",
    "write_computation_times": False,
}
