"""Makes figures/screenshots anew, in a real Chromium, from the embedded benchmark; five minutes.

python docs/screenshots.py [--run DIR] [--out DIR]
"""

import argparse
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from browser import chromium, opened, served  # noqa: E402

from aevlp.runner import train  # noqa: E402
from aevlp.state import open_state  # noqa: E402

SIZES = {"": (1366, 768), "-1920": (1920, 1080), "-390": (390, 844)}
TABS = {"find": 1, "classes": 2, "matrix": 3, "map": 4, "errors": 5}
MODEL_HEIGHT = 970  # down to the curves


def kept(page, path):
    """The window as a PNG of 256 colours."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)  # pictures on their way
    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    if wide > 0:
        print(f"{path.name}: the page is {wide} pixels wider than the window")
    picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(256, kmeans=2).save(path, optimize=True)
    print(path.name, flush=True)


def explorer(browser, address, out, theme):
    """The explorer in one theme: every tab at a laptop's size by day, the first at all sizes."""
    page, dark = opened(browser, address, theme=theme, judged=True), "-dark" if theme == "dark" else ""
    for size, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        kept(page, out / f"explore{size}{dark}.png")
    for name, n in TABS.items() if not dark else [("find", 1)]:
        page.set_viewport_size({"width": 1366, "height": 768})
        page.locator(".aevlp-explore .lm-TabBar-tab").nth(n).click()
        if name == "find":
            page.locator("select", has_text="false negative").first.select_option("false negative")
        kept(page, out / f"explore-{name}{dark}.png")
        if name == "find":
            page.get_by_role("button", name="Clear").click()
    page.close()


def model(browser, address, out, theme):
    """The tab Model of a run, by day, as long as it is."""
    if theme == "light":
        page = opened(browser, address, height=MODEL_HEIGHT, theme=theme, judged=True)
        page.locator(".aevlp-explore .lm-TabBar-tab").nth(6).click()
        kept(page, out / "explore-model.png")
        page.close()


def reviewer(browser, address, out, theme):
    """The review in one theme."""
    dark = "-dark" if theme == "dark" else ""
    page = opened(browser, address, theme=theme)
    for size, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        kept(page, out / f"review{size}{dark}.png")
    page.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run for the tab Model; default: AEVLP, trained for three epochs")
    parser.add_argument("--out", type=Path, default=ROOT / "figures/screenshots")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    open_state("glyphs").table()  # so that no page has to wait for it
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        run = args.run or train(dataset="glyphs", method="aevlp", overrides={"epochs": 3}, runs=folder)
        pages = {
            model: f"from aevlp.explore import explore\nexplore(run={str(run.resolve())!r})",
            reviewer: f"from aevlp.review import review\nreview('glyphs', out='{folder}/reviewed.csv', split='val')",
            explorer: "from aevlp.explore import explore\nexplore('glyphs')",
        }
        for shoot, code in pages.items():
            with served(code) as address:
                for theme in ("light", "dark"):
                    shoot(browser, address, args.out, theme)


if __name__ == "__main__":
    main()
