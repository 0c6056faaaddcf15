"""The paper's own models at their own size, with random weights: ResNet-50 at 448 pixels, CLIP ViT-B/16, batch 8."""

import numpy as np
import pytest
from fake_run import record
from PIL import Image, ImageFilter

from aevlp import bank, datasets, recipes, train, vlm


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """Twenty photograph-sized JPEGs in VOC's official layout: eight to train on, two to validate, ten to test."""
    root, rng = tmp_path_factory.mktemp("voc"), np.random.default_rng(0)
    base = root / "VOCdevkit" / "VOC2012"
    (base / "JPEGImages").mkdir(parents=True)
    (base / "ImageSets" / "Main").mkdir(parents=True)
    names = {"train": [f"2008_{i:06d}" for i in range(10)], "val": [f"2009_{i:06d}" for i in range(10)]}
    for image in names["train"] + names["val"]:
        noise = Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8))
        noise.filter(ImageFilter.GaussianBlur(3)).save(base / "JPEGImages" / f"{image}.jpg", quality=90)
    for c, label in enumerate(datasets.class_names("voc")):
        for split, images in names.items():
            lines = [f"{image} {1 if c in (i % 20, (i + 5) % 20) else -1:2d}" for i, image in enumerate(images)]
            (base / "ImageSets" / "Main" / f"{label}_{split}.txt").write_text("\n".join(lines) + "\n")
    return datasets.load("voc", root=root)


@pytest.mark.slow
def test_steps_on_photographs(voc, tmp_path, monkeypatch):
    """One AEVLP epoch fills the bank; a second run with another seed reads it and never calls CLIP's image tower."""
    recipe = recipes.recipe("voc", "aevlp", backbone_weights="none", clip_weights="none", epochs=1, workers=0)
    assert (recipe.backbone, recipe.image_size, recipe.clip, recipe.grid) == ("resnet50.tv_in1k", 448, "ViT-B-16", 4)
    random_clip = vlm.load_clip(recipe.clip, "none")
    monkeypatch.setattr("aevlp.eyes.load_clip", lambda *args, **kwargs: random_clip)  # both runs: the same weights
    views = []
    encode = vlm.Clip.encode_images
    monkeypatch.setattr(
        vlm.Clip, "encode_images", lambda self, pixels: views.append(tuple(pixels.shape)) or encode(self, pixels)
    )
    first = train.fit(voc, "aevlp", recipe, 0, tmp_path / "first", bank=tmp_path / "banks", progress=False)
    every = sum(len(ids) for ids in voc.splits.values())  # of validation and test what CLIP alone says
    assert sum(shape[0] for shape in views) == every * 17 and views[0][1:] == (3, 224, 224)
    assert np.isfinite(first["test_map"])
    assert bank.banks(tmp_path / "banks").complete.tolist() == [1, 1, 1]  # one of each split
    views.clear()
    second = train.fit(voc, "aevlp", recipe, 1, tmp_path / "second", bank=tmp_path / "banks", progress=False)
    assert not views and np.isfinite(second["test_map"])
    labels = [np.load(tmp_path / run / "pseudo/epoch_01.npz")["pseudo"] for run in ("first", "second")]
    assert np.array_equal(*labels)
    record("real size", first=round(first["seconds"]), second=round(second["seconds"]))
