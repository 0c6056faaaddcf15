"""Small trees in every official layout, well-formed and not, against independent loops; downloads from 127.0.0.1."""

import csv
import hashlib
import http.server
import io
import json
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aevlp import datasets
from aevlp.data import AevlpError
from aevlp.datasets import Archive, check, class_names, fetch, load

RNG = np.random.default_rng(11)


def draw(truth):
    """The published single positive: a fresh legacy stream, positives then negatives shuffled row by row."""
    rng, out = np.random.RandomState(1200), np.zeros_like(truth)
    for i, row in enumerate(truth):
        yes, no = np.nonzero(row == 1)[0], np.nonzero(row == 0)[0]
        rng.shuffle(yes)
        rng.shuffle(no)
        if len(yes):
            out[i, yes[0]] = 1
    return out


def expect(data, names, train_truth, test_truth, folder):
    """Order, labels, single positives and split, from plain loops."""
    truth = np.concatenate([train_truth, test_truth])
    assert data.paths.tolist() == [str(folder / n) for n in names]
    assert np.array_equal(data.truth, truth)
    assert np.array_equal(data.observed, np.concatenate([draw(train_truth), draw(test_truth)]))
    n = len(train_truth)
    n_val = int(np.round(0.2 * n))
    order = np.random.RandomState(1200).permutation(n)
    assert data.splits["train"].tolist() == sorted(order[: n - n_val])
    assert data.splits["val"].tolist() == sorted(order[n - n_val :])
    assert data.splits["test"].tolist() == list(range(n, len(truth)))


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), tuple(RNG.integers(0, 256, 3).tolist())).save(path)


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{r}\n" for r in rows))


# --- PASCAL VOC


def voc_tree(root, n=23, base="VOCdevkit/VOC2012"):
    base, classes, wanted = root / base, class_names("voc"), {}
    for phase in ("train", "val"):
        ids = [f"2008_{i:06d}" for i in RNG.permutation(900)[:n]]
        labels = RNG.choice([-1, 0, 1], size=(n, 20), p=[0.85, 0.07, 0.08])
        labels[0] = 0  # only difficult objects: not in the set
        for c, name in enumerate(classes):
            lines(base / f"ImageSets/Main/{name}_{phase}.txt", (f"{i} {labels[r, c]:2d}" for r, i in enumerate(ids)))
        for r, i in enumerate(ids):
            picture(base / f"JPEGImages/{i}.jpg")
            objects = "".join(
                f"<object><name>{name}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{c + 3}</xmax><ymax>11</ymax>"
                "</bndbox><part><name>head</name><bndbox><xmin>0</xmin></bndbox></part></object>"
                for c, name in enumerate(classes)
                if labels[r, c] >= 0
            )
            lines(base / f"Annotations/{i}.xml", [f"<annotation><size/>{objects}</annotation>"])
        rows = sorted((i, (row == 1).astype(int)) for i, row in zip(ids, labels, strict=True) if (row == 1).any())
        wanted[phase] = rows
    return base, wanted


@pytest.mark.parametrize("base", ["VOCdevkit/VOC2012", "VOC2012", "."])
def test_voc(tmp_path, base):
    base, wanted = voc_tree(tmp_path, base=base)
    names = [f"{i}.jpg" for phase in ("train", "val") for i, _ in wanted[phase]]
    train, test = (np.array([row for _, row in wanted[p]]) for p in ("train", "val"))
    data = load("voc", tmp_path)
    expect(data, names, train, test, base / "JPEGImages")
    assert data.class_names == class_names("voc") and data.class_names[10] == "diningtable"


def test_voc_observed_by_size_reads_the_boxes(tmp_path):
    base, wanted = voc_tree(tmp_path)
    data = load("voc", tmp_path, observation="size")
    area = data.extra["object_area"]
    assert np.array_equal(area[data.truth == 1], (10.0 * (np.nonzero(data.truth)[1] + 2)))
    assert (data.observed.sum(1) == 1).all() and (data.observed <= data.truth).all()
    (base / f"Annotations/{wanted['val'][0][0]}.xml").write_text("<annotation>")
    with pytest.raises(AevlpError, match=wanted["val"][0][0]):
        load("voc", tmp_path, observation="size")
    load("voc", tmp_path)


