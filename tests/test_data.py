"""Decoding against Pillow's transposition, draws against loops with numpy's legacy generator, loading with workers."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from aevlp.data import (
    AevlpError,
    LabelledImages,
    _content,
    _pool,
    decode,
    epoch_order,
    home,
    image_loader,
    in_threads,
    observe,
    progress,
    sample_single_positives,
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
    path = tmp_path / "a.jpg"
    Image.fromarray(SCENE).save(path, quality=95, exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff" + b"\x07" * 40)
    assert decode(path).shape == (40, 64, 3)


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
        ({"truth": np.full((600, 6), -2)}, "allowed are"),
        ({"truth": np.full((600, 6), np.nan)}, "nan"),
        ({"class_names": ["a"] * 6}, "class names"),
        ({"splits": {"dev": [0]}}, "dev"),
        ({"splits": {"train": [600]}}, "below 600"),
        ({"splits": {"train": [-1]}}, "below 600"),
        ({"splits": {"train": [1, 1]}}, "twice"),
        ({"splits": {"train": [2, 1]}}, "sorted"),
        ({"splits": {"train": [1], "val": [1]}}, "two splits"),
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
    shutil.copy(two / "2.bmp", one / "2.bmp")
    assert there(one).fingerprint == first.fingerprint
    (one / "3.bmp").unlink()
    assert there(one).pictures != first.pictures
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


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("AEVLP_HOME", str(tmp_path / "here"))
    assert home() == tmp_path / "here"
    monkeypatch.delenv("AEVLP_HOME")
    assert home() == Path(os.path.abspath(__file__)).parents[1] / "data"


def test_progress_appears_only_where_it_takes_long(capsys):
    assert list(progress(range(3), "short")) == [0, 1, 2] and capsys.readouterr().err == ""
    with progress(desc="long", total=9) as bar:
        bar.appears = 0
        bar.set_postfix_str("mAP 50.0")
        bar.update(4)
        bar.update(2)
        assert bar.bar.n == bar.n == 6 and "mAP 50.0" in str(bar.bar) and "6/9" in str(bar.bar)
    assert bar and "long" in capsys.readouterr().err
