"""Sphinx configuration of the site; docs/build.py copies it beside the pages that it makes from the notebooks."""

import os

offline = bool(os.environ.get("AEVLP_DOCS_OFFLINE"))

project = "aevlp"
author = "aevlp developers"
copyright = "2026, aevlp developers"
root_doc = "index"
html_title = "aevlp"
extensions = ["myst_nb", "sphinx_design"]
exclude_patterns = ["figures"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # tables
nb_ipywidgets_js = {}  # no page shows a live widget
myst_enable_extensions = ["attrs_inline", "dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

html_theme = "sphinx_book_theme"
html_static_path = ["static"]
html_css_files = ["aevlp.css"]
html_search_scorer = os.path.join(os.path.dirname(os.path.abspath(__file__)), "scorer.js")
html_context = {"default_mode": "auto"}
html_theme_options = {"navbar_persistent": [], "show_toc_level": 2, "home_page_in_toc": True}
html_use_index = False  # the pages are their own index
html_show_sourcelink = False
html_copy_source = False

if offline:
    mathjax_path = "mathjax/tex-chtml-full.js"
