"""The documentation site: built without a warning, no link to nowhere, and every page whole on a phone and offline."""

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from test_browser import browser  # noqa: F401  a fixture

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def html(tmp_path_factory, worker_id):
    """The folder of the built site; of several workers one builds it, for there is one folder."""
    build = [sys.executable, "docs/build.py", "site", "--strict"]
    here = tmp_path_factory.getbasetemp()
    built = (here if worker_id == "master" else here.parent) / "site built"
    with FileLock(f"{built}.lock"):
        if not built.exists():
            done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
            built.touch()
    return ROOT / "docs/_build/html"


def test_site(html):
    for page in ("index", "losses", "tutorials/explore", "experiments/table1", "background/paper_and_code"):
        assert (html / f"{page}.html").exists(), page
    losses = (html / "losses.html").read_text(encoding="utf-8")
    assert "positive_pseudo_loss" in losses and "<table" in losses  # signatures and parameter tables
    index = (html / "index.html").read_text(encoding="utf-8")
    assert index.count("<table") >= 1 and "|:--" not in index  # Markdown tables of outputs too
    assert not [p for p in html.glob("*.html") if "Call self as a function" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_whole_on_a_phone(html, browser, scheme):  # noqa: F811
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page, wrong = context.new_page(), []
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    if (html / "_static/mathjax").exists():  # else formulas come from the network
        page.on("request", lambda r: wrong.append(r.url) if r.url.startswith("http") else None)
    for path in sorted(p for p in html.rglob("*.html") if "_static" not in p.parts):
        page.goto(path.as_uri(), wait_until="load")
        page.wait_for_function("!window.MathJax?.startup?.promise || MathJax.startup.promise.then(() => true)")
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        width = page.evaluate("document.documentElement.scrollWidth")
        unseen = page.evaluate("Array.from(document.images, i => i.naturalWidth ? '' : i.src).filter(Boolean)")
        assert (width, unseen, wrong) == (390, [], []), path.name
    context.close()
