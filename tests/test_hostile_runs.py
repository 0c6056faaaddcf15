"""Hostile and torn files of sweeps and runs, full disks, processes that are not ours: one sentence, nothing else."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from fake_run import alive, begun, fake_notebook, states
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from test_runs import finished

from aevlp import (
    board,
    checkpoints,
    cli,
    datasets,
    draw,
    evidence,
    models,
    outcome,
    recipes,
    runner,
    runs,
    sweeps,
    tabs,
)
from aevlp.data import AevlpError, replacing, write_json

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
YAML = {
    "an alias bomb": (BOMB + "methods: *j\n", "more than 200000 values"),
    "20,000 brackets": ("methods: " + "[" * 20_000, "deeper than 20 levels"),
    "20,000 indents": ("\n".join(" " * i + f"a{i}:" for i in range(2_000)), "deeper than 20 levels"),
    "an alias to itself": ("methods: &a [*a]", "nothing before it is called &a"),
    "a tag": ("methods: !!python/object/apply:os.mkdir [pwned]", "stands for no plain value"),
    "a number of 5,000 digits": ("seeds: [" + "9" * 5000 + "]", "not plain YAML"),
    "two documents": ("methods: [an]\n---\nmethods: [gr]", "more than one document"),
    "a list as a key": ("? [a, b]\n: c\n", "unhashable"),
    "a merge of no keys": ("<<: 3\nmethods: [an]", "not plain YAML"),
    "5 MB": ("methods: [an] #" + "x" * 5_000_000, "larger than 4 MB"),
}


@pytest.mark.parametrize("what", YAML)
def test_hostile_yaml_is_refused_within_a_second(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    text, says = YAML[what]
    (tmp_path / "sweep.yaml").write_text(text)
    (tmp_path / "params.yaml").write_text(text)
    began = time.process_time()
    for read in (lambda: sweeps.load_spec(tmp_path / "sweep.yaml"), lambda: runs.read_params(tmp_path)):
        with pytest.raises(AevlpError, match=f"yaml.*{says}"):
            read()
    assert (
        time.process_time() - began < 2
        and os.listdir(tmp_path) == ["sweep.yaml", "params.yaml"]
        or not (tmp_path / "pwned").exists()
    )


def test_yaml_means_what_it_meant(tmp_path):
    text = """base: &base {lr: 1.0e-4, epochs: 3, name: "3", on: yes, none: ~, when: 2020-01-01}
more: {<<: *base, epochs: 4}
list: [*base, 'a b', 0x10, 1e-4, .inf, !!str 7]
block: |
  two
  lines
