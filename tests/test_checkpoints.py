"""Checkpoints alone: what goes in comes out, what is torn is passed over. Those of runs: test_resume.py."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save

from aevlp import checkpoints as module
from aevlp.checkpoints import load_checkpoint, save_checkpoint
from aevlp.data import AevlpError
from aevlp.models import FROZEN

STATE = {
    "weights": {"a": torch.tensor([[1.5, -2.0]]), "none": {}},
    "order": np.array([[3, 1], [2, 0]])[:, ::-1],  # not contiguous
    "numbers": [np.float64(0.1), np.int64(7), np.bool_(True), 1e-300, None, "text"],
    "pair": (1, [np.zeros(0, np.int8)]),
}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_what_goes_in_comes_out(tmp_path):
    assert load_checkpoint(tmp_path / "never") is None
    save_checkpoint(tmp_path / "of a run/last", "epoch-0001", STATE)
    state, best = load_checkpoint(tmp_path / "of a run/last")
    assert best is None and state.keys() == STATE.keys()
    assert torch.equal(state["weights"]["a"], STATE["weights"]["a"]) and state["weights"]["none"] == {}
    assert isinstance(state["order"], np.ndarray) and state["order"].tolist() == [[1, 3], [0, 2]]
    assert state["numbers"] == [0.1, 7, True, 1e-300, None, "text"]
    assert [type(n) for n in state["numbers"][:3]] == [float, int, bool]
    one, (empty,) = state["pair"]
    assert one == 1 and empty.dtype == np.int8 and empty.shape == (0,)


@pytest.mark.parametrize("links", [True, False])
def test_the_best_weights_go_along(tmp_path, monkeypatch, links):
    if not links:  # as some network drives

        def refused(*names):
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refused)
    best = tmp_path / "best.safetensors"
    best.write_bytes(b"weights of epoch 1")
    save_checkpoint(tmp_path / "last", "1", {}, best)
    assert (os.stat(best).st_nlink == 2) == links  # no second copy where it can be helped
    best.unlink()
    best.write_bytes(b"weights of epoch 2")
    kept = load_checkpoint(tmp_path / "last")[1]
    assert kept == tmp_path / "last/1/best.safetensors" and kept.read_bytes() == b"weights of epoch 1"


def test_one_checkpoint_before_the_newest_stays(tmp_path):
    for i in range(4):
        save_checkpoint(tmp_path, f"{i}", {"i": i})
    assert names(tmp_path) == ["2", "3"]
    save_checkpoint(tmp_path, "1", {"i": 1})  # after a step back: what came later is not of this attempt
    assert names(tmp_path) == ["1"]
    assert load_checkpoint(tmp_path)[0] == {"i": 1}


def shorten(path):
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("harm", [shorten, Path.unlink, lambda path: path.write_text("{}")])
@pytest.mark.parametrize("name", ["state.pt", "best.safetensors", "manifest.json"])
def test_a_torn_one_is_passed_over(tmp_path, harm, name):
    (tmp_path / "best.safetensors").write_bytes(b"weights")
    for i in range(2):
        save_checkpoint(tmp_path / "last", f"{i}", {"i": i}, tmp_path / "best.safetensors")
    assert load_checkpoint(tmp_path / "last")[0] == {"i": 1}
    torn = tmp_path / "last/1" / name
    torn.write_bytes(torn.read_bytes())
    shutil.copy(torn, tmp_path / "copy")
    torn.unlink()  # the best weights are one file under several names
    shutil.copy(tmp_path / "copy", torn)
    harm(torn)
    assert load_checkpoint(tmp_path / "last")[0] == {"i": 0}


def test_what_is_in_the_way_goes(tmp_path):
    (tmp_path / "last/.1.tmp").mkdir(parents=True)  # a process was killed while it wrote
    (tmp_path / "last/.1.tmp/state.pt").write_bytes(b"half")
    (tmp_path / "last/1/deep").mkdir(parents=True)  # a torn one under the same name
    save_checkpoint(tmp_path / "last", "1", {"i": 1})
    assert names(tmp_path / "last") == ["1"] and names(tmp_path / "last/1") == ["manifest.json", "state.pt"]
    save_checkpoint(tmp_path / "last", "1", {"i": 2})
    assert load_checkpoint(tmp_path / "last")[0] == {"i": 2}


def test_nothing_is_written_where_a_link_leads(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine").write_text("stays")
    (tmp_path / "last").mkdir()
    (tmp_path / "last/.1.tmp").symlink_to(tmp_path / "elsewhere")
    save_checkpoint(tmp_path / "last", "1", {"i": 1})
    assert names(tmp_path / "elsewhere") == ["mine"] and load_checkpoint(tmp_path / "last")[0] == {"i": 1}


def test_it_is_on_the_disk_before_the_old_ones_go(tmp_path, monkeypatch):
    did, fsync, rename = [], os.fsync, os.rename
    for i in range(2):
        save_checkpoint(tmp_path, f"{i}", {"i": i})

    def synced(handle):
        did.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}"))))
        assert names(tmp_path)[-2:] >= ["0", "1"] and (tmp_path / "0").exists()
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", lambda *paths: (did.append(("rename", paths[1])), rename(*paths)))
    save_checkpoint(tmp_path, "2", {"i": 2})
    at = did.index(("rename", tmp_path / "2"))
    assert ("sync", tmp_path / ".2.tmp") in did[:at] and ("sync", tmp_path) in did[at:]
    assert not (tmp_path / "0").exists()


def test_pickled_code_is_refused(tmp_path):
    """A checkpoint from elsewhere, its hashes in order, with code in it."""

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    save_checkpoint(tmp_path / "last", "1", {"at": {}})
    (tmp_path / "last/1/state.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    digest = hashlib.sha256((tmp_path / "last/1/state.pt").read_bytes()).hexdigest()
    (tmp_path / "last/1/manifest.json").write_text(json.dumps({"state.pt": digest}))
    with pytest.raises(AevlpError, match="state.pt"):
        load_checkpoint(tmp_path / "last")
    assert not (tmp_path / "was here").exists()


# --- where a run goes on


class Clock:
    def __init__(self):
        self.now = 50.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Part:
    """Something with a state, as an objective or a labeler."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


