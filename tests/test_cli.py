"""The command line: help, examples, exit codes, one sentence an error, JSON, and no colour in a pipe."""

import contextlib
import json
import os
import re
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
        "import sys, time; t = time.process_time(); from aevlp import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and time.process_time() - t < 1"
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
        f"import sys, time; t = time.process_time(); from aevlp import cli\ntry: cli.main({command.split()})\n"
        "except SystemExit as e: assert not e.code\n"
        f"assert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)\nassert time.process_time() - t < 1"
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
    "a sweep that is not there": (["sweep", "table7"], "table7"),
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

    from aevlp import runs

    monkeypatch.setenv("AEVLP_RUNS", str(tmp_path))
    notebook, train = fake_notebook(tmp_path, fail=[4]), runs.train
    monkeypatch.setattr(runs, "train", lambda **kw: train(**kw, notebook=notebook))
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
    from aevlp import runs

    monkeypatch.setattr(runs, "frame", lambda: 1 / 0)
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


@pytest.mark.parametrize("command, kind", [("lab", "jupyterlab"), ("app", "voila")])
def test_the_review_opens_on_own_pictures(tmp_path, capsys, monkeypatch, command, kind):
    import nbformat

    monkeypatch.setenv("AEVLP_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    opened = []
    monkeypatch.setattr(cli, "_serve", lambda kind, notebook, *_: opened.append((kind, notebook)))
    given = [command, "--images", "photos", "--csv", "labels.csv"]
    for options, name in ((["--review"], "reviewed.csv"), (["--review", "--out", "mine.csv"], "mine.csv"), ([], None)):
        code, _, err = call(capsys, *given, *options)
        assert (code, err) == (0, "") and opened[-1][0] == kind
        assert opened[-1][1].name == ("review.ipynb" if name else "explore.ipynb")
        cells = nbformat.read(opened[-1][1], 4).cells
        values = next(c.source for c in cells if "injected-parameters" in c.metadata.get("tags", []))
        found = {}
        exec(values, found)
        expected = {"dataset": "csv", "root": str(tmp_path / "photos"), "csv": str(tmp_path / "labels.csv")}
        expected |= {"run": None} | ({"out": str(tmp_path / name)} if name else {})
        assert {k: v for k, v in found.items() if k != "__builtins__"} == expected
    code, _, err = call(capsys, *given, "--out", "mine.csv")
    assert code == 2 and "--review" in err


@pytest.mark.parametrize("command", ["lab", "app"])
def test_servers_listen_here_only_and_want_their_token(tmp_path, command):
    import urllib.error
    import urllib.request

    import psutil

    env = os.environ | {"AEVLP_RUNS": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path / "jupyter")}
    heed = "import signal, os, sys; signal.signal(2, signal.default_int_handler); os.execv(sys.argv[1], sys.argv[1:])"
    server = subprocess.Popen(  # also where the tests run in the background, to which a shell makes Ctrl-C nothing
        [sys.executable, "-c", heed, AEVLP, command, "--no-browser"],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        url = until_answers(server)
        places = set()
        for p in [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # one that just ended
                places |= {c.laddr.ip for c in p.net_connections("tcp") if c.status == "LISTEN"}
        assert places == {"127.0.0.1"}
        assert urllib.request.urlopen(url, timeout=60).status == 200
        with pytest.raises(urllib.error.HTTPError) as refused:
            request = urllib.request.Request(
                url.partition("?")[0].replace("/lab/tree", "/api/contents/lab"), headers={"Accept": "application/json"}
            )
            request = request if command == "lab" else url.partition("?")[0]
            page = urllib.request.urlopen(request, timeout=60)
            if "login" in page.url:
                raise urllib.error.HTTPError(page.url, 403, "login", page.headers, None)
        assert refused.value.code in (401, 403)
        token = url.rpartition("=")[2]
        listed = subprocess.run(["ps", "-eo", "args", "-ww"], capture_output=True, text=True, check=True).stdout
        assert AEVLP in listed and token not in listed, "the token is in the list of processes"
    finally:
        family = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
        os.killpg(server.pid, 2)
        server.wait(120)
        until = time.monotonic() + 10
        while any(p.is_running() and p.status() != "zombie" for p in family) and time.monotonic() < until:
            time.sleep(0.1)
    assert not any(p.is_running() and p.status() != "zombie" for p in family), "a server is left behind"
