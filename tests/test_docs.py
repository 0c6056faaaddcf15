"""The documentation site is built from the notebooks without a warning and without a link to nowhere."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_site():
    build = [sys.executable, "docs/build.py", "site", "--strict"]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    html = ROOT / "docs/_build/html"
    for page in ("index", "losses", "tutorials/explore", "experiments/table1", "background/paper_and_code"):
        assert (html / f"{page}.html").exists(), page
    losses = (html / "losses.html").read_text(encoding="utf-8")
    assert "positive_pseudo_loss" in losses and "<table" in losses  # signatures and parameter tables
