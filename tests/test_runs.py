"""Run folders: names, locks, resuming, collecting; tables, tests of significance, the report."""

import json
import os
import re
import subprocess
import sys
import time

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from fake_run import alive, begun, fake_notebook
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from aevlp import board, cli, metrics, plots, recipes, results, runner, runs, sweeps
from aevlp.data import AevlpError


def finished(folder, test_map=60.0, epochs=2, **params):
    """A finished run's folder, made by hand."""
    params = runs.run_params(**({"dataset": "glyphs", "method": "gr"} | params))
    made = folder / runs.run_name(params)
    made.mkdir(parents=True)
    (made / "params.yaml").write_text(yaml.safe_dump(params | runs.provenance()))
    metrics = {"test_map": test_map, "val_map": test_map + 1, "average_precision": 0.8, "per_class": {"cup": 50.0}}
    (made / "metrics.json").write_text(json.dumps(metrics))
    (made / "status.json").write_text(json.dumps({"state": "done", "seconds": 10.0}))
    lines = [f"{e},{1 / e},{50 + e},0.9,0.5,0.9,0.{5 + e},5.0" for e in range(1, epochs + 1)]
    head = "epoch,loss,val_map,precision,recall,accumulated_precision,accumulated_recall,seconds"
    (made / "history.csv").write_text("\n".join([head, *lines]))
    return made


def test_a_name_depends_on_what_decides_the_numbers_and_on_nothing_else():
    def name(**kw):
        return runs.run_name(runs.run_params(**({"dataset": "glyphs", "method": "aevlp"} | kw)))

    assert re.fullmatch(r"glyphs-aevlp-s0-[0-9a-f]{8}", name())
    same = [name(), name(method="gpr+damp"), name(overrides={}), name(seed=0)]
    assert len(set(same)) == 1
    other = [
        {"seed": 1},
        {"fidelity": "released"},
        {"observation": "size"},
        {"overrides": {"lr": 0.123}},
        {"root": "/x"},
    ]
    assert len({name(), *(name(**kw) for kw in other)}) == 6
    script = "from aevlp import runs; print(runs.run_name(runs.run_params('glyphs', 'aevlp')))"
    again = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    assert again.stdout.strip() == name()


def test_the_key_forgets_where_the_pictures_lie():
    here, there = (runs.run_params("voc", "gr", root=root) for root in ("/here", "/there"))
    assert runs.run_key(here) == runs.run_key(there) and runs.run_name(here) != runs.run_name(there)


