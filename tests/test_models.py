"""Backbones, local weight files, heads: random small networks, no download."""

import json
import pickle
from dataclasses import replace

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from aevlp import models
from aevlp.data import AevlpError
from aevlp.models import BACKBONES, HEADS, BoostHead, Output, build_model, logits_of, read_weights, sine_positions
from aevlp.recipes import recipe
from aevlp.vlm import load_clip

TINY = recipe("glyphs", "aevlp", backbone="resnet10t", backbone_weights="none", image_size=64)


def build(head="linear", n_classes=5, seed=0, **changes):
    torch.manual_seed(seed)
    return build_model(replace(TINY, **changes), n_classes, head)


def images(n=2, size=64, seed=1):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("head", HEADS)
def test_a_head_learns_and_predicts_the_same_twice(head):
    model = build(head)
    output = model(images())
    assert logits_of(output).shape == (2, 5)
    extras = [x.mean() for x in output[1:] if x is not None] if isinstance(output, Output) else []
    (logits_of(output).square().mean() + sum(extras)).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not dead
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images()), model(images()))


def test_training_samples_latents_anew():
    model = build("mime", mime_dropout=0.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    first, second = model(images()), model(images())
    torch.testing.assert_close(first.mu, second.mu)
    assert not torch.equal(first.logits, second.logits)


@pytest.mark.parametrize("name, grid", [("resnet10t", 2), ("convnext_atto", 2), ("vit_tiny_patch16_224", 4)])
def test_backbones_of_all_kinds_give_features_and_a_map(name, grid):
    model = build("boostlu", backbone=name).eval()
    with torch.no_grad():
        assert model.backbone.map(images()).shape[2:] == (grid, grid)
        assert model(images()).shape == (2, 5)
        assert build("linear", backbone=name).eval()(images()).shape == (2, 5)


def test_a_transformer_takes_any_image_size():
    assert build(backbone="vit_tiny_patch16_224", image_size=96).eval()(images(size=96)).shape == (2, 5)


def test_clip_tower(tmp_path):
    vision = dict(image_size=32, layers=1, width=32, patch_size=8, head_width=16)
    text = dict(context_length=16, vocab_size=64, width=32, heads=2, layers=1)
    config = dict(embed_dim=24, vision_cfg=vision, text_cfg=text)
    (tmp_path / "tiny-tower.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-tower.json")
    model = build(backbone="clip:tiny-tower")
    assert model.head.in_features == 24 and model(images()).shape == (2, 5)
    with pytest.raises(AevlpError, match="gives no map"):
        build("boostlu", backbone="clip:tiny-tower")


def test_clip_tower_has_the_weights_and_the_activation_of_its_clip(monkeypatch):
    shipped = load_clip("glyphs-clip")
    tower = build(backbone="clip:glyphs-clip", backbone_weights="shipped", image_size=shipped.image_size).backbone.net
    expected = shipped.model.visual.state_dict()
    assert tower.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in tower.state_dict().items())

    create, given = open_clip.create_model, {}
    monkeypatch.setattr(
        open_clip, "create_model", lambda name, **kw: given.update(kw) or create(name, **kw | {"pretrained": None})
    )
    model = build(backbone="clip:ViT-B-32", backbone_weights="hub", image_size=224)
    assert given["pretrained"] == "openai"
    assert any(type(m).__name__ == "QuickGELU" for m in model.backbone.modules())


def test_boost_multiplies_positive_activations_only():
    head, features = BoostHead(4, 3, alpha=5.0), torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    cam = torch.einsum("bfhw,cf->bchw", features, head.conv.weight[:, :, 0, 0]) + head.conv.bias[:, None, None]
    by_hand = torch.stack(
        [torch.stack([sum(5 * v if v > 0 else v for v in plane.flatten()) / 9 for plane in image]) for image in cam]
    )
    torch.testing.assert_close(head(features), by_hand)


def test_positions_tell_places_apart():
    table = sine_positions(4, 5, 32)
    assert table.shape == (20, 32)
    assert torch.cdist(table, table).add(torch.eye(20) * 9).min() > 0.1
    torch.testing.assert_close(table[:5, :16], table[:1, :16].expand(5, -1))  # the same row: the same half for y


def test_frozen_head_and_rates():
    model = build(train_head=False)
    assert [g["name"] for g in model.param_groups(1e-5, 1e-4)] == ["backbone"]
    groups = build().param_groups(1e-5, 1e-4, 0.1)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [("backbone", 1e-5, 0.1), ("head", 1e-4, 0.1)]
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in build().parameters())


