"""Time and peak memory of DAMP (decode, views, CLIP, bank, labels) against images, grid and classes; draws a figure.

`python benchmarks/growth.py` measures, each point in a process of its own, with the small CLIP that ships.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from common import photographs

POINTS = {
    "images": [(64, 4, 20), (256, 4, 20), (1024, 4, 20)],
    "grid": [(128, g, 20) for g in range(2, 7)],
    "classes": [(128, 4, c) for c in (20, 80, 312)],
}
FIGURE = Path(__file__).parents[1] / "figures" / "growth.png"


def point(images, grid, classes, folder):
    """Seconds, and how far this process grew meanwhile."""
    from aevlp.bank import Bank
    from aevlp.data import image_loader
    from aevlp.labelers import Batch, DampLabeler, Eyes, prototypes, view_settings
    from aevlp.recipes import recipe
    from aevlp.vlm import load_clip

    torch.set_num_threads(2)
    data = photographs(Path(folder) / "photographs", images, classes, files=64)
    r, clip = recipe("glyphs", "aevlp", grid=grid), load_clip("glyphs-clip")
    key = dict(point=[images, grid, classes])
    bank = Bank.open(tempfile.mkdtemp(dir=folder), key, data.splits["train"], 1 + grid**2, clip.width)  # an empty one
    labeler = DampLabeler(Eyes(clip, view_settings(r, clip), 0, bank), prototypes(r, clip, data.class_names), r)
    observed, peak, before = torch.from_numpy(data.observed), 0, psutil.Process().memory_info().rss
    start = time.perf_counter()
    for pictures, ids in image_loader(data, range(images), 16):
        labeler.labels(Batch(ids, ids, pictures, observed[ids]), 1)
        peak = max(peak, psutil.Process().memory_info().rss)
    return dict(seconds=round(time.perf_counter() - start, 3), peak_mb=round((peak - before) / 1e6, 1))


def measure():
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for varied, points in POINTS.items():
            for images, grid, classes in points:
                command = [sys.executable, __file__, "--point", str(images), str(grid), str(classes), folder]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows.append(dict(varied=varied, images=images, grid=grid, classes=classes, **json.loads(out)))
                print(rows[-1], flush=True)
    return rows


def draw(rows, path=FIGURE):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10, 5), sharey="row", layout="constrained")
    for column, (varied, label) in enumerate(
        (("images", "images"), ("grid", "views an image"), ("classes", "classes"))
    ):
        part = [r for r in rows if r["varied"] == varied]
        x = [1 + r["grid"] ** 2 if varied == "grid" else r[varied] for r in part]
        axes[0, column].plot(x, [1e3 * r["seconds"] / r["images"] for r in part], "o-", color="#0072B2")
        axes[1, column].plot(x, [r["peak_mb"] for r in part], "o-", color="#D55E00")
        axes[1, column].set_xlabel(label)
    for panel in axes.flat:
        panel.set(xlim=(0, None), ylim=(0, None))
    axes[0, 0].set_ylabel("ms an image")
    axes[1, 0].set_ylabel("memory grown, MB")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--point", nargs=4, metavar=("IMAGES", "GRID", "CLASSES", "FOLDER"))
    given = parser.parse_args().point
    if given:
        print(json.dumps(point(*map(int, given[:3]), given[3])))
    else:
        draw(measure())
