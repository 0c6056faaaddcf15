"""Decoding, 1 + g x g views at 224 and the classifier's input at 448, until the tensors are ready for the models.

On the CPU, aevlp decodes in threads of the training process: a picture that comes from another process costs as
much again as its decoding.
"""

import resource
import tempfile
from types import SimpleNamespace

import textbook
import torch
from common import photographs, ratio, rivals
from steps import MEAN, SIZE, STD

from aevlp.data import image_loader
from aevlp.labelers import Eyes
from aevlp.views import ViewSettings, student_flips, student_inputs


def ours(data, batch_size, workers, views, device):
    eyes = Eyes(SimpleNamespace(image_size=views.size, device=torch.device(device)), views, 0)  # what it asks of CLIP
    for images, ids in image_loader(
        data, range(len(data.paths)), batch_size, workers=workers, pin_memory=device != "cpu"
    ):
        for part in eyes.parts(images, ids, 1):
            del part  # CLIP would read it here
        student_inputs(images, SIZE, MEAN, STD, device, student_flips(ids, 0, 1))


def theirs(data, batch_size, workers, grid, weak, device):
    for x, views, _ in textbook.loader(data, batch_size, workers, grid, SIZE, weak=weak):
        x.to(device), views.to(device)


def processor_seconds(function):
    """Of this process and of the workers it waits for; hardly changed by what else the machine does."""
    used = lambda: sum(sum(resource.getrusage(w)[:2]) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))  # noqa: E731
    before = used()
    function()
    return used() - before


def measure(images=192, batch_size=16, workers=2, grid=4, repeats=5, device="cpu"):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = photographs(folder, images, files=min(64, images))
        for augment, title in (("weak", "the paper's augmentation"), ("flip", "flips only")):
            views = ViewSettings(grid=grid, augment=augment)
            run = dict(
                textbook=lambda augment=augment: theirs(data, batch_size, workers, grid, augment == "weak", device),
                aevlp=lambda views=views: ours(data, batch_size, 0 if device == "cpu" else workers, views, device),
            )
            times = rivals(run, repeats, device)
            used = {name: processor_seconds(function) for name, function in run.items()}
            rows.append(
                dict(
                    what=f"loading, {title}",
                    textbook=f"{images / min(times['textbook']):.0f} images/s",
                    aevlp=f"{images / min(times['aevlp']):.0f} images/s",
                    **ratio(times["textbook"], times["aevlp"]),
                    processor_ratio=round(used["textbook"] / used["aevlp"], 2),
                    target=4 if device == "cpu" else 8,
                )
            )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(2)
    for row in measure():
        print(row)