SETTINGS = {"method": "an", "seed": 0, "version": "1", "recipe": {"lr": 0.1, "workers": 0}}


def halfway(folder, ema=0.0, backbone="resnet50", scaler=None, value=1.0, main=True):
    """A run in the fourth step of its second epoch, as `Resume` sees it; `did` is what it was asked to do."""
    did = []
    told = SimpleNamespace(scaler=scaler, wait_for_everyone=lambda: did.append("waited"))
    objective = Part(value)
    objective.start_epoch = lambda *given: did.append(("started", *given))
    parts = {name: Part(value) for name in ("net", "optimizer", "labeler", "meter", "judged")}
    at = {"epoch": 2, "step": 3, "best_epoch": 1, "stopped": False, "history": []}
    return SimpleNamespace(
        run_dir=folder, main=main, at=at, settings=SETTINGS, accelerator=told, objective=objective, did=did,
        recipe=SimpleNamespace(ema=ema, backbone=backbone, epochs=3), check=lambda: did.append("checked"), **parts
    )  # fmt: skip


@pytest.mark.parametrize(("ema", "scaler"), [(0.0, None), (0.9, None), (0.0, Part(1.0))])
def test_a_run_goes_on_with_all_of_its_parts(tmp_path, ema, scaler):
    run = halfway(tmp_path, ema, scaler=scaler)
    resume = module.Resume(run)
    resume.best = b"weights"
    resume.save()
    assert names(tmp_path / "last") == ["epoch-0002-step-00000003"] and run.did == ["checked"]
    assert (tmp_path / "best.safetensors").read_bytes() == b"weights" and resume.best is None
    (tmp_path / "best.safetensors").unlink()
    (tmp_path / "best.safetensors").write_bytes(b"of an epoch after the checkpoint")
    other = halfway(tmp_path, ema, scaler=scaler and Part(2.0), value=2.0)
    other.at = {"epoch": 1, "step": 0}
    module.Resume(other).load()
    assert other.at == run.at and other.did == [("started", 2, 3), "waited"]
    parts = ["net", "optimizer", "objective", "labeler", "meter"]
    assert [getattr(other, name).value for name in parts] == [1.0] * 5
    assert other.judged.value == (1.0 if ema else 2.0) and (scaler is None or other.accelerator.scaler.value == 1.0)
    assert (tmp_path / "best.safetensors").read_bytes() == b"weights"


