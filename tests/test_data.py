"""Decoding against Pillow's transposition, draws against loops with numpy's legacy generator, loading with workers."""

import hashlib
import os
import shutil
import struct
import subprocess
import sys
import threading
import warnings
from contextlib import nullcontext
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from aevlp import data as module
from aevlp.data import (
    AevlpError,
    LabelledImages,
    _content,
    _pool,
    decode,
    decoded_bytes,
    epoch_order,
    home,
    image_loader,
    in_threads,
    nearest,
    observe,
    progress,
    sample_single_positives,
    threads,
    train_val_split,
)

RNG = np.random.default_rng(0)
SCENE = np.kron(RNG.integers(0, 256, (5, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)  # 40 x 64


def legacy_draw(truth, seed=1200):
    """The published recipe, label by label: -1/+1, positives shuffled, then negatives; one and none are kept."""
    rng, drawn = np.random.RandomState(seed), []
    for row in np.where(np.asarray(truth) == 1, 1, -1):
        yes, no = np.nonzero(row == 1)[0], np.nonzero(row == -1)[0]
        rng.shuffle(yes)
        rng.shuffle(no)
        new = [0] * len(row)
        for c in yes[:1]:
            new[c] = 1
        drawn.append(new)
    return np.array(drawn)


def labelled(n=600, classes=6, density=0.4, extra=None):
    truth = (np.random.default_rng(3).random((n, classes)) < density).astype(np.int8)
    train, val = train_val_split(n - n // 4)
    splits = {"train": train, "val": val, "test": np.arange(n - n // 4, n)}
    paths = [f"/somewhere/{i:04d}.png" for i in range(n)]
    return LabelledImages("x", paths, [f"c{i}" for i in range(classes)], truth * 0, truth, splits, extra or {})


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation_is_what_pillow_shows(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(SCENE).save(path, exif=exif)
    with Image.open(path) as im:
        expected = np.asarray(ImageOps.exif_transpose(im).convert("RGB"))
    assert np.array_equal(decode(path), expected)
    assert decode(path).shape[:2] == ((40, 64) if orientation < 5 else (64, 40))


def test_a_broken_exif_block_leaves_the_picture_as_it_is(tmp_path):
    path, plain = tmp_path / "a.jpg", tmp_path / "plain.jpg"
    Image.fromarray(SCENE).save(path, quality=95, exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff" + b"\x07" * 40)
    Image.fromarray(SCENE).save(plain, quality=95)
    assert np.array_equal(decode(path), decode(plain))
    for error in (OSError, ValueError, SyntaxError, KeyError, TypeError, struct.error):

        def broken(error=error):
            raise error

        assert module._orientation(SimpleNamespace(getexif=broken)) == 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LA", "RGBA", "PA"])
def test_modes_and_formats_give_rgb(tmp_path, mode):
    im = Image.fromarray(SCENE).convert("P" if mode == "PA" else mode)
    im = im.convert("PA") if mode == "PA" else im
    reference = np.asarray(im.convert("RGB"))
    for suffix in ("png", "tif", "jpg", "bmp", "webp", "gif"):
        path = tmp_path / f"{mode}.{suffix}"
        try:
            im.save(path, **({"lossless": True} if suffix == "webp" else {}))
        except (OSError, ValueError):  # the format has no such mode
            continue
        found = decode(path)
        assert found.shape == (40, 64, 3) and found.dtype == np.uint8 and found.flags.c_contiguous
        if suffix in ("png", "tif", "bmp"):
            assert np.array_equal(found, reference), path


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_colour_jpegs_are_pillows(tmp_path, subsampling, progressive):
    for quality, (height, width) in ((30, (1, 1)), (75, (17, 33)), (95, (40, 64))):
        path = tmp_path / f"{quality}.jpg"
        Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            path, quality=quality, subsampling=subsampling, progressive=progressive
        )
        with Image.open(path) as im:
            assert im.mode == "RGB" and np.array_equal(decode(path), np.asarray(im))


def test_a_cut_colour_jpeg_is_refused_wherever_it_ends(tmp_path):
    Image.fromarray(SCENE).save(tmp_path / "whole.jpg", quality=90)
    whole = (tmp_path / "whole.jpg").read_bytes()
    assert decode(tmp_path / "whole.jpg").shape == SCENE.shape
    for end in range(2, len(whole) - 2, max(1, len(whole) // 25)):
        (tmp_path / "cut.jpg").write_bytes(whole[:end])
        with pytest.raises(AevlpError, match="cut.jpg"):
            decode(tmp_path / "cut.jpg")


def test_alpha_is_laid_over_white(tmp_path):
    alpha = np.full((40, 64, 1), 255, np.uint8)
    alpha[:, 32:] = 0
    alpha[:, 16:32] = 51
    Image.fromarray(np.dstack([SCENE, alpha])).save(tmp_path / "a.png")
    share = alpha / 255.0
    expected = SCENE * share + 255 * (1 - share)
    assert np.abs(decode(tmp_path / "a.png") - expected).max() <= 1
    palette = Image.fromarray(SCENE).quantize(6)
    palette.save(tmp_path / "p.png", transparency=2)
    hidden = np.asarray(palette) == 2
    assert hidden.any() and (decode(tmp_path / "p.png")[hidden] == 255).all()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_not_cut(tmp_path, suffix):
    deep = np.linspace(0, 65535, 40 * 64).round().astype(np.uint16).reshape(40, 64)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(deep).save(path)
    expected = np.round(deep / 257.0)
    assert np.abs(decode(path)[..., 1] - expected).max() <= 1
    assert decode(path).min() == 0 and decode(path).max() == 255


def test_of_an_animation_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (20, 10), c) for c in ("red", "blue")]
    for suffix in ("gif", "png", "webp"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
        assert np.abs(decode(tmp_path / f"a.{suffix}").astype(int) - (255, 0, 0)).max() < 8


def test_the_draw_is_the_published_one():
    truth = (np.random.default_rng(5).random((4000, 20)) < 0.08).astype(np.int8)
    drawn = sample_single_positives(truth)
    assert np.array_equal(drawn, legacy_draw(truth)) and drawn.dtype == np.int8
    assert (truth.sum(1) == 0).any() and not drawn[truth.sum(1) == 0].any()
    assert np.array_equal(sample_single_positives(truth.astype(float)), drawn)
    assert not np.array_equal(sample_single_positives(truth, seed=1), drawn)
    three = sample_single_positives(truth, k=3)
    assert (three >= drawn).all() and np.array_equal(three.sum(1), np.minimum(truth.sum(1), 3))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 12, 13, 5717, 5994])
def test_the_split_is_the_published_one(n):
    train, val = train_val_split(n)
    n_val = int(np.round(0.2 * n))
    order = list(np.random.RandomState(1200).permutation(n))
    assert train.tolist() == sorted(order[: n - n_val])
    assert val.tolist() == (sorted(order[-n_val:]) if n_val else [])


def test_uniform_observation_draws_training_and_test_from_fresh_streams():
    data = labelled()
    found = observe(data)
    n = 450
    assert np.array_equal(found.observed[:n], legacy_draw(data.truth[:n]))
    assert np.array_equal(found.observed[n:], legacy_draw(data.truth[n:]))


def agree(counts, expected):
    """Chi-square against the expected counts, far in the tail: seeds are fixed, so this cannot flicker."""
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 2 * len(counts) + 15, (counts, expected)


@pytest.mark.parametrize("how", ["uniform", "size", "frequency"])
def test_single_positives_follow_the_stated_probabilities(how):
    n, weights = 8000, np.array([8.0, 4.0, 2.0, 1.0])
    truth = np.ones((n, 4), np.int8)
    truth[: n // 2, 3] = 0  # rows without the last class: the others share its part
    data = LabelledImages("x", [f"/{i}" for i in range(n)], "abcd", truth * 0, truth, {"train": np.arange(n)})
    data = replace(data, extra={"object_area": np.tile(weights, (n, 1))})
    observed = observe(data, how, seed=7).observed
    assert (observed.sum(1) == 1).all() and (observed <= truth).all()
    p = {"uniform": np.ones(4), "size": weights, "frequency": truth.sum(0)}[how].astype(float)
    agree(observed[n // 2 :].sum(0), n / 2 * p / p.sum())
    agree(observed[: n // 2, :3].sum(0), n / 2 * p[:3] / p[:3].sum())


def test_second_label_is_drawn_without_replacement():
    n, w = 20000, np.array([4.0, 2.0, 1.0])
    truth = np.ones((n, 3), np.int8)
    data = LabelledImages("x", [f"/{i}" for i in range(n)], "abc", truth * 0, truth, {"train": np.arange(n)})
    left_out = 1 - observe(replace(data, extra={"object_area": np.tile(w, (n, 1))}), "size", k=2).observed
    p = w / w.sum()
    pairs = [sum(p[a] * p[b] / (1 - p[a]) for a, b in ((i, j), (j, i))) for i, j in ((1, 2), (0, 2), (0, 1))]
    agree(left_out.sum(0), n * np.array(pairs))


def test_confidence_observes_the_most_probable_positive():
    data = labelled()
    scores = np.random.default_rng(9).random(data.truth.shape)
    found = observe(data, "confidence", scores=scores, k=2).observed
    for row, truth, score in zip(found, data.truth, scores, strict=True):
        best = sorted(np.flatnonzero(truth), key=lambda c: -score[c])[:2]
        assert sorted(np.flatnonzero(row)) == sorted(best)


def test_fractions_of_positives_and_negatives():
    data = labelled(n=4000)
    found = observe(data, "fraction", positive_fraction=0.7, negative_fraction=0.2).observed
    assert not (found[data.truth == 1] == -1).any() and not (found[data.truth == 0] == 1).any()
    assert abs((found[data.truth == 1] == 1).mean() - 0.7) < 0.02
    assert abs((found[data.truth == 0] == -1).mean() - 0.2) < 0.02
    everything = observe(data, "fraction", positive_fraction=1, negative_fraction=1).observed
    assert np.array_equal(everything, np.where(data.truth == 1, 1, -1))


def test_a_fraction_is_a_half_unless_it_is_named_and_may_be_nothing():
    data = labelled(n=4000)
    found = observe(data, "fraction").observed
    assert abs((found[data.truth == 1] == 1).mean() - 0.5) < 0.02
    assert abs((found[data.truth == 0] == -1).mean() - 0.5) < 0.02
    assert not observe(data, "fraction", positive_fraction=0, negative_fraction=0).observed.any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("how", ["size", "confidence"])
def test_weights_are_shares_and_of_nothing_nothing_is_chosen(how):
    """A class of weight 0 is drawn where there is no other; a row without positives stays empty."""
    n, weights = 20_000, np.array([8.0, 0.0, 2.0])
    truth = np.ones((n, 3), np.int8)
    truth[0], truth[1] = 0, [0, 1, 0]
    data = LabelledImages("x", [f"/{i}" for i in range(n)], "abc", truth * 0, truth, {"train": np.arange(n)})
    found = []
    for scale in (1, 2.0**-33, 2.0**20):
        given = np.tile(weights * scale, (n, 1))
        found.append(observe(replace(data, extra={"object_area": given}), how, scores=given).observed)
        assert np.array_equal(found[-1], found[0]) and found[-1].dtype == np.int8
    assert not found[0][0].any() and found[0][1].tolist() == [0, 1, 0] and not found[0][2:, 1].any()
    assert (found[0][1:].sum(1) == 1).all()


@pytest.mark.parametrize("how", ["uniform", "size", "frequency", "fraction"])
def test_observation_is_a_function_of_the_seed(how):
    data = labelled(extra={"object_area": np.random.default_rng(1).random((600, 6))})
    assert np.array_equal(observe(data, how, seed=4).observed, observe(data, how, seed=4).observed)
    assert not np.array_equal(observe(data, how, seed=4).observed, observe(data, how, seed=5).observed)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"how": "guess"}, "unknown observation"),
        ({"how": "size"}, "object_area"),
        ({"how": "confidence"}, "scores"),
        ({"how": "confidence", "scores": np.full((600, 6), np.nan)}, "finite"),
        ({"how": "confidence", "scores": np.ones((3, 3))}, "shape"),
        ({"k": 0}, "k=0"),
        ({"k": 1.5}, "k=1.5"),
        ({"how": "fraction", "positive_fraction": 1.5}, "fractions"),
        ({"how": "fraction", "negative_fraction": float("nan")}, "fractions"),
        ({"how": "confidence", "scores": np.full((600, 6), -1e-9)}, "not negative"),
    ],
)
def test_wrong_observations_are_refused(change, says):
    with pytest.raises(AevlpError, match=says):
        observe(labelled(), **change)
    with pytest.raises(AevlpError, match="unknown"):
        observe(replace(labelled(), truth=None))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"observed": np.zeros((600, 5))}, "shape"),
        ({"observed": np.full((600, 6), 2)}, "row 0, column 0"),
        ({"truth": np.full((600, 6), -2)}, "the first -2 at row 0, column 0"),
        ({"truth": np.full((600, 6), np.nan)}, "nan"),
        ({"class_names": ["a"] * 6}, "class names"),
        ({"splits": {"dev": [0]}}, "dev"),
        ({"splits": {"train": [600]}}, "below 600"),
        ({"splits": {"train": [-1]}}, "below 600"),
        ({"splits": {"train": [1, 1]}}, "twice"),
        ({"splits": {"train": [2, 1]}}, "sorted"),
        ({"splits": {"train": [1], "val": [1]}}, "two splits"),
        ({"splits": {"train": [[1, 2]]}}, "sorted positions"),
        ({"observed": np.where(np.arange(3600).reshape(600, 6) >= 3599 - 6, 3, 0)}, "3 at row 598, column 5"),
    ],
)
def test_a_wrong_set_is_refused(change, says):
    with pytest.raises(AevlpError, match=says):
        replace(labelled(), **change)


def test_targets_are_the_truth_or_what_is_observed():
    data = observe(labelled(), "fraction")
    assert np.array_equal(data.targets("val"), data.truth[data.splits["val"]])
    unknown = replace(data, truth=None)
    assert np.array_equal(unknown.targets("test"), (data.observed == 1)[data.splits["test"]])
    assert data.summary()["images"].tolist() == [len(data.splits[s]) for s in ("train", "val", "test")]


def test_fingerprint_follows_content_and_not_place():
    data = labelled()
    moved = replace(data, paths=[p.replace("/somewhere", "/else/where") for p in data.paths])
    assert moved.fingerprint == data.fingerprint
    truth = data.truth.copy()
    truth[0, 0] ^= 1
    renamed = replace(data, paths=[*data.paths[:-1], "/somewhere/other.png"])
    others = [replace(data, truth=truth), replace(data, name="y"), renamed, replace(data, splits={"train": [0]})]
    assert len({d.fingerprint for d in [data, *others]}) == 5


@pytest.mark.parametrize("known", [True, False])
def test_the_fingerprint_is_that_of_earlier_releases(known):
    data = observe(labelled())
    data = data if known else replace(data, truth=None)
    names = "\n".join(f"{i:04d}.png" for i in range(600))
    whole = repr(("x", tuple(f"c{i}" for i in range(6)))).encode() + names.encode() + data.observed.tobytes()
    whole += data.truth.tobytes() if known else b"none"
    for split in ("test", "train", "val"):
        whole += split.encode() + b"".join(int(i).to_bytes(8, "little") for i in data.splits[split])
    assert data.fingerprint == hashlib.sha256(whole).hexdigest()[:12]


def test_a_set_does_not_change_and_is_itself_alone():
    data = labelled()
    with pytest.raises(FrozenInstanceError):
        data.name = "y"
    assert len({data, data, replace(data)}) == 2 and not data.own
    assert data.clean("nowhere").tolist() == [] and observe(replace(data, splits={})).observed.sum() == 0


def test_a_summary_counts():
    truth = np.array([[1, 1, 0], [0, 0, 0], [1, -1, 0], [0, 1, 1], [1, 1, 0]], np.int8)
    observed = np.array([[1, 0, 0], [0, 0, 0], [-1, 1, 1], [0, 0, 1], [1, 0, 0]], np.int8)
    splits = {"train": [0, 1, 2], "val": [3], "test": []}
    found = LabelledImages("x", list("abcde"), "abc", observed, truth, splits).summary()
    assert found.loc["train"].tolist() == [3, 2, 1.0, 1, 1.0] and found.loc["val"].tolist() == [1, 2, 2.0, 0, 1.0]
    assert found.loc["test"].fillna(-1).tolist() == [0, 0, -1, 0, -1] and found.index.tolist() == list(splits)
    thirds = replace(labelled(n=4), splits={"train": [0, 1, 2]})
    share = (thirds.truth[:3] == 1).sum() / 3
    assert thirds.summary().loc["train", "positives per image"] == round(share, 2) != round(share, 3)
    seen = np.where(np.arange(24).reshape(4, 6) < 1, 1, 0)
    assert replace(thirds, observed=seen).summary().loc["train", "observed per image"] == 0.33


def test_an_unknown_truth_is_neither_drawn_nor_clean():
    data = labelled()
    truth = data.truth.copy()
    truth[::3, 2] = -1
    data = replace(data, truth=truth)
    val = data.splits["val"]
    assert data.clean("val").tolist() == [i % 3 > 0 for i in val]
    assert not replace(data, truth=None).clean("val").any() and len(data.clean("test")) == len(data.splits["test"])
    assert np.array_equal(data.targets("val"), truth[val])
    assert np.array_equal(observe(data).observed[:450], legacy_draw(truth[:450]))
    everything = observe(data, "fraction", positive_fraction=1, negative_fraction=1).observed
    assert np.array_equal(everything, np.select([truth == 1, truth == 0], [1, -1], 0))
    assert data.summary().loc["val", "positives per image"] == round(float((truth[val] == 1).sum(1).mean()), 2)


def test_own_pictures_are_known_by_their_content(tmp_path, monkeypatch):
    monkeypatch.setenv("AEVLP_HOME", str(tmp_path / "home"))
    read = []
    monkeypatch.setattr("aevlp.data._content", lambda path, real=_content: read.append(Path(path).name) or real(path))

    def there(folder):
        paths = [str(folder / f"{i}.bmp") for i in range(4)]
        return LabelledImages("own", paths, "a", np.ones((4, 1)), None, {"train": np.arange(4)}, own=True)

    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(one / f"{i}.bmp")
    first = there(one)
    assert first.pictures == there(one).pictures and sorted(read) == [f"{i}.bmp" for i in range(4)]  # hashed once
    shutil.copytree(one, two)
    assert there(two).fingerprint == first.fingerprint  # wherever they lie
    read.clear()
    was = os.stat(one / "2.bmp")
    Image.new("RGB", (8, 8), (9, 0, 0)).save(one / "2.bmp")
    os.utime(one / "2.bmp", ns=(was.st_atime_ns, was.st_mtime_ns))
    assert os.stat(one / "2.bmp").st_size == was.st_size  # the same size and time, another picture
    assert there(one).pictures != first.pictures and there(one).fingerprint != first.fingerprint and read == ["2.bmp"]
    digests = [hashlib.sha256((one / f"{i}.bmp").read_bytes()).digest()[:16] for i in range(4)]
    assert there(one).pictures == hashlib.sha256(b"".join(digests)).hexdigest()[:12] and read == ["2.bmp"]
    shutil.copy(two / "2.bmp", one / "2.bmp")
    assert there(one).fingerprint == first.fingerprint
    assert not len(there(one).suspects())
    (one / "3.bmp").unlink()
    (one / "0.bmp").write_bytes((one / "0.bmp").read_bytes()[:-1])
    assert there(one).pictures != first.pictures and there(one).suspects().tolist() == [0, 3]
    next((tmp_path / "home/pictures").iterdir()).write_bytes(b"torn")
    assert there(two).fingerprint == first.fingerprint
    official = replace(first, own=False)
    read.clear()
    assert official.pictures == official.fingerprint and not read


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for i in range(11):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (10 + i, 20 - i), (i, 2 * i, 3 * i)).save(paths[-1])
    return LabelledImages("p", paths, "a", np.ones((11, 1)), None, {"train": np.arange(11)})


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_keeps_the_order(pictures, workers):
    order = epoch_order(pictures.splits["train"], seed=3, epoch=2)
    loader = image_loader(pictures, pictures.splits["train"], 4, order=order, workers=workers)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert torch.cat([ids for _, ids in batches]).tolist() == order.tolist()
    for images, ids in batches:
        assert ids.dtype == torch.long
        for image, i in zip(images, ids.tolist(), strict=True):
            assert image.dtype == torch.uint8 and image.shape == (3, 20 - i, 10 + i)
            assert image[:, 0, 0].tolist() == [i, 2 * i, 3 * i]


def test_threads_of_the_pool_work_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    _pool.cache_clear()
    try:
        assert in_threads(lambda i: i, range(6)) == list(range(6))  # no torch operation: it would be their first
        assert set(
            in_threads(lambda i: torch.zeros(10**6).add_(i) is not None and torch.get_num_threads(), range(6))
        ) == {1}
        assert torch.get_num_threads() == 3
        later = []
        thread = threading.Thread(target=lambda: (torch.zeros(10**6).add_(1), later.append(torch.get_num_threads())))
        thread.start(), thread.join()
        assert later == [3], "a thread that is started afterwards works alone as well"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_one_sentence_from_any_process(pictures, workers):
    Path(pictures.paths[5]).write_bytes(b"no picture")
    with pytest.raises(AevlpError) as e:
        list(image_loader(pictures, np.arange(11), 2, workers=workers))
    assert str(e.value).startswith(pictures.paths[5]) and "\n" not in str(e.value)


def test_epoch_order_is_a_function_of_seed_and_epoch():
    ids = np.arange(50, 150)
    orders = {(s, e): epoch_order(ids, s, e).tolist() for s in range(3) for e in range(1, 4)}
    assert len({tuple(o) for o in orders.values()}) == 9
    assert all(sorted(o) == ids.tolist() for o in orders.values())
    assert epoch_order(ids, 2, 3).tolist() == orders[2, 3]


def test_a_loader_without_more_words_goes_through_the_positions_as_they_are(pictures):
    loader = image_loader(pictures, [7, 2, 9], 2)
    assert [ids.tolist() for _, ids in loader] == [[7, 2], [9]]
    assert loader.loader.num_workers == 0 and not loader.loader.pin_memory
    assert [ids.tolist() for _, ids in image_loader(pictures, None, [[4], [1, 0]])] == [[4], [1, 0]]


def test_two_items_are_work_for_two_threads():
    with threads(2):
        found = in_threads(lambda i: (i, threading.get_ident()), "ab")
        assert [i for i, _ in found] == ["a", "b"] and threading.get_ident() not in {t for _, t in found}
        assert in_threads(lambda i: threading.get_ident(), "a") == [threading.get_ident()]
    with threads(1):
        assert set(in_threads(lambda i: threading.get_ident(), "abc")) == {threading.get_ident()}


def test_threads_are_so_many_inside_and_as_many_as_before_behind():
    before = torch.get_num_threads()
    with threads(before + 2):
        with threads(0):
            assert torch.get_num_threads() == before + 2
        with pytest.raises(KeyError), threads(1):
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("missing", "kernels", "says"),
    [(None, "AVX2", "portable"), (None, "AVX512", "native AVX512"), ("MKL_CBWR", "AVX2", "native AVX2")],
)
def test_arithmetic_is_portable_where_all_was_asked_for_and_is_in_use(monkeypatch, missing, kernels, says):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
    for name, value in module.PORTABLE.items():
        monkeypatch.setenv(name, "other" if name == missing else value)
    assert module.arithmetic() == says


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("AEVLP_HOME", str(tmp_path / "here"))
    assert home() == tmp_path / "here"
    monkeypatch.delenv("AEVLP_HOME")
    assert home() == Path(os.path.abspath(__file__)).parents[1] / "data"


