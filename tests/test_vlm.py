"""CLIP through open_clip, prototypes, label graph and similarities against float64."""

import json

import numpy as np
import open_clip
import pytest
import torch

from aevlp import vlm
from aevlp.data import AevlpError
from aevlp.vlm import Clip, GraphNoise, label_graph, load_clip, prompts, similarities, text_prototypes

NAME = "tiny-vlm"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny CLIP that open_clip knows by name, and a file with its weights."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    vision = dict(image_size=32, layers=1, width=32, patch_size=8, head_width=16)
    text = dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=1)
    (folder / f"{NAME}.json").write_text(json.dumps(dict(embed_dim=24, vision_cfg=vision, text_cfg=text)))
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(3)
    model = open_clip.create_model(NAME, load_weights=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.fixture(scope="module")
def clip(weights):
    return load_clip(NAME, weights)


def test_a_local_file_gives_its_weights(weights, clip):
    pixels = torch.randn(3, 3, 32, 32)
    torch.manual_seed(3)
    expected = open_clip.create_model(NAME, load_weights=False).eval().encode_image(pixels)
    made = clip.encode_images(pixels)
    torch.testing.assert_close(made, torch.nn.functional.normalize(expected, dim=-1))
    torch.testing.assert_close(made.norm(dim=1), torch.ones(3))
    assert (clip.image_size, clip.width) == (32, 24) and not clip.model.training
    assert not any(p.requires_grad for p in clip.model.parameters())


def test_the_hash_names_the_weights(weights, clip):
    other = load_clip(NAME, weights)
    assert clip.weights_hash == other.weights_hash and len(clip.weights_hash) == 16
    other = load_clip(NAME, weights)
    other.model.visual.proj.data[0, 0] += 1e-6
    assert clip.weights_hash != other.weights_hash


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_chunks_change_no_embedding(weights, monkeypatch, precision):
    clip, pixels = load_clip(NAME, weights, precision=precision), torch.randn(11, 3, 32, 32)
    seen, encode = [], clip.model.encode_image
    monkeypatch.setattr(clip.model, "encode_image", lambda p: seen.append(len(p)) or encode(p))
    whole = clip.encode_images(pixels)
    monkeypatch.setattr(vlm, "_CHUNK", 4 * 32**2)
    near = dict(atol=1e-6, rtol=0) if precision == "fp32" else dict(atol=0.02, rtol=0)
    torch.testing.assert_close(clip.encode_images(pixels), whole, **near)
    assert seen == [11, 4, 4, 3]


def test_tokens_first_is_the_same_tower(weights):
    pixels = torch.randn(6, 3, 32, 32)
    made = load_clip(NAME, weights, precision="bf16")
    assert not made.model.visual.transformer.batch_first
    plain = open_clip.create_model(NAME, pretrained=str(weights)).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = torch.nn.functional.normalize(plain.encode_image(pixels).float(), dim=-1)
    assert (made.encode_images(pixels) * expected).sum(1).min() > 0.9999
    mixed = made.model.visual(pixels.flip(0)).flip(0)  # float32, no autocast: exact but for the order of sums
    torch.testing.assert_close(mixed, plain.visual(pixels), atol=1e-5, rtol=1e-4)


def test_bf16_is_near(weights, clip):
    pixels = torch.randn(8, 3, 32, 32)
    near = load_clip(NAME, weights, precision="bf16").encode_images(pixels)
    assert near.dtype == torch.float32
    assert 0.99 < (near * clip.encode_images(pixels)).sum(1).min() < 1 - 1e-7


def test_openais_weights_get_their_activation():
    assert vlm.weights_of("ViT-B-16", "openai")["force_quick_gelu"]
    assert vlm.weights_of("ViT-L-14-336", "openai")["force_quick_gelu"]
    assert not vlm.weights_of("ViT-B-16", "laion2b_s34b_b88k")["force_quick_gelu"]
    given = vlm.weights_of("RN50", "openai") | dict(pretrained=None, load_weights=False)
    model = open_clip.create_model("RN50", **given)
    assert type(model.transformer.resblocks[0].mlp[1]).__name__ == "QuickGELU"


@pytest.mark.parametrize(
    "name, given, says",
    [
        ("ViT-B16", "openai", "nearest is 'ViT-B-16'"),
        ("ViT-B-16", None, "clip_weights=openai"),
        ("ViT-B-16", "opnai", "nearest tag is 'openai'"),
        (NAME, "openai", "no tag"),
        ("ViT-B-16", "missing.safetensors", "no local file"),
    ],
)
def test_errors_help(weights, name, given, says):
    with pytest.raises(AevlpError, match=says) as e:
        load_clip(name, given)
    assert "\n" not in str(e.value)


def test_a_file_of_something_else(weights, tmp_path):
    for path, content in ((tmp_path / "a.safetensors", b"no weights"), (tmp_path / "b.pt", b"no weights either")):
        path.write_bytes(content)
        with pytest.raises(AevlpError, match="could not be loaded"):
            load_clip(NAME, path)
    torch.save(dict(model=open), tmp_path / "c.pt")  # a pickle of code is not opened
    with pytest.raises(AevlpError, match="could not be loaded"):
        load_clip(NAME, tmp_path / "c.pt")


def test_no_network_is_one_sentence(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Connection refused\nand a page of details")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(AevlpError, match="no network, give a local file") as e:
        load_clip("ViT-B-16", "openai")
    assert "\n" not in str(e.value) and "Connection refused" in str(e.value)


def test_prompts():
    assert prompts(["potted_plant", "cat"], "a {}.") == ["a potted plant.", "a cat."]
    with pytest.raises(AevlpError):
        prompts(["cat"], "a photo")


def graph_loop(text, neighbours, self_weight):
    unit = text / np.linalg.norm(text, axis=1, keepdims=True)
    out = np.zeros((len(text), len(text)))
    for i in range(len(text)):
        cosines = np.maximum(unit @ unit[i], 0)
        kept = sorted(range(len(text)), key=lambda j: -cosines[j])[:neighbours]
        others = [j for j in kept if j != i]
        total = sum(cosines[j] for j in others)
        for j in others:
            out[i, j] = (1 - self_weight) * cosines[j] / total if total else 0
        out[i, i] = 1 - out[i].sum()
    return out


@pytest.mark.parametrize("neighbours, self_weight", [(None, 0.8), (4, 0.8), (1, 0.8), (9, 0.5), (100, 0.0)])
def test_label_graph_is_the_loops(neighbours, self_weight):
    text = np.random.default_rng(1).normal(size=(9, 20)) + 0.5
    made = label_graph(torch.tensor(text), neighbours, self_weight).double().numpy()
    np.testing.assert_allclose(made, graph_loop(text, neighbours or 9, self_weight), atol=1e-6)
    np.testing.assert_allclose(made.sum(1), 1, atol=1e-6)


def test_one_class_has_a_graph():
    assert label_graph(torch.randn(1, 8)).tolist() == [[1.0]]


@pytest.mark.parametrize("last", [True, False])
def test_noise_is_its_formula(last):
    noise = GraphNoise(12, layers=3, hidden=20, seed=5, last_activation=last)
    shapes = [tuple(w.shape) for w in noise.weights]
    assert shapes == [(12, 20), (20, 20), (20, 12)]
    for w in noise.weights:
        bound = 1 / w.shape[1] ** 0.5
        assert 0.8 * bound < w.abs().max() <= bound and abs(w.mean()) < 0.15 * bound and not w.requires_grad
    text, graph = torch.randn(7, 12), label_graph(torch.randn(7, 12))
    h = text.double().numpy()
    for i, w in enumerate(noise.weights):
        h = graph.double().numpy() @ h @ w.double().numpy()
        h = np.where(h > 0, h, 0.2 * h) if i < 2 or last else h
    np.testing.assert_allclose(noise(text, graph).numpy(), h, atol=1e-5)


def test_noise_has_its_own_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    one = GraphNoise(12, seed=1)
    assert torch.equal(torch.rand(1), expected)
    other = GraphNoise(12, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.weights, GraphNoise(12, seed=1).weights, strict=True))
    assert not torch.equal(one.weights[0], other.weights[0])


def test_prototypes(clip):
    names = ["cat", "potted_plant", "cup"]
    text = clip.encode_text(prompts(names))
    plain = text_prototypes(clip, names, noise=False)
    torch.testing.assert_close(plain, torch.nn.functional.normalize(text, dim=-1))
    noisy = text_prototypes(clip, names, hidden=32, seed=4)
    g = GraphNoise(24, hidden=32, seed=4)(text, label_graph(text))
    torch.testing.assert_close(noisy, torch.nn.functional.normalize(text + g, dim=-1))
    torch.testing.assert_close(noisy.norm(dim=1), torch.ones(3))
    assert not torch.equal(noisy, text_prototypes(clip, names, hidden=32, seed=5))
    calls, encode = [], clip.encode_text
    clip.encode_text = lambda texts: calls.append(texts) or encode(texts)
    text_prototypes(clip, names, hidden=32)
    del clip.encode_text
    assert len(calls) == 1


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01, 1e-4])
def test_similarities_in_float64(temperature):
    rng = np.random.default_rng(0)
    e, t = (
        v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (rng.normal(size=(4, 5, 16)), rng.normal(size=(7, 16)))
    )
    logits = (e @ t.T).astype(np.longdouble) / temperature
    expected = np.exp(logits - logits.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    made = similarities(torch.tensor(e), torch.tensor(t), temperature)
    np.testing.assert_allclose(made.numpy(), expected.astype(float), atol=1e-10)
    single = similarities(torch.tensor(e).float(), torch.tensor(t).float(), temperature)
    assert torch.isfinite(single).all()
    np.testing.assert_allclose(single.sum(-1).numpy(), 1, atol=1e-5)


def test_the_small_clip_ships():
    clip = load_clip("glyphs-clip")
    assert clip.image_size == 64 and torch.isfinite(clip.encode_text(["a photo of a cup"])).all()


@pytest.mark.slow
def test_the_papers_architecture():
    clip = load_clip("ViT-B-16", "none")
    assert (clip.image_size, clip.width) == (224, 512)
    assert clip.encode_images(torch.zeros(2, 3, 224, 224)).shape == (2, 512)
    assert text_prototypes(clip, [f"class {i}" for i in range(20)], neighbours=20).shape == (20, 512)
    assert isinstance(clip, Clip)


VISION = dict(  # timm: how SigLIP is built
    vit=dict(image_size=32, layers=3, width=32, patch_size=8, head_width=16),
    resnet=dict(image_size=64, layers=[1, 1, 1, 1], width=8, head_width=32),
    timm=dict(image_size=160, timm_model_name="test_vit", timm_pool="map", timm_proj="none"),
    coca=dict(image_size=32, layers=1, width=32, patch_size=8, head_width=16, attentional_pool=True),
    mean=dict(image_size=32, layers=1, width=32, patch_size=8, head_width=16, pool_type="avg"),
)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Clips with random weights, some positions, and the file of their weights."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("towers")
    text = dict(context_length=16, vocab_size=512, width=32, heads=2, layers=1)

    def make(kind, **kwargs):
        name = f"tokens-{kind}"
        if not (folder / f"{name}.json").exists():
            width = 64 if kind == "timm" else 24
            config = dict(embed_dim=width, vision_cfg=VISION[kind], text_cfg=text)
            (folder / f"{name}.json").write_text(json.dumps(config))
            open_clip.add_model_config(folder / f"{name}.json")
            torch.manual_seed(5)
            model = open_clip.create_model(name, load_weights=False)
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / f"{name}.safetensors")
        if "force_image_size" in kwargs:
            return open_clip.create_model(name, pretrained=str(folder / f"{name}.safetensors"), **kwargs).eval()
        return load_clip(name, folder / f"{name}.safetensors", **kwargs)

    return make