def test_malformed_voc(tmp_path):
    base, wanted = voc_tree(tmp_path)
    dog = base / "ImageSets/Main/dog_train.txt"
    good = dog.read_text()
    for bad, says in (("2008_1 2\n", "line 24"), ("2008_1\n", "line 24"), ("2008_1 1 1\n", "line 24")):
        dog.write_text(good + bad)
        with pytest.raises(AevlpError, match=f"dog_train.txt, {says}"):
            load("voc", tmp_path)
    dog.write_text(good + "../../../etc/passwd 1\n")
    with pytest.raises(AevlpError, match="leads out of"):
        load("voc", tmp_path)
    dog.unlink()
    with pytest.raises(AevlpError, match="dog_train.txt cannot be read"):
        load("voc", tmp_path)
    assert check("voc", tmp_path).index.tolist() == [str(dog)]
    dog.write_text(good)
    image = base / f"JPEGImages/{wanted['train'][3][0]}.jpg"
    image.unlink()
    with pytest.raises(AevlpError, match=image.name):
        load("voc", tmp_path)
    found = check("voc", tmp_path)
    assert not found["ok"].any() and image.name in found["found"].iloc[0][1]


# --- MS-COCO


def coco_tree(root):
    used = {1: "person", 44: "bottle", 3: "car", 90: "toothbrush"}
    rest = [n for n in class_names("coco") if n not in used.values()]
    categories = [{"id": i, "name": name} for i, name in (used | dict(enumerate(rest, 101))).items()]
    wanted = {}
    for phase in ("train2014", "val2014"):
        ids = RNG.permutation(3000)[:40].tolist()
        images = [{"id": i, "file_name": f"COCO_{phase}_{i:012d}.jpg"} for i in ids]
        annotations = [
            {"id": k, "image_id": int(RNG.choice(ids[:30])), "category_id": int(c), "area": float(k), "iscrowd": k % 2}
            for k, c in enumerate(RNG.choice([1, 44, 3, 90], size=70))
        ]
        lines(
            root / f"annotations/instances_{phase}.json",
            [json.dumps({"images": images, "annotations": annotations, "categories": categories})],
        )
        for image in images:
            picture(root / phase / image["file_name"])
        rows, areas = {}, {}
        for a in annotations:
            column = [c["id"] for c in categories].index(a["category_id"])
            rows.setdefault(str(a["image_id"]), [0] * 80)[column] = 1
            areas.setdefault(str(a["image_id"]), [0.0] * 80)[column] += a["area"]
        order = sorted(rows)
        names = [f"{phase}/COCO_{phase}_{int(i):012d}.jpg" for i in order]
        wanted[phase] = (names, np.array([rows[i] for i in order]), np.array([areas[i] for i in order]))
    return wanted


def test_coco(tmp_path):
    wanted = coco_tree(tmp_path)
    (names, train, area), (test_names, test, test_area) = wanted.values()
    data = load("coco", tmp_path)
    expect(data, names + test_names, train, test, tmp_path)
    assert data.class_names[:4] == ("person", "bottle", "car", "toothbrush") and data.name == "coco" and not data.own
    assert np.array_equal(data.extra["object_area"], np.concatenate([area, test_area]))
    assert any(int(Path(a).stem[-12:]) > int(Path(b).stem[-12:]) for a, b in zip(names, names[1:], strict=False))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"images": 3}', "[" * 100_000, '{"images": [], "annotations": [{}], "categories": []}'],
)
def test_malformed_coco(tmp_path, text):
    coco_tree(tmp_path)
    path = tmp_path / "annotations/instances_val2014.json"
    path.write_text(text)
    with pytest.raises(AevlpError, match="instances_val2014.json"):
        load("coco", tmp_path)


def test_coco_with_other_categories_or_names_that_lead_out(tmp_path):
    coco_tree(tmp_path)
    path = tmp_path / "annotations/instances_val2014.json"
    good = path.read_text()
    path.write_text(good.replace('"toothbrush"', '"comb"'))
    with pytest.raises(AevlpError, match="different categories"):
        load("coco", tmp_path)
    path.write_text(good.replace("COCO_val2014_", "../../COCO_val2014_"))
    with pytest.raises(AevlpError, match="leads out"):
        load("coco", tmp_path)
    path.unlink()
    assert check("coco", tmp_path).index.tolist() == [str(path)]