def test_a_checkout_has_settings_and_notebooks_and_all_else_is_installed(monkeypatch, tmp_path):
    monkeypatch.delenv("AEVLP_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    package = tmp_path / "site/aevlp"
    (package / "assets/classnames").mkdir(parents=True)
    (package / "assets/classnames/voc.txt").write_text("installed")
    monkeypatch.setattr(module, "_PACKAGE", package)
    for has in ((), ("settings.ini",), ("nbs",)):
        (package.parent / "settings.ini").unlink(missing_ok=True)
        for name in has:
            (package.parent / name).mkdir() if name == "nbs" else (package.parent / name).write_text("")
        assert home() == tmp_path / "me/.cache/aevlp", has
        assert module.shipped("classnames/voc.txt").read_text() == "installed"
    (package.parent / "settings.ini").write_text("")
    assert home() == package.parent / "data"
    with pytest.raises(AevlpError, match=f"{package.parent}/data/classnames/voc.txt is missing"):
        module.shipped("classnames/voc.txt")
    (package.parent / "data/classnames").mkdir(parents=True)
    (package.parent / "data/classnames/voc.txt").write_text("of the checkout")
    assert module.shipped("classnames/voc.txt").read_text() == "of the checkout"
    assert module.open_clip_file("https://host/a/ViT-B-16.pt") == tmp_path / "me/.cache/clip/ViT-B-16.pt"


def test_the_nearest_name_is_named_however_far_it_is():
    assert nearest("tarin", ["test", "train", "val"]) == "train" and nearest("zzz", ["abc"]) == "abc"
    assert nearest(3, []) is None


# --- files


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    most = 3 * 2**20 // 2
    for size in (0, 1, most):
        (tmp_path / "a").write_bytes(os.urandom(size))
        assert module.read_bytes(tmp_path / "a", most) == (tmp_path / "a").read_bytes()
    with open(tmp_path / "a", "wb") as file:
        file.truncate(2**43)  # of no bytes on the disk; nobody has memory for them
    with pytest.raises(ValueError, match="^it is larger than 1.5 MB$"):
        module.read_bytes(tmp_path / "a", most)
    (tmp_path / "a").write_bytes(bytes(most + 1))
    with pytest.raises(ValueError, match="^it is larger than 1.5 MB$"):
        module.read_bytes(tmp_path / "a", most)


def test_a_file_takes_the_old_one_s_place_when_it_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    path, did = tmp_path / "a.json", []
    fsync, put = os.fsync, os.replace

    def synced(handle):
        at = Path(os.readlink(f"/proc/self/fd/{handle}"))
        did.append(("folder", at) if at.is_dir() else ("file", at.read_text(), path.exists() and path.read_text()))
        fsync(handle)

    path.write_text("old")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (did.append("replace"), put(*names)))
    handles = len(os.listdir("/proc/self/fd"))
    module.write_json(path, {"a": [1]})
    text = '{\n "a": [\n  1\n ]\n}\n'
    assert path.read_text() == text and did == [("file", text, "old"), "replace", ("folder", tmp_path)]
    assert os.stat(path).st_mode & 0o777 == 0o666 & ~umask() and len(os.listdir("/proc/self/fd")) == handles
    for error in (KeyError, OSError):
        with pytest.raises((KeyError, AevlpError)), module.replacing(path) as file:
            file.write(b"half")
            raise error
        assert path.read_text() == text and os.listdir(tmp_path) == ["a.json"]