def test_parameters_survive_the_file(tmp_path):
    params = runs.run_params("voc", "aevlp", seed=3, overrides={"lr": "1e-7", "negative_ratio": 0.1})
    folder = runs.open_folder(params, tmp_path / "run")
    read = runs.read_params(folder)
    assert {k: read[k] for k in params} == params
    assert recipes.Recipe(**read["recipe"]).lr == 1e-7
    assert {"version", "commit", "torch", "device", "python"} <= set(read)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['echo pwned > pwned']",
        "- a list",
        "dataset: [",
        "dataset: glyphs",
        "\x00",
    ],
)
def test_a_hostile_params_file_is_one_sentence(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(AevlpError, match="params.yaml"):
        runs.read_params(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_one_run_is_made_once_goes_on_after_a_kill_and_is_made_again_on_demand(tmp_path):
    params = runs.run_params("glyphs", "gr")
    notebook, folder = fake_notebook(tmp_path), tmp_path / runs.run_name(params)
    folder.mkdir()
    known = os.environ | {"AEVLP_RUN": str(folder)}  # the kernel of a worker that was killed
    orphan = subprocess.Popen(["sleep", "100"], start_new_session=True, env=known)
    said = {
        "state": "running",
        "host": runs.HOST,
        "process": {"pid": 1, "born": 0},
        "kernel": runs.process_of(orphan.pid),
    }
    (folder / "status.json").write_text(json.dumps(said))
    (folder / "last").mkdir()
    assert runs.status(folder)["state"] == "interrupted"
    assert runner.train(params, tmp_path, notebook=notebook) == folder
    assert orphan.wait(5) == -9, "the orphaned kernel was not ended"
    assert (folder / "last").is_dir(), "a half-done run starts from what is there"
    assert runs.status(folder)["state"] == "done" and (folder / "train.ipynb").is_file()
    runner.train(params, tmp_path, notebook=notebook)
    assert len(begun(tmp_path)[folder.name]) == 1, "a finished run was made again"
    runner.train(params, tmp_path, notebook=notebook, force=True)
    assert len(begun(tmp_path)[folder.name]) == 1 and not (folder / "last").exists(), "force starts from nothing"
    assert not any(alive(pid) for pid in begun(tmp_path)[folder.name])


def test_the_end_of_a_kernel_prints_nothing(tmp_path, capfd):
    """Even where the kernel is still busy with its last answer, and an interrupt would hit that."""
    notebook, params = fake_notebook(tmp_path), runs.run_params("glyphs", "gr")
    cells = nbformat.read(notebook, 4)
    busy = "handlers = get_ipython().kernel.shell_handlers; answer = handlers['kernel_info_request']"
    busy += "\nasync def slow(*given): await answer(*given); time.sleep(2)"
    busy += "\nhandlers['kernel_info_request'] = slow"
    cells.cells.append(nbformat.v4.new_code_cell(busy))
    nbformat.write(cells, notebook)
    assert runner.attempt(params, tmp_path, notebook)["state"] == "done"
    assert capfd.readouterr() == ("", "")
    assert not any(alive(pid) for pids in begun(tmp_path).values() for pid in pids)


def test_a_failed_run_says_why(tmp_path):
    notebook = fake_notebook(tmp_path, fail=[5])
    with pytest.raises(runs.RunFailed, match="ValueError: seed 5 was told to fail.*train.ipynb"):
        runner.train(runs.run_params("glyphs", "gr", seed=5), tmp_path, notebook=notebook)
    row = board.frame(tmp_path).iloc[0]
    assert row.state == "failed" and row.error == "ValueError: seed 5 was told to fail"


def test_a_lock_is_respected_and_a_stop_file_too(tmp_path):
    params = runs.run_params("glyphs", "gr")
    with runner._locked(tmp_path / runs.run_name(params), wait=False) as ours:
        assert ours
        again = f"runner.attempt(runs.run_params('glyphs', 'gr'), {str(tmp_path)!r})"
        other = f"from aevlp import runner, runs; print({again}['state'])"
        assert subprocess.run([sys.executable, "-c", other], capture_output=True, text=True).stdout.strip() == "busy"
    (tmp_path / "stop").touch()
    assert runner.attempt(params, tmp_path, stop=tmp_path / "stop")["state"] == "stopped"


def test_thousands_of_runs_are_read_in_seconds(tmp_path):
    first = finished(tmp_path)
    params, said = (first / "params.yaml").read_text(), runs.read_params(first)
    for seed in range(1, 2000):
        folder = tmp_path / runs.run_name(said | {"seed": seed})
        folder.mkdir()
        (folder / "params.yaml").write_text(params.replace("\nseed: 0\n", f"\nseed: {seed}\n"))
        for name in ("metrics.json", "status.json", "history.csv"):
            os.link(first / name, folder / name)
    began = time.process_time()
    table = board.frame(tmp_path)
    assert len(table) == 2000 and table.key.nunique() == 2000 and sorted(table.seed) == list(range(2000))
    assert time.process_time() - began < 15
    past = board.history(tmp_path, set(table.run[:100]))
    assert len(past) == 200 and {"run", "dataset", "method", "seed", "epoch", "val_map"} <= set(past)


def test_a_frame_of_nothing_has_its_columns(tmp_path):
    assert board.frame(tmp_path / "none").empty and "test_map" in board.frame(tmp_path / "none")
    assert board.history(tmp_path / "none").empty


def test_a_run_is_found_by_the_beginning_of_its_name(tmp_path):
    a, b = finished(tmp_path), finished(tmp_path, method="an")
    assert runs.find("glyphs-gr", tmp_path) == a and runs.find(b, tmp_path) == b
    with pytest.raises(AevlpError, match="2 runs begin"):
        runs.find("glyphs", tmp_path)
    with pytest.raises(AevlpError, match="nearest is"):
        runs.find("glyps-gr", tmp_path)


def test_an_estimate_uses_runs_of_the_same_kind(tmp_path):
    finished(tmp_path)
    table = sweeps.sweep({"methods": ["gr", "an"], "seeds": [0, 1]}, runs=tmp_path, dry_run=True)
    assert table.state.tolist() == ["done", "new", "new", "new"] and table.seconds.tolist() == [0, 10, 10, 10]
    assert "1 of 4 runs are done, 3 to do: about 00:15 with 2 at a time" in sweeps.cost(table, 2)
    other = sweeps.sweep({"datasets": ["voc"], "methods": ["gr"]}, runs=tmp_path, dry_run=True)
    assert other.seconds.isna().all() and "no run like 1" in sweeps.cost(other)


@pytest.mark.parametrize("name", [f"table{n}" for n in range(1, 7)] + ["figure2", "figure3"])
@pytest.mark.parametrize("dataset", ["glyphs", "voc", "coco", "nus", "cub"])
def test_every_shipped_sweep_expands_on_every_data_set(name, dataset):
    plan = sweeps.expand(name, dataset, root=None if dataset == "glyphs" else "/somewhere")
    assert len(plan) and plan.label.notna().all()
    if dataset != "glyphs" and name.startswith("table") and name not in ("table1", "table2", "table7", "table8"):
        assert plan.paper.notna().all(), "the paper has a number for every row"


def test_settings_of_one_data_set_are_its_own():
    spec = dict(methods=["an"], overrides=dict(epochs=3, lr=0.1), per_dataset=dict(glyphs=dict(epochs=5)))
    given = {w: sweeps.expand(spec, w, root=None if w == "glyphs" else "/r").params[0] for w in ("glyphs", "voc")}
    assert given["glyphs"]["overrides"] == dict(epochs=5, lr=0.1) and given["voc"]["overrides"] == dict(
        epochs=3, lr=0.1
    )
    row = dict(label="long", method="an", overrides=dict(epochs=7))
    assert sweeps.expand(dict(rows=[row]) | dict(per_dataset=spec["per_dataset"])).params[0]["overrides"]["epochs"] == 7
    with pytest.raises(AevlpError, match="per_dataset: glyphs should be keys with values, not 5"):
        sweeps.expand(dict(methods=["an"], per_dataset=dict(glyphs=5)))
    with pytest.raises(AevlpError, match="per_dataset: unknown key 'glyph'; the nearest is 'glyphs'"):
        sweeps.expand(dict(methods=["an"], per_dataset=dict(glyph=dict(epochs=5))))


def test_the_paper_s_numbers_stand_beside_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "figures_root", lambda: tmp_path / "none")  # no published results
    for seed, test_map in enumerate([60.0, 61.0, 62.0]):
        finished(tmp_path, test_map, method="an", seed=seed)
        finished(tmp_path, test_map + [2, 4, 6][seed], method="gr", seed=seed)
    table = results.rows("table1", "glyphs", seeds=[0, 1, 2], folder=tmp_path)
    shown = results.beside_paper(table, {"test_map": ("mAP", 1)}, "GR Loss")
    assert shown.loc["Assume Negative", "mAP"] == "61.00 ± 2.48 (3)" and shown.loc["ROLE", "mAP"] == "–"
    p = stats.ttest_rel([60, 61, 62], [62, 65, 68]).pvalue
    assert shown.loc["Assume Negative", "minus GR Loss"] == f"-4.00 (p = {p:.3f})"
    lack = results.missing(table, "table1", "glyphs")
    assert (
        lack.startswith("45 of 51 runs are missing") and "`aevlp sweep table1 --dataset glyphs --seeds 0,1,2`" in lack
    )
    voc = results.rows("table1", "voc", folder=tmp_path, root="/v")
    assert results.beside_paper(voc, {}).loc["AEVLP", "paper"] == 90.46


@pytest.mark.parametrize(
    "method, changes, expected",
    [
        ("aevlp", {}, 24 * 5),  # the whole picture and 2 x 2 patches, anew in every epoch
        ("aevlp", {"grid": 3, "epochs": 2}, 2 * 10),
        ("gpr+tokens", {}, 24),
        ("vlpl", {}, 1),
        ("full", {}, 0),
        ("clip-tokens", {}, 0),
        ("clip-piaa", {}, 1),
        ("an", {"backbone": "frozen", "view_epochs": 4}, 4 * 5),
    ],
)
def test_passes_of_clip_are_counted_by_hand(method, changes, expected):
    from aevlp import registry

    assert results.passes(registry.get(method), recipes.recipe("glyphs", method, **changes)) == expected


def test_runs_of_different_kernels_are_not_mixed_without_a_word(tmp_path):
    for seed, kernels in enumerate(("portable", "native AVX512")):
        run = finished(tmp_path, 60.0, method="an", seed=seed)
        metrics = json.loads((run / "metrics.json").read_text())
        (run / "metrics.json").write_text(json.dumps(metrics | {"arithmetic": kernels}))
    spec = {"name": "mine", "methods": ["an"], "seeds": [0, 1]}
    said = results.missing(results.rows(spec, "glyphs", folder=tmp_path), spec, "glyphs")
    assert "different kernels (native AVX512, portable)" in said


def test_published_results_stand_in_for_the_same_settings_only(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "figures_root", lambda: tmp_path / "figures")
    for seed in (0, 1):
        finished(tmp_path / "runs", 60.0 + seed, method="an", seed=seed)
    spec = {"name": "mine", "methods": ["an"], "seeds": [0, 1]}
    path = results.publish([spec], "glyphs", folder=tmp_path / "runs")
    assert path == tmp_path / "figures/reference/glyphs/results.csv" and len(path.read_text().splitlines()) == 3
    table = results.rows(spec, "glyphs", folder=tmp_path / "none")
    assert table.published.all() and table.test_map.tolist() == [60.0, 61.0] and table.run.isna().all()
    assert "published" in results.missing(table, spec, "glyphs")
    other = results.rows(spec | {"overrides": {"epochs": 3}}, "glyphs", folder=tmp_path / "none")
    assert not other.published.any() and other.get("test_map", other.seed * float("nan")).isna().all()
    usual = dict(negative_ratio=0.2)  # what the recipe says anyway
    same = results.rows(spec | {"overrides": usual}, "glyphs", folder=tmp_path / "none")
    assert same.published.all() and same.test_map.tolist() == [60.0, 61.0]
    assert results.rows(spec | {"overrides": dict(negative_ratio=0.3)}, "glyphs").published.sum() == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=6))