# --- NUS-WIDE


def nus_tree(root, layout):
    concepts, n = ["airport", "bear", "clouds"], {"Train": 21, "Test": 13}
    every = [f"{'actor' if i % 2 else 'zoo'}\\{i:04d}_{i * 7}.jpg" for i in range(34)]
    order = RNG.permutation(34)
    lists = {"Train": [every[i] for i in order[:21]], "Test": [every[i] for i in order[21:]]}
    labels = (RNG.random((34, 3)) < 0.4).astype(int)
    truth = {p: np.array([labels[every.index(name)] for name in lists[p]]) for p in lists}
    lines(root / "ConceptsList/Concepts81.txt", concepts)
    lines(root / "ImageList/Imagelist.txt", every)
    for phase in n:
        lines(root / f"ImageList/{phase}Imagelist.txt", lists[phase])
        for c, name in enumerate(concepts):
            if layout == "TrainTestLabels":
                lines(root / f"Groundtruth/TrainTestLabels/Labels_{name}_{phase}.txt", truth[phase][:, c])
            else:
                lines(root / f"Groundtruth/AllLabels/Labels_{name}.txt", labels[:, c])
    for name in every:
        picture(root / "Flickr" / name.replace("\\", "/"))
    return lists, truth


@pytest.mark.parametrize("layout", ["TrainTestLabels", "AllLabels"])
def test_nus(tmp_path, layout):
    lists, truth = nus_tree(tmp_path, layout)
    assert (truth["Train"].sum(1) == 0).any()
    data = load("nus", tmp_path)
    names = [n.replace("\\", "/") for p in ("Train", "Test") for n in lists[p]]
    expect(data, names, truth["Train"], truth["Test"], tmp_path / "Flickr")
    assert data.class_names == ("airport", "bear", "clouds")


@pytest.mark.parametrize("layout", ["TrainTestLabels", "AllLabels"])
def test_malformed_nus(tmp_path, layout):
    nus_tree(tmp_path, layout)
    labels = next((tmp_path / "Groundtruth" / layout).glob("Labels_bear*"))
    good = labels.read_text()
    labels.write_text(good[:-2])
    with pytest.raises(AevlpError, match=f"{labels.name} has"):
        load("nus", tmp_path)
    labels.write_text("0\n2\n" + good[4:])
    with pytest.raises(AevlpError, match=f"{labels.name}, line 2"):
        load("nus", tmp_path)
    labels.unlink()
    with pytest.raises(AevlpError, match=labels.name):
        load("nus", tmp_path)
    (tmp_path / "ImageList/TestImagelist.txt").unlink()
    with pytest.raises(AevlpError, match="TestImagelist.txt"):
        load("nus", tmp_path)


# --- CUB-200-2011


def cub_tree(root, base="CUB_200_2011", attributes="attributes.txt"):
    base, n = root / base, 19
    raw = ["has_bill_shape::hooked_seabird", "has_size::large_(16_-_32_in)", "has_upper_tail_color::blue"]
    names = [f"{i:03d}.Bird_{i}/Bird_{i}_{k:04d}.jpg" for i in range(7) for k in range(3)][:n]
    labels, training = (RNG.random((n, 3)) < 0.4).astype(int), RNG.random(n) < 0.6
    lines(base / "images.txt", (f"{i} {name}" for i, name in enumerate(names, 1)))
    lines(base / "train_test_split.txt", (f"{i} {int(t)}" for i, t in enumerate(training, 1)))
    lines(root / attributes, (f"{i} {a}" for i, a in enumerate(raw, 1)))
    rows = [f"{i + 1} {a + 1} {labels[i, a]} {RNG.integers(1, 5)} 7.3" for i in range(n) for a in range(3)]
    rows[4] += " 0 12.5"  # as the official file has: too many columns
    rows[9] += " 1"
    rows[11] = " ".join(rows[11].split()[:4])
    lines(base / "attributes/image_attribute_labels.txt", rows)
    for name in names:
        picture(base / "images" / name)
    order = [*np.flatnonzero(training), *np.flatnonzero(~training)]
    return base, [names[i] for i in order], labels[training], labels[~training]


