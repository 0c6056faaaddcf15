"""Labelers: functions of seed, epoch and image; the bank is asked before CLIP; a tiny random CLIP, no download."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from aevlp.damp import damp
from aevlp.data import AevlpError, LabelledImages
from aevlp.labelers import (
    LABELERS,
    Batch,
    Fixed,
    LargeLossLabeler,
    RandomLabeler,
    VlplLabeler,
    build_labeler,
    large_loss_count,
)
from aevlp.recipes import recipe
from aevlp.vlm import load_clip

N, C = 10, 6
TINY = dict(clip="tiny-labeler", clip_weights="none", vlpl_clip="tiny-labeler", vlpl_clip_weights="none")
TINY |= dict(grid=2, noise_hidden=16, temperature=0.02, token_size=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory, images):
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    observed = np.zeros((N, C), np.int8)
    observed[np.arange(N), rng.integers(0, C, N)] = 1
    paths = np.array([str(folder / f"{i}.png") for i in range(N)])
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    splits = dict(train=np.arange(1, N), val=np.arange(1), test=np.array([], np.int64))
    return LabelledImages("tiny", paths, tuple("abcdef"), observed, observed, splits)


@pytest.fixture(scope="module", autouse=True)
def clip_model(tmp_path_factory):
    vision = dict(image_size=32, layers=1, width=32, patch_size=8, head_width=16)
    text = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
    path = tmp_path_factory.mktemp("clip") / "tiny-labeler.json"
    path.write_text(json.dumps(dict(embed_dim=24, vision_cfg=vision, text_cfg=text)))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    clip = load_clip("tiny-labeler", "none")
    clip.model.visual.class_embedding.data.zero_()  # else all pictures look alike to random weights
    clip.model.visual.positional_embedding.data.zero_()
    return clip


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(1)
    blocks = [torch.from_numpy(rng.integers(0, 256, (3, 4, 5), dtype=np.uint8)) for i in range(N)]
    return [b.repeat_interleave(10, 1).repeat_interleave(10, 2)[:, i:] for i, b in enumerate(blocks)]


@pytest.fixture
def batch(data, images):
    def make(ids, pictures=True):
        ids = torch.tensor(ids)
        observed = torch.from_numpy(data.observed[ids.numpy()])
        return Batch(ids, ids - 1, [images[i] for i in ids] if pictures else None, observed)

    return make


@pytest.fixture
def build(data, clip_model, tmp_path, monkeypatch):
    def same(*args):  # one model for all labelers, its weights are random
        return copy.copy(clip_model)

    monkeypatch.setattr("aevlp.eyes.load_clip", same)

    def make(name="damp", bank=False, seed=0, **changes):
        made = recipe("glyphs", "aevlp", **{**TINY, **changes})
        return build_labeler(name, data, made, seed=seed, bank_root=tmp_path if bank is True else bank)

    return make


def counted(eyes):
    "The numbers of views that CLIP encodes from now on."
    seen, encode = [], eyes.clip.encode_images

    def count(pixels):
        seen.append(len(pixels))
        return encode(pixels)

    eyes.clip.encode_images = count
    return seen


@pytest.mark.parametrize("name", [n for n in LABELERS if n != "ll-ct"])
def test_labels_know_neither_order_nor_company(name, build, batch):
    labeler, again = build(name, global_threshold=0.2), build(name, global_threshold=0.2)
    for epoch in (1, 2):
        whole = labeler.labels(batch([1, 2, 3, 4, 5]), epoch)
        parts = torch.cat([again.labels(batch(ids), epoch) for ids in ([5, 3], [1], [4, 2])])
        assert torch.equal(whole[[4, 2, 0, 3, 1]], parts)
        assert whole.dtype == torch.int8 and set(whole.unique().tolist()) <= {-1, 0, 1}


@pytest.mark.parametrize("images_at_a_time", [1, 2, 4, 5, 100])
def test_parts_are_the_whole(build, batch, monkeypatch, images_at_a_time):
    from aevlp.views import make_views, view_plan

    eyes, some = build().eyes, batch([4, 1, 3, 2, 5])
    plan = view_plan(some.ids, [i.shape[1:] for i in some.images], eyes.settings, eyes.seed, 2)
    whole = make_views(some.images, plan, eyes.settings)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    monkeypatch.setattr("aevlp.eyes._PART", images_at_a_time * eyes.settings.views * eyes.clip.image_size**2)
    parts = [part.clone() for part in eyes.parts(some.images, some.ids, 2)]
    assert max(map(len, parts)) <= images_at_a_time and torch.equal(torch.cat(parts), whole)


def test_none(build, batch):
    assert not build("none").labels(batch([1, 2]), 1).any()


def test_only_large_losses_ask_for_logits(build):
    assert [name for name in ("none", "damp", "random", "ll-ct") if build(name).needs_logits] == ["ll-ct"]


def test_damp_changes_with_the_epoch_and_fixed_damp_does_not(build, batch):
    changes = dict(global_threshold=0.0, top_k=2, temperature=0.003)
    damp, fixed = build(**changes), build("fixed-damp", **changes)
    every = batch(list(range(1, N)))
    first, second = damp.labels(every, 1), damp.labels(every, 2)
    assert not torch.equal(first, second) and len(first.unique(dim=0)) > 1
    assert all(torch.equal(fixed.labels(every, epoch), first) for epoch in (3, 1, 2))
    other = build(view_seed=1, **changes)
    assert not torch.equal(other.labels(every, 1), first)


def test_tokens_are_damp_on_the_tokens_of_one_pass(build, batch, images):
    changes = dict(global_threshold=0.1, token_temperature=0.03, token_grid=2, local_threshold=0.2)
    labeler, some = build("tokens", **changes), batch([2, 5, 7])
    scores, shown = labeler.scores(some, 3), counted_tokens(labeler.eyes)
    e = labeler.eyes.encode(some.images, some.ids, 3)
    assert e.shape == (3, 5, 24) and shown == [3]  # one pass a picture
    probs = (e.double() @ labeler.prototypes.double().T / 0.03).softmax(-1)
    settings = dict(local_threshold=0.2, global_threshold=0.1, top_k=3, negative_ratio=0.2)
    expected = damp(probs, some.observed, **settings)
    torch.testing.assert_close(scores.final.double(), expected.final, atol=1e-5, rtol=1e-4)
    assert torch.equal(labeler.labels(some, 3), expected.pseudo)
    every = batch(list(range(1, N)))
    assert not torch.equal(labeler.scores(every, 1).final, labeler.scores(every, 2).final)


def test_piaa_labels_are_the_best_and_the_worst_of_its_scores(build, batch):
    labeler, some = build("piaa", global_threshold=0.15, top_k=2, negative_ratio=0.34), batch([1, 4, 6, 8])
    final = labeler.scorer.read(labeler.eyes(some, 2))
    for row, label in zip(final.tolist(), labeler.labels(some, 2).tolist(), strict=True):
        order = sorted(range(C), key=lambda c: row[c])
        expected = [1 if c in order[-2:] and row[c] >= 0.15 else 0 for c in range(C)]
        assert label == [-1 if c in order[:2] else v for c, v in enumerate(expected)]
    assert labeler.scorer.weight.abs().sum() > 0


def counted_tokens(eyes):
    "The numbers of pictures whose tokens are read from now on."
    seen, encode = [], eyes.clip.encode_tokens
    eyes.clip.encode_tokens = lambda pixels, rule: seen.append(len(pixels)) or encode(pixels, rule)
    return seen


def test_fixed_labels_survive_a_save(build, batch):
    fixed, every = build("fixed-damp", global_threshold=0.0), batch(list(range(1, N)))
    labels = fixed.labels(every, 1)
    resumed = build("fixed-damp", global_threshold=0.0)
    resumed.load_state_dict(fixed.state_dict())
    resumed.labeler = None  # not asked again
    assert torch.equal(resumed.labels(every, 5), labels)


def test_damp_is_damp_on_similarities(build, batch):
    labeler, some = build(global_threshold=0.2), batch([2, 5, 7])
    scores = labeler.scores(some, 3)
    embeddings = labeler.eyes.encode(some.images, some.ids, 3)
    assert embeddings.shape == (3, 5, 24)
    probs = (embeddings.double() @ labeler.prototypes.double().T / 0.02).softmax(-1)
    torch.testing.assert_close(scores.global_probs.double(), probs[:, 0], atol=1e-5, rtol=1e-4)
    average = (probs[:, 0] + probs[:, 1:].mean(1)) / 2
    torch.testing.assert_close(scores.average.double(), average, atol=1e-5, rtol=1e-4)


def test_switches_reach_the_labeler(build):
    plain = build()
    assert not torch.equal(build(noise=False).prototypes, plain.prototypes)
    assert torch.equal(build(seed=5).prototypes, plain.prototypes)
    assert not torch.equal(build(seed=5, noise_seed=-1).prototypes, build(seed=6, noise_seed=-1).prototypes)
    assert not torch.equal(build(neighbours=2).prototypes, plain.prototypes)
    assert not torch.equal(build(noise_last_activation=False).prototypes, plain.prototypes)
    assert build(clip_norm="imagenet").eyes.settings.mean != plain.eyes.settings.mean
    settings = build(overlap=0.0, augment="none", grid=3).eyes.settings
    assert (settings.overlap, settings.augment, settings.grid) == (0.0, "none", 3)


def test_the_bank_is_asked_first(build, batch):
    labeler = build(bank=True, global_threshold=0.2)
    seen = counted(labeler.eyes)
    first = labeler.labels(batch([1, 2, 3]), 1)
    assert seen == [15]
    mixed = labeler.labels(batch([2, 4, 1, 5]), 1)
    assert seen == [15, 10]  # images 4 and 5 only
    assert torch.equal(mixed[[2, 0]], first[:2])
    again = labeler.labels(batch([5, 3, 1], pictures=False), 1)  # no picture is needed
    assert seen == [15, 10] and torch.equal(again[1:], first[[2, 0]])
    labeler.labels(batch([1, 2, 3]), 2)
    assert seen == [15, 10, 15]  # another epoch, other views
    other = build(bank=True, global_threshold=0.9, temperature=0.5, top_k=1, noise=False)
    seen = counted(other.eyes)
    other.labels(batch([1, 2, 3, 4, 5], pictures=False), 1)
    assert seen == []  # thresholds, temperature and G share one bank


def test_bank_and_no_bank_agree(build, batch):
    every, changes = batch(list(range(1, N))), dict(global_threshold=0.2)
    with_bank, without = build(bank=True, **changes), build(bank=False, **changes)
    for epoch in (1, 2):
        assert torch.equal(with_bank.labels(every, epoch), without.labels(every, epoch))


def test_vlpl_reads_the_whole_image_once(build, batch):
    labeler, some = build("vlpl", vlpl_threshold=0.2, vlpl_temperature=0.01), batch([1, 4, 6, 8])
    seen = counted(labeler.labeler.eyes)
    first = labeler.labels(some, 1)
    assert seen == [4] and torch.equal(labeler.labels(some, 7), first) and seen == [4]
    embeddings = labeler.labeler.eyes.encode(some.images, some.ids, 1)[:, 0].double()
    probs = (embeddings @ labeler.labeler.prototypes.double().T / 0.01).softmax(-1)
    assert torch.equal(first, (probs > 0.2).to(torch.int8)) and first.any()


def test_vlpl_s_threshold_is_the_recipe_s_and_not_enough_by_itself():
    made, epochs = recipe("glyphs", "vlpl", vlpl_temperature=1.0, vlpl_threshold=0.28), []
    some = Batch(torch.tensor([0]), torch.tensor([0]), [], torch.zeros(1, 3, dtype=torch.int8))

    def labels(probs, made):
        def eyes(batch, epoch):
            epochs.append(epoch)
            return probs.log()[:, None]

        return VlplLabeler(eyes, torch.eye(probs.shape[1]), made).labels(some, 5).tolist()

    assert labels(torch.tensor([[0.5, 0.2, 0.3]]), made) == [[1, 0, 1]]
    quarters = torch.full((1, 4), 0.25)  # a softmax of equal numbers is exact
    assert labels(quarters, replace(made, vlpl_threshold=0.25)) == [[0, 0, 0, 0]]
    assert epochs == [1, 1]  # one picture, which a bank keeps once


def test_vlpl_s_prompts_have_no_noise_and_its_bank_no_draws(build, data, clip_model):
    labeler = build("vlpl", bank=True).labeler
    sentences = [labeler.recipe.prompt.format(name) for name in data.class_names]
    with torch.no_grad():
        text = clip_model.model.encode_text(open_clip.tokenize(sentences))
    torch.testing.assert_close(labeler.prototypes, text / text.norm(dim=1, keepdim=True))
    key = json.loads((labeler.eyes.bank.folder / "manifest.json").read_text())["key"]
    assert (key["views"], key["seed"], key["split"]) == ("global", 0, "train")


# ---- chance


@pytest.mark.parametrize("mean", [1.3, 2.3])
def test_random_labels_are_unknown_classes_in_the_right_number(mean):
    observed = torch.zeros(2000, 12, dtype=torch.int8)
    observed[:, 3], observed[:, 7] = 1, -1
    ids = torch.arange(2000)
    labels = RandomLabeler(mean, seed=0).labels(Batch(ids, ids, [], observed), 1)
    assert not labels[:, [3, 7]].any() and (labels >= 0).all()
    counts = labels.sum(1)
    assert set(counts.tolist()) == {int(mean), int(mean) + 1} and abs(counts.float().mean() - mean) < 0.04
    per_class = labels.float().mean(0)[[0, 1, 2, 4, 5, 6, 8, 9, 10, 11]]
    assert (per_class - mean / 10).abs().max() < 0.04
    assert not torch.equal(RandomLabeler(mean, seed=1).labels(Batch(ids, ids, [], observed), 1), labels)


def test_random_labels_are_of_seed_0_where_none_is_named(data, batch):
    made, every = recipe("glyphs", "gpr+random", random_positives=2.0), batch(list(range(1, N)))
    unnamed = build_labeler("random", data, made).labels(every, 1)
    assert torch.equal(unnamed, RandomLabeler(2.0, seed=0).labels(every, 1)) and unnamed.any()


def test_random_labels_never_run_out():
    observed, ids = torch.eye(3, dtype=torch.int8), torch.arange(3)
    assert torch.equal(RandomLabeler(30.4, seed=0).labels(Batch(ids, ids, [], observed), 1), 1 - observed)


# ---- large losses


def test_large_losses_are_the_unknown_labels_with_the_largest_logits():
    observed = torch.zeros(4, 5, dtype=torch.int8)
    observed[:, 0], observed[0, 1] = 1, -1
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    logits[:, 0], logits[0, 1] = 9.0, 8.0  # the largest, but known
    batch, labeler = Batch(torch.arange(4), torch.arange(4), [], observed, logits), LargeLossLabeler(5.0)
    assert labeler.needs_logits and not labeler.labels(batch, 1).any()
    for epoch, k in ((2, 1), (3, 2), (5, 4)):
        allowed = logits.masked_fill(observed != 0, -math.inf).flatten()
        expected = torch.zeros(20, dtype=torch.int8)
        expected[allowed.argsort(descending=True)[:k]] = 1
        assert torch.equal(labeler.labels(batch, epoch), expected.reshape(4, 5))


@pytest.mark.parametrize("c, delta, first, last", [(20, 0.2, 1, 6), (80, 0.2, 3, 24), (312, 0.2, 10, 90)])
def test_large_loss_count_at_batches_of_16(c, delta, first, last):
    assert [large_loss_count((16, c), epoch, delta) for epoch in (1, 2, 10)] == [0, first, last]
    assert large_loss_count((16, c), 10**6, delta) == 16 * c


# ---- errors


def test_unknown_labeler(build):
    with pytest.raises(AevlpError, match="nearest is 'fixed-damp'"):
        build("fixd-damp")


def test_fixed_asks_only_for_what_it_lacks():
    asked = []

    class Ask:
        def labels(self, batch, epoch):
            asked.append((batch.ids.tolist(), epoch))
            return batch.ids[:, None].to(torch.int8).expand(-1, 2)

    fixed = Fixed(Ask(), 4, 2)
    observed = torch.zeros(2, 2, dtype=torch.int8)
    for ids, epoch in (([0, 1], 3), ([1, 0], 4), ([2, 3], 4)):
        labels = fixed.labels(Batch(torch.tensor(ids), torch.tensor(ids), [], observed), epoch)
        assert labels[:, 0].tolist() == ids
    assert asked == [([0, 1], 1), ([2, 3], 1)]


def test_fixed_keeps_the_labels_of_an_epoch_in_its_place():
    class Epoch:
        def labels(self, batch, epoch):
            return torch.full((len(batch.ids), 2), epoch, dtype=torch.int8)

    fixed, ids = Fixed(Epoch(), 3, 2, epochs=2), torch.tensor([2, 0])
    fixed.labels(Batch(ids, ids, [], torch.zeros(2, 2, dtype=torch.int8)), 1)
    state = fixed.state_dict()  # a run that is resumed reads it, with whatever release of aevlp
    assert state["table"].tolist() == [[[1, 1], [0, 0], [1, 1]], [[0, 0]] * 3]
    assert state["known"].tolist() == [[True, False, True], [False] * 3]
