"""Two processes train the same epochs as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.torch import load_file

from aevlp.bank import verify

# The k-th largest loss of the batch with GPR's squared mean; a trainable table beside the classifier; labels per image;
# CLIP's views through a bank that all ranks fill.
METHODS = ("gpr+ll-ct", "role", "bce+random", "aevlp")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of the same runs by one process and by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    data = tiny.shapes(two / "pictures", n=118)  # 59 for training: the last batch has three rows, for two ranks
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(Path(tiny.__file__)), str(two), *METHODS]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    both = subprocess.Popen(torchrun + script, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for method in METHODS:
            tiny.train(one / method, method, data, tiny.EXACT, one / "banks")
        output = both.communicate(timeout=300)[0]
    finally:
        both.kill()
    assert both.returncode == 0, output[-4000:]
    return one, two


@pytest.mark.parametrize("method", METHODS)
def test_same_losses_labels_and_weights(runs, method):
    (_, history, predictions, pseudo, _), (_, history2, predictions2, pseudo2, _) = (
        tiny.result(r / method) for r in runs
    )
    np.testing.assert_allclose(column(history, 1), column(history2, 1), rtol=1e-4)  # loss of each epoch
    np.testing.assert_allclose(column(history, 3), column(history2, 3), atol=0.5)  # validation mAP
    assert pseudo == pseudo2
    assert predictions["ids"] == predictions2["ids"]
    np.testing.assert_allclose(predictions["probs"], predictions2["probs"], atol=2e-3)
    weights, weights2 = (load_file(r / method / "best.safetensors") for r in runs)
    assert max(float((weights[k] - weights2[k]).abs().max()) for k in weights) < 5e-3


def column(history, i):
    return [float(row[i]) for row in history[1:]]


def test_pseudo_labels_were_compared(runs):
    one, _ = runs
    assert all(tiny.result(one / m)[3] for m in ("gpr+ll-ct", "bce+random", "aevlp"))


def test_the_ranks_fill_one_bank_together(runs):
    """Each rank encodes its own rows; the padded rows of the last batch are those of the other ranks once more."""
    of_training = lambda folder: json.loads((folder / "manifest.json").read_text())["key"]["split"] == "train"  # noqa: E731
    (bank,), (bank2,) = ([b for b in (r / "banks").iterdir() if of_training(b)] for r in runs)
    assert bank.name == bank2.name
    for root, folder in zip(runs, (bank, bank2), strict=True):
        assert verify(folder.name, root / "banks").state.tolist() == ["complete", "complete"]
    for epoch in (1, 2):
        rows, rows2 = (np.fromfile(b / f"epoch_{epoch:03d}.f16", np.float16).astype(float) for b in (bank, bank2))
        np.testing.assert_allclose(rows, rows2, atol=2e-3)  # CLIP sees other batches of views