@pytest.mark.parametrize(
    ("base", "attributes"),
    [
        ("CUB_200_2011", "attributes.txt"),
        ("CUB_200_2011/CUB_200_2011", "CUB_200_2011/attributes.txt"),
        ("CUB_200_2011", "CUB_200_2011/attributes/attributes.txt"),
    ],
)
def test_cub(tmp_path, base, attributes):
    base, names, train, test = cub_tree(tmp_path, base, attributes)
    data = load("cub", tmp_path)
    expect(data, names, train, test, base / "images")
    assert data.class_names == ("hooked seabird bill", "large size", "blue upper tail")
    assert load("cub", tmp_path, fidelity="released").class_names[1:] == ("large size::large", "blue upper")
    frame = check("cub", tmp_path)
    assert frame.loc["classes"].tolist() == [3, 312, False]


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("attributes/image_attribute_labels.txt", lambda t: t[: len(t) // 2].rsplit("\n", 1)[0], "no line for image"),
        ("attributes/image_attribute_labels.txt", lambda t: "1 1 2 3 4\n" + t, "line 1: '1 1 2'"),
        ("attributes/image_attribute_labels.txt", lambda t: "1 9 1 3 4\n" + t, "line 1: '1 9 1'"),
        ("attributes/image_attribute_labels.txt", lambda t: "1 1\n" + t, "image_attribute_labels.txt"),
        ("attributes/image_attribute_labels.txt", lambda t: "one 1 1 3 4\n" + t, "image_attribute_labels.txt"),
        ("attributes/image_attribute_labels.txt", lambda t: "", "image_attribute_labels.txt"),
        ("attributes/image_attribute_labels.txt", lambda t: "\x00" * 50, "image_attribute_labels.txt"),
        ("images.txt", lambda t: t + "x\n", "images.txt, line 20"),
        ("images.txt", lambda t: t.replace("\n3 ", "\n4 "), "images.txt must count"),
        ("train_test_split.txt", lambda t: t.rsplit("\n", 2)[0] + "\n", "train_test_split.txt must count"),
        ("train_test_split.txt", lambda t: "", "train_test_split.txt must count"),
    ],
)
def test_malformed_cub(tmp_path, file, change, says):
    base, *_ = cub_tree(tmp_path)
    (base / file).write_text(change((base / file).read_text()))
    with pytest.raises(AevlpError, match=says):
        load("cub", tmp_path)


def test_missing_cub_files_are_named(tmp_path):
    base, *_ = cub_tree(tmp_path)
    gone = [tmp_path / "attributes.txt", base / "attributes/image_attribute_labels.txt"]
    for path in gone:
        path.unlink()
    assert check("cub", tmp_path).index.tolist() == [str(p) for p in gone]


def test_cub_names_clean_and_as_released():
    raw = datasets.shipped("classnames/cub.txt").read_text().split()
    released, clean = class_names("cub", "released"), class_names("cub")
    assert len(raw) == 312 and len(set(clean)) == len(set(released)) == 312
    assert sum("::" in name for name in released) == 19 and not any("::" in name for name in clean)
    assert sum("_" in line.split("::")[1].split("_(")[0] for line in raw) == 14
    assert not any("_" in name or "(" in name for name in (*clean, *released))
    assert sum(name.endswith(" upper") for name in released) == sum(n.endswith(" upper tail") for n in clean) == 15


# --- the shared npy files


def npy_tree(root, n=(30, 12), classes=20, observed=True, dtype=float):
    parts = []
    for phase, rows in zip(("train", "val"), n, strict=True):
        names = np.array([f"{phase}_{i}.jpg" for i in RNG.permutation(rows)])
        truth = (RNG.random((rows, classes)) < 0.2).astype(dtype)
        np.save(root / f"formatted_{phase}_images.npy", names)
        np.save(root / f"formatted_{phase}_labels.npy", truth)
        if observed:
            np.save(root / f"formatted_{phase}_labels_obs.npy", draw(truth))
        for name in names:
            picture(root / "images" / str(name))
        parts.append((names.tolist(), truth.astype(int)))
    return parts


@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("dtype", [float, np.int64, bool])
def test_npy(tmp_path, observed, dtype):
    (names, train), (test_names, test) = npy_tree(tmp_path, observed=observed, dtype=dtype)
    data = load("npy", tmp_path)
    expect(data, names + test_names, train, test, tmp_path / "images")
    assert data.class_names == class_names("voc")


