"""The pipeline that the field writes first, as a baseline: every photograph decoded twice, its patches cut and
resized by Pillow one after another, every prompt encoded at every step, CLIP at every step, all of it in float32."""

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from aevlp.vlm import GraphNoise, label_graph, prompts


class Photographs(Dataset):
    """One item: the classifier's input, the views for CLIP, the observed labels."""

    def __init__(self, data, grid, size, view_size, clip_mean, clip_std, weak=False):
        normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        ends = [transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        kinds = [
            transforms.RandomRotation(10),
            transforms.ColorJitter(0.2, 0.2, 0.2),
            transforms.RandomAdjustSharpness(2, p=1),
            transforms.RandomAutocontrast(p=1),
        ]
        augment = [transforms.RandomApply([transforms.RandomChoice(kinds)], p=0.2)] if weak else []
        squash, cut = (transforms.Resize((s, s)) for s in (size, view_size))
        self.data, self.grid = data, grid
        self.student = transforms.Compose([squash, *ends, normalise])
        self.view = transforms.Compose([cut, *augment, *ends, transforms.Normalize(clip_mean, clip_std)])

    def __len__(self):
        return len(self.data.paths)

    def patches(self, image):
        width, height = image.width / self.grid, image.height / self.grid
        for row in range(self.grid):
            for column in range(self.grid):
                grow = 0.2 * np.random.random()
                box = (column - grow, row - grow, column + 1 + grow, row + 1 + grow)
                x0, y0, x1, y1 = (int(round(v * s)) for v, s in zip(box, (width, height) * 2, strict=True))
                yield image.crop((max(x0, 0), max(y0, 0), min(x1, image.width), min(y1, image.height)))

    def __getitem__(self, i):
        with Image.open(self.data.paths[i]) as file:
            student = self.student(file.convert("RGB"))
        with Image.open(self.data.paths[i]) as file:
            image = file.convert("RGB")
        views = torch.stack([self.view(v) for v in [image, *self.patches(image)]])
        return student, views, torch.from_numpy(self.data.observed[i])


CLIP = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


def loader(data, batch_size, workers, grid=4, size=448, view_size=224, weak=False):
    photographs = Photographs(data, grid, size, view_size, *CLIP, weak)
    return DataLoader(photographs, batch_size, shuffle=True, num_workers=workers)


class Labeler:
    """DAMP as a loop over images and classes' prompts, nothing kept from one step to the next."""

    def __init__(self, clip, class_names, recipe):
        self.clip, self.class_names, self.recipe = clip, class_names, recipe
        self.noise = GraphNoise(clip.width).to(clip.device)

    def text(self):
        text = self.clip.encode_text(prompts(self.class_names))
        return torch.nn.functional.normalize(text + self.noise(text, label_graph(text)), dim=-1)

    def labels(self, views, observed):
        r, prototypes = self.recipe, self.text()
        out = []
        for image, given in zip(views, observed, strict=True):
            probs = (self.clip.encode_images(image) @ prototypes.T / r.temperature).softmax(-1)
            whole, local = probs[0], probs[1:]
            threshold = min(whole[given == 1].min().item(), r.local_threshold)
            high, low = local.max(0).values, local.min(0).values
            final = (whole + torch.where(high >= threshold, high, low)) / 2
            average = (whole + local.mean(0)) / 2
            label = torch.zeros(len(whole), dtype=torch.int8, device=probs.device)
            label[average <= torch.quantile(average, r.negative_ratio)] = -1
            top = final.topk(r.top_k).indices
            label[top[final[top] >= r.global_threshold]] = 1
            out.append(label)
        return torch.stack(out)
