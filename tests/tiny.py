"""A tiny training run for the tests that kill processes or start several: coloured shapes and a small network.

`python tiny.py FOLDER METHOD ...` is one rank of some runs.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from aevlp import glyphs
from aevlp.data import LabelledImages, sample_single_positives
from aevlp.recipes import recipe
from aevlp.train import fit

COLOURS = ((220, 60, 50), (60, 170, 80), (60, 90, 210), (230, 180, 40), (150, 60, 180))
# No batch normalisation, whose statistics are those of a rank's own rows;
# no Adam, to which the scale of a gradient is nothing.
EXACT = {"backbone": "test_convnext", "epochs": 2, "optimizer": "sgd", "lr": 0.05, "head_lr": 0.1}
CLIP = {
    "clip": "glyphs-clip",
    "clip_weights": "",
    "temperature": 0.05,
    "grid": 2,
    "top_k": 2,
    "global_threshold": 0.2,
    "negative_ratio": 0.2,
}
TIMES = ("seconds", "images_per_second")


def shapes(folder, n=120, seed=0, truth_known=True):
    """Pictures of 24 x 24 to 40 x 32 pixels with one to three coloured squares; half of them for training."""
    rng, folder = np.random.default_rng(seed), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    truth = np.zeros((n, len(COLOURS)), np.int8)
    paths = [folder / f"{i:03d}.png" for i in range(n)]
    for i, path in enumerate(paths):
        width, height = int(rng.integers(24, 41)), int(rng.integers(24, 33))
        image = Image.fromarray(rng.integers(150, 256, (height, width, 3), dtype=np.uint8))
        for c in rng.choice(len(COLOURS), rng.integers(1, 4), replace=False):
            x, y = rng.integers(0, width - 10), rng.integers(0, height - 10)
            ImageDraw.Draw(image).rectangle((x, y, x + 9, y + 9), fill=COLOURS[c])
            truth[i, c] = 1
        if not path.exists():
            image.save(path)
    splits = {"train": np.arange(n // 2), "val": np.arange(n // 2, 3 * n // 4), "test": np.arange(3 * n // 4, n)}
    names = ["sun", "cloud", "star", "crown", "heart"]  # the small CLIP can tell these words apart
    paths = [str(p) for p in paths]
    return LabelledImages(
        "shapes", paths, names, sample_single_positives(truth), truth if truth_known else None, splits
    )


def scenes(folder):
    """Sixteen scenes of the embedded benchmark with one given label each, ten of them for training."""
    drawn = [glyphs.draw_scene(5, i) for i in range(16)]
    truth = np.zeros((16, len(glyphs.CLASS_NAMES)), np.int8)
    paths = [str(Path(folder) / f"{i:02d}.png") for i in range(16)]
    for scene, row, path in zip(drawn, truth, paths):
        scene.image.save(path)
        row[[t.label for t in scene.things]] = 1
    observed = np.zeros_like(truth)
    observed[np.arange(16), truth.argmax(1)] = 1
    splits = {"train": np.arange(10), "val": np.arange(10, 12), "test": np.arange(12, 16)}
    return LabelledImages("glyphs", paths, glyphs.CLASS_NAMES, observed, truth, splits)


def small(method, **overrides):
    """A recipe for `shapes`: a few seconds of training."""
    given = dict(backbone="glyphnet", backbone_weights="none", image_size=32, workers=0, epochs=3, batch_size=8)
    given |= dict(lr=3e-3, head_lr=3e-3, expected_positives=2.0, random_positives=1.0)
    given |= dict(mime_width=32, mime_ffn=32, mime_z=8)
    return recipe("shapes", method, **given | overrides)


def result(run):
    """Everything a run says, but how long it took."""
    metrics = json.loads((run / "metrics.json").read_text())
    history = [line.split(",")[:-2] for line in (run / "history.csv").read_text().splitlines()]
    predictions = np.load(run / "predictions.npz")
    pseudo = {p.name: np.load(p)["pseudo"].tolist() for p in sorted((run / "pseudo").iterdir())}
    metrics = {k: v for k, v in metrics.items() if k not in TIMES}
    return (
        metrics,
        history,
        {k: predictions[k].tolist() for k in predictions},
        pseudo,
        (run / "best.safetensors").read_bytes(),
    )


def train(run, method, data, overrides=None, bank=False, **kwargs):
    given = (CLIP if method == "aevlp" else {}) | (overrides or {})
    return fit(data, method, small(method, **given), 0, run, device="cpu", bank=bank, progress=False, **kwargs)


def forked(body):
    """Run `body` in a child; its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def killed_after(body, seconds):
    """Whether a child running `body` was killed after `seconds`, rather than done before."""
    pid, end = forked(body), time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return _died(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return _died(os.waitpid(pid, 0)[1])


def _died(status):
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the run failed"
    return False


if __name__ == "__main__":
    folder, *methods = sys.argv[1:]
    torch.set_num_threads(1)
    data = shapes(Path(folder) / "pictures", n=118)
    for method in methods:
        train(Path(folder) / method, method, data, EXACT, Path(folder) / "banks")
