"""A training step of AEVLP, of AN and of the textbook, on the same models and photographs."""

from dataclasses import replace

import numpy as np
import open_clip
import textbook
import timm
import torch

from aevlp import losses
from aevlp.data import image_loader
from aevlp.labelers import Batch, DampLabeler, Eyes, prototypes, view_settings
from aevlp.recipes import recipe
from aevlp.views import student_flips, student_inputs
from aevlp.vlm import Clip

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 448


def settings(dataset, **changes):
    """The paper's settings; thresholds low enough that a CLIP with random weights gives pseudo-labels."""
    return replace(recipe(dataset, "aevlp"), global_threshold=0.0, **changes)


def random_clip(device, precision="fp32", name="ViT-B-16"):
    torch.manual_seed(0)
    return Clip(open_clip.create_model(name, load_weights=False), name, device, precision)


class Student:
    """A classifier with its optimiser."""

    def __init__(self, classes, device, bf16=False, channels_last=False, compiled=False, name="resnet50"):
        torch.manual_seed(0)
        kind = torch.channels_last if channels_last else torch.contiguous_format
        self.net = timm.create_model(name, num_classes=classes).to(device, memory_format=kind).train()
        self.forward = torch.compile(self.net) if compiled else self.net
        fused = bf16 and torch.device(device).type == "cuda"
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-5, fused=fused)
        self.device, self.kind, self.bf16 = torch.device(device), kind, bf16

    def logits(self, x):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.forward(x.to(memory_format=self.kind)).float()

    def update(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def gpr(logits, observed, pseudo, r):
    now = losses.gr_schedule(1, r.epochs, r.w0, r.wT, r.b0, r.bT, r.mu0, r.sigma0, r.muT, r.sigmaT)
    bounds = dict(lambda1=r.lambda1, lambda2=r.lambda2, eta=r.eta, expected_positives=r.expected_positives)
    return losses.gpr(logits, observed, pseudo, q1=r.q1, q2=r.q2, q3=r.q3, **now, **bounds)


class Textbook:
    """What `textbook.loader` gives, in float32."""

    def __init__(self, data, r, device, workers, clip=None):
        clip = clip or random_clip(device)
        self.data, self.recipe, self.device, self.workers = data, r, torch.device(device), workers
        self.labeler = textbook.Labeler(clip, data.class_names, r)
        self.student = Student(len(data.class_names), device)
        self.view_size = clip.image_size

    def batches(self):
        return textbook.loader(
            self.data, self.recipe.batch_size, self.workers, self.recipe.grid, SIZE, self.view_size, True
        )

    def step(self, batch):
        x, views, observed = (t.to(self.device) for t in batch)
        logits = self.student.logits(x)
        pseudo = self.labeler.labels(views, observed)
        self.student.update(gpr(logits, observed, pseudo, self.recipe))


class Ours:
    """What aevlp does; `bank` is where the views' embeddings are kept, `clip` None is a step of AN."""

    def __init__(self, data, r, device, workers, clip=None, bank=None, bf16=False, compiled=False):
        self.data, self.recipe, self.device, self.workers = data, r, torch.device(device), workers
        self.student = Student(len(data.class_names), device, bf16, r.channels_last, compiled)
        self.observed = torch.from_numpy(data.observed).to(device)
        if clip is not None:
            views = view_settings(r, clip)
            self.labeler = DampLabeler(Eyes(clip, views, 0, bank), prototypes(r, clip, data.class_names), r)
        else:
            self.labeler = None

    def batches(self, epoch=1):
        order = np.random.default_rng(epoch).permutation(len(self.data.paths))
        pinned = self.device.type == "cuda"
        return image_loader(self.data, order, self.recipe.batch_size, workers=self.workers, pin_memory=pinned)

    def step(self, batch, epoch=1):
        images, ids = batch
        observed = self.observed[ids.to(self.device, non_blocking=True)]
        x = student_inputs(images, SIZE, MEAN, STD, self.device, student_flips(ids, 0, epoch))
        logits = self.student.logits(x)
        if self.labeler is None:
            return self.student.update(losses.an(logits, observed))
        pseudo = self.labeler.labels(Batch(ids, ids, images, observed), epoch)
        return self.student.update(gpr(logits, observed, pseudo, self.recipe))


def epoch(pipeline):
    for batch in pipeline.batches():
        pipeline.step(batch)
