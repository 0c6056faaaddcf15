"""Sweeps survive failing runs, killed workers, a second sweep and Ctrl-C; nothing is run twice, no kernel is left."""

import json
import os
import random
import signal
import time
import urllib.error
import urllib.request
from functools import partial

import dask
import psutil
import pytest
from distributed import Client, LocalCluster, Security
from fake_run import Sweep, alive, begun, fake_notebook, record, states, until

from aevlp import cli, runs, sweeps
from aevlp.data import AevlpError


def spec(n, method="gr"):
    return {"methods": [method], "seeds": list(range(n))}


def running(folder):
    return {n: s for n, s in states(folder).items() if s["state"] == "running" and "kernel" in s and n in begun(folder)}


def test_a_failing_run_is_recorded_and_stops_no_other(tmp_path):
    notebook = fake_notebook(tmp_path, fail=[1])
    table = sweeps.sweep(spec(3), workers=2, runs=tmp_path, notebook=notebook)
    assert table.state.tolist() == ["done", "failed", "done"]
    assert table.error[1] == "ValueError: seed 1 was told to fail"
    why = json.loads((tmp_path / table.run[1] / "error.json").read_text())
    assert why["error"] == table.error[1] and any("told to fail" in line for line in why["last_lines"])
    assert not any("\x1b" in line for line in why["last_lines"])

    fake_notebook(tmp_path)  # what made it fail is put right
    again = sweeps.sweep(spec(3), workers=1, runs=tmp_path, notebook=notebook)
    assert again.state.tolist() == ["reused", "done", "reused"]
    assert {n: len(b) for n, b in begun(tmp_path).items()} == {table.run[0]: 1, table.run[1]: 2, table.run[2]: 1}
    assert not (tmp_path / table.run[1] / "error.json").exists()
    assert not any(alive(pid) for pids in begun(tmp_path).values() for pid in pids)


def test_a_killed_worker_s_run_is_taken_up_again(tmp_path):
    sweep = Sweep(spec(3), tmp_path, fake_notebook(tmp_path, pause=1.0))
    victim, said = until(lambda: next(iter(running(tmp_path).items()), None), sweep)
    os.kill(said["process"]["pid"], signal.SIGKILL)
    printed = sweep.end()
    assert "['done', 'done', 'done']" in printed, printed
    counts = {n: len(b) for n, b in begun(tmp_path).items()}
    assert counts.pop(victim) == 2 and set(counts.values()) == {1}
    assert not any(alive(pid) for pids in begun(tmp_path).values() for pid in pids)


def test_two_sweeps_at_once_make_no_run_twice(tmp_path):
    notebook = fake_notebook(tmp_path, pause=0.3)
    sweeps = [Sweep(spec(4), tmp_path, notebook, workers=1) for _ in range(2)]
    for sweep in sweeps:
        printed = sweep.end()
        assert printed.count("done") + printed.count("reused") and "failed  " not in printed, printed
        assert "stopped" not in printed and "Traceback" not in printed, printed
    assert {n: len(b) for n, b in begun(tmp_path).items()} == {n: 1 for n in states(tmp_path)}
    assert {s["state"] for s in states(tmp_path).values()} == {"done"} and len(states(tmp_path)) == 4


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_finishes_what_runs_and_twice_stops(tmp_path, times):
    sweep = Sweep(spec(6), tmp_path, fake_notebook(tmp_path, pause=1.0 if times == 1 else 60))
    until(lambda: len(running(tmp_path)) == 2, sweep)
    for _ in range(times):
        sweep.interrupt()
        time.sleep(1)
    printed = sweep.end()
    found = [runs.status(tmp_path / n)["state"] for n in states(tmp_path)]
    assert found == (["done", "done"] if times == 1 else ["interrupted", "interrupted"]), printed
    assert not any(alive(pid) for pids in begun(tmp_path).values() for pid in pids)
    assert not list(tmp_path.glob(".sweep-*"))
    if times == 1:
        assert printed.count("stopped") == 4, printed


@pytest.mark.parametrize("dataset, views", [("glyphs", [0, 1, 2]), ("voc", [0, 0, 0])])
def test_a_seed_of_the_embedded_benchmark_has_views_of_its_own(dataset, views):
    plan = sweeps.expand({"datasets": [dataset], "methods": ["an", "gpr+damp"], "seeds": [0, 1, 2]})
    assert [p["recipe"]["view_seed"] for p in plan.params] == 2 * views and plan.seed.tolist() == 2 * [0, 1, 2]


def test_runs_that_share_a_bank_wait_for_the_first(tmp_path):
    plan = sweeps.expand(
        {
            "methods": ["an", "aevlp", "gpr+damp", "bce+damp"],
            "seeds": [0, 1],
            "overrides": {"grid": [2, 3], "view_seed": 0},
        }
    )
    todo = dict(zip(plan.run, plan.params, strict=True))
    now, later = sweeps._waves(todo, set())
    assert [todo[n]["method"] for n in now].count("an") == 4
    leaders = [todo[n] for n in now if todo[n]["method"] != "an"]
    assert sorted(p["recipe"]["grid"] for p in leaders) == [2, 3]
    assert set(now[:2]) == {runs.run_name(p) for p in leaders}, "what others wait for comes first"
    assert {len(names) for names in later.values()} == {3} and len(now) + 6 == len(todo)
    assert sweeps._waves(todo, {sweeps.bank_of(p) for p in leaders})[1] == {}


