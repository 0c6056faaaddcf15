"""The embedded benchmark: the same pixels everywhere, honest labels, drawing that survives a stop."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from aevlp import glyphs
from aevlp.data import AevlpError, shipped
from aevlp.glyphs import CLASS_NAMES, LETTERS, draw_scene, load

PINNED = {"matplotlib": "3.11.2", "pillow": "13.0.0", "numpy": "2.4.6"}
HASHES = {
    (2025, 0, "train"): "bbb88b9680c90d7a",
    (2025, 1, "train"): "e06b67ee8aa56172",
    (2025, 2499, "train"): "6c2a8cf5fda408eb",
    (2025, 0, "test"): "0b6006116b9db374",
    (7, 0, "captions"): "78436ba27a463be4",
    (11, 0, "letters"): "c67138d51274c706",
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(glyphs.SIZES, "tiny", (50, 30))
    monkeypatch.setattr(glyphs, "_GROUP", 20)


def sha(scene):
    return hashlib.sha256(scene.image.tobytes() + repr(scene.things).encode()).hexdigest()[:16]


@pytest.mark.skipif(any(version(k) != v for k, v in PINNED.items()), reason=f"pixels are pinned at {PINNED}")
@pytest.mark.parametrize(("arguments", "expected"), HASHES.items())
def test_the_same_scene_on_every_machine(arguments, expected):
    seed, index, stream = arguments
    assert sha(draw_scene(seed, index, stream, LETTERS if stream == "letters" else None)) == expected


def test_every_argument_matters():
    images = [draw_scene(*a).image.tobytes() for a in ((1, 0), (2, 0), (1, 1), (1, 0, "test"), (1, 0, "captions"))]
    assert len(set(images)) == len(images)


def test_things_are_as_frequent_and_as_often_together_as_promised():
    labels = np.zeros((1500, len(CLASS_NAMES)))
    for i in range(len(labels)):
        things = draw_scene(3, i).things
        assert len({t.label for t in things}) == len(things) > 0
        labels[i, [t.label for t in things]] = 1
    share = dict(zip(CLASS_NAMES, labels.mean(0), strict=True))
    assert 2.5 <= labels.sum(1).mean() <= 3
    assert min(share.values()) > 0.03 and max(share.values()) > 3 * min(share.values())
    both = lambda a, b: (labels[:, CLASS_NAMES.index(a)] * labels[:, CLASS_NAMES.index(b)]).mean()  # noqa: E731
    assert both("castle", "crown") > 3 * share["castle"] * share["crown"]
    assert both("castle", "keyboard") < share["castle"] * share["keyboard"]


def test_a_thing_stands_out_from_its_ground_and_lies_where_its_box_says(monkeypatch):
    """Against the same scene drawn without painting: pixels differ inside the box only, and differ in lightness."""
    gaps = []
    for i in range(40):
        with_it = np.asarray(draw_scene(4, i).image.convert("L")).astype(int)
        things = draw_scene(4, i).things
        with monkeypatch.context() as m:
            m.setattr(glyphs, "_paint", lambda *_: None)
            without = np.asarray(draw_scene(4, i).image.convert("L")).astype(int)
        if len(things) > 1:
            continue  # what follows a thing draws other numbers when it is left out
        x0, y0, x1, y1 = things[0].box
        outside = np.ones_like(without, bool)
        outside[max(0, y0 - 2) : y1 + 3, max(0, x0 - 2) : x1 + 3] = False
        changed = with_it != without
        assert not changed[outside].any() and changed.any()
        gaps.append(np.abs(with_it - without)[changed].max())
    assert len(gaps) > 3 and min(gaps) > 60


def test_files_hold_what_is_drawn_and_labels_what_is_in_it(tmp_path, small):
    data = load("tiny", tmp_path)
    assert [len(data.splits[s]) for s in ("train", "val", "test")] == [40, 10, 30]
    for row, (index, stream) in {0: (0, "train"), 49: (49, "train"), 50: (0, "test"), 79: (29, "test")}.items():
        scene = draw_scene(2025, index, stream)
        assert np.array_equal(np.asarray(Image.open(data.paths[row])), np.asarray(scene.image))
        assert set(np.flatnonzero(data.truth[row])) == {t.label for t in scene.things}
        for thing in scene.things:
            assert data.extra["object_area"][row, thing.label] == pytest.approx(thing.area)
    assert ((data.observed == 1).sum(1) == 1).all() and (data.truth[data.observed == 1] == 1).all()


def test_an_interrupted_drawing_goes_on(tmp_path, small, monkeypatch):
    whole, drawn, last = load("tiny", tmp_path / "whole"), [], 2
    original = glyphs._draw_group

    def counted(folder, seed, stream, indices):
        if len(drawn) == last:
            raise KeyboardInterrupt
        drawn.append((stream, indices[0]))
        original(folder, seed, stream, indices)

    monkeypatch.setattr(glyphs, "_draw_group", counted)
    with pytest.raises(KeyboardInterrupt):
        load("tiny", tmp_path / "half")
    last = 99
    assert load("tiny", tmp_path / "half").fingerprint == whole.fingerprint
    assert sorted(drawn) == [("test", 0), ("test", 20), ("train", 0), ("train", 20), ("train", 40)]  # none twice
    (tmp_path / "half/tiny-2025-v1/test/00025.png").unlink()
    drawn.clear()
    for _ in range(2):
        assert load("tiny", tmp_path / "half").fingerprint == whole.fingerprint
    assert drawn == [("test", 20)]


def test_two_at_a_time_do_no_harm(tmp_path, small):
    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(lambda _: load("tiny", tmp_path), range(2))
    assert a.fingerprint == b.fingerprint == load("tiny", tmp_path).fingerprint
    assert not list(tmp_path.rglob("*.tmp"))


def test_unknown_size_is_named(tmp_path):
    with pytest.raises(AevlpError, match="'huge'"):
        load("huge", tmp_path)


@pytest.fixture(scope="module")
def clip():
    weights = shipped(glyphs.CLIP_WEIGHTS)
    assert weights.stat().st_size < 8e6
    return open_clip.create_model(glyphs.CLIP_NAME, pretrained=str(weights), load_weights=True).eval()


def test_clip_loads_whole_and_is_cheap(clip):
    stored = load_file(shipped(glyphs.CLIP_WEIGHTS))
    for name, value in clip.state_dict().items():
        assert torch.equal(stored[name].to(value.dtype), value), name
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        clip.encode_image(torch.zeros(1, 3, 64, 64))
    assert counter.get_total_flops() / 2 < 0.05e9


@torch.no_grad()
def test_clip_names_things_that_it_has_not_seen(clip):
    scenes = [draw_scene(5, i, "test") for i in range(150)]
    pixels = np.stack([np.asarray(s.image.resize((64, 64), Image.Resampling.BILINEAR)) for s in scenes])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip.visual.image_mean, clip.visual.image_std))
    image = clip.encode_image((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std, normalize=True)
    prompts = open_clip.get_tokenizer(glyphs.CLIP_NAME)([f"a photo of a {c}" for c in CLASS_NAMES])
    best = (image @ clip.encode_text(prompts, normalize=True).T).argmax(1).tolist()
    hits = np.mean([b in {t.label for t in s.things} for b, s in zip(best, scenes, strict=True)])
    assert hits > 0.7  # a guess is right once in nine


def test_student_starts_from_letters_and_knows_no_class():
    weights = shipped(glyphs.STUDENT_WEIGHTS)
    assert weights.stat().st_size < 8e6
    assert not set(LETTERS) & set(glyphs.GLYPHS.values())
    stored = load_file(weights)
    model = timm.create_model("glyphnet", pretrained=True, num_classes=len(CLASS_NAMES))
    for name, value in model.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(stored[name].to(value.dtype), value), name
    assert stored["fc.weight"].shape[0] == len(LETTERS)
    assert model.fc.weight.shape[0] == len(CLASS_NAMES)
