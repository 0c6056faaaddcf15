"""Seconds of a run on frozen features of VOC's size, made up: 11,540 pictures, 512 numbers a view."""

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import cpu_name

from aevlp import frozen, recipes, train
from aevlp.data import LabelledImages, sample_single_positives

SPLITS = dict(train=4574, val=1143, test=5823)  # VOC 2012 as the field splits it
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


def measure():
    """Wall and processor seconds of whole runs, validation and files included."""
    folder = Path(tempfile.mkdtemp())
    data, name = features(folder, np.random.default_rng(0))
    rows = []
    for method in ("an", "gr", "gpr+random"):
        for hidden in (0, 256):
            recipe = recipes.recipe("voc", method, backbone="frozen", features=name, frozen_hidden=hidden, threads=1)
            start = time.perf_counter(), time.process_time()
            found = train.fit(
                data,
                method,
                recipe,
                0,
                folder / f"{method} {hidden}",
                device="cpu",
                bank=folder / "banks",
                progress=False,
            )
            took = time.perf_counter() - start[0], time.process_time() - start[1]
            head = f"hidden layer of {hidden}" if hidden else "linear"
            what = f"{method} on frozen features, {head}, {recipe.epochs} epochs"
            rows.append(
                dict(
                    what=what,
                    seconds=round(took[0], 1),
                    processor=round(took[1], 1),
                    test_map=round(found["test_map"], 1),
                )
            )
            print(rows[-1], flush=True)
    shutil.rmtree(folder)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(cpu_name())
    measure()
