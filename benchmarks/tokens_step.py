"""A first-run step of gpr+tokens on the CPU, loading included: one pass of ViT-B/16 a picture in place of 17."""

import tempfile
from pathlib import Path

from common import photographs, ratio, rivals
from steps import Ours, Textbook, epoch, random_clip, settings

from aevlp.eyes import eyes_of, prototypes
from aevlp.labelers import DampLabeler


def tokens(data, r, clip, bf16=False):
    """`Ours` with the labels of dense tokens."""
    made = Ours(data, r, "cpu", 0, clip, bf16=bf16)
    words = prototypes(r, clip, data.class_names)
    made.labeler = DampLabeler(eyes_of(r, clip, tokens=True), words, r, r.token_temperature)
    return made


def measure(dataset="voc", classes=20, batch_size=8, repeats=1):
    with tempfile.TemporaryDirectory() as folder:
        data = photographs(Path(folder) / "photographs", batch_size, classes)
        r = settings(dataset, batch_size=batch_size)
        clip, half = random_clip("cpu"), random_clip("cpu", "bf16")
        steps = dict(textbook=Textbook(data, r, "cpu", 0, clip), tokens=tokens(data, r, clip))
        steps["bf16"] = tokens(data, r, half, bf16=True)
        times = rivals({k: lambda p=p: epoch(p) for k, p in steps.items()}, repeats, warm=0)
    rows, where = [], f"{dataset}, {classes} classes, batch {batch_size}"
    for what, key, target in (("", "tokens", 4), (" in bf16", "bf16", 11)):
        shown = dict(textbook=f"{min(times['textbook']):.2f} s", tokens=f"{min(times[key]):.2f} s")
        named = dict(what=f"step of a first run, dense tokens{what} ({where})", **shown)
        rows.append(named | ratio(times["textbook"], times[key]) | dict(target=target))
    return rows


if __name__ == "__main__":
    for row in measure():
        print(row)