def test_pairs_agree_with_scipy_and_few_pairs_say_nothing(pairs):
    ours, other = (pd.Series([p[i] for p in pairs], dtype=float) for i in (0, 1))
    mean, p, n = results.paired(ours, other)
    assert n == len(pairs) and np.isclose(mean, (ours - other).mean())
    if n < 3:
        assert np.isnan(p)
    elif (ours - other).std() > 1e-6:
        assert np.isclose(p, stats.ttest_rel(ours, other).pvalue)


def test_names_in_a_report_are_text(tmp_path):
    evil = "<img src=x onerror=alert(1)>$x_{$;\n'\"&"
    for seed in range(3):
        finished(tmp_path, 60.0 + seed, seed=seed)
    broken = finished(tmp_path, method="an")
    (broken / "status.json").write_text('{"state": "failed"}')
    (broken / "error.json").write_text(json.dumps({"error": evil, "last_lines": [evil]}))
    rows = [{"label": evil, "method": "gr"}, {"label": f"second {evil}", "method": "an"}]
    spec = {"name": f"../{evil}", "title": evil, "rows": rows, "seeds": [0, 1, 2]}
    page = results.report(spec, folder=tmp_path)
    text = page.read_text()
    assert page.parent == tmp_path and "<img src=x" not in text
    assert text.count("&lt;img src=x onerror=alert(1)&gt;") >= 6