"""
    (tmp_path / "a.yaml").write_text(text)
    assert runs.read_yaml(tmp_path / "a.yaml") == yaml.safe_load(text)
    for path in Path(runs.experiments_root()).glob("*.yaml"):
        assert runs.read_yaml(path) == yaml.safe_load(path.read_text()), path


WORDS = ["a:", "b:", "3:", "x", "- x", "1.5", "'", '"', "[", "]", "{", "}", "{c: 2}", "|", ">-", "<<:", "&e", "*e"]
WORDS += ["---", "...", "#", "!!str", "?", "2020-01-01", "yes", "\t", "\r", "\x85", "\u2028", "%", "yes:", "|+"]


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.sampled_from(WORDS), min_size=1, max_size=4)), max_size=6))
@example([(0, ["a:"]), (1, ["b:", "1.5"]), (0, ["a:", "{c: 2}"])])  # the later one counts
@example([(0, ["a:", "x"]), (0, ["..."]), (0, ["b:", "x"])])  # two documents
@example([(0, ["a:", "|"]), (1, ["b:", "x"]), (0, ["b:", "x"])])
@example([(0, ["b:", "'"]), (0, ["a:", "'"])])  # a text of two lines
@example([(0, ["a:"]), (2, ["b:", "1.5"]), (2, ["a:", "x"]), (2, ["b:", "yes"]), (0, ["b:", "x"])])  # one in one
@example([(0, ["a:"]), (2, ["b:", "|+"]), (4, ["x"]), (0, []), (2, ["a:", "x"])])  # empty lines are of a text
@example([(0, ["a:"]), (2, ["b:", '"']), (2, ["a:", '"'])])
@example([(0, ["a:"]), (2, ["b:", "x"]), (1, ["a:", "x"])])  # neither in it nor after it
@settings(deadline=None)
def test_a_mapping_read_in_parts_is_what_the_whole_is(lines):
    """Line after line of any words: the same value, or an error in both."""
    text = "".join(" " * indent + " ".join(said) + "\n" for indent, said in lines)

    def found(read):
        try:
            return repr(read(text))
        except (yaml.YAMLError, ValueError, TypeError):
            return "an error"

    assert found(runs._values) == found(runs._whole)


def test_what_was_read_once_is_given_as_a_copy(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\nrecipe:\n  grid: 2\nnotes: [[1]]\n")
    first = runs.read_yaml(tmp_path / "a.yaml")
    first["recipe"]["grid"] = first["notes"][0][0] = 3
    assert runs.read_yaml(tmp_path / "a.yaml") == {"seed": 1, "recipe": {"grid": 2}, "notes": [[1]]}


def test_a_grid_of_a_billion_runs_is_refused_at_once():
    spec = {
        "methods": ["an"],
        "seeds": list(range(1000)),
        "overrides": {"lr": list(range(1000)), "eta": list(range(1000))},
    }
    began = time.process_time()
    with pytest.raises(AevlpError, match="1e.09 runs, more than 10000"):
        sweeps.expand(spec)
    assert time.process_time() - began < 1


def test_all_rows_and_data_sets_of_a_sweep_are_counted_before_any_is_planned():
    grid = {"method": "an", "overrides": {"lr": list(range(100)), "eta": list(range(100))}}
    for spec in ({"rows": [grid] * 11}, {"rows": [grid], "datasets": ["glyphs"] * 11}):
        began = time.process_time()
        with pytest.raises(AevlpError, match="1.1e.05 runs, more than 10000"):
            sweeps.expand(spec)
        assert time.process_time() - began < 1


@pytest.mark.parametrize("seed", [2**31, 10**400, -1, 1.5, True, "a", None, [0]])
def test_a_seed_that_nothing_can_be_drawn_by_is_refused(seed):
    with pytest.raises(AevlpError, match="seed=.* should be a whole number from 0"):
        sweeps.expand({"methods": ["an"], "seeds": [seed]})


# --- run folders


def change(folder, /, raw="", **params):
    found = runs.read_params(folder)
    (folder / "params.yaml").write_text(yaml.safe_dump(found | params) + raw + "\n")


STRANGE = {
    "metrics.json is a list": lambda f: (f / "metrics.json").write_text("[1, 2]"),
    "metrics.json is cut off": lambda f: (f / "metrics.json").write_text('{"test_map": 6'),
    "metrics.json nests": lambda f: (f / "metrics.json").write_text("[" * 100_000),
    "metrics.json is large": lambda f: (f / "metrics.json").write_text('{"a": 1}' + " " * 2**23),
    "metrics.json is a pipe": lambda f: ((f / "metrics.json").unlink(), os.mkfifo(f / "metrics.json")),
    "a number of 5,000 digits": lambda f: (f / "metrics.json").write_text('{"test_map": ' + "9" * 5000 + "}"),
    "a number of 400 digits": lambda f: (f / "metrics.json").write_text('{"test_map": ' + "9" * 400 + "}"),
    "half a character": lambda f: (f / "metrics.json").write_text('{"device": "\\ud800"}'),
    "a split is a number": lambda f: (f / "metrics.json").write_text('{"test": {"map": 5}, "val": {"map": null}}'),
    "a split has two numbers": lambda f: (f / "metrics.json").write_text('{"test": {"auc_observed": [1, 2]}}'),
    "the content is a date": lambda f: change(f, content="2020-01-01", raw="content: 2020-01-01"),
    "an override is a date": lambda f: change(f, raw="overrides: {lr: 2020-01-01}"),
    "overrides of two kinds of name": lambda f: change(f, raw="overrides: {1: 2, a: 3}"),
    "a parameter without a name": lambda f: change(f, raw="~: 2"),
    "a parameter called 5": lambda f: change(f, raw="5: 2"),
    "test_map is text": lambda f: (f / "metrics.json").write_text('{"test_map": "high"}'),
    "status.json is a list": lambda f: (f / "status.json").write_text("[]"),
    "params.yaml is a list": lambda f: (f / "params.yaml").write_text("[]"),
    "params.yaml is a bomb": lambda f: (f / "params.yaml").write_text(BOMB),
    "params.yaml is not text": lambda f: (f / "params.yaml").write_bytes(b"\xff\xfe\0"),
    "the data set is a list": lambda f: change(f, dataset=["voc"]),
    "the seed is text": lambda f: change(f, seed="one"),
    "the recipe is a list": lambda f: change(f, recipe=[1]),
    "the recipe holds a list": lambda f: change(f, recipe={"lr": [1, 2]}),
}
FINE = {
    "a state nobody knows": {"state": "flying"},
    "a state that is a list": {"state": ["done"]},
    "a negative process": {"state": "running", "host": runs.HOST, "process": {"pid": -5, "born": 1}},
    "a process that is a list": {"state": "running", "host": runs.HOST, "process": [1], "kernel": [2]},
    "a huge process": {"state": "running", "host": runs.HOST, "process": {"pid": 2**70, "born": "x"}},
    "seconds that are text": {"state": "done", "seconds": "long"},
}


@pytest.mark.parametrize("what", [*STRANGE, *FINE])
def test_a_strange_run_folder_hides_no_other(tmp_path, monkeypatch, capsys, what):
    good, bad = finished(tmp_path, 61.25), finished(tmp_path, method="an")
    if what in FINE:
        write_json(bad / "status.json", FINE[what])
    else:
        STRANGE[what](bad)
    table = board.frame(tmp_path).set_index("run")
    assert table.loc[good.name, "test_map"] == 61.25 and table.loc[good.name, "state"] == "done"
    assert what in FINE or table.loc[bad.name, "state"] == "unreadable" and str(bad) in table.loc[bad.name, "error"]
    assert what not in FINE or table.loc[bad.name, "state"] in ("new", "interrupted", "done")
    board.history(tmp_path)
    monkeypatch.setenv("AEVLP_RUNS", str(tmp_path))
    for arguments in (["results"], ["results", "--json"], ["sweep", "table1", "--dry-run"]):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert not end.value.code, capsys.readouterr().err
    assert "61.25" in capsys.readouterr().out


def test_what_a_file_calls_as_the_table_does_changes_nothing_in_it(tmp_path):
    """Not the name, folder or state of the run, and not its method."""
    good, odd = finished(tmp_path), finished(tmp_path, method="an")
    ours = dict(run="x", state="new", key="k", folder="/", wall=-1, ended="y", error="z", method="gr", dataset="d")
    (odd / "metrics.json").write_text(json.dumps({"test_map": 7.0} | ours))
    change(odd, **{k: v for k, v in ours.items() if k not in ("method", "dataset")})
    found = runs.read_params(odd)
    change(odd, recipe=found["recipe"] | dict(run="x", state="y", method="gr", test_map=3.0))
    row = board.frame(tmp_path).set_index("run").loc[odd.name]
    assert row[["state", "folder", "method", "dataset", "wall"]].tolist() == ["done", str(odd), "an", "glyphs", 10.0]
    assert board.frame(tmp_path).set_index("run").loc[good.name, "test_map"] == 60


@pytest.mark.parametrize("name", ["history.csv", "predictions.npz", "best.safetensors", "run.json", "thresholds.json"])
def test_a_pipe_at_the_name_of_a_file_ends_no_command_in_waiting(tmp_path, name):
    folder = weights(finished(tmp_path))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    (folder / "last/epoch-1").mkdir(parents=True)
    os.mkfifo(folder / "last/epoch-1/manifest.json")
    script = f"""import sys
