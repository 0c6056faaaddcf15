"""A training step of the classifier alone on the CPU: number format, memory layout, compiler against plain float32."""

import torch
from common import ratio, rivals
from steps import SIZE, Student

from aevlp import glyphs, losses  # glyphs registers glyphnet with timm

WAYS = {
    "bf16": dict(bf16=True),
    "channels_last": dict(channels_last=True),
    "bf16, channels_last": dict(bf16=True, channels_last=True),
    "bf16, channels_last, torch.compile": dict(bf16=True, channels_last=True, compiled=True),
}


def measure(name="resnet50", size=SIZE, batch_size=8, classes=20, repeats=2, steps=1):
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, size, size, generator=rng)
    observed = (torch.rand(batch_size, classes, generator=rng) < 0.1).to(torch.int8)

    def step(student):
        for _ in range(steps):
            student.update(losses.an(student.logits(images), observed))

    students = {way: Student(classes, "cpu", name=name, **given) for way, given in ({"plain": {}} | WAYS).items()}
    times = rivals({way: lambda s=s: step(s) for way, s in students.items()}, repeats)
    plain = f"{min(times['plain']) / steps:.3f} s"
    where = f"{name} at {size}, batch {batch_size}"
    return [
        dict(what=f"{way} ({where})", plain=plain, aevlp=f"{min(times[way]) / steps:.3f} s")
        | ratio(times["plain"], times[way])
        for way in WAYS
    ]


def measure_small():
    """The classifier of the embedded benchmark."""
    return measure(glyphs.STUDENT_NAME, 64, 32, 12, repeats=5, steps=10)


if __name__ == "__main__":
    torch.set_num_threads(2)
    for row in measure() + measure_small():
        print(row)
