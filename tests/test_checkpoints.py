"""Checkpoints alone: what goes in comes out, what is torn is passed over. Those of runs: test_resume.py."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from aevlp.checkpoints import load_checkpoint, save_checkpoint
from aevlp.data import AevlpError

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