def loop_tokens(tower, pixels, rule):
    """The last block of a ViT token by token in float64: (n, K) for one picture."""
    tower = tower.double()
    x = tower._embeds(pixels.double()[None])
    for block in tower.transformer.resblocks[:-1]:
        x = block(x)
    last, x = tower.transformer.resblocks[-1], x[0]
    inside = last.ln_1(x) @ last.attn.in_proj_weight.T + last.attn.in_proj_bias
    q, k, v = inside.chunk(3, -1)
    width, out = q.shape[1] // last.attn.num_heads, torch.zeros_like(x)
    for i in range(len(x)):
        for h in range(last.attn.num_heads):
            own = slice(h * width, (h + 1) * width)
            if rule == "maskclip":
                out[i, own] = v[i, own]
            else:
                for left, right in {"sclip": ((q, q), (k, k)), "plain": ((q, k),)}[rule]:
                    weights = torch.stack([left[i, own] @ right[j, own] for j in range(len(x))]) / width**0.5
                    out[i, own] += sum(w * v[j, own] for j, w in enumerate(weights.softmax(0)))
    x = x + out @ last.attn.out_proj.weight.T + last.attn.out_proj.bias
    x = x + last.mlp(last.ln_2(x))
    return (tower.ln_post(x) @ tower.proj)[1:]