def test_the_report_stands_alone(tmp_path):
    for seed in range(3):
        for i, method in enumerate(["an", "gr", "aevlp"]):
            finished(tmp_path, 60.0 + 5 * i + seed * (1 + 0.1 * i), method=method, seed=seed)
    broken = finished(tmp_path, method="full")
    (broken / "status.json").write_text('{"state": "failed"}')
    (broken / "error.json").write_text('{"error": "ValueError: <b>", "last_lines": ["line <1>", "line 2"]}')
    spec = {"name": "mine", "methods": ["full", "an", "gr", "aevlp"], "seeds": [0, 1, 2]}
    page = results.report(spec, folder=tmp_path)
    text = page.read_text()
    assert page == tmp_path / "mine.html" and "70.00 ± 1.20" not in text and "71.20 ± 2.98 (3)" in text
    assert (
        "minus gr" in text
        and "(p = " in text
        and "Failed runs" in text
        and "line &lt;1&gt;" in text
        and "<b>" not in text
    )
    assert not re.search(r'(src|href)="https?:', text), "the page needs the network"
    links = set(re.findall(r'href="([^"]+)"', text))
    assert len(links) == 10 and all((tmp_path / link).parent.is_dir() for link in links)
    few = results.report(spec | {"seeds": [0, 1]}, folder=tmp_path, out=tmp_path / "few.html").read_text()
    assert "n = 2 &lt; 3: no test" in few


