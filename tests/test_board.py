"""`aevlp results` and the names of a sweep's runs: what differs, sorted, filtered, in people's words."""

import io
import re
import threading

import pandas as pd
import pytest
from rich.console import Console
from test_runs import finished

from aevlp import board, cli, results, runs, sweeps


@pytest.fixture
def four(tmp_path, monkeypatch):
    "Folder with one run of AN and three of AEVLP, all of 8 epochs, with two shares of negatives."
    monkeypatch.setenv("AEVLP_RUNS", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    finished(tmp_path, 61.0, method="an", overrides={"epochs": 8})
    for share, seed, test_map in ((0.1, 0, 64.0), (0.3, 0, 66.5), (0.3, 1, 65.5)):
        finished(tmp_path, test_map, method="aevlp", seed=seed, overrides={"epochs": 8, "negative_ratio": share})
    return tmp_path


def said(capsys, *arguments):
    "Exit code, output and error of `aevlp results`."
    with pytest.raises(SystemExit) as end:
        cli.main(["results", *arguments])
    return end.value.code or 0, *capsys.readouterr()


def test_results_show_the_settings_that_differ_and_no_other(four, capsys):
    head = said(capsys)[1].splitlines()[0].split()
    assert head[:3] == ["run", "state", "negative_ratio"] and not {"epochs", "view_seed", "lr"} & set(head)
    assert board.differing(board.frame(four).query("negative_ratio == 0.3")) == []


def test_results_are_sorted_by_a_heading_or_a_column(four, capsys):
    for name in ("test mAP", "test_map"):
        code, out, _ = said(capsys, "--sort", name)
        assert not code and re.findall(r"(\d+\.\d) +\d+\.\d +80", out) == ["66.5", "65.5", "64.0", "61.0"]
    assert [int(line.split()[-1]) for line in said(capsys, "--sort", "seed")[1].splitlines()[1:]] == [0, 0, 0, 1]
    lower = pd.DataFrame({"test_mean_rank": [3.0, 1.0, None, 2.0], "dataset": "glyphs"})
    assert board.chosen(lower, sort="test_mean_rank").index.tolist() == [1, 3, 0, 2]


def test_results_are_filtered(four, capsys):
    assert len(said(capsys, "--method", "gpr+damp")[1].splitlines()) == 4  # heading and three runs
    assert len(said(capsys, "--method", "an", "--state", "done", "--dataset", "glyphs")[1].splitlines()) == 2
    assert said(capsys, "--state", "failed")[:2] == (0, "nothing\n")


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("--method aevpl", "aevlp"),
        ("--state faild", "failed"),
        ("--dataset glyps", "glyphs"),
        ("--sort test_mp", "test_map"),
    ],
)
def test_an_unknown_word_is_an_error_with_the_nearest(four, capsys, wrong, near):
    code, out, err = said(capsys, *wrong.split())
    assert code == 2 and not out and f"the nearest is '{near}'" in err


def test_names_of_a_sweep_say_what_differs():
    shares = {"epochs": 8, "negative_ratio": [0.1, 0.3]}
    plan = sweeps.expand({"methods": ["aevlp", "an"], "seeds": [0, 1], "overrides": shares})
    assert plan.label.unique().tolist() == [f"{m}, negatives {s} %" for m in ("aevlp", "an") for s in (10, 30)]
    assert sweeps._names(plan)[plan.run[1]] == "aevlp, negatives 10 %, seed 1"
    rows = [{"method": "an"}, {"method": "an", "overrides": {"lr": 0.001}}]
    assert sweeps.expand({"rows": rows}).label.tolist() == ["an", "an, learning rate 0.001"]
    assert sweeps.expand(dict(results.DEMO, seeds=[0])).label.tolist() == ["full", "an", "gr", "aevlp"]


def test_a_board_calls_runs_by_their_names(tmp_path):
    folder = finished(tmp_path)
    seen = board.Board([runs.run_params("glyphs", "gr")], tmp_path, names={folder.name: "negatives 30 %"})
    seen.console = Console(file=io.StringIO(), width=150)
    seen.note(dict(run=folder.name, state="done"))
    seen.note(dict(run=folder.name, state="failed", error="no room"))
    done, failed = seen.console.file.getvalue().splitlines()
    assert done.startswith("done    negatives 30 %  test mAP 60.00") and folder.name not in done
    assert failed == f"failed  negatives 30 % ({folder.name}): no room"


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(tmp_path):
    folder = finished(tmp_path, 61.0, method="gr", overrides={"epochs": 8})
    seen, ticks = board.Board([runs.read_params(folder)], tmp_path, names={folder.name: "gr"}), threading.Event()
    said = []

    def say(text):
        said.append(text)
        ticks.set()

    seen.say = say
    with seen._minutes(0.01):
        assert ticks.wait(20)
    assert said[0] == "1 waiting, 0 running, 0 done, 0 failed"
    now = len(said)
    ticks.clear()
    assert not ticks.wait(0.1) and len(said) <= now + 1, "it ends with the block"
