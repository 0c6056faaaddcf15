"""A run that is killed and started again ends with the same numbers, to the last digit."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from aevlp.data import AevlpError
from aevlp.train import load_checkpoint, save_checkpoint


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9(tmp_path, kills):
    """Half of the kills at random moments, half in the middle of writing a file."""
    command = [sys.executable, tiny.__file__, "soak", str(tmp_path), str(kills), "1200"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(": killed") >= kills - 1


class PowerCut(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Data, and what a run that nothing interrupts says."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    data = tiny.shapes(folder / "pictures")
    tiny.train(folder / "run", "gpr+random", data)
    return data, tiny.result(folder / "run")


def cut(run, data, method="gpr+random"):
    """A run that ended after its second epoch; its checkpoints, the newest last."""

    def power_cut(row):
        if row["epoch"] == 2:
            raise PowerCut

    with pytest.raises(PowerCut):
        tiny.train(run, method, data, on_epoch=power_cut)
    return sorted((run / "last").iterdir())


def shorten(checkpoint):
    state = checkpoint / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])


def flip_a_bit(checkpoint):
    state = bytearray((checkpoint / "state.pt").read_bytes())
    state[len(state) // 2] ^= 1
    (checkpoint / "state.pt").write_bytes(state)


def lose(name):
    return lambda checkpoint: (checkpoint / name).unlink()


@pytest.mark.parametrize(
    "harm", [shorten, flip_a_bit, lose("manifest.json"), lose("best.safetensors"), lose("state.pt")]
)
def test_torn_checkpoint(whole, tmp_path, harm):
    data, numbers = whole
    before, newest = cut(tmp_path, data)
    assert (before.name, newest.name) == ("epoch-0002-step-00000000", "epoch-0003-step-00000000")
    harm(newest)
    epochs = []
    tiny.train(tmp_path, "gpr+random", data, on_epoch=lambda row: epochs.append(row["epoch"]))
    assert epochs == [2, 3]  # the one before it was used
    assert tiny.result(tmp_path) == numbers


def test_all_checkpoints_torn(whole, tmp_path):
    data, numbers = whole
    for checkpoint in cut(tmp_path, data):
        shorten(checkpoint)
    tiny.train(tmp_path, "gpr+random", data)
    assert tiny.result(tmp_path) == numbers


def test_best_weights_come_from_the_checkpoint(whole, tmp_path):
    """Best weights written after the last checkpoint do not outlive a step back."""
    data, numbers = whole
    cut(tmp_path, data)
    (tmp_path / "best.safetensors").write_bytes(b"torn")
    tiny.train(tmp_path, "gpr+random", data)
    assert tiny.result(tmp_path) == numbers


@pytest.mark.parametrize("method", ["role", "em-apl", "gpr+random", "ll-cp+random", "mime", "smile"])
def test_state_of_objectives(tmp_path, method):
    """Tables of labels, soft negatives, running sums, corrections, dropout and latents go on as they were."""
    torch.set_num_threads(1)
    data = tiny.shapes(tmp_path / "pictures", n=60)
    overrides = {"apl_warmup": 1, "ll_delta": 5.0, "epochs": 4}

    def power_cut(row):
        if row["epoch"] == 3:
            raise PowerCut

    tiny.train(tmp_path / "whole", method, data, overrides)
    with pytest.raises(PowerCut):
        tiny.train(tmp_path / "cut", method, data, overrides, on_epoch=power_cut)
    tiny.train(tmp_path / "cut", method, data, overrides)
    assert tiny.result(tmp_path / "cut") == tiny.result(tmp_path / "whole")


def test_pickled_code_is_refused(tmp_path):
    """A checkpoint from elsewhere, its hashes in order, with code in it."""

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    save_checkpoint(tmp_path / "last", "1", {"at": {}})
    (tmp_path / "last" / "1" / "state.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    digest = hashlib.sha256((tmp_path / "last" / "1" / "state.pt").read_bytes()).hexdigest()
    (tmp_path / "last" / "1" / "manifest.json").write_text(json.dumps({"state.pt": digest}))
    with pytest.raises(AevlpError, match="state.pt"):
        load_checkpoint(tmp_path / "last")
    assert not (tmp_path / "was here").exists()


def test_one_checkpoint_before_the_newest_stays(tmp_path):
    for i in range(4):
        save_checkpoint(tmp_path, f"{i}", {"i": i})
    assert [p.name for p in sorted(Path(tmp_path).iterdir())] == ["2", "3"]
    save_checkpoint(tmp_path, "1", {"i": 1})  # after a step back: what came later is not of this attempt
    assert [p.name for p in sorted(Path(tmp_path).iterdir())] == ["1"]
    assert load_checkpoint(tmp_path)[0] == {"i": 1}