from aevlp import board, checkpoints, cli
board.epoch_of({str(folder)!r}, 3)
assert checkpoints.load_checkpoint({str(folder / "last")!r}) is None
for command in ("report", "card"):
    try:
        cli.main([command, {str(folder)!r}, "--out", {str(tmp_path / "page.html")!r}])
    except SystemExit as end:
        assert end.code in (0, None, 2), end.code
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "AEVLP_DEBUG" not in done.stderr, done.stderr


PREDICTED = dict(
    ids=np.arange(4),
    probs=np.full((4, 3), 0.5, np.float32),
    targets=np.zeros((4, 3), np.int8),
    names=np.array(list("abcd")),
    observed=np.zeros((4, 3), np.int8),
)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"targets": None}, "labels are missing"),
        ({"probs": np.ones(4, np.float32)}, "float32 .4,."),
        ({"probs": np.full((4, 3), "a")}, "<U1"),
        ({"probs": np.ones((4, 3, 2), np.float32)}, "4, 3, 2"),
        ({"targets": np.full((4, 3), "1")}, "targets are <U1"),
        ({"targets": np.zeros((4, 2), np.int8)}, "targets are int8 .4, 2."),
        ({"observed": np.zeros((3, 3), np.int8)}, "observed are int8 .3, 3."),
        ({"names": np.array(list("abc"))}, "names are <U1 .3,."),
        ({"names": np.arange(4)}, "names are int64"),
        ({"ids": np.arange(5)}, "ids are int64 .5,."),
    ],
)
def test_strange_predictions_are_one_sentence(tmp_path, change, says):
    for prefix, split in (("", "test"), ("val_", "val")):
        whole = {prefix + k: v for k, v in PREDICTED.items()}
        np.savez(tmp_path / "predictions.npz", **whole)
        assert outcome.scored(tmp_path, split).names == tuple("abcd")
        strange = whole | {prefix + k: v for k, v in change.items()}
        np.savez(tmp_path / "predictions.npz", **{k: v for k, v in strange.items() if v is not None})
        with pytest.raises(AevlpError, match=f"predictions.npz: cannot be read .*{says}"):
            outcome.scored(tmp_path, split)


