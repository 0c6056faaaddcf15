"""The page of a run and the comparison of runs: true numbers, no HTML from a name, whatever is gone or torn."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, precision_score, recall_score
from test_deploy import SMALL
from tiny import shapes

from aevlp import cli, deploy, evidence, outcome, report, runs, train
from aevlp.data import AevlpError
from aevlp.recipes import Recipe

HOSTILE = ["<script>alert(1)</script>", "cup; mug $x$", 'a|b "c" `d`', "image", "never"]


def trained(folder, names, truth=True, seed=0, **overrides):
    """A run on coloured squares whose classes have these names; of the last no test picture has one."""
    data = shapes(folder / "pictures $y$ <b>", 60)
    known = data.truth.copy()
    known[data.splits["test"], 4] = 0
    split = {i: name for name, ids in data.splits.items() for i in ids}
    table = pd.DataFrame({"image": [p.rsplit("/", 1)[1] for p in data.paths], "split": [split[i] for i in range(60)]})
    if truth:
        table[names] = known
    else:
        table["label"] = [names[c] for c in data.observed.argmax(1)]
    table.to_csv(folder / "labels.csv", index=False)
    given = SMALL | {"epochs": 2} | overrides
    root = folder / "pictures $y$ <b>"
    params = runs.run_params("csv", "an", seed=seed, root=root, csv=folder / "labels.csv", overrides=given)
    run = runs.open_folder(params, folder / "runs" / runs.run_name(params))
    train.fit(runs.load_data(params), "an", Recipe(**params["recipe"]), seed, run, progress=False)
    (run / "status.json").write_text('{"state": "done"}')
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("hostile"), ["sun", "cloud", "star", "crown", "heart"])


@pytest.fixture(scope="module")
def others(run):
    """Another seed, and another rate with both seeds."""
    folder, names = run.parents[1], ["sun", "cloud", "star", "crown", "heart"]
    return [trained(folder, names, seed=1), trained(folder, names, lr=2e-2), trained(folder, names, seed=1, lr=2e-2)]


@pytest.fixture
def copy(run, tmp_path):
    """A run to be spoiled."""
    return shutil.copytree(run, tmp_path / run.name)


class Page(HTMLParser):
    """Tags, and the text outside of style."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.words, self.inside = [], [], [], None
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag
        self.links += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside != "style":
            self.words.append(data)


def renamed(run, names):
    """The run as if its classes had had these names."""
    text = dict(zip(json.loads((run / "run.json").read_text())["class_names"], names, strict=True))
    for name in ("run.json", "metrics.json", "thresholds.json"):
        found = json.loads((run / name).read_text(), object_pairs_hook=lambda p: {text.get(k, k): v for k, v in p})
        if "class_names" in found:
            found["class_names"] = names
        (run / name).write_text(json.dumps(found))
    weights = load_file(run / "best.safetensors")
    said = evidence.run_settings(run / "best.safetensors") | {"class_names": names}
    (run / "best.safetensors").write_bytes(evidence.run_weights(weights, said))
    return run


def test_the_page_s_numbers_are_scikit_learn_s(run):
    page, kept = Page(report.of_run(run)), np.load(run / "predictions.npz", allow_pickle=False)
    probs, truth, cut = kept["probs"], kept["targets"], deploy.thresholds(run)
    scores = [100 * average_precision_score(truth[:, c], probs[:, c]) for c in range(5) if truth[:, c].any()]
    for c, name in enumerate(cut.index):
        said = probs[:, c] >= cut[name]
        row = re.search(rf"{name} (–|[\d.]+) (\d+) ([\d.]+)[*†]? (–|\d+) (–|\d+) (\d+)", page.text)
        assert int(row[2]) == truth[:, c].sum() and float(row[3]) == round(cut[name], 2) and int(row[6]) == said.sum()
        if truth[:, c].any():
            assert row[1] == f"{100 * average_precision_score(truth[:, c], probs[:, c]):.1f}"
            assert row[5] == f"{100 * recall_score(truth[:, c], said):.0f}"
        else:
            assert row[1] == "–" and row[5] == "–", "no picture shows it, so nothing is known of it"
        assert row[4] == (f"{100 * precision_score(truth[:, c], said):.0f}" if said.any() else "–")
    assert "1 of 5 classes have no positive there" in page.text and "No test picture shows heart" in page.text
    low, high = map(float, re.search(r"95 % interval ([\d.]+) to ([\d.]+)", page.text).groups())
    assert 0 <= low < np.mean(scores) < high <= 100


