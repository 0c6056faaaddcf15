"""A page of the explorer or the review in a real Chromium, served as `aevlp app` serves it."""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import nbformat

SERVE = """import sys
from pathlib import Path
from aevlp.pages import serve
serve('voila', Path(sys.argv[1]), browser=False)"""
JUDGED = "[...document.querySelectorAll('.aevlp-explore option')].some(o => o.text.includes('false'))"


@contextmanager
def served(code, **environment):
    """The address of a page that runs `code`; the server and its kernel end with the block."""
    with tempfile.TemporaryDirectory() as folder:
        sentences = "from aevlp.pages import say_errors\nsay_errors()"
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"{sentences}\n\n{code}")])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, Path(folder) / "page.ipynb")
        server = subprocess.Popen(
            [sys.executable, "-u", "-c", SERVE, str(Path(folder) / "page.ipynb")],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        try:
            yield next(line.strip() for line in server.stdout if line.startswith("http"))
        finally:
            server.terminate()
            server.wait(60)


@contextmanager
def chromium():
    """Debian's Chromium, else Playwright's own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--force-color-profile=srgb"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        yield browser
        browser.close()


def opened(browser, address, width=1366, height=768, theme="light", judged=False, **kw):
    """A tab in which the first picture is drawn, and with `judged` every picture of the split is known."""
    page = browser.new_page(viewport={"width": width, "height": height}, **kw)
    page.set_default_timeout(580_000)
    page.goto(f"{address}&theme={theme}", wait_until="commit")
    page.wait_for_selector(".aevlp-stage img[src^='data:'], [role=alert]")
    if said := page.locator("[role=alert]").all_inner_texts():
        raise RuntimeError(said[0])
    if judged:
        page.wait_for_function(JUDGED)
    page.wait_for_timeout(500)
    return page
