"""A run without training: a notebook that writes what `train.fit` writes, slow, failing or finishing as it is told."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import nbformat

from aevlp.data import write_json

PARAMETERS = "\n".join(
    f"{name} = None" for name in "dataset method seed root csv fidelity observation overrides run_dir".split()
)

BODY = """import json, os, pathlib, time
folder = pathlib.Path(run_dir)
told = json.loads((folder.parent / "told.json").read_text())
with open(folder / "begun.log", "a") as log:
    log.write(f"{os.getpid()}\\n")
if seed in told.get("fail", []):
    raise ValueError(f"seed {seed} was told to fail")
lines = ["epoch,loss,val_map,seconds"]
for epoch in range(1, 4):
    time.sleep(told.get("pause", 0.05))
    lines.append(f"{epoch},{1 / epoch},{50 + epoch},{told.get('pause', 0.05)}")
    (folder / "history.csv").write_text("\\n".join(lines))
metrics = {"test_map": 60.0 + seed, "val_map": 53.0, "per_class": {"a": 1.0}}
(folder / "metrics.json").write_text(json.dumps(metrics | {"tracker": os.environ.get("AEVLP_TRACKER")}))"""


def fake_notebook(folder, **told) -> str:
    """The notebook, and what it is told, for runs in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(BODY),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    path = folder / "fake.ipynb"
    nbformat.write(notebook, path)
    (folder / "told.json").write_text(json.dumps(told))
    return str(path)


ROOT = Path(__file__).resolve().parents[1]


def record(test, command="make soak", **measured):
    """What a soak test measured, in place of what is in benchmarks/soak.json of it."""
    from common import cpu_name  # of benchmarks/

    path = Path(os.environ.get("AEVLP_SOAK_JSON") or ROOT / "benchmarks" / "soak.json")
    known = json.loads(path.read_text()) if path.exists() else {}
    about = dict(device=cpu_name(), date=datetime.now(UTC).date().isoformat(), command=command)
    write_json(path, known | {test: about | measured})


def begun(folder) -> dict:
    """Process numbers of the kernels that began each run."""
    return {p.parent.name: p.read_text().split() for p in Path(folder).glob("*/begun.log")}


def states(folder) -> dict:
    """State of each run that has one."""
    return {p.parent.name: json.loads(p.read_text()) for p in Path(folder).glob("*/status.json")}


def until(condition, sweep, seconds=300):
    """Wait until something is true while a sweep runs, and give it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and sweep.process.poll() is None:
        if found := condition():
            return found
        time.sleep(0.05)
    os.killpg(sweep.process.pid, signal.SIGKILL)
    raise AssertionError(f"not true within {seconds} s, or the sweep ended: {sweep.process.communicate()[0]}")


def alive(pid) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Sweep:
    """`sweeps.sweep` in a process of its own, which signals can reach."""

    def __init__(self, spec, folder, notebook, workers=2):
        code = f"""from aevlp import sweeps
if __name__ == "__main__":
    table = sweeps.sweep({spec!r}, workers={workers}, runs={str(folder)!r}, notebook={notebook!r})
    print(table.state.tolist())"""
        script = Path(folder) / f"sweep{time.monotonic_ns()}.py"
        script.write_text(code)
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def interrupt(self):
        """Ctrl-C in a terminal: the whole foreground group gets it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, seconds=600) -> str:
        """Wait for the end; everything that was printed."""
        try:
            return self.process.communicate(timeout=seconds)[0]
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