def test_predictions_that_unpack_to_gigabytes_or_are_no_archive_are_refused(tmp_path):
    path, head = tmp_path / "predictions.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(head, dict(descr="<f4", fortran_order=False, shape=(10**12, 3)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("probs.npy", head.getvalue())
    with pytest.raises(AevlpError, match="predictions.npz: cannot be read"):
        outcome.scored(tmp_path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("probs.npy", "w", force_zip64=True) as file:
            for _ in range(1100):
                file.write(bytes(2**20))
    with pytest.raises(AevlpError, match="more than a gigabyte"):
        outcome.scored(tmp_path)
    with open(path, "wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(AevlpError, match="one array"):
        outcome.scored(tmp_path)


@pytest.mark.parametrize(
    "observation, says",
    [
        ("uniform, kk=2", "unknown 'kk'; did you mean 'k'"),
        ({"how": "uniform", "a": {"b": [1]}}, "unknown 'a'"),
        ({"how": ["uniform"]}, "should be text"),
        ("uniform, seed=-2", "whole number from 0"),
        ({"how": "uniform", "k": "2"}, "k='2' should be a whole number"),
        ({"how": "fraction", "positive_fraction": "half"}, "should be a number"),
        ({"how": "fraction", "positive_fraction": True}, "should be a number"),
    ],
)
def test_an_observation_that_nobody_knows_is_one_sentence(observation, says):
    with pytest.raises(AevlpError, match=f"observation .*{says}"):
        datasets.load("glyphs", observation=observation)


WIDE = b",".join(b"c%d" % i for i in range(100_000)) + b"\n" + b"1," * 99_999 + b"1\n"


@pytest.mark.parametrize("text", [None, b"", b"epoch,loss\n1,2,3\n1,2,3,4,5\n", b"epoch,\xff\n1,2\n", WIDE])
def test_a_history_that_is_a_pipe_or_torn_is_empty_for_all_who_read_it(tmp_path, text):
    """The board, the report and the explorer's curves."""
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    path = tmp_path / "history.csv"
    os.mkfifo(path) if text is None else path.write_bytes(text)
    assert outcome.history(tmp_path).empty and board.epoch_of(tmp_path, 3) == (0, None, None)
    (tmp_path / "params.yaml").write_text("{dataset: glyphs, method: an, recipe: {}}")
    assert board.history(tmp_path.parent).empty
    curves = tabs.Tabs._curves(SimpleNamespace(state=SimpleNamespace(run=tmp_path)))
    assert curves == draw.curve_html({})


@pytest.mark.parametrize("text", ['{"state.pt": 1}', "[1]", "7", "null", '["state.pt"]', "[" * 100_000])
def test_a_torn_manifest_of_a_checkpoint_is_no_checkpoint(tmp_path, text):
    (tmp_path / "epoch-1").mkdir()
    (tmp_path / "epoch-1/manifest.json").write_text(text)
    (tmp_path / "epoch-1/state.pt").write_bytes(b"x")
    assert checkpoints.load_checkpoint(tmp_path) is None


def test_what_is_written_replaces_no_pipe_and_reads_none(tmp_path):
    os.mkfifo(tmp_path / "page.html")
    with pytest.raises(AevlpError, match="was not made by this command"):
        outcome.keep_foreign(tmp_path / "page.html", outcome.is_page)


def test_a_run_folder_that_is_a_pipe_or_goes_away_hides_no_other(tmp_path, monkeypatch):
    good, bad, gone = finished(tmp_path), finished(tmp_path, method="an"), finished(tmp_path, method="em")
    (bad / "params.yaml").unlink()
    os.mkfifo(bad / "params.yaml")
    found = runs.folders(tmp_path)
    shutil.rmtree(gone)
    monkeypatch.setattr(board, "folders", lambda _: found)
    assert dict(board.frame(tmp_path)[["run", "state"]].to_numpy()) == {good.name: "done", bad.name: "unreadable"}


# --- weights


def weights(folder, tensors=None, **settings):
    recipe = recipes.recipe("glyphs", "an")
    known = dict(method="an", recipe=asdict(recipe), class_names=["a", "b"], version="0", seed=0, dataset="glyphs")
    if tensors is None:
        tensors = {k: v.contiguous() for k, v in models.build_model(recipe, 2).state_dict().items()}
    header = settings.pop(
        "header", json.dumps(known | {"recipe": asdict(recipe) | settings.pop("recipe", {})} | settings)
    )
    (folder / "best.safetensors").write_bytes(save(tensors, {"run": header}))
    return folder


HEADERS = {
    "a list": dict(header="[1, 2]"),
    "no JSON": dict(header="{"),
    "deep JSON": dict(header="[" * 100_000),
    "classes that are a number": dict(class_names=3),
    "no classes": dict(class_names=[]),
    "classes that are lists": dict(class_names=[["a"], ["b"]]),
    "a method that is a list": dict(method=["an"]),
    "a method nobody knows": dict(method="none"),
    "another number of classes": dict(class_names=["a", "b", "c"]),
    "a hundred thousand classes": dict(class_names=[str(i) for i in range(100_000)]),
    "a picture of 10^9 pixels a side": dict(recipe=dict(image_size=10**9)),
    "a million processes": dict(recipe=dict(workers=10**6)),
    "a size that is text": dict(recipe=dict(image_size="big")),
    "a large backbone": dict(recipe=dict(backbone="vit_huge_patch14_clip_224.laion2b", image_size=2048)),
    "a wide head": dict(method="mime", recipe=dict(mime_width=8192, mime_ffn=65536, mime_z=8192)),
    "somebody else's backbone": dict(recipe=dict(backbone="hf-hub:somebody/else")),
    "somebody else's CLIP": dict(recipe=dict(backbone="clip:hf-hub:somebody/else")),
    "a text tower of a hub": dict(recipe=dict(backbone="clip:roberta-ViT-B-32")),
    "a folder as backbone": dict(recipe=dict(backbone="local-dir:/tmp")),
    "a CLIP of a hub": dict(method="clip", recipe=dict(clip="ViT-B-32", clip_weights="openai")),
    "a CLIP of an address": dict(method="clip", recipe=dict(clip="RN50", clip_weights="yfcc15m")),
    "an address as weights": dict(method="clip", recipe=dict(clip_weights="https://example.org/clip.pt")),
    "a CLIP whose words are of a hub": dict(method="clip", recipe=dict(clip="roberta-ViT-B-32", clip_weights="none")),
    "a CLIP without its prototypes": dict(method="clip", tensors={"weight": torch.ones(2)}),
    "a setting nobody knows": dict(recipe=dict(colour="red")),
    "tensors of something else": dict(tensors={"weight": torch.ones(2)}),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_strange_weight_file_is_one_sentence_and_asks_no_network(tmp_path, monkeypatch, what):
    def refuse(*given, **_):
        raise AssertionError(f"the network was asked: {given}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    began = time.process_time()
    with pytest.raises(AevlpError, match="best.safetensors|no method is called 'none'"):
        evidence.load_run(weights(tmp_path, **HEADERS[what]))
    assert time.process_time() - began < 10


def test_a_whole_weight_file_is_read(tmp_path):
    model, settings, names = evidence.load_run(weights(tmp_path))
    assert names == ("a", "b") and settings["recipe"].backbone == "glyphnet" and not model.training


# --- processes


def sleeper(**environment):
    return subprocess.Popen(["sleep", "100"], start_new_session=True, env=os.environ | environment)


@pytest.mark.parametrize("of", ["this run", "another run", "nobody"])
def test_only_a_process_that_was_started_for_the_run_is_ended(tmp_path, of):
    """Whatever a status.json says: it may have been copied from elsewhere."""
    params = runs.run_params("glyphs", "gr")
    folder = tmp_path / runs.run_name(params)
    folder.mkdir()
    process = sleeper(
        **({} if of == "nobody" else {"AEVLP_RUN": str(folder if of == "this run" else tmp_path / "other")})
    )
    try:
        said = dict(state="running", host=runs.HOST, process={"pid": 1, "born": 0}, kernel=runs.process_of(process.pid))
        write_json(folder / "status.json", said)
        assert runner.attempt(params, tmp_path, fake_notebook(tmp_path))["state"] == "done"
        assert alive(process.pid) == (of != "this run")
    finally:
        process.kill()
        process.wait()


# --- temporary files and folders


def test_a_link_at_the_name_of_a_temporary_file_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda n: "known")
    (tmp_path / ".a.json.known.tmp").symlink_to(victim)
    with pytest.raises(AevlpError, match="a.json: cannot be written .File exists"):
        write_json(tmp_path / "a.json", {})
    monkeypatch.undo()
    for name in (f".a.json.{os.getpid()}.tmp", ".a.json.tmp"):
        (tmp_path / name).symlink_to(victim)
    write_json(tmp_path / "a.json", {"a": 1})
    (tmp_path / "last").mkdir()
    (tmp_path / "last/.epoch-1.tmp").symlink_to(tmp_path)
    checkpoints.save_checkpoint(tmp_path / "last", "epoch-1", {"a": 1})
    assert victim.read_text() == "precious" and json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    with replacing(tmp_path / "b") as file:
        assert len([p for p in tmp_path.iterdir() if p.name.startswith(".b.")]) == 1
        file.write(b"x")
    (tmp_path / "c").write_bytes(b"x")
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "c").stat().st_mode


def test_folders_of_killed_processes_are_removed_by_the_next(tmp_path):
    code = f"""import os, signal
from aevlp import runner
with runner.scratch("mine-", {str(tmp_path)!r}):
    os.kill(os.getpid(), signal.SIGKILL)"""
    subprocess.run([sys.executable, "-c", code])
    (left,) = tmp_path.glob("mine-*")
    (tmp_path / "mine-of-somebody").mkdir()  # not made by us: no lock in it
    (tmp_path / "mine-link").symlink_to(left)
    with runner.scratch("mine-", tmp_path) as first, runner.scratch("mine-", tmp_path) as second:
        assert not left.exists() and first.is_dir() and second.is_dir()
        assert first.stat().st_mode & 0o077 == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine-link", "mine-of-somebody"]


def test_a_temporary_folder_of_100_characters(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    notebook = fake_notebook(tmp_path)
    assert runner.attempt(runs.run_params("glyphs", "gr"), tmp_path, notebook)["state"] == "done"
    table = sweeps.sweep({"methods": ["an"]}, runs=tmp_path, notebook=notebook, workers=1, show=False)
    assert table.state.tolist() == ["done"]
    assert not list(long.iterdir())


# --- disks and folders that go away


def test_a_folder_that_disappears_is_said_to_have_disappeared(tmp_path):
    notebook, params = fake_notebook(tmp_path), runs.run_params("glyphs", "gr")
    folder = tmp_path / runs.run_name(params)
    text = (
        Path(notebook).read_text().replace("lines = [", f"import shutil; shutil.rmtree({str(folder)!r}); lines = [", 1)
    )
    Path(notebook).write_text(text)
    outcome = runner.attempt(params, tmp_path, notebook)
    assert outcome == dict(run=folder.name, state="failed", error=f"{folder} disappeared while the run was being made")
    assert not folder.exists()


def test_recording_an_error_never_raises(tmp_path, monkeypatch):
    def full(path, value):
        raise AevlpError(f"{path}: cannot be written (No space left on device); make room")

    monkeypatch.setattr(runner, "write_json", full)
    outcome = runner.attempt(runs.run_params("glyphs", "gr"), tmp_path, fake_notebook(tmp_path))
    assert outcome["state"] == "failed" and "No space left on device" in outcome["error"]
    failed = sweeps._lost(
        type("Future", (), dict(status="error", exception=lambda self: OSError("gone")))(), "run", 3, tmp_path
    )
    assert failed["state"] == "failed" and "gone" in failed["error"]


class Elsewhere:
    """A dask client whose runs are busy in another process for a while."""

    def __init__(self, busy):
        self.busy = busy

    def submit(self, function, params, *rest, **_):
        self.busy -= 1
        state = "busy" if self.busy >= 0 else "done"
        outcomes = [dict(run=runs.run_name(p), state=state, error=None) for p in params]
        return type("Future", (), dict(done=lambda s: True, status="finished", result=lambda s: outcomes))()


def test_a_run_that_is_busy_elsewhere_is_not_lost(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(
        sweeps,
        "time",
        type("Clock", (), dict(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + 5))),
    )
    params = runs.run_params("glyphs", "an")
    name, seen, tried = runs.run_name(params), board.Board([params], tmp_path), []
    monkeypatch.setattr(sweeps, "_lost", lambda future, name, tries, where: tried.append(tries))
    ended = sweeps._drive(Elsewhere(10), {name: params}, set(), tmp_path, "train", tmp_path / "stop", seen)
    assert ended[name]["state"] == "done" and not tried


@pytest.fixture
def small_disk(tmp_path):
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "none", str(where)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_disk_that_fills_during_a_sweep(tmp_path, small_disk, capfd):
    """The runs that fit are made; the others fail with a sentence, and the sweep ends."""
    notebook = fake_notebook(tmp_path)
    shutil.copy(tmp_path / "told.json", small_disk / "told.json")
    text = Path(notebook).read_text()
    Path(notebook).write_text(
        text.replace("lines = [", "(folder / 'ballast').write_bytes(bytes(300_000)); lines = [", 1)
    )
    table = sweeps.sweep({"methods": ["gr"], "seeds": [0, 1, 2, 3]}, workers=1, runs=small_disk, notebook=notebook)
    assert table.state.tolist()[0] == "done" and table.state.tolist()[-1] == "failed"
    assert all("No space left" in e for e in table.error.dropna()), table.error.tolist()
    assert "Traceback" not in capfd.readouterr().err
    assert not any(alive(pid) for pids in begun(small_disk).values() for pid in pids)


# --- signals


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sweep TERM", "sweep HUP", "sweep INT INT", "train TERM", "train HUP", "train INT"])
def test_a_signal_ends_what_was_started(tmp_path, how):
    (command, *signals), notebook = how.split(), fake_notebook(tmp_path, pause=60)
    (tmp_path / "two.yaml").write_text(json.dumps({"methods": ["gr"], "seeds": [0, 1]}))
    script = tmp_path / "command.py"
    script.write_text(f"""import sys
from functools import partial
from aevlp import cli, runner, sweeps
given = dict(runs={str(tmp_path)!r}, notebook={str(notebook)!r})
sweeps.sweep, runner.train = partial(sweeps.sweep, **given), partial(runner.train, **given)
if __name__ == "__main__":
    cli.main(sys.argv[1:])
""")
    arguments = (
        ["sweep", str(tmp_path / "two.yaml"), "--workers", "2"] if command == "sweep" else ["train", "--method", "gr"]
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    known = dict(stdout=-1, stderr=-2, text=True, start_new_session=True, env=os.environ | {"TMPDIR": str(temporary)})
    known["preexec_fn"] = lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)]  # nohup's
    process = subprocess.Popen([sys.executable, script, *arguments], **known)
    try:
        wanted, end = (2 if command == "sweep" else 1), time.monotonic() + 200
        while len(begun(tmp_path)) < wanted and time.monotonic() < end and process.poll() is None:
            time.sleep(0.2)
        for name in signals:
            if name == "INT":
                os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
            else:
                process.send_signal(getattr(signal, f"SIG{name}"))
            time.sleep(1)
        printed = process.communicate(timeout=100)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    code = {"TERM": 143, "HUP": 129, "INT": 130}[signals[0]]
    assert process.returncode == code and "Traceback" not in printed, printed
    assert [runs.status(tmp_path / name)["state"] for name in states(tmp_path)] == ["interrupted"] * wanted
    assert len(begun(tmp_path)) == wanted and not any(alive(p) for pids in begun(tmp_path).values() for p in pids)
    assert not list(tmp_path.glob(".sweep-*"))
    assert not list(temporary.glob("*.json"))  # how to talk to a kernel


@pytest.mark.slow
@pytest.mark.parametrize("command", ["lab", "app"])
def test_sigterm_of_a_server_ends_it(tmp_path, command):
    code = f"from aevlp import cli; cli.main(['{command}', '--no-browser'])"
    known = os.environ | {"AEVLP_RUNS": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=known)
    try:
        address = process.stdout.readline()
        assert address.startswith("http://127.0.0.1:"), address
        server = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        process.terminate()
        assert process.wait(60) == 0
        assert server and not any(alive(pid) for pid in server)
    finally:
        process.kill()
