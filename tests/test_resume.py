"""A run that is killed and started again ends with the same numbers, to the last digit."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from fake_run import record

from aevlp import train
from aevlp.bank import banks, verify

# Where a process can be made to die: owner, function, what it was about to do.
PLACES = {
    "file": (os, "fsync", "writing "),
    "bank": (np.memmap, "flush", "between a bank's embeddings and their marks"),
    "validation": (train, "score", "in validation"),
}


def die_at(place, count, note):
    """The process ends, as by a power cut, before the `count`-th of something; `note` is a file that says of what."""
    owner, name, what = PLACES[place]
    original, calls = getattr(owner, name), iter(range(1, 10**9))

    def called(*given, **named):
        if next(calls) == count:
            written = Path(os.readlink(f"/proc/self/fd/{given[0]}")).name if place == "file" else ""
            note.write_text(what + re.sub(r"^\.|\.\w+\.tmp$", "", written))
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **named)

    setattr(owner, name, called)


def embeddings(root):
    """What is in all banks of a folder: embeddings, and the marks of those that are there."""
    files = [p for p in sorted(root.glob("*/epoch_*")) if p.suffix in (".f16", ".done")]
    assert all(set(p.read_bytes()) == {1} for p in files if p.suffix == ".done"), "a bank is not full"
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def soak(folder, kills, seed, method):
    """One run left alone and one killed `kills` times; prints where each kill hit, and leaves it in kills.json."""
    torch.set_num_threads(1)
    folder, rng, data = Path(folder), random.Random(seed), tiny.shapes(Path(folder) / "pictures", n=80)
    places = ["file", "moment", "validation", "moment"] + (["bank", "bank"] if method == "aevlp" else [])
    run, bank, note, start = folder / "killed", folder / "banks", folder / "where", time.monotonic()
    assert not tiny.killed_after(lambda: tiny.train(folder / "whole", method, data, bank=folder / "whole bank"), 600)
    whole, where = time.monotonic() - start, []
    body = lambda: tiny.train(run, method, data, bank=bank, checkpoint_minutes=0)  # noqa: E731  a checkpoint after every step

    def same():
        assert tiny.result(run) == tiny.result(folder / "whole"), "the killed run ended with other numbers"
        assert embeddings(bank) == embeddings(folder / "whole bank"), "its bank holds something else"

    while len(where) < kills:
        place = places[len(where) % len(places)]
        at = rng.randint(1, {"file": 30, "bank": 4, "validation": 1}.get(place, 1))
        note.write_text("at any moment")
        if place == "moment":
            died = tiny.killed_after(body, rng.uniform(0.05, 0.6) * whole)
        else:
            died = tiny.killed_after(lambda place=place, at=at: (die_at(place, at, note), body()), 600)
        if died:
            saved = max((p.name for p in (run / "last").glob("epoch-*")), default="nothing")
            where.append({"kill": note.read_text(), "newest checkpoint": saved})
            print(f"kill {len(where)}: {place}, {where[-1]}", flush=True)
        else:  # it had ended: compared, and once more from its beginning
            same()
            shutil.rmtree(run)
            shutil.rmtree(bank, ignore_errors=True)
    assert not tiny.killed_after(body, 600)
    same()
    states = [state for name in (banks(bank).name if bank.exists() else []) for state in verify(name, bank).state]
    (folder / "kills.json").write_text(json.dumps({"where": where, "bank": states}))
    print(f"same numbers after {kills} kills", flush=True)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("method, kills", [("gpr+random", 4), ("aevlp", 6), pytest.param("aevlp", 20, marks=SLOW)])
def test_kill_9(tmp_path, method, kills):
    """At random moments, and while a file, the bank or a validation is half done; `aevlp` fills a bank of CLIP's."""
    command, start = [sys.executable, __file__, str(tmp_path), str(kills), "1200", method], time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    killed = json.loads((tmp_path / "kills.json").read_text())
    assert len(killed["where"]) == kills
    assert killed["bank"] == ["complete"] * (5 if method == "aevlp" else 0)  # one an epoch, two of evaluation views
    if kills >= 20:
        minutes = round((time.monotonic() - start) / 60, 1)
        record("kills", method=method, kills=kills, equal=True, minutes=minutes, **killed)


def test_a_bank_that_was_killed_before_its_seal_is_sealed_by_the_next_run(tmp_path):
    data = tiny.shapes(tmp_path / "pictures", n=80)
    tiny.train(tmp_path / "first", "aevlp", data, {"epochs": 1}, bank=tmp_path / "banks")
    next(tmp_path.glob("banks/*/epoch_001.json")).unlink()  # as a kill before it was written leaves the bank
    tiny.train(tmp_path / "second", "aevlp", data, {"epochs": 1}, bank=tmp_path / "banks")
    (name,) = banks(tmp_path / "banks").query("split == 'train'").name
    assert verify(name, tmp_path / "banks").state.tolist() == ["complete"]


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    (tmp_path / "run/pseudo").mkdir(parents=True)
    for name in ("best.safetensors", "pseudo/epoch_01.npz"):
        path = tmp_path / "run" / name
        path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
    others = tmp_path / "run/.status.json.1.tmp"  # of the process that started this one
    others.write_bytes(b"half")
    tiny.train(tmp_path / "run", "an", tiny.shapes(tmp_path / "pictures", n=80), {"epochs": 1})
    assert list((tmp_path / "run").rglob(".*.tmp")) == [others]


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


if __name__ == "__main__":
    folder, kills, seed, method = sys.argv[1:]
    soak(folder, int(kills), int(seed), method)