def test_a_report_of_runs_that_are_still_to_come(tmp_path):
    other = finished(tmp_path, method="full")
    (other / "history.csv").write_text("epoch,loss,val_map,seconds\n1,0.5,60.0,5.0\n")
    text = results.report({"name": "mine", "methods": ["gr"], "seeds": [0]}, folder=tmp_path).read_text()
    assert "learning curves" not in text and "gr" in text


words = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(
    ["name", "datasets", "methods", "rows", "seeds", "overrides", "fidelity", "observation", "metric", "x"]
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(keys, words | st.just(["gr"]) | st.just([{"method": "gr"}]) | st.just({"lr": [1e-4]}), max_size=5)
)
def test_any_sweep_is_expanded_or_refused_with_one_sentence(spec):
    try:
        plan = sweeps.expand(spec)
    except AevlpError as e:
        assert str(e).strip()
    else:
        assert len(plan) and plan.run.notna().all()


def test_a_torn_file_is_a_row_that_says_so_and_the_others_stand(tmp_path):
    whole, torn = finished(tmp_path), [finished(tmp_path, seed=s) for s in (1, 2)]
    (torn[0] / "metrics.json").write_text('{"test_map": ')
    (torn[1] / "status.json").write_text('["done"]')
    table = board.frame(tmp_path).set_index("run")
    assert table.state[whole.name] == "done" and table.test_map[whole.name] == 60.0
    for folder, name in zip(torn, ("metrics.json", "status.json"), strict=True):
        assert table.state[folder.name] == "unreadable" and name in table.error[folder.name]
    with pytest.raises(runs.RunFailed, match="metrics.json"):
        runner.train(runs.read_params(torn[0]), runs=tmp_path, show=False)


