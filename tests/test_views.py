"""Views: where they are, and pixels against Pillow and torchvision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torchvision.transforms import v2

from aevlp import views
from aevlp.data import AevlpError
from aevlp.views import ViewSettings, make_views, student_flips, student_inputs, view_plan

PLAIN = dict(mean=(0, 0, 0), std=(1 / 255,) * 3)  # views in grey levels
SIZES = [(375, 500), (500, 333), (64, 64), (31, 97), (5, 7), (700, 40)]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (3, *s), dtype=np.uint8)) for s in SIZES]


def pillow(image, box, size):
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).crop(box).resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float()


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("overlap", [0, 0.2, 1.0])
def test_every_pixel_is_in_a_patch_and_no_patch_leaves_the_image(grid, overlap):
    plan = view_plan(range(len(SIZES)), SIZES, ViewSettings(grid=grid, overlap=overlap), seed=3, epoch=2)
    for (height, width), boxes in zip(SIZES, plan.boxes.tolist(), strict=True):
        assert boxes[0] == [0, 0, width, height] and len(boxes) == 1 + grid**2
        covered = np.zeros((height, width), int)
        for x0, y0, x1, y1 in boxes[1:]:
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            covered[y0:y1, x0:x1] += 1
        assert covered.min() >= 1
        if overlap == 0 and width % grid == 0 and height % grid == 0:
            assert covered.max() == 1


def test_patches_grow_by_their_own_ratio_on_every_side():
    plan = view_plan(range(400), [(1000, 2000)] * 400, ViewSettings(grid=4, overlap=0.2), seed=0, epoch=1)
    middle = plan.boxes[:, 1 + 5].double()  # row 1, column 1
    grow = torch.stack([500 - middle[:, 0], middle[:, 2] - 1000]) / 500
    tall = torch.stack([250 - middle[:, 1], middle[:, 3] - 500]) / 250
    assert (grow[0] - grow[1]).abs().max() <= 1 / 250 and (grow[0] - tall[0]).abs().max() <= 2 / 250
    assert 0 <= grow.min() < 0.01 and 0.19 < grow.max() <= 0.2 + 1 / 500 and abs(grow.mean() - 0.1) < 0.01
    assert len(plan.boxes[0, 1:].unique(dim=0)) == 16
    neighbour = (1000 - plan.boxes[:, 1 + 6, 0].double()) / 500  # row 1, column 2 grows by a ratio of its own
    assert abs(np.corrcoef(grow[0], neighbour)[0, 1]) < 0.2 and (grow[0] - neighbour).abs().mean() > 0.03


def test_draws_are_uniform_and_independent():
    settings = ViewSettings(grid=4)
    plans = [view_plan(range(500), [(90, 90)] * 500, settings, seed=0, epoch=e) for e in (1, 2)]
    flips = torch.stack([p.flip for p in plans]).double()
    assert abs(flips.mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(flips.flatten(1))[0, 1]) < 0.05  # epochs
    assert torch.corrcoef(flips[0].T).fill_diagonal_(0).abs().max() < 0.2  # views
    ops = torch.stack([p.op for p in plans])
    assert abs((ops >= 0).double().mean() - 0.2) < 0.02
    assert all(abs((ops == k).double().mean() - 0.05) < 0.012 for k in range(4))
    for seed in (1, 2):
        assert not torch.equal(view_plan(range(500), [(90, 90)] * 500, settings, seed, 1).flip, plans[0].flip)
    assert not torch.equal(student_flips(range(500), 0, 1), plans[0].flip[:, 0])


def test_a_view_is_the_formula_on_the_numbers_of_its_picture():
    """Drawn from a counter-based generator, so that a bank of another machine and year holds the same views."""
    settings, ids, sizes = ViewSettings(grid=2, overlap=0.5), [3, 900], [(100, 200), (61, 33)]
    plan = view_plan(ids, sizes, settings, seed=11, epoch=7)
    kinds = set()
    for b, (i, (height, width)) in enumerate(zip(ids, sizes, strict=True)):
        philox = np.random.Philox(key=[11, 0], counter=[0, 0, 7, i])
        for v, (grow, flip, which, strong) in enumerate(np.random.Generator(philox).random((5, 4))):
            row, column = divmod(v - 1, 2)
            edges = [
                (column - grow / 2) / 2,
                (row - grow / 2) / 2,
                (column + 1 + grow / 2) / 2,
                (row + 1 + grow / 2) / 2,
            ]
            x0, y0, x1, y1 = (min(max(e, 0), 1) * n for e, n in zip(edges, (width, height) * 2, strict=True))
            box = [int(x0), int(y0), int(np.ceil(x1)), int(np.ceil(y1))] if v else [0, 0, width, height]
            assert plan.boxes[b, v].tolist() == box and plan.flip[b, v] == (flip < 0.5)
            assert plan.op[b, v] == (int(which * 20) if which < 0.2 else -1)
            assert plan.strength[b, v] == np.float32(strong)
            kinds.add(plan.op[b, v].item())
    assert len(kinds) > 1
    for made, purpose, change in (
        (student_flips(ids, 11, 7), 1, lambda u: u[0] < 0.5),
        (views.student_shifts(ids, 0.1, 11, 7), 2, lambda u: (2 * u - 1) * 0.1),
    ):
        us = [np.random.Generator(np.random.Philox(key=[11, purpose], counter=[0, 0, 7, i])).random(2) for i in ids]
        np.testing.assert_allclose(made.numpy(), np.array([change(u) for u in us]), rtol=1e-12)
    assert views.draws([], 3, 0, 1).shape == (0, 3)


def test_settings_are_those_of_the_paper_and_of_clip():
    settings = ViewSettings()
    assert (settings.grid, settings.overlap, settings.augment, settings.size) == (4, 0.2, "weak", 224)
    assert (settings.mean, settings.std) == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD) and settings.views == 17
    with pytest.raises(AttributeError):
        settings.grid = 3


def test_evaluation_views_are_half_grown_and_otherwise_as_they_are():
    plan = views.evaluation_plan([(80, 160), (40, 40)], ViewSettings(grid=2, overlap=0.2))
    assert plan.boxes.tolist() == [
        [[0, 0, 160, 80], [0, 0, 88, 44], [72, 0, 160, 44], [0, 36, 88, 80], [72, 36, 160, 80]],
        [[0, 0, 40, 40], [0, 0, 22, 22], [18, 0, 40, 22], [0, 18, 22, 40], [18, 18, 40, 40]],
    ]
    assert not plan.flip.any() and (plan.op == -1).all() and plan.strength.shape == (2, 5)
    assert views.evaluation_plan([(9, 12)] * 3, ViewSettings(grid=3)).boxes.shape == (3, 10, 4)
    part = plan[1:]
    assert part.boxes.tolist() == plan.boxes[1:].tolist()
    assert part.flip.shape == part.op.shape == part.strength.shape == (1, 5)


def test_memory_of_earlier_batches_is_used_again_and_not_hoarded():
    views._spare.clear()
    batch = views._fresh(3, 5)
    where = batch.data_ptr()
    del batch
    assert views._fresh(3, 5).data_ptr() == where
    for n in range(10):
        views._fresh(n + 1, 2)
        assert len(views._spare) <= 4
    views._spare.clear()
    for n in range(4):  # of a run: views and inputs, of whole batches and of the last one
        views._fresh(n + 1, 2)
    assert set(views._spare) == {(n + 1, 2) for n in range(4)}


def test_switches():
    off = view_plan(range(50), [(40, 40)] * 50, ViewSettings(overlap=0, augment="none"), 0, 1)
    again = view_plan(range(50), [(40, 40)] * 50, ViewSettings(overlap=0, augment="none"), 5, 9)
    assert not off.flip.any() and (off.op == -1).all() and torch.equal(off.boxes, again.boxes)
    flips = view_plan(range(50), [(40, 40)] * 50, ViewSettings(overlap=0, augment="flip"), 0, 1)
    assert flips.flip.any() and (flips.op == -1).all()
    assert ViewSettings(grid=1, size=1).views == 2
    for wrong in (dict(grid=0), dict(overlap=-0.1), dict(augment="x"), dict(size=0)):
        with pytest.raises(AevlpError):
            ViewSettings(**wrong)


@pytest.mark.parametrize("size", [32, 224])
def test_views_are_pillows(images, size):
    settings = ViewSettings(grid=3, augment="flip", size=size, **PLAIN)
    plan = view_plan(range(len(images)), SIZES, settings, seed=0, epoch=1)
    made = make_views(images, plan, settings)
    assert made.shape == (len(images), 10, 3, size, size) and made.dtype == torch.float32
    assert made.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)  # which a CPU's convolutions read
    products = views._products(images, plan.boxes, plan.flip, size, "cpu")  # what a GPU computes
    for b, image in enumerate(images):
        for v, box in enumerate(plan.boxes[b].tolist()):
            expected = pillow(image, box, size)
            expected = expected.flip(-1) if plan.flip[b, v] else expected
            assert (made[b, v] - expected).abs().max() < 2.01  # grey levels of 255
            assert (products[b, v] - expected).abs().max() < 2.01
            assert (made[b, v] - expected).abs().mean() < 0.25


def test_students_input_is_pillows(images):
    flip = torch.tensor([False, True] * 3)
    made = student_inputs(images, 96, flip=flip, **PLAIN)
    for image, flipped, view in zip(images, flip, made, strict=True):
        expected = pillow(image, (0, 0, image.shape[2], image.shape[1]), 96)
        assert (view - (expected.flip(-1) if flipped else expected)).abs().max() < 1.01
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    expected = v2.functional.normalize(made / 255, mean, std)
    torch.testing.assert_close(student_inputs(images, 96, mean, std, flip=flip), expected, atol=1e-5, rtol=1e-5)


def reference(op, view, strength):
    f, view = v2.functional, view / 255  # floats, which torchvision does not truncate
    if op == 0:
        return f.rotate(view, 10 * strength, interpolation=v2.InterpolationMode.BILINEAR)
    if op == 1:
        view = f.adjust_contrast(f.adjust_brightness(view, 1 + 0.2 * strength), 1 + 0.2 * strength)
        return f.adjust_saturation(view, 1 - 0.2 * strength)
    return f.adjust_sharpness(view, 1 + strength) if op == 2 else f.autocontrast(view)


@pytest.mark.parametrize("op", range(4))
def test_augmentations_are_torchvisions(op):
    smooth = torch.nn.functional.interpolate(torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(op)), 48)
    x = (smooth * 80 + 80).round()  # far from both ends, where one clamp and several differ
    x[1, 2] = 100  # nothing to spread in this channel
    x[2, 0] = 100 + torch.eye(48)  # and in this one a single grey level
    strength = torch.tensor([-1.0, -0.5, 0.0, 0.3, 0.999])
    made = views._OPS[op](x.clone(), strength)
    alone = torch.cat([views._OPS[op](x[i : i + 1].clone(), strength[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(made, alone, atol=1e-3, rtol=0)
    for view, s, out in zip(x, strength.tolist(), made, strict=True):
        assert (out - 255 * reference(op, view, s)).abs().max() < 0.1


@pytest.mark.parametrize("op", [1, 2])
def test_augmentations_end_at_black_and_white(op):
    x = torch.tensor([[0.0, 30.0], [220.0, 255.0]]).repeat_interleave(4, 0).repeat_interleave(4, 1).expand(1, 3, 8, 8)
    out = views._OPS[op](x.clone(), torch.tensor([0.9]))[..., 1:-1, 1:-1]  # the border is not sharpened
    assert out.min() == 0 and out.max() == 255


def test_both_ways_of_making_views_augment_alike(images):
    settings = ViewSettings(grid=4, size=48)
    plan = view_plan(range(len(images)), SIZES, settings, seed=0, epoch=1)
    assert set(plan.op.unique().tolist()) == {-1, 0, 1, 2, 3}
    one = make_views(images, plan, settings)
    other = views._on_device(images, plan, 48, settings.mean, settings.std, "cpu")
    assert (one - other).abs().mean() < 0.01  # of values with unit spread


def test_views_know_neither_order_nor_company_nor_threads(images):
    settings, ids = ViewSettings(grid=2, size=32), [4, 9, 2, 7, 5, 0]
    made = {}
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        made[threads] = make_views(images, view_plan(ids, SIZES, settings, 0, 3), settings)
        assert torch.get_num_threads() == threads
        torch.set_num_threads(before)
    assert torch.equal(made[1], made[2]) and torch.equal(made[1], made[3])
    for order in ([5, 0, 3], [2], [1, 4]):
        part = [images[i] for i in order]
        plan = view_plan([ids[i] for i in order], [SIZES[i] for i in order], settings, 0, 3)
        assert torch.equal(make_views(part, plan, settings), made[1][order])


def test_memory_is_not_shared_with_a_living_batch(images):
    settings = ViewSettings(grid=2, size=32, **PLAIN)
    plan = view_plan([0], SIZES[:1], settings, 0, 1)
    first = make_views(images[:1], plan, settings)
    kept, part = first.clone(), first[0, 1]
    make_views([255 - images[0]], plan, settings).zero_()
    assert torch.equal(first, kept)
    del first  # a piece of it lives on
    make_views([255 - images[0]], plan, settings).zero_()
    assert torch.equal(part, kept[0, 1])
    array = make_views(images[:1], plan, settings).numpy()
    make_views([255 - images[0]], plan, settings).zero_()
    assert np.array_equal(array, kept.numpy())


def test_decoded_pictures_need_not_be_contiguous(images):
    settings = ViewSettings(grid=2, size=32)
    plan = view_plan([0, 1], SIZES[:2], settings, 0, 1)
    interleaved = [i.permute(1, 2, 0).contiguous().permute(2, 0, 1) for i in images[:2]]
    torch.testing.assert_close(make_views(interleaved, plan, settings), make_views(images[:2], plan, settings))


def test_products_are_a_resize_in_exact_numbers():
    scene = np.random.default_rng(1).integers(0, 256, (3, 90, 120), dtype=np.uint8)
    scene[:, :30], scene[:, 60:] = 0, 255  # bands of black and of white
    boxes, flip = (
        torch.tensor([[[0, 0, 120, 90], [17, 5, 100, 80], [3, 40, 20, 90]]]),
        torch.tensor([[False, True, False]]),
    )
    made = views._products([torch.from_numpy(scene)], boxes, flip, 64, "cpu")[0]
    for view, (x0, y0, x1, y1), flipped in zip(made, boxes[0].tolist(), flip[0], strict=True):
        cut = torch.from_numpy(scene[None, :, y0:y1, x0:x1]).double()
        expected = torch.nn.functional.interpolate(cut, (64, 64), mode="bilinear", antialias=True)[0].round()
        expected = expected.flip(-1) if flipped else expected
        assert (view - expected).abs().max() <= 1 and (view != expected).float().mean() < 0.001
    assert made.min() == 0 and made.max() == 255


@pytest.mark.parametrize("height, width", [(500, 200), (200, 500), (4000, 3000), (40_000, 30_000)])
def test_memory_of_the_matrix_products_is_bounded(monkeypatch, height, width):
    """As many pictures at a time as 2^28 numbers allow, one at least, of which only the sizes are known here."""
    parts, settings = [], ViewSettings(grid=4, size=224, augment="flip")
    small = [torch.empty(3, 10, 10, dtype=torch.uint8, device="meta")] * 98
    many = [*small, *(torch.empty(3, *s, dtype=torch.uint8, device="meta") for s in ((height, 20), (30, width)))]
    plan = view_plan(range(100), [i.shape[1:] for i in many], settings, 0, 1)
    monkeypatch.setattr(views, "_products", lambda i, *a: parts.append(len(i)) or torch.zeros(len(i), 17, 3, 2, 2))
    views._on_device(many, plan, 224, settings.mean, settings.std, "cpu")
    each = 17 * 224 * (height + 3 * width)  # the padded picture by rows, and its rows by columns
    most = max(2**28 // each, 1)
    assert parts == [most] * (100 // most) + ([100 % most] if 100 % most else [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_makes_the_same_views(images):
    settings = ViewSettings(grid=4, size=224, **PLAIN)
    plan = view_plan(range(len(images)), SIZES, settings, seed=0, epoch=1)
    difference = (make_views(images, plan, settings, "cuda").cpu() - make_views(images, plan, settings)).abs()
    assert difference[plan.op < 0].max() < 2.01 and difference.mean() < 1


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.floats(-0.9, 0.9), st.floats(-0.9, 0.9))
def test_a_shift_mirrors_as_numpy_does(height, width, right, down):
    image = np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)
    dy, dx = round(down * height), round(right * width)
    dy, dx = (max(1 - n, min(n - 1, d)) for n, d in ((height, dy), (width, dx)))  # numpy mirrors once
    padded = np.pad(image, ((0, 0), (abs(dy), abs(dy)), (abs(dx), abs(dx))), mode="reflect")
    expected = padded[:, abs(dy) - dy :][:, :height, abs(dx) - dx :][:, :, :width]
    found = views.shifted(torch.from_numpy(image), dx / width, dy / height).numpy()
    np.testing.assert_array_equal(found, expected)


def test_shifts_belong_to_the_picture_and_the_epoch():
    first = views.student_shifts([3, 5, 8], 0.1, seed=0, epoch=1)
    assert torch.equal(first[1], views.student_shifts([5], 0.1, seed=0, epoch=1)[0])
    assert not torch.equal(first, views.student_shifts([3, 5, 8], 0.1, seed=0, epoch=2))
    many = views.student_shifts(range(2000), 0.1, seed=0, epoch=1)
    assert many.abs().max() <= 0.1 and many.abs().max() > 0.099 and many.mean().abs() < 0.005
