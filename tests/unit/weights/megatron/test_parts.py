"""A language model and a tower made one, layers moved between stages: by names, rank by rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tessera.config.errors import UserError
from tessera.weights.hf import Checkpoint
from tessera.weights.megatron import parts
from tessera.weights.megatron.checkpoint import LEGACY, locate, open_as_ours
from tessera.weights.megatron.options import Options
from tessera.weights.megatron.ranks import Ranks
from tests.megatron import Model, rank_tensors

TOWER = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "model_type": "intern_vit_6b"}


def tower(path: Path) -> dict[str, Tensor]:
    """A tower as its own repository has it: norms without mean, normed queries and keys, no bias on qkv."""
    held = {
        "embeddings.class_embedding": torch.randn(1, 1, 32),
        "embeddings.position_embedding": torch.randn(1, 17, 32),
        "embeddings.patch_embedding.weight": torch.randn(32, 3, 14, 14),
        "embeddings.patch_embedding.bias": torch.randn(32),
    }
    for layer in range(2):
        stem = f"encoder.layers.{layer}."
        held |= {f"{stem}{name}": torch.randn(32) for name in ("ls1", "ls2", "norm1.weight", "norm2.weight")}
        held |= {f"{stem}attn.{name}_norm.weight": torch.randn(32) for name in "qk"}
        held |= {f"{stem}attn.qkv.weight": torch.randn(96, 32), f"{stem}attn.proj.weight": torch.randn(32, 32)}
        held |= {f"{stem}attn.proj.bias": torch.randn(32), f"{stem}mlp.fc1.weight": torch.randn(64, 32)}
        held |= {f"{stem}mlp.fc1.bias": torch.randn(64), f"{stem}mlp.fc2.weight": torch.randn(32, 64)}
        held |= {f"{stem}mlp.fc2.bias": torch.randn(32)}
    path.mkdir()
    save_file(held, path / "model.safetensors")
    return held


def converted_tower(tmp_path: Path, tp: int) -> tuple[Path, dict[str, Tensor]]:
    held = tower(tmp_path / "vit")
    root = tmp_path / f"vit-{tp}"
    root.mkdir()
    options = Options(dialect="lm", format=LEGACY, ranks=Ranks(tp=tp))
    parts.tower_to_megatron(Checkpoint(tmp_path / "vit"), TOWER, root, options)
    return root, held


def test_a_tower_alone_with_empty_heads(tmp_path: Path) -> None:
    """Two heads for four ranks, as 25 for 8: queries, keys and values of a head side by side, then zeros."""
    root, held = converted_tower(tmp_path, 4)
    ranks = [rank_tensors(root, rank) for rank in range(4)]
    qkv = torch.cat([rank["decoder.layers.1.self_attention.linear_qkv.weight"] for rank in ranks])
    heads = held["encoder.layers.1.attn.qkv.weight"].view(3, 2, 16, 32).transpose(0, 1).reshape(96, 32)
    assert torch.equal(qkv, torch.cat([heads, torch.zeros(96, 32)]))
    norm = torch.cat([rank["decoder.layers.0.self_attention.k_layernorm.weight"] for rank in ranks])
    assert torch.equal(norm, torch.cat([held["encoder.layers.0.attn.k_norm.weight"], torch.zeros(32)]))
    assert torch.equal(ranks[3]["position_embeddings.weight"], held["embeddings.position_embedding"][0])
    assert torch.equal(ranks[2]["decoder.layers.0.input_layernorm.weight"], held["encoder.layers.0.norm1.weight"])
    assert len(ranks[0]) == len(held)


def test_a_tower_with_something_else_in_it(tmp_path: Path) -> None:
    held = tower(tmp_path / "vit")
    save_file({**held, "head.weight": torch.ones(2)}, tmp_path / "vit" / "model.safetensors")
    with pytest.raises(UserError, match=r"1 tensors have no place in a tower: head.weight"):
        parts.tower_to_megatron(Checkpoint(tmp_path / "vit"), TOWER, tmp_path, Options(format=LEGACY))


def test_a_language_model_and_a_tower_are_combined(tmp_path: Path) -> None:
    model = Model(tmp_path / "hf", "qwen2", tie_word_embeddings=False)
    text = model.to_megatron(tmp_path / "text", Options(dialect="lm", format=LEGACY, ranks=Ranks(tp=2)))
    vision, _ = converted_tower(tmp_path, 2)
    root = tmp_path / "both"
    root.mkdir()
    counts = parts.combine(text, vision, root)
    for rank in range(2):
        both, one, two = (rank_tensors(path, rank) for path in (root, text, vision))
        wanted = {f"language_model.{name}": v for name, v in one.items()}
        wanted |= {f"vision_model.{name}": v for name, v in two.items()}
        assert counts == (len(one), len(two)) and both.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in both.items())
    assert locate(root).args is not None and locate(root).args.num_layers == 3  # type: ignore[union-attr]
    held = torch.load(root / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)["model"]
    assert held["vision_model.decoder.layers.0.mlp.linear_fc1._extra_state"] is None


def test_what_cannot_be_combined(tmp_path: Path) -> None:
    model = Model(tmp_path / "hf", "llama")
    one = model.to_megatron(tmp_path / "one", Options(dialect="lm", format=LEGACY))
    two = model.to_megatron(tmp_path / "two", Options(dialect="lm", format=LEGACY, ranks=Ranks(tp=2)))
    dist = model.to_megatron(tmp_path / "dist", Options(dialect="lm"))
    with pytest.raises(UserError, match=r"has 1 tensor ranks, the language model 2; convert one of them"):
        parts.combine(two, one, tmp_path)
    with pytest.raises(UserError, match=r"--mcore_model .*dist: is a torch_dist checkpoint"):
        parts.combine(dist, one, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_layers_move_between_stages_and_back(tmp_path: Path, tied: bool) -> None:
    model = Model(tmp_path / "hf", "qwen2", tie_word_embeddings=tied)
    one = model.to_megatron(tmp_path / "one", Options(dialect="lm", format=LEGACY, ranks=Ranks(tp=2)))
    for name, pp, stages in (("three", 3, None), ("uneven", 2, (1, 2)), ("again", 1, None)):
        (tmp_path / name).mkdir()
        source = {"three": one, "uneven": tmp_path / "three", "again": tmp_path / "uneven"}[name]
        assert parts.repipeline(source, tmp_path / name, pp, stages=stages) == 3
        assert locate(tmp_path / name).args.pipeline_model_parallel_size == pp  # type: ignore[union-attr]
        model.same_weights(_back(model, tmp_path / name, tmp_path / f"hf-{name}"))
    direct = model.to_megatron(
        tmp_path / "direct", Options(dialect="lm", format=LEGACY, ranks=Ranks(tp=2, pp=2, stages=(1, 2)))
    )
    for rank in ((0, 0), (0, 1), (1, 0), (1, 1)):
        held, wanted = rank_tensors(tmp_path / "uneven", *rank), rank_tensors(direct, *rank)
        assert held.keys() == wanted.keys() and all(torch.equal(held[key], wanted[key]) for key in held)


def _back(model: Model, root: Path, out: Path) -> Path:
    from tessera.weights.megatron import convert

    out.mkdir()
    found = locate(root).assembled(model.family, model.config)
    convert.to_hf(convert.from_megatron(found), model.family, model.config, out, layout=model.path)
    return out


def test_a_tower_stays_on_the_first_stage(tmp_path: Path) -> None:
    model = Model(tmp_path / "hf", "internvl")
    one = model.to_megatron(tmp_path / "one", Options(dialect="lm", format=LEGACY))
    (tmp_path / "three").mkdir()
    parts.repipeline(one, tmp_path / "three", 3)
    seen = [any(name.startswith("vision_") for name in rank_tensors(tmp_path / "three", 0, pp)) for pp in range(3)]
    assert seen == [True, False, False]
    checkpoint = open_as_ours(tmp_path / "three", model.family, model.config)
    assert all(torch.equal(checkpoint.read(name), value) for name, value in model.ours.items())