def test_the_kernel_is_this_interpreter_s_whatever_python3_is_to_jupyter(tmp_path, monkeypatch):
    stale = tmp_path / "jupyter/kernels/python3"
    stale.mkdir(parents=True)
    argv = ["/opt/gone/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (stale / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook = fake_notebook(tmp_path / "runs")
    outcome = runner.attempt(runs.run_params("glyphs", "gr"), tmp_path / "runs", notebook)
    assert outcome["state"] == "done", outcome["error"]


def unknown(folder, auc=70.0, **params):
    """A finished run whose truth nobody knows, made by hand."""
    made = finished(folder, **params)
    spread = {"auc_observed": [auc, auc - 5, auc + 5], "recall@1": [30.0, 20.0, 40.0], "mean_rank": [4.0, 3.0, 5.0]}
    said = dict(test_map=None, val_map=None, test=spread | {"map": None}, val=spread | {"map": None})
    said |= dict(select_by="auc_observed", per_class={"cup": None}, average_precision=None)
    (made / "metrics.json").write_text(json.dumps(said))
    rows = "".join(f"{e},{1 / e},,{auc - 2 + e},5.0\n" for e in (1, 2))
    (made / "history.csv").write_text("epoch,loss,val_map,val_auc_observed,seconds\n" + rows)
    return made


def test_a_run_of_unknown_truth_is_never_given_a_map(tmp_path, monkeypatch, capsys):
    """Board, table, command, page and curves say what was measured, and under which assumption."""
    monkeypatch.setenv("AEVLP_RUNS", str(tmp_path))
    name = unknown(tmp_path).name
    assert board.epoch_of(tmp_path / name, 6) == (2, "val AUC (given labels) 70.0", 20.0)
    seen = board.Board([runs.run_params("glyphs", "gr", 0)], tmp_path)
    seen.note(dict(run=name, state="done"))
    assert "test AUC (given labels) 70.00" in capsys.readouterr().out
    row = board.frame(tmp_path).iloc[0]
    assert row.test_auc_observed == 70 and row["test_recall@1"] == 30 and row.val_mean_rank == 4 and not row.test_map
    with pytest.raises(SystemExit):
        cli.main(["results"])
    said = capsys.readouterr().out
    assert re.search(r"test AUC\*.*\n.* 70\.0", said) and metrics.ASSUMPTION in said and "mAP" not in said
    spec = dict(name="own", methods=["gr", "an"], seeds=[0])
    unknown(tmp_path, 60.0, method="an")
    page = results.report(spec).read_text()
    assert "test AUC (given labels) (%)" in page and "70.00 (1)" in page and metrics.ASSUMPTION in page
    assert "mAP" not in page and "nan" not in page.split("<img")[0]
    table = results.rows(spec, "glyphs")
    assert results.best_baseline(table, "test_auc_observed") == "gr"
    figure = plots.learning_curves(board.history(tmp_path, [name]))
    assert [ax.get_title() for ax in figure.axes] == ["training loss", "validation AUC, given labels (%)"]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [69, 70]


def test_known_and_unknown_truth_in_one_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AEVLP_RUNS", str(tmp_path))
    finished(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["results"])
    head, line = capsys.readouterr().out.splitlines()
    assert "test mAP" in head and "AUC" not in head and "60.0" in line and "80.0" in line, "one unit: percent"
    unknown(tmp_path, method="an")
    with pytest.raises(SystemExit):
        cli.main(["results"])
    said = capsys.readouterr().out
    assert "test mAP" in said and "test AUC*" in said and metrics.ASSUMPTION in said
    page = results.report(dict(name="own", methods=["gr", "an"], seeds=[0])).read_text()
    assert "test mAP (%)" in page and "<td>–</td>" in page and "nan" not in page.split("<img")[0]


def test_the_kernel_of_a_page_is_this_interpreter_too(tmp_path, monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager

    from aevlp import pages

    stale = tmp_path / "jupyter/kernels/python3"
    stale.mkdir(parents=True)
    (stale / "kernel.json").write_text(
        '{"argv": ["/opt/gone/bin/python"], "display_name": "Python 3", "language": "python"}'
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    assert KernelSpecManager().get_kernel_spec("python3").argv[0] == "/opt/gone/bin/python"
    monkeypatch.setenv("JUPYTER_PATH", pages._environment("token", tmp_path / "server")["JUPYTER_PATH"])
    assert KernelSpecManager().get_kernel_spec("python3").argv[0] == sys.executable