def test_a_cluster_that_exists_makes_the_runs_and_goes_on(tmp_path):
    given = dict(n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", protocol="tcp://")
    given |= dict(dashboard_address="127.0.0.1:0", local_directory=str(tmp_path / "dask"), silence_logs=50)
    with dask.config.set({"distributed.worker.daemon": False}), LocalCluster(**given) as elsewhere:
        with Client(elsewhere, set_as_default=False) as client:
            workers = set(client.run(os.getpid).values())
            table = sweeps.sweep(
                spec(4), runs=tmp_path, notebook=fake_notebook(tmp_path), scheduler=client.scheduler.address
            )
            assert table.state.tolist() == ["done"] * 4
            assert {s["process"]["pid"] for s in states(tmp_path).values()} <= workers, "made somewhere else"
            assert {n: len(b) for n, b in begun(tmp_path).items()} == dict.fromkeys(table.run, 1)
            assert set(client.run(os.getpid).values()) == workers, "the sweep ended a cluster that is not its own"


def test_a_sweep_s_tracker_reaches_its_runs(tmp_path, monkeypatch):
    """Through $AEVLP_TRACKER: from the command to dask's worker and to the kernel."""
    monkeypatch.setenv("AEVLP_TRACKER", "none yet")
    monkeypatch.setattr(sweeps, "sweep", partial(sweeps.sweep, runs=tmp_path, notebook=fake_notebook(tmp_path)))
    (tmp_path / "one.yaml").write_text(json.dumps(spec(1)))
    with pytest.raises(SystemExit) as end:
        cli.main(["sweep", str(tmp_path / "one.yaml"), "--tracker", "tensorboard", "--workers", "1"])
    assert not end.value.code
    assert [json.loads(p.read_text())["tracker"] for p in tmp_path.glob("*/metrics.json")] == ["tensorboard"]


def test_a_dead_scheduler_is_one_sentence(tmp_path):
    notebook = fake_notebook(tmp_path)
    with pytest.raises(AevlpError, match="no dask scheduler answers at"):
        with sweeps.cluster(scheduler="tcp://127.0.0.1:1"):
            pass
    assert notebook


def listening():
    """Ports on which this process or a child of it listens."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return {c.laddr.port for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def answers(port):
    """What a port says to a browser; None where it does not speak HTTP."""
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).status
    except urllib.error.HTTPError as e:
        return e.code
    except OSError:
        return None


def test_only_the_sweep_itself_can_talk_to_its_cluster(tmp_path):
    before = listening()
    with sweeps.cluster(1) as client:
        assert client.submit(len, "abc").result(timeout=60) == 3
        known = client.scheduler_info()
        addresses = [known["address"], *known["workers"], *(w["nanny"] for w in known["workers"].values())]
        assert all(a.startswith("tls://127.0.0.1:") for a in addresses), addresses
        for address in addresses[:2]:
            for stranger in (None, Security.temporary()):  # no certificate, and one of another sweep
                protocol = "tls" if stranger else "tcp"
                with pytest.raises(OSError):
                    Client(address.replace("tls", protocol, 1), security=stranger, timeout=3, set_as_default=False)
        assert {answers(port) for port in listening() - before} <= {None, 404}, "a page of dask is served"
        assert client.submit(len, "abcd").result(timeout=60) == 4


@pytest.mark.slow
def test_200_short_runs_with_workers_killed_at_random(tmp_path):
    """`AEVLP_SOAK_RUNS=N` for another number of runs."""
    n, chance, kills, memory = int(os.environ.get("AEVLP_SOAK_RUNS", 200)), random.Random(0), 0, []
    sweep = Sweep(spec(n), tmp_path, fake_notebook(tmp_path, pause=0.1))
    began = time.monotonic()
    due = began + chance.uniform(2, 12)
    watched = psutil.Process(sweep.process.pid)
    while sweep.process.poll() is None:
        time.sleep(1)
        ended = sum(s["state"] == "done" for s in states(tmp_path).values())
        if alive(sweep.process.pid):
            memory.append((ended, round(watched.memory_info().rss / 1e6)))
        if time.monotonic() > due and (now := running(tmp_path)):
            due = time.monotonic() + chance.uniform(2, 12)
            worker = chance.choice(list(now.values()))["process"]["pid"]
            if alive(worker):
                os.kill(worker, signal.SIGKILL)
                kills += 1
    printed = sweep.end()
    minutes = (time.monotonic() - began) / 60
    done, counts = states(tmp_path), {name: len(pids) for name, pids in begun(tmp_path).items()}
    reports = printed.count("\ndone  ") + printed.startswith("done  ")
    left = [pid for pids in begun(tmp_path).values() for pid in pids if alive(pid)]
    complete = sum(s["state"] == "done" for s in done.values())
    curve = list(dict(m for m in memory if m[1]).items())  # the last measurement at each number of runs
    share = {f"{q} %": next(mb for ended, mb in curve if ended >= q / 100 * n) for q in (25, 50, 75)}
    share["100 %"] = curve[-1][1]
    again = sum(c > 1 for c in counts.values())
    said = dict(runs=n, complete=complete, twice=reports - complete, lost=n - complete, kills=kills, again=again)
    said |= dict(minutes=round(minutes, 1), memory=share, curve=curve[:: max(1, len(curve) // 40)])
    print(said)
    assert complete == len(done) == n, printed
    assert reports == n, "a run was finished twice, or not reported"
    assert sum(counts.values()) <= n + kills and not left
    assert share["100 %"] < 1.1 * share["25 %"] + 10, "the sweep's memory grows with the runs"
    fewer = f"AEVLP_SOAK_RUNS={n} " if "AEVLP_SOAK_RUNS" in os.environ else ""
    record("sweep", command=f"{fewer}make soak", **said)