def test_best_weights_are_written_once_and_linked_where_there_are_any(tmp_path):
    run = halfway(tmp_path)
    run.at |= {"best_epoch": 0, "step": 0}
    module.Resume(run).save()
    assert not (tmp_path / "best.safetensors").exists()
    other = halfway(tmp_path)
    module.Resume(other).load()
    assert other.did == ["waited"], "the objective begins its epoch with the first step"
    resume = module.Resume(run)
    run.at |= {"best_epoch": 1, "step": 1}
    resume.best = b"weights"
    resume.save()
    (tmp_path / "best.safetensors").write_bytes(b"as they are")
    run.at["step"] = 2
    resume.save()
    assert (tmp_path / "best.safetensors").read_bytes() == b"as they are"
    assert load_checkpoint(tmp_path / "last")[1].read_bytes() == b"as they are"


def test_other_ranks_read_and_do_not_write(tmp_path):
    first = module.Resume(halfway(tmp_path))
    first.best = b"weights"
    first.save()
    (tmp_path / "best.safetensors").unlink()
    run = halfway(tmp_path, main=False, value=2.0)
    resume = module.Resume(run)
    resume.load()
    run.at["step"], resume.best = 4, b"weights"
    resume.save()
    assert run.net.value == 1.0 and names(tmp_path) == ["last"] and len(names(tmp_path / "last")) == 1
    (tmp_path / "best.safetensors").write_bytes(save({"a": torch.ones(2)}))
    run.did.clear()
    assert resume.best_weights()["a"].tolist() == [1, 1] and run.did == ["waited"]


def test_nothing_to_go_on_with(tmp_path):
    run = halfway(tmp_path)
    at = dict(run.at)
    module.Resume(run).load()
    assert run.at == at and run.net.value == 1.0 and run.did == ["waited"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    (tmp_path / "best.safetensors").write_bytes(b"weights")
    module.Resume(halfway(tmp_path)).save()
    run = halfway(tmp_path)
    run.settings = SETTINGS | {"seed": 1}
    with pytest.raises(AevlpError, match="a run with seed=0, not 1"):
        module.Resume(run).load()


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ({}, None),
        ({"version": "0"}, None),
        ({"recipe": {"lr": 0.1, "workers": 4}}, None),
        ({"recipe": {"lr": 0.1, "workers": 0, "dropped": 1}}, None),
        ({"method": "role"}, "method='role', not 'an'"),
        ({"recipe": {"lr": 0.2, "workers": 0}}, "lr=0.2, not 0.1"),
        ({"recipe": {"workers": 0}}, "lr=None, not 0.1"),
    ],
)
def test_whose_folder_it_is(there, says):
    """Who made it and how it decodes change no number; anything else does."""
    if says is None:
        module.refuse_other(SETTINGS | there, SETTINGS, "run")
    else:
        with pytest.raises(AevlpError, match=f"run: this folder holds a run with {says}"):
            module.refuse_other(SETTINGS | there, SETTINGS, "run")


def test_when_a_checkpoint_is_due(tmp_path, clock, monkeypatch):
    run, saved = halfway(tmp_path), []
    for given, minutes in (((), 10), ((2.5,), 2.5)):
        resume = module.Resume(run, *given)
        monkeypatch.setattr(resume, "save", lambda: saved.append(clock.now))
        assert resume.due(), "every ended epoch is written"
        clock.now += 60 * minutes
        resume.within_epoch()
        assert not saved
        clock.now += 0.5
        resume.within_epoch()
        assert saved == [clock.now]
        saved.clear()


def test_of_a_frozen_backbone_an_epoch_is_due_after_five_seconds_and_at_the_end(tmp_path, clock):
    run = halfway(tmp_path, backbone=FROZEN)
    resume, often = module.Resume(run), module.Resume(run, minutes=0.05)
    for seconds, due in ((2.5, (False, False)), (3.0, (False, True)), (4.5, (False, True)), (5.0, (True, True))):
        clock.now = 50 + seconds
        assert (resume.due(), often.due()) == due
    (tmp_path / "best.safetensors").write_bytes(b"")
    resume.save()
    assert not resume.due()
    for at in ({"epoch": 4}, {"stopped": True}):
        over = module.Resume(halfway(tmp_path, backbone=FROZEN))
        over.run.at |= at
        assert over.due()
    run.at["epoch"] = 3
    assert not resume.due()
    clock.now += 100
    resume.load()
    assert not resume.due(), "what was read need not be written"
