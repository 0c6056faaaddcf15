"""What a step costs once its views' embeddings are in the bank, against a step of AN: paired, many times."""

import tempfile
from pathlib import Path

from common import photographs, ratio, rivals
from steps import Ours, epoch, random_clip, settings

from aevlp.bank import Bank


def measure(batch_size=8, repeats=7):
    with tempfile.TemporaryDirectory() as folder:
        data = photographs(Path(folder) / "photographs", batch_size)
        r, clip = settings("voc", batch_size=batch_size), random_clip("cpu", name="ViT-S-32-alt")
        bank = Bank.open(folder, dict(clip="random"), data.splits["train"], 1 + r.grid**2, clip.width)
        runs = dict(bank=Ours(data, r, "cpu", 0, clip, bank), an=Ours(data, r, "cpu", 0))
        times = rivals({k: lambda p=p: epoch(p) for k, p in runs.items()}, repeats)
    shown = dict(an=f"{min(times['an']):.2f} s", aevlp=f"{min(times['bank']):.2f} s")
    return [dict(what="step from the bank against AN's", **shown, **ratio(times["bank"], times["an"]), target=1.1)]


if __name__ == "__main__":
    print(measure())