def test_the_page_is_one_file_and_shows_pictures_and_curves(run):
    page = Page(report.of_run(run))
    assert page.links and all(link.startswith(("data:image/jpeg;base64,", "#")) for link in page.links)
    assert "svg" in page.tags and "script" not in page.tags and "currentColor" in (run / "report.html").read_text()
    for title in ("What to do next", "Learning", "Classes", "Most surprising pictures", "Given together", "Settings"):
        assert title in page.text


def test_no_name_becomes_html_or_a_formula(copy):
    renamed(copy, HOSTILE)
    page = Page(report.of_run(copy))
    assert "script" not in page.tags and "<script>alert(1)</script>" in page.text and "cup; mug $x$" in page.text
    text = deploy.card(copy).read_text()
    assert "<script>" not in text and r"cup; mug \$x\$" in text and r"a\|b" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "&lt;script&gt;" in line]
    assert rows and all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in rows)
    assert (copy / "report.png").read_bytes().startswith(b"\x89PNG")


def test_without_truth_nothing_is_called_map(tmp_path):
    run = trained(tmp_path, ["sun", "cloud", "star", "crown", "heart"], truth=False)
    page = Page(report.of_run(run))
    assert "mAP in percent" not in page.text and "given labels" in page.text
    assert "aevlp app --review --run" in page.text and "but is not there" not in page.text


@pytest.mark.parametrize("gone", ["pictures", "csv", "history.csv", "predictions.npz", "thresholds.json", "run.json"])
def test_what_is_gone_is_said_and_the_rest_is_shown(run, gone, tmp_path):
    folder = shutil.copytree(run.parents[1], tmp_path / "moved")
    moved = folder / "runs" / run.name
    text = (moved / "params.yaml").read_text().replace(str(run.parents[1]), str(folder))
    (moved / "params.yaml").write_text(text)
    (moved / "run.json").write_text((moved / "run.json").read_text().replace(str(run.parents[1]), str(folder)))
    missing = {"pictures": folder / "pictures $y$ <b>", "csv": folder / "labels.csv"}.get(gone, moved / gone)
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    page = Page(report.of_run(moved))
    assert "Settings" in page.text and ("No number" in page.text) == (gone == "predictions.npz")
    if gone == "pictures":
        assert "are not where they were" in page.text and "picture not found" in page.text and "img" not in page.tags
    if gone in ("pictures", "csv"):
        assert "Since the run was made" in page.text
    assert "Settings" in deploy.card(moved).read_text()


TORN = ['{"a": ', "[1, 2]", '"text"', '{"class_names": [], "per_class": 1, "given": 2}', '{"test_map": "eighty"}']


@pytest.mark.parametrize("name", ["metrics.json", "run.json", "thresholds.json", "predictions.npz"])
@pytest.mark.parametrize("text", TORN)
def test_what_is_torn_is_one_sentence_that_names_the_file(copy, name, text):
    (copy / name).write_text(text)
    for use in (report.of_run, deploy.card):
        with pytest.raises(AevlpError, match=re.escape(name)):
            use(copy)


def test_a_page_replaces_a_page_and_nothing_else(run, tmp_path):
    out = tmp_path / "page.html"
    assert report.of_run(run, out) == out == report.of_run(run, out)
    for name in ("mine.html", "mine.md"):
        (tmp_path / name).write_text("my own words")
    for use, name in ((report.of_run, "mine.html"), (deploy.card, "mine.md")):
        with pytest.raises(AevlpError, match="was not made by this command"):
            use(run, tmp_path / name)
        assert (tmp_path / name).read_text() == "my own words"