@pytest.mark.parametrize("rule", vlm.TOKEN_RULES)
@torch.no_grad()
def test_a_vits_tokens_are_those_of_a_plain_loop(towers, rule):
    clip, pixels = towers("vit"), torch.randn(2, 3, 32, 32)
    whole, tokens = clip.encode_tokens(pixels, rule)
    assert tokens.shape == (2, 4, 4, 24) and clip.token_grid() == 4
    expected = torch.stack([loop_tokens(towers("vit").model.visual, p, rule) for p in pixels])
    expected = torch.nn.functional.normalize(expected, dim=-1).float()
    torch.testing.assert_close(tokens.flatten(1, 2), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whole, clip.encode_images(pixels), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_unchanged_last_block_gives_the_towers_own_tokens(towers):
    clip, pixels = towers("vit"), torch.randn(3, 3, 32, 32)
    made = vlm.dense_tokens(clip.model.visual, pixels, "plain")[1].flatten(1, 2)
    clip.model.visual.output_tokens = True
    _, own = clip.model.visual(pixels)
    torch.testing.assert_close(made, own @ clip.model.visual.proj, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_resnets_tokens_are_value_and_output_of_every_place(towers):
    clip, pixels = towers("resnet"), torch.randn(2, 3, 96, 64)
    tower = clip.model.visual
    made = vlm.dense_tokens(tower, pixels)[1]
    assert made.shape == (2, 3, 2, 24)
    last = tower.forward_intermediates(pixels, indices=1, intermediates_only=True)["image_intermediates"][-1].double()
    pool = tower.attnpool.double()
    for b, row, column in np.ndindex(2, 3, 2):
        value = pool.v_proj.weight @ last[b, :, row, column] + pool.v_proj.bias
        expected = pool.c_proj.weight @ value + pool.c_proj.bias
        torch.testing.assert_close(made[b, row, column].double(), expected, atol=1e-5, rtol=1e-4)
    clip, square = towers("resnet"), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(clip.encode_tokens(square)[0], clip.encode_images(square), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [24, 48, 64])
@torch.no_grad()
def test_other_sizes_are_those_of_force_image_size(towers, size):
    clip, other = towers("vit"), towers("vit", force_image_size=size).visual
    pixels = torch.randn(2, 3, size, size)
    whole, tokens = vlm.dense_tokens(clip.model.visual, pixels, "plain")
    other.output_tokens = True
    expected, own = other(pixels)
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tokens.flatten(1, 2), own @ other.proj, atol=1e-5, rtol=1e-4)


def test_tokens_under_autocast_are_near_and_chunks_change_nothing(towers, monkeypatch):
    pixels = torch.randn(9, 3, 48, 48)
    exact, near = towers("vit").encode_tokens(pixels), towers("vit", precision="bf16").encode_tokens(pixels)
    for one, other in zip(exact, near, strict=True):
        assert 0.99 < (one * other).sum(-1).min() < 1 - 1e-7 and other.dtype == torch.float32
    monkeypatch.setattr(vlm, "_CHUNK", 4 * 48**2)
    for one, other in zip(exact, towers("vit").encode_tokens(pixels), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["timm", "coca", "mean"])
def test_towers_without_tokens_are_refused_by_name(towers, kind):
    clip = towers(kind)
    with pytest.raises(AevlpError, match=f"tokens-{kind} has no dense tokens") as e:
        clip.encode_tokens(torch.randn(1, 3, clip.image_size, clip.image_size))
    assert "\n" not in str(e.value)
    with pytest.raises(AevlpError, match="one of sclip, maskclip, plain"):
        towers("vit").encode_tokens(torch.randn(1, 3, 32, 32), "clap")
    with pytest.raises(AevlpError, match="no multiple of 8"):
        towers("vit").encode_tokens(torch.randn(1, 3, 30, 30))
