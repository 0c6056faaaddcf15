"""The command line: help, examples, exit codes, one sentence an error, JSON, and no colour in a pipe."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_runs import finished

from aevlp import cli

AEVLP = str(Path(sys.executable).parent / "aevlp")
COMMANDS = "demo train sweep results report compare figure methods recipe predict export card lab app".split()
GROUPS = {"data": ["check", "fetch"], "bank": ["ls", "verify", "rm"]}


def call(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


def test_help_fits_a_screen_comes_at_once_and_has_no_colour_in_a_pipe():
    script = (
        "import sys; from aevlp import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'pandas', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"}
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) < 30 and max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout and all(f"\n  {name} " in done.stdout for name in [*COMMANDS, *GROUPS])


HEAVY = {"torch", "torchvision", "open_clip", "timm", "accelerate", "scipy", "matplotlib", "papermill", "IPython"}


@pytest.mark.parametrize("command", ["methods", "recipe voc gr", "results", "sweep table1 --dry-run", "train --help"])
def test_a_table_is_printed_without_importing_what_trains(tmp_path, command):
    script = (
        f"import sys; from aevlp import cli\ntry: cli.main({command.split()})\n"
        "except SystemExit as e: assert not e.code\n"
        f"assert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)"
    )
    known = os.environ | {"AEVLP_RUNS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=known)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("command", [[c] for c in COMMANDS] + [[g, c] for g, names in GROUPS.items() for c in names])
def test_every_command_has_an_example_that_parses(capsys, command):
    code, out, _ = call(capsys, *command, "--help")
    examples = re.findall(r"^ +aevlp (.+)$", out, re.M)
    assert code == 0 and examples and all(e.split()[: len(command)] == command for e in examples), out
    options = set(re.findall(r"--[a-z-]+", out.partition("Example")[0]))
    assert {o for e in examples for o in re.findall(r"--[a-z-]+", e)} <= options


def test_what_is_in_the_frames_is_shown_as_text_and_as_json(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("AEVLP_RUNS", str(tmp_path))
    assert call(capsys, "results")[:2] == (0, "nothing\n")
    run = finished(tmp_path, 61.25)
    code, out, _ = call(capsys, "results", "--dataset", "glyphs")
    assert code == 0 and run.name in out and "61.25" in out
    code, out, _ = call(capsys, "results", "--json")
    assert code == 0 and json.loads(out)[0]["test_map"] == 61.25
    assert json.loads(call(capsys, "results", "--json", "--method", "an")[1]) == []
    code, out, _ = call(capsys, "methods", "--json")
    assert code == 0 and {"full", "an", "gr", "aevlp"} <= {m["name"] for m in json.loads(out)}
    code, out, _ = call(capsys, "recipe", "voc", "aevlp", "--set", "grid=3", "--json")
    assert code == 0 and next(r for r in json.loads(out) if r["field"] == "grid")["voc"] == 3
    code, out, _ = call(capsys, "sweep", "table1", "--seeds", "0", "--dry-run", "--json")
    plan = {r["label"]: r for r in json.loads(out)}
    assert code == 0 and plan["GR Loss"]["state"] == "done" and plan["AEVLP"]["state"] == "new" and len(plan) == 17
    code, out, _ = call(capsys, "report", "table1")
    assert code == 0 and Path(out.strip()).read_text().startswith("<!doctype html>")


WRONG = {
    "an unknown command": (["trian"], "trian"),
    "an unknown option": (["train", "--sed", "1"], "--sed"),
    "a word for a number": (["train", "--seed", "one"], "--seed"),
    "an unknown method": (["train", "--method", "aevlpp"], "aevlp"),
    "an unknown data set": (["train", "--dataset", "glyps"], "glyphs"),
    "an unknown setting": (["train", "--set", "negativ_ratio=0.2"], "negative_ratio"),
    "a setting without value": (["train", "--set", "grid"], "key=value"),
    "a value of the wrong type": (["train", "--set", "grid=two"], "whole number"),
    "a folder that is not there": (
        ["train", "--dataset", "csv", "--root", "/nowhere", "--csv", "/nowhere/x.csv"],
        "nowhere",
    ),
    "a sweep that is not there": (["sweep", "table77"], "table77"),
    "seeds that are words": (["sweep", "table1", "--seeds", "a,b"], "0,1,2"),
    "a run that is not there": (["predict", "nothing", "a.png"], "nothing"),
    "neither form": (["export", "x"], "--onnx"),
    "a run without metrics": (["card", "/nowhere"], "nowhere"),
    "an unknown figure": (["figure", "figure9"], "figure9"),
    "zero seeds": (["demo", "--seeds", "0"], "seeds"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_exit_code_2_and_says_what_to_do(capsys, tmp_path, monkeypatch, case):
    monkeypatch.setenv("AEVLP_RUNS", str(tmp_path))
    arguments, said = WRONG[case]
    code, out, err = call(capsys, *arguments)
    assert code == 2 and said in err and "Traceback" not in err, (code, err)
    assert not list(tmp_path.glob("*/params.yaml")), "something was started"


def test_a_run_that_fails_is_exit_code_1_and_one_line(capsys, tmp_path, monkeypatch):
    from fake_run import fake_notebook

    from aevlp import runner

    monkeypatch.setenv("AEVLP_RUNS", str(tmp_path))
    notebook, train = fake_notebook(tmp_path, fail=[4]), runner.train
    monkeypatch.setattr(runner, "train", lambda **kw: train(**kw, notebook=notebook))
    code, _, err = call(capsys, "train", "--method", "gr", "--seed", "4")
    assert code == 1 and err.splitlines()[-1].startswith("aevlp: ValueError: seed 4 was told to fail")
    code, out, _ = call(capsys, "train", "--method", "gr", "--seed", "3")
    assert code == 0 and Path(out.splitlines()[-1]).is_dir()


@pytest.mark.parametrize("state, expected", [("complete", 0), ("partial", 0), ("damaged", 1)])
def test_a_damaged_bank_is_exit_code_1(capsys, monkeypatch, state, expected):
    from aevlp import bank

    monkeypatch.setattr(bank, "verify", lambda name: pd.DataFrame([{"epoch": 1, "state": state}]))
    code, out, _ = call(capsys, "bank", "verify", "x", "--json")
    assert (code, json.loads(out)) == (expected, [{"epoch": 1, "state": state}])


def test_the_shell_completes():
    asked = {"_AEVLP_COMPLETE": "complete_bash", "COMP_WORDS": "aevlp s", "COMP_CWORD": "1"}
    done = subprocess.run([AEVLP], capture_output=True, text=True, env=os.environ | asked)
    assert done.stdout.split() == ["sweep"]
    asked |= {"COMP_WORDS": "aevlp train --me", "COMP_CWORD": "2"}
    done = subprocess.run([AEVLP], capture_output=True, text=True, env=os.environ | asked)
    assert done.stdout.split() == ["--method"]


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"set -o pipefail; {AEVLP} recipe | head -1", shell=True, executable="/bin/bash", capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr and done.returncode in (0, 141)


def test_a_defect_is_one_sentence_too(capsys, monkeypatch):
    from aevlp import board

    monkeypatch.setattr(board, "frame", lambda: 1 / 0)
    code, _, err = call(capsys, "results")
    assert (code, err) == (1, "aevlp: ZeroDivisionError: division by zero (AEVLP_DEBUG=1 shows where)\n")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.text(max_size=20),
        st.builds("{}={}".format, st.sampled_from(["lr", "grid", "noise", "clip", "epochs"]), st.text(max_size=8)),
    )
)
@example("lr=nan")
@example("lr=inf")
@example("grid=99999999999999999999")
@example("epochs=1e400")
@example("=")
@example("grid=２")
def test_any_override_is_taken_or_refused_with_one_sentence(capsys, text):
    code, out, err = call(capsys, "recipe", "glyphs", "aevlp", "--set", text)
    assert code in (0, 2) and "Traceback" not in err
    assert out if code == 0 else err.strip()


def until_answers(server):
    """The address that a server printed, once it answers."""
    line = server.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), line + (server.stdout.read() if server.poll() is not None else "")
    return line.strip()


PAGES = ["--images", "photos", "--csv", "labels.csv", "--set", "clip=glyphs-clip", "--set", "clip_weights="]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Ten pictures with a label each, in the current folder."""
    from aevlp import glyphs

    (tmp_path / "photos").mkdir()
    lines = ["image,label"]
    for i in range(10):
        scene = glyphs.draw_scene(3, i)
        scene.image.save(tmp_path / f"photos/{i}.png")
        lines.append(f"{i}.png,{glyphs.CLASS_NAMES[scene.things[0].label]}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("AEVLP_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command, kind", [("lab", "jupyterlab"), ("app", "voila")])
def test_every_page_has_a_notebook_of_its_own(photos, capsys, monkeypatch, command, kind):
    import nbformat

    from aevlp import pages

    opened = []
    monkeypatch.setattr(pages, "serve", lambda kind, notebook, *_: opened.append((kind, notebook)) or 0)
    given = {"dataset": "csv", "root": str(photos / "photos"), "csv": str(photos / "labels.csv"), "run": None}
    given |= {"overrides": {"clip": "glyphs-clip", "clip_weights": ""}}
    mine = {"out": str(photos / "mine.csv"), "split": "test", "order": "random"}
    for options, more in (
        ([], {}),
        (["--review"], {"out": str(photos / "reviewed.csv"), "split": "train", "order": None}),
        (["--review", "--out", "mine.csv", "--split", "test", "--order", "random"], mine),
    ):
        code, out, err = call(capsys, command, *PAGES, *options)
        assert (code, out) == (0, "") and "looking" in err and opened[-1][0] == kind
        (cell,) = nbformat.read(opened[-1][1], 4).cells
        assert cell.metadata.jupyter.source_hidden
        values = cell.source.partition("# Parameters\n")[2].partition("\n\n")[0]
        found = {}
        exec(values, found)
        assert {k: v for k, v in found.items() if k != "__builtins__"} == given | more
    assert len({notebook for _, notebook in opened}) == 3


@pytest.mark.parametrize(
    "options, said",
    [
        (["--images", "nowhere"], "nowhere: there is no such folder"),
        (["--csv", "nothing.csv"], "nothing.csv: there is no such file"),
        (["--images", "photos", "--csv", "broken.csv"], "broken.csv"),
        (["--run", "nothing"], "no run is called 'nothing'"),
        (["--dataset", "vco"], "did you mean 'voc'?"),
        ([*PAGES, "--set", "gird=2"], "the nearest is 'grid'"),
        ([*PAGES, "--out", "mine.csv"], "--review"),
        ([*PAGES, "--review", "--split", "tset"], "train, val or test"),
        ([*PAGES, "--review", "--order", "best"], "uncertain, weighted or random"),
    ],
)
def test_what_no_page_opens_on_is_said_before_a_server_starts(photos, capsys, monkeypatch, options, said):
    from aevlp import pages

    monkeypatch.setattr(pages, "serve", lambda *_: pytest.fail("a server was started"))
    (photos / "broken.csv").write_text("image,label\nnot-there.png,cat\n")
    code, out, err = call(capsys, "app", *options)
    assert (code, out) == (2, "") and said in err and "Traceback" not in err


def test_what_a_page_needs_is_looked_for_before_a_server_starts(photos, capsys, monkeypatch):
    import nbformat

    from aevlp import pages, ready

    opened = []
    monkeypatch.setattr(pages, "serve", lambda kind, notebook, *_: opened.append(notebook) or 0)
    rows = (photos / "labels.csv").read_text().splitlines()
    (photos / "lists.csv").write_text("\n".join([rows[0], f"{rows[1]}/anchor", *rows[2:]]) + "\n")
    code, _, err = call(capsys, "lab", "--images", "photos", "--csv", "lists.csv", "--separator", "/", *PAGES[4:])
    assert code == 0, err
    assert 'separator = "/"' in nbformat.read(opened[0], 4).cells[0].source
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(photos / "none"))
    monkeypatch.setenv("HOME", str(photos))
    ready.network.cache_clear()
    code, _, err = call(capsys, "app", *PAGES[:4])
    assert code == 2 and "ViT-B-16 (openai) are not on this machine" in err and "--set clip_weights=FILE" in err
    ready.network.cache_clear()
    (photos / "photos/3.png").write_bytes((photos / "photos/3.png").read_bytes()[:99])
    code, _, err = call(capsys, "lab", *PAGES)
    assert code == 2 and "3.png" in err and len(opened) == 1


