"""How fast the explorer answers in a browser: prints a table, writes benchmarks/explorer.json.

python benchmarks/explorer.py     the embedded benchmark, then 10,000 made-up pictures; a minute or two
"""

import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from browser import chromium, opened, served
from common import cpu_name

from aevlp import glyphs
from aevlp.data import LabelledImages
from aevlp.explore import Explore
from aevlp.recipes import recipe
from aevlp.state import Explorer, open_state
from aevlp.table import Table

RESULTS = Path(__file__).parent / "explorer.json"
HERE = str(Path(__file__).parent)
REPEATS = 5


def made_up(n, classes):
    """A table of random numbers, 80 classes as COCO has them."""
    rng = np.random.default_rng(0)
    truth = (rng.random((n, classes)) < 3 / classes).astype(np.int8)
    given = np.zeros_like(truth)
    given[np.arange(n), rng.integers(0, classes, n)] = 1
    truth[given == 1] = 1
    scores = {j: (0.6 * rng.random((n, classes)) + 0.4 * truth).astype(np.float32) for j in ("model", "damp", "clip")}
    cuts = {j: np.full(classes, 0.55, np.float32) for j in scores}
    labels = {j: (s >= 0.55).astype(np.int8) for j, s in scores.items()}
    names = np.array([f"{i:05d}.png" for i in range(n)])
    about = "train", np.arange(n), names, tuple(f"class {c}" for c in range(classes)), given, truth
    positive = rng.integers(0, 11, truth.shape).astype(np.int16)
    return Table(*about, scores, labels, cuts, rng.random((n, 2)).astype(np.float32), positive, 10)


def page(folder, n=10_000, classes=80, scenes=48):
    """The explorer on a made-up table, and a few scenes seen again and again."""
    for i in range(scenes):
        glyphs.draw_scene(3, i).image.save(Path(folder) / f"{i:03d}.png")
    table = made_up(n, classes)
    paths = [str(Path(folder) / f"{i % scenes:03d}.png") for i in range(n)]
    data = LabelledImages("glyphs", paths, table.class_names, table.given, table.truth, {"train": np.arange(n)})
    state = Explorer(data, recipe("glyphs", "aevlp"), bank_root=False)
    table.key["recipe"] = asdict(state.recipe)
    state.table = lambda *_, **__: table
    seen = torch.stack([e for _, e in state.embed(range(scenes), epoch=0)])
    state.bank = SimpleNamespace(get=lambda _, ids: seen[np.asarray(ids) % scenes])  # as after one look at the split
    return Explore(state)


WATCH = """([act, seen, before]) => new Promise((done, fail) => {
  const value = () => { try { return String(eval(seen)) } catch { return 'nothing' } }
  const was = before === null ? value() : before, start = performance.now()
  eval(act)
  const look = () => {
    if (value() !== was) return done(performance.now() - start)
    if (performance.now() - start > 20000) return fail(new Error(`${act}: ${seen} stays ${was.slice(0, 200)}`))
    requestAnimationFrame(look)
  }
  look()
})"""
KEY = """document.querySelector('.aevlp-stage').dispatchEvent(
  new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))"""
PICTURE = "document.querySelector('.aevlp-stage img').src + document.querySelector('.aevlp-labels').innerHTML"
CHOOSE = """(() => {
  const menus = [...document.querySelectorAll('.aevlp-explore .widget-dropdown')]
  const select = menus.find(d => d.innerText.trim().startsWith('%s')).querySelector('select')
  select.value = [...select.options].find(o => o.text.replaceAll('\\u00a0', ' ') === '%s').value
  select.dispatchEvent(new Event('change', {bubbles: true}))
})()"""
TYPE = """(() => {
  const input = document.querySelector('.aevlp-explore input[placeholder="%s"]')
  input.value = '%s'
  for (const name of ['input', 'change', 'blur']) input.dispatchEvent(new Event(name, {bubbles: true}))
})()"""
TAB = """(() => {
  const tab = document.querySelectorAll('.aevlp-explore .lm-TabBar-tab')[%d], at = tab.getBoundingClientRect()
  const where = {bubbles: true, button: 0, clientX: at.x + 5, clientY: at.y + 5}
  for (const name of ['pointerdown', 'pointerup']) tab.dispatchEvent(new PointerEvent(name, where))
})()"""
FOUND = "document.querySelector('.aevlp-found').innerText"
STRIP = "document.querySelector('.aevlp-grid.strip .pane').innerHTML"  # its titles name the column
GRID = "document.querySelector('.aevlp-grid:not(.strip) .pane')"
FILLED = f"""(() => {{
  const pane = {GRID}, buttons = [...pane.querySelectorAll('button')], tops = buttons.map(b => b.offsetTop)
  const middle = pane.scrollTop + pane.clientHeight / 2
  const there = pane.offsetParent && Math.min(...tops) <= pane.scrollTop && Math.max(...tops) > middle
  return Boolean(there && buttons.every(b => b.querySelector('img')))
}})()"""  # where it is scrolled to, not where it was


