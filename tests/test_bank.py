"""The bank of view embeddings: killed, damaged, full, shared; and labels from it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from aevlp import bank as module
from aevlp.bank import Bank, banks, remove, verify
from aevlp.damp import damp
from aevlp.data import AevlpError
from aevlp.vlm import similarities

N, V, K = 40, 5, 16
IDS = np.arange(N) * 3 + 2  # as in a training split: sorted, with gaps
KEY = dict(data="0123", clip="ViT-B-16", weights="abcd", views=dict(grid=2), seed=0)

WRITER = """
import sys, time, numpy as np, torch
from aevlp.bank import Bank
root, part, parts, pause = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
ids = np.arange(40) * 3 + 2
bank = Bank.open(root, dict(data="0123", clip="ViT-B-16", weights="abcd", views=dict(grid=2), seed=0), ids, 5, 16)
for i in ids[part::parts]:
    bank.put(1, [i], torch.from_numpy(np.random.default_rng(i).standard_normal((1, 5, 16))))
    print(i, flush=True)
    time.sleep(pause)
"""


def truth(ids=IDS):
    return torch.from_numpy(np.stack([np.random.default_rng(i).standard_normal((V, K)) for i in ids])).half()


def open_bank(root, **changes):
    return Bank.open(root, KEY | changes, IDS, V, K)


def writer(root, part=0, parts=1, pause=0.0):
    command = [sys.executable, "-c", WRITER, str(root), str(part), str(parts), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def full(tmp_path):
    bank = open_bank(tmp_path)
    bank.put(1, IDS, truth())
    return bank


def test_what_goes_in_comes_out(tmp_path):
    bank, rng = open_bank(tmp_path), np.random.default_rng(0)
    assert bank.get(1, IDS[:2]) is None and not bank.complete(1) and np.array_equal(bank.missing(1, IDS), IDS)
    for part in np.array_split(rng.permutation(IDS), 7):
        assert not bank.complete(1)
        bank.put(1, part, truth(part).float())
    assert bank.complete(1) and not bank.complete(2) and len(bank.missing(1, IDS)) == 0
    some = rng.permutation(IDS)[:9]
    assert torch.equal(bank.get(1, some), truth(some)) and bank.get(1, some).dtype == torch.float16
    assert torch.equal(open_bank(tmp_path).get(1, torch.from_numpy(some)), truth(some))
    assert bank.get(2, some) is None and not list(bank.folder.glob("epoch_002*"))
    assert (bank.folder / "epoch_001.done").read_bytes() == b"\1" * N
    assert (bank.folder / "epoch_001.f16").stat().st_size == bank.bytes == 2 * N * V * K


def test_the_key_decides(tmp_path, full):
    assert open_bank(tmp_path).folder == full.folder
    for changes in (dict(seed=1), dict(weights="abce"), dict(views=dict(grid=3)), dict(data="0124")):
        assert open_bank(tmp_path, **changes).folder != full.folder
    assert Bank.open(tmp_path, KEY, IDS, V, K + 1).folder != full.folder
    assert Bank.open(tmp_path, dict(reversed(KEY.items())), IDS, V, K).folder == full.folder
    whole = dict(images=N, key=KEY, views=V, width=K)  # banks of earlier releases are found under this name
    assert full.folder.name == hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]


def test_banks_are_at_home_where_no_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("AEVLP_HOME", str(tmp_path / "not/there yet"))
    bank = open_bank(None)
    assert bank.folder.parent == tmp_path / "not/there yet/banks"
    bank.put(1, IDS, truth())
    assert banks().name.tolist() == [bank.folder.name] and verify(bank.folder.name).state.tolist() == ["complete"]
    remove(bank.folder.name)
    assert len(banks()) == 0


def test_killed_before_its_manifest(tmp_path, full):
    (full.folder / "manifest.json").unlink()
    assert torch.equal(open_bank(tmp_path).get(1, IDS), truth())
    assert json.loads((full.folder / "manifest.json").read_text())["key"] == KEY


@pytest.mark.parametrize("epoch", [1, 123])
def test_killed_before_its_seal(tmp_path, full, epoch):
    full.put(epoch, IDS, truth())
    full.put(7, IDS[:1], truth(IDS[:1]))
    (full.folder / f"epoch_{epoch:03d}.json").unlink()
    open_bank(tmp_path)
    states = dict(verify(full.folder.name, tmp_path).itertuples(index=False))
    assert states == {1: "complete", epoch: "complete", 7: "partial"}


def test_what_is_marked_is_on_the_disk_and_what_is_sealed_is_marked(tmp_path, monkeypatch):
    """A power cut may lose whatever nobody asked the system to put on the disk."""
    bank, flush, seen = open_bank(tmp_path), np.memmap.flush, []
    done, seal = bank.folder / "epoch_001.done", bank.folder / "epoch_001.json"

    def flushed(self):
        seen.append((Path(self.filename).suffix, sum(done.read_bytes()), seal.exists()))
        flush(self)

    monkeypatch.setattr(np.memmap, "flush", flushed)
    bank.put(1, IDS[:9], truth(IDS[:9]))
    bank.put(1, IDS[9:], truth(IDS[9:]))
    assert [s for s in seen if s[0] == ".f16"] == [(".f16", 0, False), (".f16", 9, False)]
    assert (".done", N, False) in seen and seal.exists()


def test_the_size_is_announced_before_anything_large_is_written(tmp_path, capsys):
    bank = open_bank(tmp_path)
    assert "0.0 MB an epoch" in capsys.readouterr().err and not list(bank.folder.glob("*.f16"))
    open_bank(tmp_path)
    assert capsys.readouterr().err == ""


def test_a_killed_writer_leaves_a_bank_that_the_next_continues(tmp_path):
    process = writer(tmp_path, pause=0.01)
    said = [int(process.stdout.readline()) for _ in range(11)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    bank = open_bank(tmp_path)
    left = bank.missing(1, IDS)
    assert set(said) <= set(IDS) - set(left) and 0 < len(left) < N
    there = np.setdiff1d(IDS, left)
    assert torch.equal(bank.get(1, there), truth(there)) and bank.get(1, IDS) is None
    assert verify(bank.folder.name, tmp_path).state.tolist() == ["partial"]
    bank.put(1, left, truth(left))
    assert bank.complete(1) and torch.equal(bank.get(1, IDS), truth())
    assert verify(bank.folder.name, tmp_path).state.tolist() == ["complete"]


def test_killed_between_its_two_files(tmp_path, full):
    (full.folder / "epoch_002.f16").write_bytes(bytes(full.bytes))
    (full.folder / "epoch_002.tmp").write_bytes(b"half a file")
    assert full.get(2, IDS[:1]) is None
    full.put(2, IDS, truth())
    assert open_bank(tmp_path).complete(2) and not list(full.folder.glob("*.tmp"))


def test_two_processes_fill_it_together_while_a_third_reads(tmp_path):
    processes = [writer(tmp_path, part, 2, 0.005) for part in range(2)]
    bank, end = open_bank(tmp_path), time.monotonic() + 60
    while not bank.complete(1) and time.monotonic() < end:
        there = np.setdiff1d(IDS, bank.missing(1, IDS))
        if len(there):
            assert torch.equal(bank.get(1, there), truth(there))
        time.sleep(0.01)
    assert [p.wait(60) for p in processes] == [0, 0], [p.stderr.read() for p in processes]
    assert torch.equal(bank.get(1, IDS), truth())
    assert verify(bank.folder.name, tmp_path).state.tolist() == ["complete"]


def refused(bank):
    """By a process that had it open and by one that opens it now."""
    for read in (lambda: bank.get(1, IDS[:1]), lambda: open_bank(bank.folder.parent).get(1, IDS[:1])):
        with pytest.raises(AevlpError, match=f"aevlp bank rm {bank.folder.name}"):
            read()


@pytest.mark.parametrize("what", ["shorter", "marks"])
def test_damage_of_half_an_epoch_is_found(tmp_path, what):
    bank = open_bank(tmp_path)
    bank.put(1, IDS[:3], truth(IDS[:3]))
    bank.close()
    os.truncate(bank.folder / ("epoch_001.f16" if what == "shorter" else "epoch_001.done"), N - 1)
    refused(bank)


@pytest.mark.parametrize("what", ["byte", "shorter", "gone", "marks"])
def test_damage_is_found(tmp_path, full, what):
    rows, done = full.folder / "epoch_001.f16", full.folder / "epoch_001.done"
    full.close()
    if what == "byte":
        with open(rows, "r+b") as f:
            f.seek(777)
            f.write(bytes([f.read(1)[0] ^ 1]))
        assert verify(full.folder.name, tmp_path).state.tolist() == ["damaged"]
    elif what == "shorter":
        os.truncate(rows, full.bytes - 2)
        assert verify(full.folder.name, tmp_path).state.tolist() == ["damaged"]
    elif what == "gone":
        rows.unlink()
    else:
        os.truncate(done, N - 1)
    refused(full)


def test_a_broken_manifest_is_named(tmp_path, full):
    (full.folder / "manifest.json").write_text("{")
    for read in (lambda: banks(tmp_path), lambda: open_bank(tmp_path)):
        with pytest.raises(AevlpError, match="manifest.json"):
            read()


BROKEN = {
    "a list": "[]",
    "a number": "7",
    "nesting": "[" * 100_000,
    "no key": "{}",
    "a key": '{"key": [], "images": 1}',
}


@pytest.mark.parametrize("what", [*BROKEN, "a pipe"])
def test_a_broken_bank_is_named_and_can_be_removed(tmp_path, full, what):
    other = open_bank(tmp_path, seed=1)
    for path in (full.folder / "manifest.json", full.folder / "epoch_001.json"):
        path.unlink(missing_ok=True)
        path.write_text(BROKEN[what]) if what in BROKEN else os.mkfifo(path)
    (full.folder / "epoch_one.f16").touch()
    (full.folder / "epoch_002.f16").symlink_to("nowhere")
    for use in (lambda: open_bank(tmp_path), lambda: banks(tmp_path)):
        with pytest.raises(AevlpError, match="manifest.json: .*remove the folder"):
            use()
    assert verify(full.folder.name, tmp_path).to_dict("records") == [dict(epoch=1, state="damaged")]
    remove(full.folder.name, tmp_path)
    assert not full.folder.exists() and banks(tmp_path).name.tolist() == [other.folder.name]
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(AevlpError, match="No CLIP bank"):
        remove("..", other.folder)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, full, monkeypatch):
    def no_room(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "posix_fallocate", no_room)
    with pytest.raises(AevlpError, match="No room .*aevlp bank ls.*without a bank"):
        full.put(2, IDS[:1], truth(IDS[:1]))
    monkeypatch.undo()
    assert sorted(p.name for p in full.folder.glob("epoch_002*")) == []
    monkeypatch.setattr(module, "fresh", no_room)  # not even a name
    with pytest.raises(AevlpError, match="No room .*aevlp bank ls.*without a bank"):
        full.put(2, IDS[:1], truth(IDS[:1]))
    monkeypatch.undo()
    full.put(2, IDS[:1], truth(IDS[:1]))
    assert torch.equal(full.get(2, IDS[:1]), truth(IDS[:1]))


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_that_is_really_full(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        bank = Bank.open(tmp_path, KEY, range(200), V, K)
        with pytest.raises(AevlpError, match="No room"):
            for epoch in range(1, 5):
                bank.put(epoch, range(200), torch.zeros(200, V, K))
        for path in bank.folder.glob("epoch_*.done"):  # what there is, is whole
            assert Bank.open(tmp_path, KEY, range(200), V, K).complete(int(path.stem[6:]))
        bank.close()
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AevlpError, match="AEVLP_HOME"):
        open_bank(tmp_path / "file")


def test_images_of_another_split_are_refused(full):
    for wrong in ([0], [3], [int(IDS[-1]) + 1]):
        with pytest.raises(AevlpError, match="other pictures"):
            full.get(1, wrong)


def test_ls_and_rm(tmp_path, full):
    full.put(2, IDS[:3], truth(IDS[:3]))
    (row,) = banks(tmp_path).to_dict("records")
    assert row["name"] == full.folder.name and row["clip"] == "ViT-B-16" and row["images"] == N
    assert (row["epochs"], row["complete"]) == (2, 1)
    for name in ("nothing", "..", "../" + tmp_path.name, ""):
        with pytest.raises(AevlpError, match="No CLIP bank"):
            remove(name, tmp_path)
    assert "MB" in remove(full.folder.name, tmp_path)
    assert len(banks(tmp_path)) == 0 and not full.folder.exists()
    assert len(banks(tmp_path / "never")) == 0


def test_megabytes_are_millions_of_bytes_on_the_disk(tmp_path):
    bank = Bank.open(tmp_path, KEY, range(7900), V, K)
    bank.put(3, [5], truth([5]))
    size = sum(path.stat().st_size for path in bank.folder.glob("*.f16"))
    (row,) = banks(tmp_path).to_dict("records")
    assert size == 2 * 7900 * V * K and row["megabytes"] == 1.3 == round(size / 10**6, 1)


def test_manifest_says_what_it_is(full):
    manifest = json.loads((full.folder / "manifest.json").read_text())
    assert manifest["key"] == KEY and (manifest["images"], manifest["views"], manifest["width"]) == (N, V, K)


def test_labels_from_float16_are_those_of_float32():
    rng = torch.Generator().manual_seed(0)
    n, views, classes, width = 500, 17, 20, 512
    prototypes = torch.nn.functional.normalize(torch.randn(classes, width, generator=rng) + 4, dim=-1)
    mixed = torch.rand(n, views, classes, generator=rng).pow(12) @ prototypes
    noise = 0.02 * torch.randn(n, views, width, generator=rng)
    exact = torch.nn.functional.normalize(torch.nn.functional.normalize(mixed, dim=-1) + noise, dim=-1)
    observed = torch.nn.functional.one_hot(torch.randint(classes, (n,), generator=rng), classes)
    settings = dict(local_threshold=0.3, global_threshold=0.2, top_k=3, negative_ratio=0.2)
    one, other = (
        damp(similarities(e, prototypes, 0.01), observed, **settings).pseudo for e in (exact, exact.half().float())
    )
    assert (one == 1).float().mean() > 0.01 and (one == -1).float().mean() > 0.1
    assert (one == other).float().mean() >= 0.999