def umask():
    os.umask(mask := os.umask(0))
    return mask


def test_a_fresh_file_is_neither_an_old_one_nor_a_link(tmp_path):
    (tmp_path / "old").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("old", "link"):
        with pytest.raises(FileExistsError):
            module.fresh(tmp_path / name)
    assert (tmp_path / "old").read_text() == "mine" and not (tmp_path / "elsewhere").exists()


def test_progress_appears_only_where_it_takes_long(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress(range(3), "short")) == [0, 1, 2] and capsys.readouterr().err == ""
    with progress(desc="long", total=9) as bar:
        bar.appears = 0
        bar.set_postfix_str("mAP 50.0")
        bar.update(4)
        bar.update(2)
        assert bar.bar.n == bar.n == 6 and "mAP 50.0" in str(bar.bar) and "6/9" in str(bar.bar)
    assert bar and "long" in capsys.readouterr().err


class Bar:
    def __init__(self, told, **kw):
        self.told = told
        told.append(kw)

    def update(self, n):
        self.told.append(n)

    def set_postfix_str(self, text):
        self.told.append(text)

    def close(self):
        self.told.append("closed")


@pytest.fixture
def clock(monkeypatch):
    """The time in a list that a test may change, and what bars are told."""
    now, told = [100.0], []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(module, "_bar", lambda began, **kw: Bar(told, began=began, **kw))
    monkeypatch.delenv("SERVER_SOFTWARE", raising=False)
    return now, told