def test_channels_last_gives_the_same():
    plain, last = build().eval(), build(channels_last=True).eval()
    assert last.backbone.net.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    torch.testing.assert_close(plain(images()), last(x), rtol=1e-4, atol=1e-5)


# ---- local weight files


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("wrap", ["plain", "checkpoint", "parallel"])
def test_local_weights_arrive(tmp_path, suffix, wrap):
    state = {
        k: v.clone(memory_format=torch.contiguous_format) for k, v in build(seed=3).backbone.net.state_dict().items()
    }
    state |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}  # not read
    if wrap == "parallel":
        state = {"module." + k: v for k, v in state.items()}
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if wrap == "checkpoint" else state, path)
    model = build(backbone_weights=str(path))
    torch.testing.assert_close(model.backbone.net.state_dict(), build(seed=3).backbone.net.state_dict())


def test_wrong_weight_files_are_one_sentence(tmp_path):
    state = build().backbone.net.state_dict()
    cases = {
        "lacks": {k: v for k, v in state.items() if "layer4" not in k},
        "another shape": state | {"conv1.0.weight": torch.zeros(2, 2)},
        "unknown": state | {"blocks.0.attn.weight": torch.zeros(2)},
    }
    for what, tensors in cases.items():
        path = tmp_path / f"{what}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        with pytest.raises(AevlpError, match=f"{what}.*another backbone") as caught:
            build(backbone_weights=str(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class _Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_and_broken_files_are_not_opened(tmp_path, capsys):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(_Evil()))
    torch.save({"a": _Evil()}, tmp_path / "evil2.pth")
    (tmp_path / "short.safetensors").write_bytes(b"\x10")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("evil.pth", "evil2.pth", "short.safetensors", "empty.pth", "list.pth", "absent.pth", "."):
        with pytest.raises(AevlpError) as caught:
            read_weights(tmp_path / name)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert "run" not in capsys.readouterr().out


def test_unknown_names_and_no_network(monkeypatch):
    with pytest.raises(AevlpError, match="backbone 'resnet51' cannot be built"):
        build(backbone="resnet51")
    with pytest.raises(AevlpError, match="no model called 'ViT-Z'; the nearest is 'ViT-"):
        build(backbone="clip:ViT-Z")
    with pytest.raises(AevlpError, match="head 'round' should be one of"):
        build("round")

    def offline(*args, **kwargs):
        raise OSError("no network\nmore")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(AevlpError, match=r"'resnet10t' cannot be fetched \(no network\); .*backbone_weights=FILE"):
        build(backbone_weights="hub")


def test_table6_backbones_build_without_weights():
    with torch.device("meta"):
        for name, changes in BACKBONES.items():
            model = build(**{"image_size": 448, **changes})
            assert model(torch.empty(1, 3, 448, 448)).shape == (1, 5), name


def test_mime_s_decoder_is_the_published_one():
    """Step by step: positions join queries and keys only, the decoder starts from nothing and ends in a norm."""
    torch.manual_seed(0)
    head = models.MimeHead(8, 3, 8, 2, 16, 0.0, 4, 1).eval()
    features = torch.randn(2, 8, 3, 4)

    def attend(layer, x, queries, keys, values):
        heads, (b, n, width) = 2, queries.shape
        weight, bias = layer.attention.in_proj_weight.chunk(3), layer.attention.in_proj_bias.chunk(3)
        q, k, v = (
            (t @ w.T + c).view(b, -1, heads, width // heads).transpose(1, 2)
            for t, w, c in zip((queries, keys, values), weight, bias, strict=False)
        )
        mixed = (
            ((q @ k.transpose(-1, -2) / (width // heads) ** 0.5).softmax(-1) @ v).transpose(1, 2).reshape(b, n, width)
        )
        x = layer.norm1(x + mixed @ layer.attention.out_proj.weight.T + layer.attention.out_proj.bias)
        return layer.norm2(x + layer.ffn(x))

    x, at = features.flatten(2).transpose(1, 2), models.sine_positions(3, 4, 8)
    memory = attend(head.encoder, x, x + at, x + at, x)
    found, queries = torch.zeros(2, 3, 8), head.queries.expand(2, -1, -1)
    for layer in head.decoder:
        found = attend(layer, found, found + queries, memory + at, memory)
    torch.testing.assert_close(head.decode(features), head.norm(found), rtol=1e-4, atol=1e-5)
    assert isinstance(head.project, torch.nn.Identity)
    assert models.MimeHead(16, 3, 8, 2, 16, 0.0, 4, 1).project.weight.shape == (8, 16, 1, 1)
