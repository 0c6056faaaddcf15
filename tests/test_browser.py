"""The explorer and the review in a real Chromium, in JupyterLab and in Voila."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image

TUTORIALS = Path(__file__).parents[1] / "nbs/tutorials"
OVERRIDES = {"clip": "glyphs-clip", "clip_weights": "", "grid": 2, "temperature": 0.05}
TOKEN = "browser-test"
VOILA_NEEDS = "@jupyter-widgets/jupyterlab-manager", "@voila-dashboards/widgets-manager8", "anywidget"
GET = "install Debian's package chromium, or run `python -m playwright install chromium`"


def chromium(playwright):
    """Debian's Chromium, else Playwright's own; without one the tests skip, but fail where CI=true."""
    system = next((p for p in (shutil.which("chromium"), "/usr/bin/chromium") if p and os.path.exists(p)), None)
    if system is None and not os.path.exists(playwright.chromium.executable_path):
        missing = f"no Chromium for the browser tests: {GET}"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    return playwright.chromium.launch(executable_path=system, args=["--no-sandbox", "--force-color-profile=srgb"])


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = chromium(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, browser):
    """Twelve scenes with a CSV of one label each, and both pages set to them."""
    from aevlp import glyphs

    root = tmp_path_factory.mktemp("pages")
    (root / "pictures").mkdir()
    rows = []
    for index in range(12):
        scene = glyphs.draw_scene(7, index)
        scene.image.save(root / f"pictures/{index:02d}.png")
        rows.append((f"{index:02d}.png", glyphs.CLASS_NAMES[scene.things[0].label]))
    with open(root / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "label"), *rows])
    values = {"root": str(root / "pictures"), "csv": str(root / "labels.csv"), "overrides": OVERRIDES}
    for name in ("explore", "review-lab", "review-voila"):
        notebook = load_notebook_node(str(TUTORIALS / f"{name.partition('-')[0]}.ipynb"))
        out = {"out": str(root / f"{name}.csv")} if name != "explore" else {}
        nbformat.write(parameterize_notebook(notebook, values | out), root / f"{name}.ipynb")
    from aevlp import pages

    told = dict(dataset="csv", run=None, **values)
    phone = pages.notebook(told, {"out": str(root / "phone.csv"), "split": "train", "order": "random"}, root)
    broken = pages.notebook(told | {"root": str(root / "nowhere")}, None, root)
    shutil.copy(phone, root / "phone.ipynb")
    shutil.copy(broken, root / "broken.ipynb")
    return root


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def servers(folder):
    """JupyterLab and Voila on the pages: {name: address}; both process groups end with the module."""
    settings = folder / "settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    own = {f"JUPYTER_{k}_DIR": folder / f"jupyter-{k.lower()}" for k in ("CONFIG", "RUNTIME", "DATA")}
    own |= {f"JUPYTERLAB_{k}_DIR": folder / k.lower() for k in ("SETTINGS", "WORKSPACES")}
    env = os.environ | {k: str(v) for k, v in own.items()}
    lab, voila = free_port(), free_port()
    common = ["--no-browser", "--ServerApp.root_dir=."]
    commands = {
        "lab": ["jupyterlab", "--ip=127.0.0.1", f"--port={lab}", "--allow-root", f"--IdentityProvider.token={TOKEN}",
                "--LabApp.expose_app_in_browser=True", *common],
        "voila": ["voila", "--Voila.ip=127.0.0.1", f"--port={voila}", "--no-browser", ".",
                  "--VoilaConfiguration.allow_theme_override=YES",
                  *[f"--VoilaConfiguration.extension_allowlist={name}" for name in VOILA_NEEDS]],
    }  # fmt: skip
    alive = {"lab": f"http://127.0.0.1:{lab}/api/status?token={TOKEN}", "voila": f"http://127.0.0.1:{voila}/"}
    logs = {name: open(folder / f"{name}.log", "w") for name in commands}
    running = {
        name: subprocess.Popen([sys.executable, "-m", *command], cwd=folder, env=env, stdout=logs[name],
                               stderr=subprocess.STDOUT, start_new_session=True)
        for name, command in commands.items()
    }  # fmt: skip
    try:
        end = time.monotonic() + 300
        while not all(answers(url) for url in alive.values()):
            dead = [n for n, p in running.items() if p.poll() is not None]
            said = [(folder / f"{n}.log").read_text()[-2000:] for n in logs]
            assert not dead and time.monotonic() < end, (dead, said)
            time.sleep(0.2)
        yield {"lab": f"http://127.0.0.1:{lab}/doc/tree/{{}}.ipynb?token={TOKEN}&reset",
               "voila": f"http://127.0.0.1:{voila}/voila/render/{{}}.ipynb"}  # fmt: skip
    finally:
        for process in running.values():
            os.killpg(process.pid, signal.SIGTERM)
        for name, process in running.items():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            logs[name].close()


class Tab:
    """A page with what its console said."""

    def __init__(self, browser, server, address, page):
        self.server, self.errors = server, []
        self.page = browser.new_page(viewport={"width": 1280, "height": 1000})
        self.page.set_default_timeout(120_000)
        self.page.on("console", self.said)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.goto(address.format(page), wait_until="commit")

    def said(self, message):
        """Keep an error; but Voila asks a CDN for a font that it brings too, and ends a kernel only with a cookie."""
        ours = not any(part in message.location.get("url", "") for part in ("fontawesome", "/voila/api/shutdown"))
        if message.type == "error" and ours:
            self.errors.append(f"{message.text} {message.location}")

    def run(self):
        """JupyterLab waits to be told; Voila ran the notebook already."""
        if self.server == "lab":
            ready = "jupyterapp?.shell?.currentWidget?.sessionContext"
            self.page.wait_for_function(f"{ready}?.isReady && {ready}?.session?.kernel?.status === 'idle'")
            self.page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_selector(".aevlp-stage img[src^='data:']", timeout=240_000)

    def text(self, selector):
        return self.page.inner_text(selector)

    def until(self, happened, what):
        end = time.monotonic() + 60
        while not happened():
            assert time.monotonic() < end, what
            self.page.wait_for_timeout(50)

    def shot(self, name):
        if kept := os.environ.get("AEVLP_SCREENSHOTS"):
            self.page.screenshot(path=f"{kept}/{name}.png", full_page=self.server == "voila")


@pytest.fixture(scope="module")
def tabs(browser, servers):
    """All pages at once: their kernels start side by side."""
    pages = [(server, page) for page in ("explore", "review") for server in ("lab", "voila")]
    opened = {(s, p): Tab(browser, s, servers[s], p if p == "explore" else f"review-{s}") for s, p in pages}
    yield opened
    for one in opened.values():
        one.page.close()


@pytest.mark.parametrize("server", ["lab", "voila"])
def test_explorer(tabs, server):
    one = tabs[server, "explore"]
    one.run()
    page = one.page
    page.wait_for_selector(".aevlp-app .aevlp-heat")
    one.shot(f"explore-{server}")

    labels, heat = page.inner_html(".aevlp-labels"), page.inner_html(".aevlp-heat")
    page.locator(".widget-slider", has_text="global").locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    one.until(lambda: page.inner_html(".aevlp-labels") != labels, "the labels follow the slider")
    assert page.inner_html(".aevlp-heat") == heat, "the heat map does not depend on a threshold"
    row = page.locator(".widget-slider", has_text="global")
    assert "section 5.2" in row.locator("[title]").first.get_attribute("title"), "a tooltip names the paper"

    boxes = page.eval_on_selector_all(".aevlp-stage .over", "all => all.map(b => b.getAttribute('width')).join()")
    page.locator(".aevlp-stage").click(position={"x": 5, "y": 5})
    page.keyboard.press("d")
    widths = "all => all.map(b => b.getAttribute('width')).join()"
    one.until(lambda: page.eval_on_selector_all(".aevlp-stage .over", widths) != boxes, "d draws again")
    first = page.get_attribute(".aevlp-stage img", "alt")
    page.keyboard.press("ArrowRight")
    one.until(lambda: page.get_attribute(".aevlp-stage img", "alt") != first, "an arrow goes to the next image")
    page.locator(".aevlp-stage .box").nth(1).hover()
    assert page.locator(".aevlp-stage .tip").is_visible()
    assert one.errors == []


@pytest.mark.parametrize("server", ["lab", "voila"])
def test_review_survives_a_reload(tabs, server, folder):
    saved = folder / f"review-{server}.csv"
    one = tabs[server, "review"]
    one.run()
    one.page.locator(".aevlp-stage").click()
    one.page.keyboard.press("Enter")
    one.until(saved.exists, "the decision is saved")
    one.until(lambda: "1 of " in one.text(".aevlp-app"), "the page counts it")
    first = one.page.get_attribute(".aevlp-stage img", "alt")
    one.page.keyboard.press("2")
    one.until(lambda: len(saved.read_text().splitlines()) == 3, "a switched class is saved too")
    one.shot(f"review-{server}")
    one.page.reload()
    one.run()
    one.until(lambda: "2 of " in one.text(".aevlp-app"), "both decisions are there after a reload")
    assert one.page.get_attribute(".aevlp-stage img", "alt") != first
    with open(saved, newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:2] == ["image", "split"] and len(rows) == 2 and set(np.array(rows)[:, 2:].ravel()) == {"0", "1"}
    assert one.errors == []


def test_the_review_fits_a_desk_and_a_phone(browser, servers, folder):
    """Picture, switches and buttons are in sight together; on a phone a tap switches."""
    for width, height, phone in ((1366, 768, False), (390, 844, True)):
        page = browser.new_page(viewport={"width": width, "height": height}, has_touch=phone, is_mobile=phone)
        page.goto(servers["voila"].format("phone"), wait_until="commit")
        page.wait_for_selector(".aevlp-stage img[src^='data:']", timeout=240_000)
        page.wait_for_function("document.querySelector('.aevlp-stage img').complete")
        boxes = {s: page.locator(s).bounding_box() for s in (".aevlp-stage img", ".aevlp-switches", ".review-actions")}
        for name, box in boxes.items():
            inside = 0 <= box["x"] and box["x"] + box["width"] <= width and box["y"] + box["height"] <= height
            assert inside and box["y"] >= 0, (width, name, box)
        picture, switches = boxes[".aevlp-stage img"], boxes[".aevlp-switches"]
        beside = switches["x"] >= picture["x"] + picture["width"]
        assert beside != phone and picture["width"] > (250 if phone else 400)
        button = page.locator(".aevlp-switches button").nth(3)
        before = button.get_attribute("aria-pressed")
        button.tap() if phone else button.click()
        changed = f".aevlp-switches button:nth-child(4):not([aria-pressed='{before}'])"
        page.wait_for_selector(changed, timeout=60_000)
        if kept := os.environ.get("AEVLP_SCREENSHOTS"):
            page.screenshot(path=f"{kept}/review-{width}.png")
        page.close()


def test_voila_says_what_is_wrong_in_a_sentence(browser, servers):
    page = browser.new_page()
    page.goto(servers["voila"].format("broken"), wait_until="commit")
    page.wait_for_selector("[role=alert]", timeout=120_000)
    said = page.inner_text("body")
    assert "aevlp: " in said and "nowhere" in said and "There was an error" not in said
    page.close()


def test_lab_opens_a_running_page(browser, folder):
    env = os.environ | {"AEVLP_RUNS": str(folder / "runs"), "JUPYTER_CONFIG_DIR": str(folder / "jupyter-config")}
    given = ["--images", "pictures", "--csv", "labels.csv", *(f"--set={k}={v}" for k, v in OVERRIDES.items())]
    command = [sys.executable, "-c", "from aevlp.cli import main; main()", "lab", "--review", *given, "--no-browser"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder, env=env
    )
    try:
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.goto(server.stdout.readline().strip(), wait_until="commit")
        page.wait_for_selector(".aevlp-stage img[src^='data:']", timeout=240_000)
        assert page.locator(".jp-InputArea-editor:visible").count() == 0, "no code is shown"
        page.wait_for_selector(".aevlp-stage:focus", timeout=60_000)
        page.keyboard.press("Enter")
        page.wait_for_selector("text=1 of", timeout=60_000)
        page.close()
    finally:
        server.terminate()
        server.wait(60)


def test_every_action_changes_the_page(browser, capsys, monkeypatch):
    """Each is seen on the page; how long it took is printed as a table, and no bound is set on it here."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import explorer

    took = pd.DataFrame(explorer.times(browser))
    with capsys.disabled():
        print("\n" + took.to_string(index=False))
    for _, one in took.groupby("pictures"):
        assert one.action.is_unique and len(one) == 12
    assert took.pictures.nunique() == 2


def test_screenshots_in_the_docs_are_small():
    shots = sorted((Path(__file__).parents[1] / "figures/screenshots").glob("*.png"))
    assert shots and all(p.stat().st_size < 300_000 and Image.open(p).width >= 390 for p in shots)
