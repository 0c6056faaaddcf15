"""The digits of the embedded benchmark: the same for any number of threads, on every x86-64 processor with AVX2."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

EXPECTED = json.loads(Path(__file__).with_name("digits.json").read_text())
AEVLP = Path(sys.executable).with_name("aevlp")
PORTABLE = platform.machine().lower() in ("x86_64", "amd64")


def trained(folder, method, *settings, threads=1):
    "metrics.json of one epoch, through the command, as a user's environment has it."
    sets = [word for setting in ("epochs=1", *settings) for word in ("--set", setting)]
    command = [AEVLP, "train", "--dataset", "glyphs", "--method", method, *sets]
    environment = os.environ | {"AEVLP_RUNS": str(folder), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (metrics,) = folder.glob("*/metrics.json")
    return json.loads(metrics.read_text())


@pytest.mark.skipif(not PORTABLE, reason="the portable kernels are those of x86-64 processors")
@pytest.mark.parametrize("method, threads", [("an", 1), ("an", 2), ("an", 4), ("aevlp", 2)])
def test_expected_digits(tmp_path, method, threads):
    metrics = trained(tmp_path, method, threads=threads)
    assert metrics["arithmetic"] == "portable"
    assert metrics["threads"] == 1
    assert {k: metrics[k] for k in EXPECTED[method]} == EXPECTED[method]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_other_kernels_stay_near(tmp_path, precision):
    "Half again what one epoch was seen to move (points of mAP: 0.8 to 1.8 in float32, 5.8 in bf16)."
    metrics = trained(tmp_path, "an", "portable=false", f"precision={precision}")
    assert metrics["arithmetic"].startswith("native")
    assert metrics["test_map"] == pytest.approx(EXPECTED["an"]["test_map"], abs=EXPECTED["tolerance"][precision])
