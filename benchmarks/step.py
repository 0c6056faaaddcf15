"""A training step on the CPU with ViT-B/16 and ResNet-50 at 448, loading included: textbook, first run, second run."""

import tempfile
from pathlib import Path

from common import photographs, ratio, rivals
from steps import Ours, Textbook, epoch, random_clip, settings

from aevlp.bank import Bank


def measure(dataset="voc", classes=20, target=1.05, batch_size=8, repeats=1):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = photographs(Path(folder) / "photographs", batch_size, classes)
        r = settings(dataset, batch_size=batch_size)
        clip, half = random_clip("cpu"), random_clip("cpu", "bf16")
        bank, half_bank = (
            Bank.open(folder, dict(clip=c.precision), data.splits["train"], 1 + r.grid**2, c.width)
            for c in (clip, half)
        )
        slow = dict(
            textbook=Textbook(data, r, "cpu", 0, clip),
            first=Ours(data, r, "cpu", 0, clip),
            bf16=Ours(data, r, "cpu", 0, half, bf16=True),
        )
        again = dict(
            bank=Ours(data, r, "cpu", 0, clip, bank),
            an=Ours(data, r, "cpu", 0),
            bf16_bank=Ours(data, r, "cpu", 0, half, half_bank, bf16=True),
        )
        times = rivals({k: lambda p=p: epoch(p) for k, p in slow.items()}, repeats, warm=0)
        times |= rivals({k: lambda p=p: epoch(p) for k, p in again.items()}, 5)
    where = f"{dataset}, {classes} classes, g = {r.grid}, batch {batch_size}"

    def row(what, slower, faster, target, **names):
        shown = {name: f"{min(times[key]):.2f} s" for name, key in names.items()}
        rows.append(dict(what=f"{what} ({where})", **shown, **ratio(slower, faster), target=target))

    row("step of a first run", times["textbook"], times["first"], target, textbook="textbook", aevlp="first")
    row("step of a first run in bf16", times["textbook"], times["bf16"], None, textbook="textbook", aevlp="bf16")
    many = times["textbook"][:1] * len(times["bank"])
    row("step from the bank", many, times["bank"], 6, textbook="textbook", aevlp="bank")
    row("step from the bank in bf16", many, times["bf16_bank"], None, textbook="textbook", aevlp="bf16_bank")
    row("step from the bank against AN's", times["bank"], times["an"], 1.1, an="an", aevlp="bank")
    return rows


if __name__ == "__main__":
    for row in measure() + measure("cub", 312, 1.2):
        print(row)
