"""How long the command line takes to begin, alone and over 3,000 finished runs: processor seconds of each command.

Processor seconds, for they are hardly changed by what else the machine does; on a quiet one a command takes as long.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from aevlp import runs

COMMANDS = ("--help", "train --help", "methods", "results", "recipe voc gr")
METHODS = ("gr", "an", "em")
SOME, MANY = 300, 3000  # runs


def finished(folder, count):
    """So many folders of finished runs; the sweep that would make them."""
    about = runs.provenance()
    for method in METHODS:
        for seed in range(count // len(METHODS)):
            params = runs.run_params("glyphs", method, seed=seed)
            made = Path(folder) / runs.run_name(params)
            made.mkdir(parents=True)
            text = yaml.dump(params | about, Dumper=yaml.CSafeDumper, sort_keys=False)
            (made / "params.yaml").write_text(text)
            (made / "metrics.json").write_text(json.dumps(dict(test_map=60.0, val_map=61.0, per_class={"cup": 50.0})))
            (made / "status.json").write_text(json.dumps(dict(state="done", seconds=10.0)))
            (made / "history.csv").write_text("epoch,loss,val_map,seconds\n1,0.5,60.0,5.0\n2,0.4,61.0,5.0\n")
    return dict(datasets=["glyphs"], methods=list(METHODS), seeds=list(range(count // len(METHODS))))


def spent(arguments, folder):
    """Processor seconds of a Python that is given these arguments."""
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    known = os.environ | {"AEVLP_RUNS": str(folder)}
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=known)
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before


def command(words, folder, repeats=3):
    code = f"from aevlp import cli; cli.main({words!r})"
    return min(spent(["-c", code], folder) for _ in range(repeats))


def history(folder, repeats=3):
    code = "import sys; from aevlp import board; assert len(board.history(sys.argv[1])) > 1"
    return min(spent(["-c", code, str(folder)], folder) for _ in range(repeats))


def measure():
    rows = []

    def add(what, seconds, target):
        rows.append(dict(what=what, aevlp=f"{seconds:.2f} s", target=target))

    with tempfile.TemporaryDirectory() as folder:
        few, many = Path(folder) / "few", Path(folder) / "many"
        finished(few, SOME)
        spec = Path(folder) / "many.yaml"
        spec.write_text(json.dumps(finished(many, MANY)))
        nowhere = Path(folder) / "none"
        for words in COMMANDS:
            add(f"aevlp {words}", command(words.split(), nowhere), "under 1 s")
        add(f"aevlp results, {MANY:,} runs", command(["results"], many), "under 3 s")
        add(f"aevlp sweep --dry-run, {MANY:,} runs", command(["sweep", str(spec), "--dry-run"], many), "under 3 s")
        some, every = history(few), history(many)
        row = dict(
            what=f"history of {MANY:,} runs against {SOME}", aevlp=f"{every:.2f} s", ratio=round(every / some, 2)
        )
        rows.append(row | dict(target=f"at most {MANY // SOME}"))
    return rows


if __name__ == "__main__":
    for row in measure():
        print(row)
