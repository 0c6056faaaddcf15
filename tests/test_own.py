"""Labels as people have them, against matrices written by hand; what a check names, and what a run's key follows."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aevlp import ready, runner, runs, sweeps
from aevlp.data import AevlpError
from aevlp.datasets import check, load, resolve

RNG = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AEVLP_HOME", str(tmp_path_factory.mktemp("home")))


def picture(path, size=(24, 18)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(size).save(path)


@pytest.fixture
def pics(tmp_path):
    for i in range(8):
        picture(tmp_path / f"pics/{i:02d}.png")
    return tmp_path / "pics"


def read(pics, lines, **kw):
    path = pics.parent / "labels.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    return load("csv", pics, csv=path, **kw)


def rows(cells, header="image,label"):
    return [header, *(f"{i:02d}.png,{c}" for i, c in enumerate(cells))]


LISTS = [["a"], ["a", "b"], ["b"], ["c", "a"], ["c"], [], ["b", "c", "a"], ["a"]]
MATRIX = np.array([[int(c in row) for c in "abc"] for row in LISTS], np.int8)


@pytest.mark.parametrize(
    ("write", "kw"),
    [
        (lambda r: "|".join(r) or "[]", {}),
        (lambda r: "; ".join(r) or "[]", {}),
        (lambda r: f'"{", ".join(r)}"' if r else "[]", {}),
        (lambda r: f'"{r}"', {}),  # as Python prints it
        (lambda r: '"' + json.dumps(r).replace('"', '""') + '"', {}),
        (lambda r: '"' + str(np.array(r)).replace('"', '""') + '"', {}),
        (lambda r: " ".join(r) or "[]", {"separator": " "}),
        (lambda r: "/".join(r) or "[]", {"separator": "/"}),
    ],
)
def test_lists_in_a_cell(pics, write, kw):
    data = read(pics, rows(map(write, LISTS)), **kw)
    assert data.class_names == ("a", "b", "c") and data.truth is None and data.own
    assert np.array_equal(data.observed, MATRIX)


def test_several_rows_a_picture_are_several_labels(pics):
    lines = [f"{i:02d},{c}" for i, row in enumerate(LISTS) for c in row]
    data = read(pics, ["id,tag", *lines, "05,a"])
    wanted = {f"{i:02d}.png": r for i, r in enumerate(MATRIX.tolist())} | {"05.png": [1, 0, 0]}
    assert {Path(p).name: r.tolist() for p, r in zip(data.paths, data.observed, strict=True)} == wanted
    assert any("'id' is taken for 'image'" in n for n in data.extra["notes"])


def test_a_value_column_says_whether_the_label_is_there(pics):
    lines = [f"{i:02d}.png,{c},{int(c in row)}" for i, row in enumerate(LISTS) for c in "ab"]
    data = read(pics, ["ImageID,LabelName,Confidence", *lines])
    assert np.array_equal(data.observed, 2 * MATRIX[:, :2] - 1) and np.array_equal(data.truth, MATRIX[:, :2])


@pytest.mark.parametrize(
    ("yes", "no"),
    [("1", "0"), ("1.0", "0.0"), ("True", "False"), ("TRUE", "FALSE"), ("yes", "no"), ("1", "-1"), (" 1", "0 ")],
)
def test_full_labels_in_columns_are_used_as_given(pics, yes, no):
    lines = [",".join([f"{i:02d}.png", *(yes if v else no for v in r)]) for i, r in enumerate(MATRIX)]
    data = read(pics, ["file_name,a,b,c", *lines])
    assert np.array_equal(data.truth, MATRIX) and np.array_equal(data.observed, 2 * MATRIX - 1)
    drawn = read(pics, ["file_name,a,b,c", *lines], observation="uniform").observed
    assert (drawn.sum(1) == MATRIX.any(1)).all() and (drawn <= MATRIX).all() and (drawn >= 0).all()


@pytest.mark.parametrize("unknown", ["", "nan", "NA", "None", "?", "-1", "-1.0"])
def test_unknown_labels_stay_unknown(pics, unknown):
    cells = [["1", "0", unknown], ["0", unknown, "1"], [unknown, "1.0", "0.0"], *[["1", "0", "0"]] * 5]
    data = read(pics, ["image,a,b,c", *(",".join([f"{i:02d}.png", *r]) for i, r in enumerate(cells))])
    truth = np.array([[1, 0, -1], [0, -1, 1], [-1, 1, 0], *[[1, 0, 0]] * 5])
    assert np.array_equal(data.truth, truth)
    assert np.array_equal(data.observed, np.array([[1, -1, 0], [-1, 0, 1], [0, 1, -1], *[[1, -1, -1]] * 5]))
    assert sum(data.clean(s).sum() for s in data.splits) == 5
    assert any("unknown" in n for n in data.extra["notes"]) == unknown.startswith("-1")


def test_other_columns_are_named_and_row_numbers_left_out(pics):
    lines = [f"{i},{i:02d}.png,{'ab'[i % 2]},{20 + i},anna" for i in range(8)]
    data = read(pics, [",Image Index,Finding Labels,Follow-up,by", *lines])
    assert data.class_names == ("a", "b")
    assert any("not used: the unnamed one, Follow-up, by" in n for n in data.extra["notes"])
    lines = [f"{i:02d}.png,{i % 2},{1 - i % 2},f" + "emale" for i in range(8)]
    assert read(pics, ["image,a,b,sex", *lines]).class_names == ("a", "b")


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        (["Training"] * 4 + ["valid"] * 2 + ["testing"] * 2, (4, 2, 2)),
        (["train"] * 6 + ["dev"] * 2, (6, 2, 0)),
        (["train"] * 8, (6, 2, 0)),
        (["train"] * 5 + ["test"] * 3, (4, 1, 3)),
    ],
)
def test_splits_by_their_usual_words_and_missing_ones_are_said(pics, words, sizes):
    data = read(pics, ["image,label,subset", *(f"{i:02d}.png,{'ab'[i % 2]},{w}" for i, w in enumerate(words))])
    assert tuple(len(data.splits[s]) for s in ("train", "val", "test")) == sizes
    notes = " ".join(data.extra["notes"])
    assert ("'test'" in notes) == (sizes[2] == 0) and "'subset' is taken for 'split'" in notes


@pytest.mark.parametrize("separator", [";", "\t"])
def test_tables_of_other_programs(pics, separator):
    text = [line.replace(",", separator) for line in rows("abababab")]
    assert read(pics, text).observed.tolist() == [[1, 0], [0, 1]] * 4


@pytest.mark.parametrize(
    "name",
    [
        lambda pics, n: f"{pics}/{n}",
        lambda pics, n: f"pics/{n}",
        lambda pics, n: f"../{pics.parent.name}/pics/{n}",
        lambda pics, n: n.removesuffix(".png"),
        lambda pics, n: n.upper(),
        lambda pics, n: f".\\{n}",
    ],
)
def test_pictures_by_the_names_people_give_them(pics, name):
    lines = ["image,label", *(f"{name(pics, f'{i:02d}.png')},{'ab'[i % 2]}" for i in range(8))]
    assert read(pics, lines).paths.tolist() == [str(pics / f"{i:02d}.png") for i in range(8)]


def test_bare_names_of_subfolders_and_names_that_fit_twice(pics):
    picture(pics / "deep/er/x.png")
    assert read(pics, rows("abababab") + ["x.png,a"]).paths[-1] == str(pics / "deep/er/x.png")
    picture(pics / "00.jpg")
    lines = [line.replace(".png", "") for line in rows("abababab")]
    with pytest.raises(AevlpError, match="line 2: '00' can be '00.jpg' or '00.png'"):
        read(pics, lines)
    picture(pics / "again/x.png")
    with pytest.raises(AevlpError, match="line 10.*'again/x.png' and 'deep/er/x.png'"):
        read(pics, rows("abababab") + ["x.png,a"])
    with pytest.raises(AevlpError, match="line 2.*web address"):
        read(pics, ["image,label", "https://x.org/00.png,a"])
    with pytest.raises(AevlpError, match="line 2.*leads out of.*'00.png'"):
        read(pics, ["image,label", "/home/anna/pics/00.png,a"])


def test_names_with_separators_stay_whole_where_their_parts_are_met_nowhere_else(pics):
    data = read(pics, rows(["cup; mug", "cat"] * 4))
    assert data.class_names == ("cat", "cup; mug") and "--separator ';'" in " ".join(data.extra["notes"])
    assert read(pics, rows(["cup|mug", "cup"] * 4), separator="none").class_names == ("cup", "cup|mug")
    known = read(pics, rows(["cup; mug", "cup"] * 4), classes=["cup; mug", "cup"])
    assert known.observed.sum(0).tolist() == [4, 4]


def test_names_that_look_alike_are_one_or_are_named(pics):
    words = ["Cat", "cat", "caf\u00e9", "cafe\u0301", "hot dog", "hot\u00a0dog", "hot-dog", "star\u200b"]
    data = read(pics, rows(words))
    assert data.class_names == tuple(sorted({"Cat", "cat", "caf\u00e9", "hot dog", "hot-dog", "star"}))
    found = check("csv", pics, pics.parent / "labels.csv")
    row = found.loc["classes that look alike: write each in one way"]
    assert sorted(row.found) == ["Cat / cat", "hot dog / hot-dog"] and not row.ok


@pytest.mark.parametrize("name", ["image", "Labels", "label", "split", "a\x07b"])
def test_names_that_tables_need_are_refused_with_the_line(pics, name):
    with pytest.raises(AevlpError, match="line 3: .*class"):
        read(pics, rows(["cat", name] + ["cat"] * 6))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["id,file,label", *(f"{i},{i:02d}.gif,a" for i in range(8))], "line 1.*may all be the column 'image'"),
        (["image,label,dog", *(f"{i:02d}.png,a,{i % 2}" for i in range(8))], "besides 'label' there is 'dog'"),
        (["image,a,b", *(f"{i:02d}.png,1,{i}" for i in range(8))], "line 4: column 'b' holds '2'"),
        (["image,a", "00.png,1", "00.png,0"], "line 3: an earlier row of the picture says something else of 'a'"),
        (
            ["image,label,split", "00.png,a,train", "00.png,b,test"],
            "line 3: an earlier row has the picture in split 'train'",
        ),
        (["02.png,cat", "03.png,cat"], "the first line must name the columns"),
        (["image,label", "00.png,a", "01.png,", "02.png,b"], "line 3: no label"),
    ],
)
def test_what_cannot_be_read_without_a_guess_is_refused(pics, lines, says):
    with pytest.raises(AevlpError, match=says):
        read(pics, lines)


def coco(root, split, n, ids=int, first=0, **more):
    images = [{"id": ids(i), "file_name": f"{split}{i}.png"} for i in range(n)]
    for image in images:
        picture(root / "images" / image["file_name"])
    boxes = [
        {"image_id": ids(i), "category_id": ids(1 + i % 2), "bbox": [0, 0, 3, 2 + i], **more} for i in range(n - 1)
    ]
    names = [{"id": 1, "name": "bolt"}, {"id": 2, "name": "nut"}, {"id": 3, "name": "washer"}]
    (root / "annotations").mkdir(exist_ok=True)
    found = {"images": images, "annotations": boxes, "categories": names}
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("ids", [int, str, float])
@pytest.mark.parametrize("more", [{}, {"area": None}, {"area": 7}, {"area": None, "bbox": None}])
def test_coco_of_own_categories(tmp_path, ids, more):
    coco(tmp_path, "train", 6, ids, **more)
    coco(tmp_path, "val", 3, ids, **more)
    data = load("coco", tmp_path)
    assert (data.name, data.own, data.class_names) == ("own-coco", True, ("bolt", "nut", "washer"))
    truth = [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert data.truth.tolist() == truth and np.array_equal(data.observed, 2 * data.truth - 1)
    assert [data.splits[s].tolist() for s in ("train", "val", "test")] == [[*range(6)], [6, 7, 8], []]
    if "bbox" in more:
        assert "object_area" not in data.extra
    else:
        assert data.extra["object_area"][1, 1] == (7 if more.get("area") else 9)
    assert len(load("own-coco", tmp_path / "images", csv=tmp_path / "annotations/instances_train.json")) == 6


def test_coco_names_the_entry_that_does_not_fit(tmp_path):
    coco(tmp_path, "train", 6)
    path = tmp_path / "annotations/instances_train.json"
    found = json.loads(path.read_text())
    found["annotations"][2]["category_id"] = 9
    found["annotations"][3]["image_id"] = None
    del found["images"][1]["file_name"]
    path.write_text(json.dumps(found))
    with pytest.raises(AevlpError) as e:
        load("own-coco", tmp_path)
    for says in (
        "annotations[2]: category_id 9",
        "annotations[3]: image_id None",
        "images[1]: id 1 and file_name None",
    ):
        assert says in str(e.value)


def test_voc_of_own_classes(tmp_path):
    for i in range(6):
        picture(tmp_path / f"JPEGImages/{i}.jpg")
        things = "".join(f"<object><name>{n}</name></object>" for n in (["bolt"], ["nut", "bolt"], [])[i % 3])
        (tmp_path / "Annotations").mkdir(exist_ok=True)
        (tmp_path / f"Annotations/{i}.xml").write_text(f"<annotation><filename>{i}.jpg</filename>{things}</annotation>")
    whole = (tmp_path / "Annotations/0.xml").read_text()
    for encoding in ("nobody-knows", "utf-7", "rot13"):
        (tmp_path / "Annotations/0.xml").write_text(f"<?xml version='1.0' encoding='{encoding}'?>{whole}")
        with pytest.raises(AevlpError, match="0.xml is not XML"):
            load("voc", tmp_path)
    (tmp_path / "Annotations/0.xml").write_text(whole)
    data = load("voc", tmp_path)
    assert data.truth.tolist() == [[1, 0], [1, 1], [0, 0]] * 2 and data.name == resolve(None, tmp_path) == "own-voc"
    lines = {"train": "0\n1\n2\n", "val": "3 1\n", "test": "4\n5\n"}
    for split, text in lines.items():
        (tmp_path / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"ImageSets/Main/{split}.txt").write_text(text)
    assert [load("own-voc", tmp_path).splits[s].tolist() for s in lines] == [[0, 1, 2], [3], [4, 5]]


def test_a_folder_per_class(tmp_path):
    for split, n in (("train", 3), ("valid", 1), ("test", 2)):
        for name in ("cat", "hot dog"):
            for i in range(n):
                picture(tmp_path / split / name / f"{i}.jfif" if i else tmp_path / split / name / f"{i}.png")
            (tmp_path / split / name / "._0.png").write_bytes(b"x")
    data = load(resolve(None, tmp_path), tmp_path)
    assert data.class_names == ("cat", "hot dog") and data.observed.sum(0).tolist() == [6, 6]
    assert [len(data.splits[s]) for s in ("train", "val", "test")] == [6, 2, 4]


def test_a_check_opens_every_picture_and_names_all_that_is_odd(pics):
    lines = rows(["a", "b", "a", "b", "a", "b", "c", "a"], "image,label,split")
    lines = [lines[0], *(f"{line},{'train' if i < 6 else 'test'}" for i, line in enumerate(lines[1:]))]
    read(pics, lines)
    whole = (pics / "01.png").read_bytes()
    (pics / "01.png").write_bytes(whole[: len(whole) // 2])
    (pics / "02.png").write_bytes(b"")
    for name in ("IMG_7.HEIC", "._00.png", "notes.txt"):
        (pics / name).write_bytes(b"x")
    picture(pics / "extra.jpe".replace("jpe", "jpeg"))
    with Image.open(pics / "00.png") as im:
        im.resize((40, 30)).save(pics / "07.png")
    found = check(None, pics, pics.parent / "labels.csv")
    said = found.found.to_dict()
    assert [line[:7] for line in said["broken pictures"]] == ["01.png:", "02.png:"] and not found.loc[
        "broken pictures"
    ].ok
    assert said["unsupported pictures"] == ["IMG_7.HEIC: save it as JPEG or PNG"]
    assert said["pictures without a label"] == ["extra.jpeg"] and said["ignored files"] == ["._00.png", "notes.txt"]
    assert said["copies in two splits"] == ["00.png (train) and 07.png (test)"] or said["copies in two splits"] == [
        "00.png (val) and 07.png (test)"
    ]
    assert said["classes without a train picture"] == ["c"] and "b" in said["classes without a test picture"]
    json.loads(found.reset_index().to_json(orient="records"))


def test_what_would_end_a_run_is_said_before_it(pics, monkeypatch, tmp_path):
    read(pics, rows("abababab"))
    small = dict(clip="glyphs-clip", clip_weights="", backbone="glyphnet", backbone_weights="shipped", epochs=1)
    given = dict(method="an", root=pics, csv=pics.parent / "labels.csv")

    def wrong(**overrides):
        params = runs.run_params(None, **given, overrides=small | overrides)
        began = time.monotonic()
        with pytest.raises(AevlpError) as e:
            runner.train(params, tmp_path / "runs", show=False)
        assert time.monotonic() - began < 10 and not (tmp_path / "runs").exists()  # under 3 on an idle machine
        return str(e.value)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    ready.network.cache_clear()
    assert "resnet50 (hub) are not on this machine" in wrong(backbone="resnet50", backbone_weights="hub")
    assert "no such weight file" in wrong(backbone_weights="/none.pt")
    assert "batch of one" in wrong(batch_size=1)
    (pics / "03.png").write_bytes(b"")
    (pics / "05.png").write_bytes((pics / "05.png").read_bytes()[:60])
    assert "03.png" in wrong() and "05.png" in wrong()
    ready.network.cache_clear()


def test_own_pictures_start_with_a_head_where_that_is_all_the_machine_can_do(pics, monkeypatch):
    read(pics, rows("abababab"))

    def chosen(gpu, **overrides):
        monkeypatch.setattr(ready, "gpu", lambda: gpu)
        params = runs.run_params(None, "aevlp", csv=pics.parent / "labels.csv", root=pics, overrides=overrides)
        return params["recipe"], params["notes"][-1:]

    recipe, notes = chosen(False)
    assert (recipe["backbone"], recipe["grid"], recipe["view_epochs"]) == ("frozen", 2, 1) and "no GPU" in notes[0]
    recipe, notes = chosen(True, epochs=7)
    assert (recipe["backbone"], recipe["grid"], recipe["epochs"]) == (
        "frozen",
        4,
        7,
    ) and "4 training pictures" in notes[0]
    assert chosen(False, backbone="resnet50")[0]["backbone"] == "resnet50" and chosen(False, lr=1e-3)[1] == []
    monkeypatch.setattr(ready, "MANY", 4)
    assert chosen(True)[0]["backbone"].startswith("resnet50")


def test_a_key_follows_labels_and_pictures_and_not_their_place(pics):
    def name(folder=pics, **kw):
        return runs.run_name(runs.run_params(None, "an", root=folder, csv=folder.parent / "labels.csv", **kw))

    read(pics, rows("abababab"))
    first = name()
    moved = pics.parent / "moved/pics"
    shutil.copytree(pics, moved)
    shutil.copy(pics.parent / "labels.csv", moved.parent)
    assert name(moved) == first and first.startswith("labels-an-s0-")
    read(pics, [line.replace("image", "file") for line in rows("abababab")])
    assert name() == first  # written in another way, it says the same
    read(pics, rows("abababaa"))
    edited = name()
    picture(pics / "03.png")
    os.utime(pics / "03.png", (1, 1))
    assert len({first, edited, name(), name(moved)}) == 3


@pytest.mark.parametrize("name", ["image", "Label", "labels", "split"])
def test_names_of_columns_are_no_classes_in_any_reader(pics, name, tmp_path):
    """Every reader says the same sentence, and a CSV the line too."""
    said = f"no class can be called '{name}'"
    with pytest.raises(AevlpError, match=f"line 3: {said}"):
        read(pics, rows(["a", name, *"ababab"]))
    with pytest.raises(AevlpError, match=said):
        read(pics, rows("abababab"), classes=["a", "b", name])
    for i in range(6):
        picture(tmp_path / f"tree/{name if i % 2 else 'cat'}/{i}.png")
    with pytest.raises(AevlpError, match=said):
        load("folders", tmp_path / "tree")
    things = [{"id": i, "name": n} for i, n in enumerate(("cat", name))]
    images = [{"id": i, "file_name": f"{i:02d}.png"} for i in range(8)]
    marks = [{"id": i, "image_id": i, "category_id": i % 2} for i in range(8)]
    (tmp_path / "coco.json").write_text(json.dumps(dict(images=images, annotations=marks, categories=things)))
    with pytest.raises(AevlpError, match=said):
        load("own-coco", pics, csv=tmp_path / "coco.json")
    (tmp_path / "voc/Annotations").mkdir(parents=True)
    shutil.copytree(pics, tmp_path / "voc/JPEGImages")
    for i in range(8):
        words = f"<annotation><filename>{i:02d}.png</filename><object><name>{name}</name></object></annotation>"
        (tmp_path / f"voc/Annotations/{i:02d}.xml").write_text(words)
    with pytest.raises(AevlpError, match=said):
        load("own-voc", tmp_path / "voc")


def test_the_old_name_of_the_module_goes_on():
    import aevlp
    from aevlp import benchmarks, datasets

    assert benchmarks is datasets
    with pytest.raises(AttributeError, match="no attribute 'bench'"):
        aevlp.bench  # noqa: B018


def test_a_root_means_own_pictures_and_is_never_drawn_into(pics):
    read(pics, rows("abababab"))
    before = sorted(os.listdir(pics))
    for call in (lambda: load("glyphs", pics), lambda: runs.run_params(None, "an", root=pics)):
        with pytest.raises(AevlpError, match="--dataset csv|no CSV"):
            call()
    with pytest.raises(AevlpError, match="leave --csv out"):
        load("glyphs", csv=pics.parent / "labels.csv")
    assert sorted(os.listdir(pics)) == before and resolve(None) == "glyphs"
    assert runs.run_params(None, "an", csv=_inside(pics))["dataset"] == "csv"
    plan = sweeps.expand({"methods": ["an"], "seeds": [0]}, root=pics, csv=pics.parent / "labels.csv")
    assert plan.dataset.tolist() == ["csv"]


def _inside(pics):
    return shutil.copy(pics.parent / "labels.csv", pics / "labels.csv")


@pytest.mark.parametrize("name", ["label", "Labels", "image", "split", "bell\x07"])
def test_no_format_takes_a_class_called_as_a_column(tmp_path, name):
    for phase in ("train", "val"):
        np.save(tmp_path / f"formatted_{phase}_images.npy", np.array([f"{i}.jpg" for i in range(5)]))
        np.save(tmp_path / f"formatted_{phase}_labels.npy", np.eye(5, 2, dtype=np.int8) + [[0, 1]] * 5 > 0)
    for i in range(5):
        picture(tmp_path / f"{i}.jpg")
    assert load("npy", tmp_path, classes=["cat", "cup"]).class_names == ("cat", "cup")
    with pytest.raises(AevlpError, match="no class can be called|control characters"):
        load("npy", tmp_path, classes=["cat", name])