def test_comparing_says_what_differs_and_how_sure_that_is(run, others, tmp_path):
    found = report.compare([run, *others])
    assert set(found["settings"].index) >= {"seed", "lr"} and "batch_size" not in found["settings"].index
    maps = {r.name: json.loads((r / "metrics.json").read_text())["test_map"] for r in [run, *others]}
    for name, row in found["pictures"].iterrows():
        assert row.low <= row.mAP <= row.high and row.pictures == 15
        assert row["minus"] == run.name and np.isclose(row.mAP, *_means(run, run.parent / name))
    seeds = found["seeds"]
    first, second = maps.values(), list(maps.values())
    assert len(first) == 4 and np.isclose(seeds["minus first"].iloc[1], np.mean(second[2:]) - np.mean(second[:2]))
    assert seeds.seeds.iloc[1] == 2 and np.isnan(seeds.p.iloc[1]), "two pairs are too few for a test"
    page = Page(report.compared_page(found, tmp_path / "difference.html"))
    assert run.name in page.text and "script" not in page.tags
    with pytest.raises(AevlpError, match="two runs or more"):
        report.compare([run])


def _means(first, second):
    """Difference in mAP over classes with a positive."""
    kept = [np.load(r / "predictions.npz", allow_pickle=False) for r in (first, second)]
    shown = kept[0]["targets"].any(0)
    means = [100 * average_precision_score(k["targets"][:, shown], k["probs"][:, shown]) for k in kept]
    return (means[1] - means[0],)


def test_one_command_for_runs_and_sweeps(run, others, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AEVLP_RUNS", str(run.parent))
    for arguments, said in [(["report", run.name], "report.html"), (["report", "table1"], "table1.html")]:
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 0 and capsys.readouterr().out.strip().endswith(said)
    for arguments in (["report", "nothing"], ["report", run.name, "--seeds", "0"]):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(SystemExit):
        cli.main(["compare", run.name, others[0].name, "--json"])
    assert {row["setting"] for row in json.loads(capsys.readouterr().out)["settings"]} >= {"seed"}


def test_pairs_and_surprises_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    probs, targets, cut = rng.random((40, 6)), rng.integers(-1, 2, (40, 6)), rng.uniform(0.2, 0.8, 6)

    def odds(p):
        return np.log(p / (1 - p))

    mistakes = []
    for i in range(40):
        for c in range(6):
            over = odds(probs[i, c]) - odds(cut[c])
            if targets[i, c] >= 0 and (over > 0) != (targets[i, c] == 1):
                mistakes.append((abs(over), i, c))
    found = report.surprises(probs, targets, cut, top=5)
    assert found[0] == max(mistakes)[1:] and all((i, c) in {m[1:] for m in mistakes} for i, c in found)
    said = probs >= cut
    pairs = {(a, b): sum(said[i, a] and said[i, b] for i in range(40)) for a in range(6) for b in range(a + 1, 6)}
    for row in report.together(said, targets).itertuples():
        assert row.pictures == pairs[row.first, row.second]
        assert row.truly == sum(targets[i, row.first] == 1 == targets[i, row.second] for i in range(40))


def test_thresholds_by_truth_where_enough_is_known():
    probs = np.tile(np.linspace(0.05, 0.95, 20)[:, None], (1, 3))
    truth = np.full((20, 3), -1)
    truth[5:15, 0] = [0] * 5 + [1] * 5
    truth[18:, 1] = 1
    given = np.zeros((20, 3))
    given[10:, 1] = 1
    (first, by), (second, also), (third, none) = outcome.class_thresholds(probs, truth, given)
    assert (by, also, none) == ("truth", "given", "nothing") and probs[9, 0] < first < probs[10, 0] and third == 0.5
    assert (probs[10:, 1] >= second).mean() >= 0.9
