"""Evaluation views and the embeddings of a split through its bank; a tiny random CLIP, no download."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from test_labelers import TINY, clip_model  # noqa: F401, a fixture of this module too

from aevlp import eyes as module
from aevlp.data import LabelledImages
from aevlp.eyes import Eyes, embeddings, open_bank, view_settings
from aevlp.recipes import recipe
from aevlp.views import ViewSettings, evaluation_plan, make_views, view_plan
from aevlp.vlm import load_clip

SIZES = [(375, 500), (64, 64), (5, 7), (700, 40)]


def test_evaluation_views_are_half_enlarged_and_nothing_is_drawn():
    settings = ViewSettings(grid=3, overlap=0.2)
    plan = evaluation_plan(SIZES, settings)
    assert not plan.flip.any() and (plan.op == -1).all()
    for (height, width), boxes in zip(SIZES, plan.boxes.tolist(), strict=True):
        wanted = [[0, 0, width, height]]
        for row in range(3):
            for column in range(3):
                left, top = max(0, width * (column - 0.1) / 3), max(0, height * (row - 0.1) / 3)
                right, bottom = min(width, width * (column + 1.1) / 3), min(height, height * (row + 1.1) / 3)
                wanted.append([*np.floor([left + 1e-6, top + 1e-6]), *np.ceil([right - 1e-6, bottom - 1e-6])])
        assert boxes == wanted
    alone = evaluation_plan(SIZES[2:3], settings)
    assert torch.equal(alone.boxes[0], plan.boxes[2])


@pytest.mark.parametrize("grid", [1, 2, 4])
def test_without_overlap_they_are_the_plain_patches_of_training(grid):
    settings = ViewSettings(grid=grid, overlap=0, augment="none")
    plan, drawn = evaluation_plan(SIZES, settings), view_plan(range(len(SIZES)), SIZES, settings, 3, 4)
    assert all(torch.equal(getattr(plan, k), getattr(drawn, k)) for k in ("boxes", "flip", "op"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    for i in range(9):
        small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(small.repeat(8 + i, 0).repeat(9, 1)).save(folder / f"{i}.png")
    labels = np.eye(9, 6, dtype=np.int8)
    splits = dict(train=np.arange(4), val=np.arange(4, 6), test=np.arange(6, 9))
    return LabelledImages("tiny", [f"{folder}/{i}.png" for i in range(9)], tuple("abcdef"), labels, labels, splits)


@pytest.fixture
def made(clip_model, monkeypatch):  # noqa: F811
    monkeypatch.setattr(module, "load_clip", lambda *_: copy.copy(clip_model))
    return lambda **changes: recipe("glyphs", "aevlp", **{**TINY, **changes})


def forbidden(*_):
    raise AssertionError("CLIP was asked")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_embeddings_are_those_of_the_views_and_come_from_the_bank(data, made, tmp_path, monkeypatch, split):
    r, ids = made(), data.splits[split]
    found = embeddings(data, split, r, bank_root=tmp_path)
    clip = module.load_clip()
    for i, row in zip(ids, found, strict=True):
        image = torch.from_numpy(np.array(Image.open(data.paths[i]))).permute(2, 0, 1)
        settings = view_settings(r, clip)
        views = make_views([image], evaluation_plan([image.shape[1:]], settings), settings)[0]
        torch.testing.assert_close(row, clip.encode_images(views).half(), atol=2e-3, rtol=0)
    assert found.dtype == torch.float16 and found.shape == (len(ids), 5, 24)
    assert torch.equal(embeddings(data, split, r, bank_root=False), found)
    monkeypatch.setattr(Eyes, "encode", forbidden)
    assert torch.equal(embeddings(data, split, r, bank_root=tmp_path), found)


def test_a_bank_that_a_killed_writer_left_is_filled(data, made, tmp_path):
    r, clip = made(), module.load_clip()
    whole = embeddings(data, "test", r, bank_root=False)
    bank = open_bank(data, "test", clip, view_settings(r, clip), 0, tmp_path)
    bank.put(0, [7], whole[[1]])
    assert torch.equal(embeddings(data, "test", r, bank_root=tmp_path), whole)
    assert open_bank(data, "test", clip, view_settings(r, clip), 0, tmp_path).complete(0)


def test_evaluation_views_share_a_bank_where_nothing_of_theirs_differs(data, made, tmp_path):
    clip = load_clip("tiny-labeler", "none")

    def opened(split, seed=0, **changes):
        return open_bank(data, split, clip, view_settings(made(**changes), clip), seed, tmp_path).folder

    assert opened("val") == opened("val", seed=1) == opened("val", augment="flip") != opened("test")
    assert opened("train") != opened("train", seed=1) and opened("val") != opened("val", grid=3)


def test_epochs_of_training_are_beside_the_evaluation_views(data, made, tmp_path):
    r = made()
    first, second = (embeddings(data, "train", r, bank_root=tmp_path, epoch=e) for e in (1, 2))
    judged = embeddings(data, "train", r, bank_root=tmp_path)
    assert not torch.equal(first, second) and not torch.equal(first, judged)
    assert len(list(tmp_path.glob("*/epoch_*.f16"))) == 3 and len(list(tmp_path.iterdir())) == 1


def test_a_split_that_is_not_there(data, made, tmp_path):
    assert embeddings(data, "other", made(), bank_root=tmp_path).shape == (0, 5, 24)
