"""Every notebook runs from top to bottom, and notebooks, module and README are in step."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
# Experiments are parameterised and write results: tests/test_experiments.py runs them through papermill.
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if "experiments" not in p.parts and ".ipynb_checkpoints" not in p.parts
)
EXPORTED = [p.name for p in (ROOT / "aevlp").glob("*.py") if p.name not in ("__init__.py", "_modidx.py")]


def run(*args, cwd, **env):
    done = subprocess.run(args, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(map(str, args))}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory):
    """A copy of the checkout with its notebooks cleaned and the module exported anew."""
    copy = tmp_path_factory.mktemp("regenerated")
    for name in ("nbs", "aevlp"):
        ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    for module in EXPORTED:
        (copy / "aevlp" / module).unlink()
    run(BIN / "nbdev_clean", cwd=copy)
    run(BIN / "nbdev_export", cwd=copy)
    return copy


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(notebook):
    run(BIN / "nbdev_test", "--path", str(notebook), "--n_workers", "0", "--do_print", cwd=ROOT, OMP_NUM_THREADS="1")


@pytest.mark.parametrize("module", EXPORTED)
def test_module_is_what_its_notebook_exports(module, regenerated):
    again = regenerated / "aevlp" / module
    assert again.exists(), f"aevlp/{module} is exported by no notebook: delete it"
    assert again.read_text() == (ROOT / "aevlp" / module).read_text(), f"aevlp/{module} differs: run `make export`"


def test_every_exported_module_is_there(regenerated):
    missing = {p.name for p in (regenerated / "aevlp").glob("*.py")} - {p.name for p in (ROOT / "aevlp").glob("*.py")}
    assert not missing, f"run `make export`: {missing}"
    assert (regenerated / "aevlp/_modidx.py").read_text() == (ROOT / "aevlp/_modidx.py").read_text(), (
        "run `make export`"
    )


@pytest.mark.parametrize("notebook", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_is_clean(notebook, regenerated):
    assert (regenerated / notebook.relative_to(ROOT)).read_text() == notebook.read_text(), "run `make export`"


def test_readme_is_made_from_the_index(tmp_path):
    run(sys.executable, "docs/build.py", "readme", "--out", tmp_path / "README.md", cwd=ROOT)
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), "run `make export`"


def test_ruff_has_no_complaint():
    run(BIN / "ruff", "check", "nbs", "tests", "benchmarks", "docs", "setup.py", cwd=ROOT)
    run(BIN / "ruff", "format", "--check", "nbs", "tests", "benchmarks", "docs", "setup.py", cwd=ROOT)
