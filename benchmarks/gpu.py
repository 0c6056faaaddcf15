"""Speed on a GPU: `python benchmarks/gpu.py --out DIR` writes gpu.json and profile.txt in under 8 minutes."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import textbook
import torch
from common import device_name, photographs, rivals, seconds
from steps import MEAN, SIZE, STD, Ours, Textbook, epoch, random_clip, settings
from torch.utils.flop_counter import FlopCounterMode

from aevlp.bank import Bank
from aevlp.data import decode, image_loader
from aevlp.labelers import view_settings
from aevlp.views import make_views, student_inputs, view_plan

DEVICE = "cuda"
WORKERS = 4


def median(function, repeats=10, warm=3):
    for _ in range(warm):
        function()
    return statistics.median(seconds(function, DEVICE) for _ in range(repeats))


def matrix_rate(kind, n=8192):
    """TFLOP/s of a square matrix product of random numbers."""
    a, b = (torch.randn(n, n, device=DEVICE, dtype=kind) for _ in range(2))
    return 2 * n**3 / median(lambda: a @ b) / 1e12


def towers():
    """The image tower in several precisions: name -> (encode, whether it is exact)."""
    clip = random_clip(DEVICE)
    fp32 = clip.encode_images
    yield "float32", fp32
    autocast = random_clip(DEVICE, "bf16")
    yield "bf16 autocast", autocast.encode_images
    compiled = random_clip(DEVICE, "bf16")
    compiled.model.visual = torch.compile(compiled.model.visual)
    yield "bf16 autocast, compiled", compiled.encode_images
    for kind, name in ((torch.bfloat16, "bf16 weights"), (torch.float16, "fp16 weights")):
        pure = random_clip(DEVICE)
        pure.model.visual.to(kind)
        yield name, lambda x, pure=pure, kind=kind: pure.encode_images(x.to(kind))
        pure.model.visual = torch.compile(pure.model.visual)
        yield f"{name}, compiled", lambda x, pure=pure, kind=kind: pure.encode_images(x.to(kind))


def encoding(images, r, rate):
    """Images/s of DAMP's CLIP pass over ready views, and its share of the matrix rate."""
    clip = random_clip(DEVICE)
    views = view_settings(r, clip)
    plan = view_plan(range(len(images)), [i.shape[1:] for i in images], views, 0, 1)
    x = make_views(images, plan, views, DEVICE).flatten(0, 1)
    with FlopCounterMode(display=False) as counter:
        exact = clip.encode_images(x[:17])
    flops = counter.get_total_flops() / 17 * len(x)
    rows = []
    for name, encode in towers():
        took = median(lambda encode=encode: encode(x))
        cosine = (encode(x[:17]) * exact).sum(1).min().item()
        rows.append(
            dict(tower=name, images_per_s=len(images) / took, tflops=flops / took / 1e12,
                 share_of_matrix_rate=flops / took / 1e12 / rate, smallest_cosine=cosine)
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def making_views(images, r):
    clip = random_clip(DEVICE)
    views = view_settings(r, clip)
    plan = view_plan(range(len(images)), [i.shape[1:] for i in images], views, 0, 1)
    pinned = [i.pin_memory() for i in images]
    whole = median(lambda: make_views(pinned, plan, views, DEVICE))
    student = median(lambda: student_inputs(pinned, SIZE, MEAN, STD, DEVICE))
    return dict(views_images_per_s=len(images) / whole, student_images_per_s=len(images) / student)


def loaders(data, r):
    """Images/s until the tensors are on the device, 4 workers each."""

    def theirs():
        for x, views, _ in textbook.loader(data, r.batch_size, WORKERS, r.grid):
            x.to(DEVICE), views.to(DEVICE)

    views = view_settings(r, random_clip(DEVICE))

    def ours():
        for images, ids in image_loader(data, range(len(data.paths)), r.batch_size, workers=WORKERS, pin_memory=True):
            plan = view_plan(ids, [i.shape[1:] for i in images], views, 0, 1)
            make_views(images, plan, views, DEVICE)
            student_inputs(images, SIZE, MEAN, STD, DEVICE)

    def decoding():
        for images, _ in image_loader(data, range(len(data.paths)), r.batch_size, workers=WORKERS, pin_memory=True):
            len(images)

    times = rivals(dict(textbook=theirs, ours=ours, decoding=decoding), repeats=3, device=DEVICE)
    return {name: len(data.paths) / statistics.median(t) for name, t in times.items()}


def steps(data, r, folder):
    """Images/s of whole epochs, loading included."""
    clip = random_clip(DEVICE, "bf16")
    bank = Bank.open(folder, dict(clip="random"), data.splits["train"], 1 + r.grid**2, clip.width)
    fast = dict(bf16=True)
    kinds = {
        "textbook": lambda: Textbook(data, r, DEVICE, WORKERS),
        "AEVLP, first run": lambda: Ours(data, r, DEVICE, WORKERS, clip, **fast),
        "AEVLP, first run, compiled student": lambda: Ours(data, r, DEVICE, WORKERS, clip, compiled=True, **fast),
        "AEVLP, filling the bank": lambda: Ours(data, r, DEVICE, WORKERS, clip, bank, **fast),
        "AEVLP, from the bank": lambda: Ours(data, r, DEVICE, WORKERS, clip, bank, **fast),
        "AEVLP, from the bank, compiled student": lambda: Ours(data, r, DEVICE, WORKERS, clip, bank, True, True),
        "AN": lambda: Ours(data, r, DEVICE, WORKERS, **fast),
    }
    rates = {}
    for name, build in kinds.items():
        pipeline = build()
        if name != "AEVLP, filling the bank":
            epoch(pipeline)
        times = [
            seconds(lambda pipeline=pipeline: epoch(pipeline), DEVICE) for _ in range(1 if "filling" in name else 3)
        ]
        rates[name] = dict(images_per_s=len(data.paths) / statistics.median(times),
                           spread=[len(data.paths) / t for t in (max(times), min(times))],
                           peak_gb=torch.cuda.max_memory_allocated() / 1e9)  # fmt: skip
        print(name, rates[name], flush=True)
        torch.cuda.reset_peak_memory_stats()
    return rates


def profile(data, r, folder, out):
    clip = random_clip(DEVICE, "bf16")
    bank = Bank.open(folder, dict(clip="random"), data.splits["train"], 1 + r.grid**2, clip.width)
    text = []
    for name, given in (("first run", None), ("from the bank", bank)):
        pipeline = Ours(data, r, DEVICE, 0, clip, given, bf16=True)
        batches = [b for b, _ in zip(pipeline.batches(), range(6), strict=False)]
        for b in batches[:3]:
            pipeline.step(b)
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.profiler.profile(activities=kinds) as p:
            for b in batches[3:]:
                pipeline.step(b)
            torch.cuda.synchronize()
        text.append(f"{name}: {(time.perf_counter() - start) / 3 * 1e3:.1f} ms a step under the profiler")
        text += [p.key_averages().table(sort_by=s, row_limit=18, max_name_column_width=60)
                 for s in ("self_device_time_total", "self_cpu_time_total")]  # fmt: skip
    (out / "profile.txt").write_text("\n".join(text))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and profile.txt")
    parser.add_argument("--images", type=int, default=1024, help="photographs of an epoch")
    parser.add_argument("--classes", type=int, default=20)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start, results = time.perf_counter(), {}

    def note(name, value):
        results[name] = value
        results["seconds"] = round(time.perf_counter() - start, 1)
        (args.out / "gpu.json").write_text(json.dumps(results, indent=1))
        print(f"[{results['seconds']:.0f} s] {name}: {value}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        note("device", device_name(DEVICE))
        note("command", "python benchmarks/gpu.py " + " ".join(sys.argv[1:]))
        note("torch", torch.__version__)
        data, r = (
            photographs(folder / "photographs", args.images, args.classes, files=min(128, args.images)),
            settings("voc", batch_size=16),
        )
        images = [torch.from_numpy(decode(p)).permute(2, 0, 1) for p in data.paths[:16]]
        note("matrix TFLOP/s", dict(bf16=matrix_rate(torch.bfloat16), float32=matrix_rate(torch.float32)))
        note("views", making_views(images, r))
        note("steps, images/s", steps(data, r, folder))
        note("loading, images/s", loaders(data, r))
        note("encoding", encoding(images, r, results["matrix TFLOP/s"]["bf16"]))
        profile(data, r, folder, args.out)
        note("profile", "profile.txt")


if __name__ == "__main__":
    main()
