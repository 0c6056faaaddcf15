"""What the benchmarks share: photographs made up by the program, clocks, ratios with their spread."""

import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from aevlp.data import LabelledImages, sample_single_positives


def photograph(seed, height=375, width=500):
    """(H, W, 3) uint8 with the 1/f spectrum of photographs, and a few edges."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency**1.1
    texture = np.fft.irfft2(spectrum, (height, width))
    texture = texture.mean(0) + 0.4 * texture
    image = 128 + 45 * texture / texture.std()
    for _ in range(6):
        y, x, radius = rng.integers(0, height), rng.integers(0, width), rng.integers(20, 90)
        inside = np.hypot(np.arange(height)[:, None] - y, np.arange(width)[None] - x) < radius
        image[:, inside] = 0.6 * image[:, inside] + 0.4 * rng.integers(0, 256, (3, 1))
    return image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def photographs(folder, n, classes=20, size=(375, 500), files=None):
    """A labelled set of n photographs, JPEGs of 100 kB, a quarter upright; where `files` is less, seen repeatedly."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i % (files or n):04d}.jpg" for i in range(n)]
    for i, path in enumerate(paths[:files]):
        if not path.exists():
            Image.fromarray(photograph(i, *(size if i % 4 else size[::-1]))).save(path, quality=90)
    rng = np.random.default_rng(0)
    truth = (rng.random((n, classes)) < 1.5 / classes).astype(np.int8)
    truth[np.arange(n), rng.integers(0, classes, n)] = 1
    names = [f"object {c}" for c in range(classes)]
    splits = {"train": np.arange(n)}
    return LabelledImages("photographs", [str(p) for p in paths], names, sample_single_positives(truth), truth, splits)


def device_name(device):
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else cpu_name()


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"


def seconds(function, device="cpu"):
    """Wall seconds of one call."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rivals(functions, repeats=5, device="cpu", warm=1):
    """Seconds of each function, the functions taking turns so that a busy machine slows all of them."""
    times = {name: [] for name in functions}
    for turn in range(warm + repeats):
        for name, function in functions.items():
            took = seconds(function, device)
            if turn >= warm:
                times[name].append(took)
    return times


def ratio(slow, fast):
    """Median, smallest and largest of the paired ratios of two lists of seconds."""
    every = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"ratio": round(statistics.median(every), 2), "from": round(min(every), 2), "to": round(max(every), 2)}
