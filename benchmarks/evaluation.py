"""Mean average precision of a COCO-sized evaluation, against scikit-learn class by class."""

import torch
from common import ratio, rivals
from sklearn.metrics import average_precision_score

from aevlp.metrics import average_precision


def measure(images=40137, classes=80, repeats=5):
    rng = torch.Generator().manual_seed(0)
    targets = (torch.rand(images, classes, generator=rng) < 0.036).to(torch.int8)
    scores = torch.rand(images, classes, generator=rng) + 0.3 * targets
    y, s = targets.numpy(), scores.numpy()
    loop = lambda: [average_precision_score(y[:, c], s[:, c]) for c in range(classes)]  # noqa: E731
    assert abs(torch.tensor(loop()) - average_precision(scores, targets)).max() < 1e-6
    times = rivals(dict(loop=loop, ours=lambda: average_precision(scores, targets)), repeats)
    shown = {"textbook": f"{min(times['loop']):.2f} s", "aevlp": f"{min(times['ours']):.2f} s"}
    what = f"mAP of {images:,} x {classes} (target: under 1 s)"
    return [dict(what=what, **shown, **ratio(times["loop"], times["ours"]), target=None)]


if __name__ == "__main__":
    print(measure())