def test_npy_takes_the_observed_labels_as_they_are(tmp_path):
    (names, train), _ = npy_tree(tmp_path)
    other = np.where(train == 1, 1, -1)
    np.save(tmp_path / "formatted_train_labels_obs.npy", other)
    assert np.array_equal(load("npy", tmp_path).observed[:30], other)


def test_npy_with_names_given(tmp_path):
    npy_tree(tmp_path, classes=3)
    with pytest.raises(AevlpError, match="3 classes, whose names are not known"):
        load("npy", tmp_path)
    (tmp_path / "names.txt").write_text("sun\nrain\nwind\n")
    assert load("npy", tmp_path, classes=tmp_path / "names.txt").class_names == ("sun", "rain", "wind")
    assert load("npy", tmp_path, classes=["a", "b", "c"], images=tmp_path / "images").class_names == ("a", "b", "c")
    with pytest.raises(AevlpError, match="shape"):
        load("npy", tmp_path, classes=["a", "b"])


def test_nus_prefers_the_formatted_lists(tmp_path):
    (names, train), (test_names, test) = npy_tree(tmp_path, classes=81)
    (tmp_path / "images").rename(tmp_path / "Flickr")
    data = load("nus", tmp_path)
    expect(data, names + test_names, train, test, tmp_path / "Flickr")
    assert data.name == "nus" and data.class_names == class_names("nus")
    assert "train images" in check("nus", tmp_path).index


# --- a folder with a CSV


@pytest.fixture
def folder(tmp_path):
    for i in range(20):
        picture(tmp_path / f"a/{i}.png")
    return tmp_path