def test_it_is_said_within_three_seconds(photos):

    began = time.monotonic()
    done = subprocess.run([AEVLP, "lab", "--images", "nowhere"], capture_output=True, text=True, cwd=photos)
    assert done.returncode == 2 and "no such folder" in done.stderr
    assert time.monotonic() - began < (3 if os.environ.get("CI") == "true" or os.getloadavg()[0] < 2 else 15)


SIGNALS = [("lab", signal.SIGINT), ("app", signal.SIGTERM), ("lab", signal.SIGHUP)]


@pytest.mark.parametrize("command, how", SIGNALS, ids=lambda v: getattr(v, "name", v))
def test_servers_listen_here_only_want_their_token_and_end_with_their_command(photos, command, how):
    import urllib.error
    import urllib.request

    import psutil

    env = os.environ | {"JUPYTER_CONFIG_DIR": str(photos / "jupyter")}
    heed = "import signal, os, sys; signal.signal(2, signal.default_int_handler); os.execv(sys.argv[1], sys.argv[1:])"
    server = subprocess.Popen(  # also where the tests run in the background, to which a shell makes Ctrl-C nothing
        [sys.executable, "-c", heed, AEVLP, command, *PAGES, "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        url = until_answers(server)
        told = [server.stderr.readline() for _ in range(3)]
        assert "looking" in told[0] and "starting" in told[1] and "some seconds" in told[2], (
            "one is told what one waits for"
        )
        places = set()
        for p in [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # one that just ended
                places |= {c.laddr.ip for c in p.net_connections("tcp") if c.status == "LISTEN"}
        assert places == {"127.0.0.1"}
        base, _, token = url.partition("?token=")
        if command == "lab":
            html = urllib.request.urlopen(url, timeout=60).read().decode()
            assert "notebook:run-all-cells" in html, "the page runs the notebook"
            top, _, notebook = base.partition("/doc/tree/")
            asked = urllib.request.Request(f"{top}/api/kernels?token={token}", method="POST")
            assert urllib.request.urlopen(asked, timeout=60).status == 201, "a kernel"
        else:
            html = urllib.request.urlopen(url, timeout=240).read().decode()
            assert "There was an error" not in html and "aevlp: " not in html
        with pytest.raises(urllib.error.HTTPError) as refused:
            request = urllib.request.Request(
                base.replace("/doc/tree", "/api/contents"), headers={"Accept": "application/json"}
            )
            request = request if command == "lab" else base
            page = urllib.request.urlopen(request, timeout=60)
            if "login" in page.url:
                raise urllib.error.HTTPError(page.url, 403, "login", page.headers, None)
        assert refused.value.code in (401, 403)
        listed = subprocess.run(["ps", "-eo", "args", "-ww"], capture_output=True, text=True, check=True).stdout
        assert AEVLP in listed and token not in listed, "the token is in the list of processes"
    finally:
        family = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
        server.send_signal(how)
        code = server.wait(120)
    assert code == 0 and len(family) >= 2, "the server and a kernel"
    assert not any(p.is_running() and p.status() != "zombie" for p in family), "a server is left behind"