def measure(tab, class_name) -> dict:
    """{what: (milliseconds from an action to what it changes on the page, the most they may be)}."""

    def ms(act, seen, before=None):
        tab.wait_for_timeout(400)  # nothing of the last action is left to do
        return tab.evaluate(WATCH, [act, seen, before])

    def usual(act, seen, before=None):
        return statistics.median([ms(act, seen, before) for _ in range(REPEATS)])

    def in_turn(acts, seen):
        return statistics.median([ms(act, seen) for act in acts])

    tab.locator(".widget-slider", has_text="global").locator(".noUi-handle").evaluate("s => { window.slider = s }")
    move = "slider.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))"
    place = "document.querySelector('.aevlp-explore input[type=number]').value"
    labels = "document.querySelector('.aevlp-labels').innerHTML"
    found = {"next picture": (usual(KEY, PICTURE), 150), "a threshold moves": (usual(move, labels), 100)}
    held = f"for (let i = 0; i < 10; i++) setTimeout(() => {{ {KEY} }}, 25 * i)"
    at = int(tab.evaluate(place))
    found["ten quick arrow keys"] = (ms(held, f"{place} === '{at + 10}'", "false"), 1000)
    filters = [CHOOSE % ("show", v) for v in ("false negative", "says yes", "false positive", "all", "right")]
    found["filter by verdict"] = (in_turn(filters, FOUND), 100)
    found["filter by class"] = (in_turn([TYPE % ("any class", c) for c in (class_name, "", class_name)], FOUND), 100)
    tab.get_by_role("button", name="Clear").click()
    found["search a name"] = (in_turn([TYPE % ("file name", t) for t in ("1", "12", "2")], FOUND), 100)
    tab.get_by_role("button", name="Clear").click()
    orders = [CHOOSE % ("by", c) for c in ("loss", "uncertainty", "suspicion", "score", "wrong")]
    found["sort"] = (in_turn(orders, f"document.querySelector('.aevlp-stage img').src + {STRIP}"), 100)
    found["Find opens"] = (ms(TAB % 1, FILLED, "false"), 1000)
    far = f"{GRID}.scrollTop = {GRID}.scrollHeight * Math.random()"
    found["Find, scrolled anywhere"] = (usual(far, FILLED, "false"), 1000)
    for n, name, part in (
        (2, "Classes", ".aevlp-pick"),
        (3, "Matrix", ".aevlp-pick svg"),
        (4, "Map", ".aevlp-map svg"),
    ):
        all_of = f"[...document.querySelectorAll('.aevlp-explore {part}')]"
        full = f"{all_of}.some(e => e.getBoundingClientRect().width > 0 && e.innerHTML.length > 200)"
        found[f"{name} opens"] = (ms(TAB % n, full, "false"), 1000)
    return found


def times(browser):
    """A row for each action: on the embedded benchmark, then on 10,000 made-up pictures."""
    open_state("glyphs").table()  # as after one look at the split
    with tempfile.TemporaryDirectory() as folder:
        many = f"import sys\nsys.path.insert(0, {HERE!r})\nimport explorer\nexplorer.page({folder!r})"
        small = "from aevlp.explore import explore\nexplore('glyphs')"
        for what, code, class_name in (("embedded benchmark", small, "sun"), ("10,000 made-up", many, "class 7")):
            with served(code) as address:
                tab = opened(browser, address, judged=True)
                for action, (found, most) in measure(tab, class_name).items():
                    yield dict(pictures=what, action=action, ms=round(found), aim=most)
                tab.close()


def main():
    rows = []
    with chromium() as browser:
        for row in times(browser):
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    frame = pd.DataFrame(rows)
    print(frame.to_string(index=False))
    about = dict(device=cpu_name(), command="python benchmarks/explorer.py", date=datetime.now(UTC).date().isoformat())
    about["load"] = [round(v, 1) for v in os.getloadavg()]
    RESULTS.write_text(json.dumps(dict(about=about, rows=rows), indent=1) + "\n")
    return int((frame.ms > frame.aim).any())


if __name__ == "__main__":
    sys.exit(main())
