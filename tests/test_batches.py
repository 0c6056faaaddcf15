"""Batches of any number of ranks hold the same pictures, and what is predicted of them does not depend on the batch."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from aevlp import batches
from aevlp.batches import global_batches, shard
from aevlp.data import LabelledImages, decode
from aevlp.models import FROZEN, Output
from aevlp.scorers import Scorer


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


# --- random numbers and algorithms


def test_random_numbers_are_a_function_of_the_position(monkeypatch):
    told = []
    for position in ((3,), (3, 1), (3, 1, 4, 0)):
        batches.seed_everything(*position)
        state = int(np.random.SeedSequence(position).generate_state(1)[0])
        assert random.random() == random.Random(state).random()
        assert np.random.random() == np.random.RandomState(state).random()
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(state)))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed", told.append)
    batches.seed_everything(3, 1, 4, 0)
    assert told == [state]


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("on", [True, False])
def test_algorithms_are_deterministic_where_anybody_asks_for_it(chosen, filled, on):
    """New memory is filled with NaN for whoever looks for a mistake, which costs a run time and no digit."""
    before, memory = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic
    was = memory.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(chosen)
        memory.fill_uninitialized_memory = filled
        with batches.deterministic(on):
            assert torch.are_deterministic_algorithms_enabled() == (on or chosen)
            assert memory.fill_uninitialized_memory == (filled and not on)
        assert torch.are_deterministic_algorithms_enabled() == chosen and memory.fill_uninitialized_memory == filled
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = was


# --- which pictures are kept, which are decoded


def many(n):
    ids = np.arange(n)
    return LabelledImages(
        "m", [str(i) for i in ids], "a", np.zeros((n, 1)), None, {"train": ids[1::2], "val": ids[::2]}
    )


def test_pictures_are_kept_where_eight_of_them_say_that_they_are_small(monkeypatch):
    asked, data = [], many(100)
    order = [*range(1, 100, 2), *range(0, 100, 2)]  # of the splits

    def decoded(path, size=1):
        asked.append(int(path))
        return SimpleNamespace(nbytes=size[int(path)] if isinstance(size, dict) else size)

    monkeypatch.setattr(batches, "decode", decoded)
    assert batches.Pictures(data).keep and asked == [order[i] for i in (0, 14, 28, 42, 56, 70, 84, 99)]
    assert (batches.Pictures(data).workers, batches.Pictures(data).pin_memory) == (0, False)
    asked.clear()
    nothing = LabelledImages("n", [], "a", np.zeros((0, 1)), None, {})
    assert not batches.Pictures(data, limit=0).keep and not batches.Pictures(nothing).keep and not asked
    for size, keep in ((2**29 // 8, True), (2**29 // 8 + 1, False)):  # 512 MiB in all
        monkeypatch.setattr(batches, "decode", lambda path, size=size: decoded(path, size))
        assert batches.Pictures(many(8)).keep == keep
    monkeypatch.setattr(batches, "decode", lambda path: decoded(path, {0: 80, **dict.fromkeys(range(1, 8), 0)}))
    assert batches.Pictures(many(8), limit=80).keep and not batches.Pictures(many(8), limit=79).keep


def test_a_batch_of_predictions_holds_a_quarter_of_a_gigabyte(monkeypatch):
    monkeypatch.setattr(batches, "decoded_bytes", lambda path, side: side)
    pictures = batches.Pictures(many(9), limit=0)
    assert [len(p) for p in pictures.parts(range(9), 64, 2**26)] == [4, 4, 1]
    assert [len(p) for p in pictures.parts(range(9), 64, 2**26 + 1)] == [3, 3, 3]
    assert [len(p) for p in pictures.parts(range(9), 2, 2**26)] == [2, 2, 2, 2, 1]
    assert [len(p) for p in pictures.parts(range(3), 64, 2**30)] == [1, 1, 1]
    assert pictures.parts([], 64, 1) == [] and pictures.parts([7, 3], 64, 1)[0].tolist() == [7, 3]


@pytest.fixture
def colours(tmp_path):
    for i in range(6):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(6)]
    return LabelledImages("c", paths, "ab", np.zeros((6, 2)), None, {"train": np.arange(6)})


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_kept_is_decoded_once(colours, monkeypatch, keep):
    asked, real = [], batches.image_loader

    def loaded(data, ids, order, **told):
        asked.append([order, told["side"]])
        return real(data, ids, order, **told)

    pictures = batches.Pictures(colours, **({} if keep else {"limit": 0}))
    monkeypatch.setattr(batches, "image_loader", loaded)
    monkeypatch.setattr(batches, "decoded_bytes", lambda *given: pytest.fail() if keep else 1)
    for parts in ([[4, 1], [1, 2, 1]], [[4, 1], [2, 0]], [[0, 1]] if keep else []):
        found = list(pictures.batches([np.array(p) for p in parts], side=4))
        assert [ids.tolist() for _, ids in found] == parts
        for images, ids in found:
            assert [int(image[0, 0, 0]) for image in images] == ids.tolist()
            if keep:
                assert all(image is pictures.kept[i] for image, i in zip(images, ids.tolist(), strict=True))
    whole, reduced = [[[[4, 1], [2]], None], [[[0]], None]], [[[[4, 1], [1, 2, 1]], 4], [[[4, 1], [2, 0]], 4]]
    assert asked == (whole if keep else reduced)
    assert [p.tolist() for p in pictures.parts([3, 1, 2], 2, 4)] == [[3, 1], [2]]


# --- batches of one rank and of several


def test_batches_of_one_picture_stay_where_they_are_asked_for():
    assert [b.tolist() for b in global_batches(np.arange(3), 1)] == [[0], [1], [2]]
    assert global_batches(np.arange(0), 4) == [] and [len(b) for b in global_batches(np.arange(4), 4)] == [4]


class Ranks:
    """Accelerate of three ranks, the middle one: what the others hold is told beforehand."""

    num_processes, process_index = 3, 1

    def __init__(self, first, third):
        self.first, self.third = first, third

    def gather(self, local):
        assert not local.requires_grad
        return torch.cat([self.first, local, self.third])


def test_rows_of_all_ranks_come_in_the_order_of_the_batch():
    ours = torch.tensor([[1.0], [4.0]], requires_grad=True)
    ranks = Ranks(torch.tensor([[0.0], [3.0]]), torch.tensor([[2.0], [5.0]]))
    rows = batches.gather_rows(ranks, ours, 5)
    assert rows.flatten().tolist() == [0, 1, 2, 3, 4]  # the sixth fills up
    (rows[:, 0] * torch.arange(5.0)).sum().backward()
    assert ours.grad.flatten().tolist() == [3 * 1, 3 * 4]  # ranks: their gradients are averaged afterwards
    assert not batches.gather_rows(ranks, ours.detach(), 5).requires_grad
    alone = SimpleNamespace(num_processes=1, process_index=0)
    assert batches.gather_rows(alone, ours, 2) is ours
    output = batches.gather_rows(ranks, Output(ours, None, ours.detach()), 6)
    assert isinstance(output, Output) and output.mu is None
    assert output.logits.flatten().tolist() == output.log_std.flatten().tolist() == [0, 1, 2, 3, 4, 5]


# --- what a classifier sees, and says


@pytest.mark.parametrize("last", [True, False])
def test_channels_are_last_where_the_recipe_says_so(monkeypatch, last):
    monkeypatch.setattr(batches, "student_inputs", lambda *given: torch.zeros(2, 3, 4, 4))  # as a GPU makes them
    model, recipe = SimpleNamespace(mean=0, std=1), SimpleNamespace(image_size=4, channels_last=last)
    x = batches.classifier_inputs(model, [None], recipe, "cpu")
    assert x.is_contiguous(memory_format=torch.channels_last) == last


@pytest.mark.parametrize(("precision", "kind"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_is_that_of_the_recipe(precision, kind):
    with batches.autocast(SimpleNamespace(precision=precision), "cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == kind


@pytest.mark.parametrize(
    ("workers", "device", "cores", "processes"),
    [
        (0, "cuda", 8, 0),
        (3, "cpu", 8, 3),
        (-1, "cpu", 8, 0),
        (-1, "cuda", 8, 4),
        (-1, "cuda", 3, 3),
        (-1, "cuda", None, 1),
    ],
)
def test_processes_decode_beside_a_gpu_unless_the_recipe_knows_better(monkeypatch, workers, device, cores, processes):
    monkeypatch.setattr(batches.os, "cpu_count", lambda: cores)
    assert batches._processes(SimpleNamespace(workers=workers), device) == processes


class Told(torch.nn.Module):
    """A classifier that says the first pixel, and in which mode it was asked."""

    def __init__(self):
        super().__init__()
        self.modes, self.mean, self.std = [], (0.0,) * 3, (1 / 255,) * 3

    def forward(self, x):
        self.modes.append(self.training)
        return x[:, 0, 0, :2] / 10


class Asked(Scorer):
    def __init__(self):
        self.training = False

    def eval(self):
        return self

    def train(self, mode):
        self.training = mode

    def scores(self, images):
        return torch.tensor([[float(image[0, 0, 0])] * 2 for image in images])


def test_predictions_are_probabilities_in_the_order_that_was_asked_for(colours, monkeypatch):
    recipe = SimpleNamespace(image_size=8, channels_last=False, precision="no", backbone="told", workers=0)
    model, kept, sides = Told(), batches.Pictures(colours), []
    monkeypatch.setattr(batches, "EVALUATION_BATCH", 2)
    for training in (True, False):
        model.train(training)
        for given in ({}, {"pictures": kept}):
            probs = batches.predict(model, colours, [5, 0, 3], recipe, **given)
            np.testing.assert_allclose(probs[:, 0], 1 / (1 + np.exp(-np.array([5, 0, 3]) / 10)), rtol=1e-6)
            assert model.training == training and not any(model.modes) and not probs.requires_grad
    empty = batches.predict(model, colours, [], recipe)
    assert empty.shape == (0, 2) and empty.dtype == torch.float32
    told, real = [], batches.source
    monkeypatch.setattr(batches, "source", lambda *given, **how: told.append(how) or real(*given, limit=0))
    batches.predict(model, colours, [1], recipe)
    assert told == [{"bank": False, "limit": 0}]
    monkeypatch.setattr(kept, "parts", lambda ids, most, side: sides.append(side) or [np.array(ids)])
    batches.predict(model, colours, [1], recipe, pictures=kept)
    assert batches.predict(Asked(), colours, [4, 2], recipe, pictures=kept).tolist() == [[4, 4], [2, 2]]
    assert sides == [16, None]  # reduced to twice of what a student sees; a teacher's patches need every pixel


def test_a_head_sees_embeddings_and_a_student_pictures(colours, monkeypatch):
    monkeypatch.setattr(batches, "Embeddings", lambda *given: ("embeddings", *given))
    recipe = SimpleNamespace(backbone=FROZEN, workers=-1)
    assert batches.source(colours, recipe, "cpu", "bank") == ("embeddings", colours, recipe, "cpu", "bank")
    pictures = batches.source(colours, SimpleNamespace(backbone="resnet50", workers=2), "cpu", limit=0)
    assert isinstance(pictures, batches.Pictures) and pictures.workers == 2