def test_a_bar_in_a_terminal_is_as_wide_as_its_window(monkeypatch):
    told = []
    monkeypatch.setattr(module, "tqdm", type("Told", (Bar,), {"__init__": lambda self, **kw: told.append(kw)}))
    monkeypatch.setattr(module.sys, "stderr", SimpleNamespace(isatty=lambda: True))
    module._bar(100.0, total=4)
    assert told == [dict(dynamic_ncols=True, total=4)]


def test_progress_is_shown_from_the_third_second_on(clock):
    now, told = clock
    for item, at in zip(bar := progress("abcd", "letters", unit="B"), (102.0, 102.5, 103.0, 103.0), strict=True):
        now[0] = at
        bar.set_postfix_str(item)
    assert told == [
        dict(began=100.0, total=4, initial=2, postfix="b", desc="letters", leave=False, unit="B"),
        *("c", 1, "d", 1, "closed"),
    ]
    for made, total in ((progress("ab"), 2), (progress(iter("ab"), total=9), 9), (progress("abc", total=5), 5)):
        assert made.total == total and made.n == 0
    assert progress(iter("ab")).total is None is progress().total


def test_without_a_terminal_progress_is_a_line_a_minute(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with progress(range(8), "letters") as bar:
        for at in (101, 110, 120, 169, 170, 171, 230):
            now[0] = at
            bar.update()
            bar.set_postfix_str(f"mAP {at}")
    said = capsys.readouterr().err.splitlines()
    assert said == [  # 2 steps in 10 seconds: 6 in 30; 5 in 70: 3 in 42; 7 in 130: 1 in 18
        "letters: 2 of 8, 00:30 left, mAP 101",
        "letters: 5 of 8, 00:42 left, mAP 169",
        "letters: 7 of 8, 00:18 left, mAP 171",
    ]


def test_progress_is_not_drawn_on_a_page(clock, monkeypatch):
    now, told = clock
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5")
    for _ in progress("abc"):
        now[0] += 100
    assert told == []


# --- what decoding takes


def head(format, mode, info=(), orientation=1):
    """What is known of a picture of 3 x 5 pixels before it is decoded."""

    def exif():
        assert format != "PNG" or "exif" in info, "a PNG would be decoded to look for it"
        return {0x0112: orientation}

    return SimpleNamespace(
        width=3, height=5, mode=mode, format=format, info=dict.fromkeys(info), getexif=exif, getbands=lambda: mode
    )


@pytest.mark.parametrize(
    ("im", "whole", "reduced"),
    [  # bytes a pixel: held by Pillow + its decoder + the result
        (head("PNG", "1"), 1 + 3, 1 + 3),
        (head("PNG", "L"), 1 + 3, 1 + 3),
        (head("GIF", "P"), 1 + 3, 1 + 3),
        (head("PNG", "I;16"), 2 + 3, 2 + 3),
        (head("TIFF", "I;16B"), 2 + 4 + 3, 2 + 4 + 3),
        (head("PNG", "RGB"), 4 + 3, 4 + 3),
        (head("PNG", "RGB", ["exif"], 6), 4 + 6, 4 + 6),
        (head("PNG", "RGB", ["exif"]), 4 + 3, 4 + 3),
        (head("TIFF", "RGB", (), 3), 4 + 4 + 6, 4 + 4 + 6),
        (head("WEBP", "RGBA"), 4 + 9 + 3, 4 + 9 + 3),
        (head("AVIF", "RGB"), 4 + 3 + 3, 4 + 3 + 3),
        (head("JPEG", "RGB"), 1 + 3, 1),
        (head("JPEG", "RGB", (), 8), 1 + 6, 1),
        (head("JPEG", "L"), 1 + 3, 1),
        (head("JPEG", "CMYK"), 4 + 3, 1),
        (head("JPEG", "RGB", ["progressive"]), 1 + 6 + 3, 1 + 6),
        (head("JPEG", "L", ["progressive"]), 1 + 2 + 3, 1 + 2),
    ],
)
def test_what_a_picture_costs(im, whole, reduced, monkeypatch):
    assert module._cost(im, None) == module._cost(im, 2) == 15 * whole
    monkeypatch.setattr(module, "SMALL_PIXELS", 14)
    assert module._cost(im, None) == 15 * whole and module._cost(im, 2) == 15 * reduced


def test_pictures_above_two_million_pixels_are_reduced_where_a_side_is_named():
    sizes = {(2000, 1000): False, (666_667, 3): True}
    for (width, height), reduced in sizes.items():
        im = SimpleNamespace(width=width, height=height)
        assert module._reduces(im, 64) == reduced and not module._reduces(im, None)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_picture_is_reduced_by_whole_factors_of_each_side(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(module, "SMALL_PIXELS", 10_000)
    smooth = Image.fromarray(SCENE).resize((700, 900), Image.Resampling.BICUBIC)
    for width, height in ((200, 300), (300, 200), (700, 900)):
        path = tmp_path / f"{width}.{suffix}"
        smooth.resize((width, height)).save(path)
        with Image.open(path) as im:
            im.draft("RGB", (128, 128))  # a JPEG is decoded at a half, a quarter or an eighth
            expected = np.asarray(im.convert("RGB").reduce((im.width // 128, im.height // 128)))
        found = decode(path, 128)
        assert np.array_equal(found, expected)
        assert found.nbytes <= decoded_bytes(path, 128) == 3 * min(width, 256) * min(height, 256)
        assert decoded_bytes(path) == 3 * width * height == decode(path).nbytes


def test_pixels_are_converted_a_quarter_of_a_million_at_a_time(monkeypatch):
    parts = []
    monkeypatch.setattr(module, "_rgb", lambda im: parts.append(im.size) or im.convert("RGB"))
    grey = RNG.integers(0, 256, (1000, 1024), dtype=np.uint8)
    found = module._converted(Image.fromarray(grey), (1, 1))
    assert np.array_equal(found, np.repeat(grey[..., None], 3, 2)) and parts == [(1024, 256)] * 3 + [(1024, 232)]
    parts.clear()
    module._converted(Image.new("L", (300_000, 3)), (1, 1))
    assert parts == [(300_000, 1)] * 3


def test_colour_jpegs_alone_are_read_by_torchvision(tmp_path, monkeypatch):
    asked, real = [], module._by_torchvision
    monkeypatch.setattr(module, "_by_torchvision", lambda path: asked.append(Path(path).name) or real(path))
    for name, mode in (("rgb.jpg", "RGB"), ("grey.jpg", "L"), ("cmyk.jpg", "CMYK"), ("rgb.png", "RGB"), ("p.gif", "P")):
        Image.fromarray(SCENE).convert(mode).save(tmp_path / name)
        decode(tmp_path / name)
    assert asked == ["rgb.jpg"]
    with Image.open(tmp_path / "rgb.jpg") as im:
        assert np.array_equal(real(tmp_path / "rgb.jpg"), np.asarray(im))
    assert real(tmp_path / "rgb.png") is None


def test_a_broken_jpeg_is_tried_by_pillow_where_that_is_not_too_large(tmp_path, monkeypatch):
    Image.fromarray(SCENE).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-200])
    for most, says in ((7 * 40 * 64, "truncated"), (7 * 40 * 64 - 1, "broken or unusual, and large")):
        monkeypatch.setattr(module, "MAX_BYTES", most)
        with pytest.raises(AevlpError, match=f"a.jpg.*{says}"):
            decode(tmp_path / "a.jpg")


def test_what_takes_more_than_a_quarter_of_the_memory_is_decoded_alone(tmp_path, monkeypatch):
    Image.fromarray(SCENE).save(tmp_path / "a.png")
    took = []
    monkeypatch.setattr(module, "_one_large", lambda process: took.append(process) or nullcontext())
    for most, alone in ((4 * 7 * 40 * 64, False), (4 * 7 * 40 * 64 - 4, True)):
        monkeypatch.setattr(module, "MAX_BYTES", most)
        took.clear()
        assert np.array_equal(decode(tmp_path / "a.png"), SCENE)
        assert took == ([os.getpid()] if alone else [])


def test_sixteen_bits_are_rounded():
    assert np.array_equal(module._8_BITS, np.round(np.arange(2**16) / 257))
    for low, high in ((0, 65535), (1, 65534)):
        found = np.asarray(module._rgb(Image.fromarray(np.array([[low, high]], np.int32))))
        assert found[0, :, 0].tolist() == [0, 255]
    for low, high in ((-1, 9), (0, 65536), (-1, 65536)):
        with pytest.raises(ValueError, match="32-bit grey values"):
            module._rgb(Image.fromarray(np.array([[low, high]], np.int32)))


def test_what_is_no_picture_is_said(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "byte.png").write_bytes(b"B")
    says = {"missing.png": "does not exist; put it there", "empty.png": "is empty; download", ".": "is a folder or"}
    for name, said in (says | {"byte.png": "not a picture in a known format"}).items():
        for reads in (decode, decoded_bytes):
            with pytest.raises(AevlpError, match=said):
                reads(tmp_path / name)


def test_pillow_s_warnings_stay_inside(tmp_path, monkeypatch, pictures):
    def warns(path, side=None, real=module._decode):
        warnings.warn("Corrupt EXIF data", stacklevel=1)
        return real(path, side)

    monkeypatch.setattr(module, "_decode", warns)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(pictures.paths[0])
        assert len(list(image_loader(pictures, [0, 1, 2], 2))) == 2 and module.Images(pictures.paths)[3][1] == 3


def test_all_formats_are_known_to_a_new_process():
    code = "from aevlp.data import FORMATS; print(*FORMATS)"
    known = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"} <= set(known)


def test_pictures_that_aevlp_drew_say_so(tmp_path):
    for software in ("aevlp", "GIMP"):
        said = PngInfo()
        said.add_text("Software", software)
        Image.fromarray(SCENE).save(tmp_path / f"{software}.png", pnginfo=said)
    Image.fromarray(SCENE).save(tmp_path / "plain.jpg")
    (tmp_path / "torn.png").write_bytes((tmp_path / "aevlp.png").read_bytes()[:20])
    assert [p.name for p in sorted(tmp_path.iterdir()) if module.made_here(p)] == ["aevlp.png"]


# --- files that may not be whole


@pytest.mark.parametrize("suffix", [*"jpg png gif bmp webp tif ppm pgm pbm avif".split()])
def test_a_whole_file_is_not_suspect(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    try:
        Image.fromarray(SCENE).convert({"pbm": "1", "pgm": "L"}.get(suffix, "RGB")).save(path)
    except (OSError, KeyError, ValueError):
        pytest.skip(f"Pillow writes no {suffix} here")
    data = path.read_bytes()
    assert not module._suspect(data)
    if suffix in ("jpg", "png", "bmp"):
        assert module._suspect(data[:-70]) and module._suspect(data[: len(data) // 2])
    assert module._suspect(b"?" + data)


def test_where_a_file_has_to_end():
    middle = bytes(100)
    for begin, end in ((b"\xff\xd8\xff", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND")):
        assert not module._suspect(begin + middle + end + bytes(64 - len(end)))
        assert module._suspect(begin + middle + end + bytes(65 - len(end)))
        assert module._suspect(begin + middle + end + middle)  # of a thumbnail inside
    for begin, more in ((b"BM", b"\1"), (b"RIFF", b"W")):
        size = len(begin) + 4 + 9 - 1
        data = begin + (300).to_bytes(4, "little") + more * (300 - len(begin) - 4)
        assert len(data) == 300 and size < 300
        assert not module._suspect(data) and not module._suspect(data + b"more") and module._suspect(data[:-1])
    for n in range(10):
        assert module._suspect(b"P%d\n1 1\n" % n) == (n not in range(1, 7))
    assert not module._suspect(b"\0\0\0\x20ftypavif") and module._suspect(b"\0\0\0\x20otypavif")
    assert not module._suspect(b"MM\0*") and not module._suspect(b"II*\0") and module._suspect(b"")
