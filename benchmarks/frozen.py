"""Seconds of a run on frozen features: the embedded benchmark's, and made up ones of VOC's size."""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import cpu_name

from aevlp import datasets, frozen, recipes, train
from aevlp.data import LabelledImages, sample_single_positives

SPLITS = dict(train=4574, val=1143, test=5823)  # VOC 2012 as the field splits it: 11,540 pictures
CLASSES, WIDTH, VIEWS = 20, 512, 5


def features(folder, rng):
    """A data set without pictures, and the name of its bank."""
    n = sum(SPLITS.values())
    truth = (rng.random((n, CLASSES)) < 1.5 / CLASSES).astype(np.int8)
    truth[np.arange(n), rng.integers(0, CLASSES, n)] = 1
    seen = truth @ rng.normal(size=(CLASSES, WIDTH)).astype(np.float32)
    rows = seen[:, None] + 2 * rng.normal(size=(n, VIEWS, WIDTH)).astype(np.float32)
    ends = np.cumsum(list(SPLITS.values()))
    splits = dict(zip(SPLITS, np.split(np.arange(n), ends[:-1]), strict=True))
    names = [f"object {c}" for c in range(CLASSES)]
    data = LabelledImages(
        "voc", [f"{i:05d}.jpg" for i in range(n)], names, sample_single_positives(truth), truth, splits
    )
    np.save(folder / "features.npy", rows)
    return data, frozen.import_features(folder / "features.npy", data, root=folder / "banks").folder.name


def seconds(data, method, recipe, folder, bank=True):
    """Wall and processor seconds of a whole run, validation and files included."""
    start = time.perf_counter(), time.process_time()
    train.fit(data, method, recipe, 0, folder, device="cpu", bank=bank, progress=False)
    return time.perf_counter() - start[0], time.process_time() - start[1]


def measure():
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        made, name = features(folder, np.random.default_rng(0))
        drawn = datasets.load("glyphs")
        for data, target, methods in ((drawn, 5, ("an", "gr", "aevlp")), (made, 20, ("an", "gr", "gpr+random"))):
            given = {} if data is drawn else dict(features=name)
            bank = True if data is drawn else folder / "banks"
            for method in methods:
                for hidden in (0, 256):
                    settings = dict(backbone="frozen", frozen_hidden=hidden, threads=1, **given)
                    recipe = recipes.recipe(data.name, method, **settings)
                    where = folder / f"{data.name} {method} {hidden}"
                    if data is drawn:  # the bank is there, as for all but the first run
                        seconds(data, method, recipe, where / "first", bank)
                    wall, processor = seconds(data, method, recipe, where / "run", bank)
                    head = f"hidden layer of {hidden}" if hidden else "linear"
                    size = f"{len(data):,} pictures of {data.name}, {recipe.epochs} epochs"
                    rows.append(
                        dict(
                            what=f"{method} on frozen features, {head} ({size})",
                            aevlp=f"{wall:.1f} s",
                            processor=f"{processor:.1f} s",
                            target=f"{target} s",
                        )
                    )
    return rows


if __name__ == "__main__":
    print(cpu_name())
    for row in measure():
        print(row)