def table(folder, text, name="t.csv", encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return folder / name


def single(n=20):
    return "image,label\n" + "".join(f"a/{i}.png,{'xyz'[i % 3]}\n" for i in range(n))


def test_csv_single_positive(folder):
    data = load("csv", folder, csv=table(folder, single()))
    assert data.truth is None and data.class_names == ("x", "y", "z") and data.name == "csv"
    assert data.paths.tolist() == [str(folder / f"a/{i}.png") for i in range(20)]
    assert np.array_equal(data.observed, np.eye(3)[np.arange(20) % 3])
    assert [len(data.splits[s]) for s in ("train", "val", "test")] == [12, 4, 4]
    again = load("csv", folder)  # the only table in the folder
    assert again.fingerprint == data.fingerprint


def test_csv_truth_is_used_as_given_and_reduced_on_demand(folder):
    truth = (RNG.random((20, 4)) < 0.5).astype(int)
    truth[:, 0] |= truth.sum(1) == 0
    rows = "".join(f"a/{i}.png," + ",".join(map(str, truth[i])) + "\n" for i in range(20))
    data = load("csv", folder, csv=table(folder, "image,p,q,r,s\n" + rows))
    assert np.array_equal(data.truth, truth) and data.class_names == tuple("pqrs")
    assert np.array_equal(data.observed, 2 * truth - 1) and data.clean("train").all()
    data = load("csv", folder, csv=folder / "t.csv", observation="uniform")
    official = np.sort(np.concatenate([data.splits["train"], data.splits["val"]]))
    assert np.array_equal(data.observed[official], draw(truth[official]))
    assert np.array_equal(data.observed[data.splits["test"]], draw(truth[data.splits["test"]]))


def test_csv_split_column(folder):
    words = ["train"] * 10 + ["TEST "] * 6 + ["val"] * 4
    text = "image,label,split\n" + "".join(f"a/{i}.png,x,{w}\n" for i, w in enumerate(words))
    data = load("csv", folder, csv=table(folder, text), classes=["x", "w"])
    assert [len(data.splits[s]) for s in ("train", "val", "test")] == [10, 4, 6] and data.class_names == ("x", "w")
    data = load("csv", folder, csv=table(folder, text.replace("val", "train")), classes=["x", "w"])
    assert [len(data.splits[s]) for s in ("train", "val", "test")] == [11, 3, 6]


def test_csv_rows_without_label_may_be_tested_on(folder):
    rows = "".join(f"a/{i}.png,{int(i < 12)},0,{'train' if i < 12 else 'test'}\n" for i in range(20))
    data = load("csv", folder, csv=table(folder, "image,p,q,split\n" + rows))
    assert data.truth[12:].sum() == 0
    data = load("csv", folder, csv=table(folder, "image,p,q,split\n" + rows.replace("a/0.png,1", "a/0.png,0")))
    assert data.observed[0].tolist() == [-1, -1]  # a background picture may be learned from


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_byte_order_mark_quotes_and_line_ends(folder, encoding, end):
    text = single().replace("a/3.png,x", '"a/3.png", "x"').replace("a/4.png", "a\\4.png").replace("\n", end) + end
    text = text.replace('"x"', "x").replace("image", "Image")
    assert len(load("csv", folder, csv=table(folder, text, encoding=encoding))) == 20


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("image,label\n", "only 0 pictures"),
        (single(4), "only 4 pictures"),
        (single().replace("label", "image"), "line 1: column 'image' occurs twice"),
        (single().replace("image,label", "image,label,"), "line 2: 2 cells, but the first line has 3"),
        (single().replace("\n", ",z\n").replace("label,z", "label,"), "line 1: a column has no name"),
        (single().replace("\n", ",1\n").replace("label,1", "label,dog"), "line 1: besides 'label'"),
        ("image\na/1.png\n", "line 1: no labels"),
        (single() + "a/99.png,x\n", "line 22: image 'a/99.png' is not in"),
        (single() + "b/9.png,x\n", "line 22: 'b/9.png'"),
        (single() + "a,x\n", "line 22: 'a' is not a file"),
        (single() + ",x\n", "line 22: no picture"),
        (single() + "a/1.png/b.png,x\n", "line 22"),
        (single().replace("a/7.png,y", "a/7.png,"), "line 9: no label"),
        (single().replace("a/7.png,y", "a/7.png,  "), "line 9: no label"),
        (single().replace("a/7.png,y", "a/7.png"), "line 9: 1 cells, but the first line has 2"),
        (single().replace("a/7.png,y", "a/7.png,x,y"), "line 9: 3 cells"),
        (single().replace("a/7.png,y", 'a/7.png,"y'), "check the quotes"),
        (single().encode() + b"a/\xe9.png,x\n", "line 22: not UTF-8"),
        (single().encode("utf-16"), "line 1: the file is UTF-16"),
        (single() + "../a/3.png,x\n", "line 22: '../a/3.png' leads out of"),
        (single() + "/etc/passwd,x\n", "line 22: '/etc/passwd' leads out of"),
        (single() + "C:\\a.png,x\n", "leads out of"),
        (single() + "..\\a.png,x\n", "leads out of"),
        (single() + "a/\0.png,x\n", "line 22"),
        ("image,p\n" + "".join(f"a/{i}.png,1\n" for i in range(9)) + "a/9.png,2\n", "line 11: column 'p' holds '2'"),
        ("image,label,split\n" + "".join(f"a/{i}.png,x,later\n" for i in range(9)), "line 2: split 'later'"),
        ("image,label,split\n" + "".join(f"a/{i}.png,x,test\n" for i in range(9)), "no row is left for split 'train'"),
    ],
)
def test_csv_troubles_name_their_line(folder, text, says):
    path = table(folder, text)
    with pytest.raises(AevlpError) as e:
        load("csv", folder, csv=path)
    assert says in str(e.value) and str(path) in str(e.value)


def test_csv_reports_the_first_ten_and_the_number(folder):
    text = single() + "".join(f"a/{i}.png,x\n" for i in range(100, 130))
    with pytest.raises(AevlpError) as e:
        load("csv", folder, csv=table(folder, text))
    message = str(e.value)
    assert (
        "30 problems" in message
        and message.count("\n  line ") == 10
        and message.endswith("and 20 more, which `aevlp data check` lists")
    )


def test_csv_line_numbers_count_lines_inside_quotes(folder):
    text = single().replace("a/2.png,z", '"a/2.png","z\n"') + "a/99.png,x\n"
    with pytest.raises(AevlpError, match="line 23: image 'a/99.png'"):
        load("csv", folder, csv=table(folder, text))


