"""Batches of any number of ranks hold the same pictures, and what is predicted of them does not depend on the batch."""

import numpy as np
import pytest
import torch
from PIL import Image

from aevlp import batches
from aevlp.batches import global_batches, shard
from aevlp.data import LabelledImages, decode


def test_shards_cover_each_batch_and_are_equally_long():
    order = np.random.default_rng(0).permutation(59)
    for size in (8, 16, 60):
        parts = [shard(order, size, rank, 4) for rank in range(4)]
        for step, start in enumerate(range(0, 59, size)):
            batch = order[start : start + size]
            assert len({len(p[step]) for p in parts}) == 1
            interleaved = np.stack([p[step] for p in parts], 1).ravel()
            assert (interleaved[: len(batch)] == batch).all()
    torch.testing.assert_close(torch.from_numpy(np.concatenate(shard(order, 8))), torch.from_numpy(order))


def test_a_last_batch_of_one_joins_the_one_before():
    for n in range(1, 60):
        for size in range(2, 20):
            parts = global_batches(np.arange(n), size)
            assert np.concatenate(parts).tolist() == list(range(n))
            assert all(len(b) > 1 for b in parts) or n == 1
            assert all(len(b) == size for b in parts[:-1]) and len(parts[-1]) <= size + 1
    assert [len(b) for b in shard(np.arange(18), 17)] == [18]


@pytest.mark.parametrize("workers", [0, 2])
def test_large_pictures_are_predicted_reduced_and_in_small_batches(tmp_path, monkeypatch, workers):
    """Of large pictures a batch holds as many as its bytes allow; of small ones always the same number."""
    rng, paths = np.random.default_rng(0), []
    for i, size in enumerate([(64, 48), (900, 700), (64, 48), (64, 48), (700, 900), (900, 900)]):
        paths.append(str(tmp_path / f"{i}.{'jpg' if i % 2 else 'png'}"))
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(size).save(paths[-1])
    nothing = np.zeros((6, 2), np.int8)
    data = LabelledImages("large", paths, ("a", "b"), nothing, None, {"test": np.arange(6)})
    monkeypatch.setattr("aevlp.data.SMALL_PIXELS", 10_000)
    pictures, side = batches.Pictures(data, workers, limit=0), 128
    assert [p.tolist() for p in pictures.parts(range(6), 4, side)] == [[0, 1, 2, 3], [4, 5]]
    monkeypatch.setattr(batches, "BATCH_BYTES", 2 * 3 * 256 * 256)
    parts = pictures.parts(range(6), 4, side)
    assert [p.tolist() for p in parts] == [[0, 1, 2, 3], [4, 5]]
    monkeypatch.setattr(batches, "BATCH_BYTES", 3 * 256 * 256)
    parts = pictures.parts(range(6), 4, side)
    assert [p.tolist() for p in parts] == [[0], [1], [2, 3], [4], [5]]
    for (images, ids), part in zip(pictures.batches(parts, side=side), parts, strict=True):
        assert ids.tolist() == part.tolist()
        for image, i in zip(images, ids, strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), decode(paths[i], side))
            assert min(image.shape[1:]) >= min(128, *decode(paths[i]).shape[:2]) and max(image.shape[1:]) < 256


def test_the_caller_keeps_its_choice_of_algorithms():
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ZeroDivisionError), batches.deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        1 / 0  # noqa: B018
    assert not torch.are_deterministic_algorithms_enabled()