def test_csv_unknown_labels(folder):
    with pytest.raises(AevlpError, match="line 4: unknown label 'z'"):
        load("csv", folder, csv=table(folder, single()), classes=["x", "y"])
    rows = "image,p,q\n" + "".join(f"a/{i}.png,1,0\n" for i in range(9))
    with pytest.raises(AevlpError, match="class 'r' is no column"):
        load("csv", folder, csv=table(folder, rows), classes=["p", "q", "r"])
    with pytest.raises(AevlpError, match="class 'q' is a column, but not a known class"):
        load("csv", folder, csv=table(folder, rows), classes=["p"])
    assert load("csv", folder, csv=table(folder, rows), classes=["q", "p"]).truth.sum(0).tolist() == [0, 9]


def test_csv_that_is_not_there_or_not_alone(folder):
    with pytest.raises(AevlpError, match="0 CSV files"):
        load("csv", folder)
    with pytest.raises(AevlpError, match="none.csv cannot be read"):
        load("csv", folder, csv=folder / "none.csv")
    with pytest.raises(AevlpError, match="cannot be read"):
        load("csv", folder, csv=folder)


def test_large_csv_is_read_in_linear_time(tmp_path):
    n = 20_000
    for folder in range(n // 1000):
        (tmp_path / str(folder)).mkdir()
    with open(tmp_path / "t.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["image", *(f"c{i}" for i in range(20))])
        for i in range(n):
            (tmp_path / f"{i // 1000}/{i}.png").touch()
            writer.writerow([f"{i // 1000}/{i}.png", 1, *[i % 2] * 19])
    start = time.perf_counter()
    data = load("csv", tmp_path)
    assert len(data) == n and data.truth.sum() == n + 19 * n // 2
    assert time.perf_counter() - start < 10  # 1 second on an idle core


# --- names


def test_unknown_names_are_answered_with_the_nearest():
    for call in (load, check):
        with pytest.raises(AevlpError, match="did you mean 'coco'"):
            call("coc")
    with pytest.raises(AevlpError, match="nothing to download"):
        fetch("glyph")
    with pytest.raises(AevlpError, match="no class names come with 'csv'"):
        class_names("csv")
    with pytest.raises(AevlpError, match="not key=number"):
        load("csv", ".", observation="uniform, k=two")


# --- download


class Server(http.server.BaseHTTPRequestHandler):
    """Serves bytes with ranges; breaks the connection `breaks` times after `limit` bytes."""

    files, breaks, limit, ranges, log = {}, 0, 1000, True, []

    def do_GET(self):
        type(self).log.append(self.headers.get("Range"))
        data = self.files.get(self.path)
        if data is None:
            return self.send_error(404)
        start = 0
        if self.ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if type(self).breaks:
            type(self).breaks -= 1
            self.wfile.write(data[start : start + self.limit])
            self.connection.close()
        else:
            self.wfile.write(data[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(datasets.time, "sleep", lambda seconds: None)
    handler = type("Handler", (Server,), {"files": {}, "log": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        handler.url = f"http://127.0.0.1:{running.server_address[1]}"
        yield handler
        running.shutdown()


def tar_of(files, **kw):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_of(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


BYTES = RNG.integers(0, 256, 5000, dtype=np.uint8).tobytes()


def archive(server, name, data, checksum="right"):
    server.files[f"/{name}"] = data
    right = f"md5:{hashlib.md5(data).hexdigest()}"
    return Archive(f"{server.url}/{name}", right if checksum == "right" else checksum)


@pytest.mark.parametrize("pack", [("a.tar", tar_of), ("a.zip", zip_of)])
def test_fetch_unpacks_and_does_not_load_twice(server, tmp_path, pack):
    name, make = pack
    known = [archive(server, name, make({"VOC2012/x.bin": BYTES}))]
    found = fetch("voc", tmp_path / "voc", known)
    assert (tmp_path / "voc/VOC2012/x.bin").read_bytes() == BYTES and not found["ok"].any()
    fetch("voc", tmp_path / "voc", known)
    assert server.log == [None]
    assert sorted(p.name for p in (tmp_path / "voc").iterdir() if not p.name.startswith(".")) == ["VOC2012"]


@pytest.mark.parametrize("ranges", [True, False])
def test_fetch_goes_on_after_broken_connections(server, tmp_path, ranges):
    server.breaks, server.ranges = 3, ranges
    data = tar_of({"x.bin": BYTES})
    fetch("voc", tmp_path, [archive(server, "a.tar", data)])
    assert (tmp_path / "x.bin").read_bytes() == BYTES
    assert server.log == [None, "bytes=1000-", *(["bytes=2000-", "bytes=3000-"] if ranges else ["bytes=1000-"] * 2)]


def test_fetch_goes_on_in_a_later_call(server, tmp_path):
    server.breaks = 10**6
    known = [archive(server, "a.tar", tar_of({"x.bin": BYTES * 4}))]
    with pytest.raises(AevlpError, match="goes on where it stopped"):
        fetch("voc", tmp_path, known)
    kept = (tmp_path / "a.tar.part").stat().st_size
    assert kept == 6000
    server.breaks = 0
    fetch("voc", tmp_path, known)
    assert server.log[-1] == f"bytes={kept}-" and (tmp_path / "x.bin").read_bytes() == BYTES * 4


def test_fetch_with_everything_there_but_the_name(server, tmp_path):
    data = tar_of({"x.bin": BYTES})
    (tmp_path / "a.tar.part").write_bytes(data)
    fetch("voc", tmp_path, [archive(server, "a.tar", data)])
    assert (tmp_path / "x.bin").exists()


@pytest.mark.parametrize("kind", ["md5:" + "0" * 32, "sha256:" + "0" * 64])
def test_fetch_refuses_a_wrong_checksum(server, tmp_path, kind):
    with pytest.raises(AevlpError, match="instead of 000.*the file was deleted"):
        fetch("voc", tmp_path, [archive(server, "a.tar", tar_of({"x.bin": BYTES}), kind)])
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == []


def test_fetch_without_known_checksum_says_so(server, tmp_path, capsys):
    fetch("voc", tmp_path, [archive(server, "a.tar", tar_of({"x.bin": BYTES}), None)])
    assert "no published checksum" in capsys.readouterr().out


def test_fetch_of_what_is_not_there(server, tmp_path):
    with pytest.raises(AevlpError, match="answers 404"):
        fetch("voc", tmp_path, [Archive(f"{server.url}/none.tar", None)])
    with pytest.raises(AevlpError, match="goes on where it stopped"):
        fetch("voc", tmp_path, [Archive("http://127.0.0.1:1/a.tar", None)])


@pytest.mark.parametrize("name", ["a.tar", "a.tgz", "a.zip"])
def test_fetch_of_a_damaged_archive(server, tmp_path, name):
    with pytest.raises(AevlpError, match="damaged"):
        fetch("voc", tmp_path, [archive(server, name, BYTES)])
    assert not (tmp_path / name).exists()


def test_fetch_never_writes_outside(server, tmp_path):
    root = tmp_path / "in"
    link = io.BytesIO()
    with tarfile.open(fileobj=link, mode="w") as tar:
        info = tarfile.TarInfo("door")
        info.type, info.linkname = tarfile.SYMTYPE, "../../"
        tar.addfile(info)
    device = io.BytesIO()
    with tarfile.open(fileobj=device, mode="w") as tar:
        info = tarfile.TarInfo("null")
        info.type = tarfile.CHRTYPE
        tar.addfile(info)
    hostile = {
        "up.tar": tar_of({"../out.txt": b"x"}),
        "deep.tar": tar_of({"a/../../out.txt": b"x"}),
        "link.tar": link.getvalue(),
        "device.tar": device.getvalue(),
        "up.zip": zip_of({"../out.txt": b"x"}),
        "root.zip": zip_of({"/out.txt": b"x"}),
        "back.zip": zip_of({"..\\out.txt": b"x"}),
    }
    for name, data in hostile.items():
        with pytest.raises(AevlpError, match=name):
            fetch("voc", root, [archive(server, name, data)])
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert {p.name for p in root.iterdir() if not p.name.startswith(".")} <= set(hostile)


def test_only_one_download_into_a_folder(server, tmp_path):
    with datasets.FileLock(tmp_path / ".fetch.lock"), pytest.raises(AevlpError, match="under way"):
        fetch("voc", tmp_path, [archive(server, "a.tar", tar_of({"x": b"y"}))])


def test_nus_says_what_to_ask_for(tmp_path):
    with pytest.raises(AevlpError, match=f"form.*{tmp_path}/Flickr"):
        fetch("nus", tmp_path)
