"""What is written lies as Megatron has it: against closed forms, and against files that Megatron wrote."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tessera.config.errors import UserError
from tessera.weights.megatron import archive
from tessera.weights.megatron.checkpoint import LEGACY, locate
from tessera.weights.megatron.options import Options
from tessera.weights.megatron.ranks import Ranks
from tests.megatron import Model, dcp_tensors, rank_tensors

RECORDED = Path(__file__).with_name("written_by_megatron.tar.xz")
"""Checkpoints of one tiny sparse model, written by megatron-core 0.13.1 and 0.16.1."""

RECORDED_MODEL = {
    "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1,
    "mlp_only_layers": [], "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "vocab_size": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    with tarfile.open(RECORDED) as held:
        held.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder


def expected_layer(ours: dict[str, Tensor], prefix: str, groups: int, biased: bool) -> dict[str, Tensor]:
    """One dense layer by Megatron's definitions."""
    own = {name.removeprefix(prefix): value for name, value in ours.items() if name.startswith(prefix)}

    def fused(leaf: str) -> Tensor:
        parts = [own[f"self_attn.{name}_proj.{leaf}"] for name in "qkv"]
        rest = parts[0].shape[1:]
        return torch.cat([part.reshape(groups, -1, *rest) for part in parts], 1).reshape(-1, *rest)

    made = {
        "self_attention.linear_qkv.layer_norm_weight": own["input_layernorm.weight"],
        "self_attention.linear_qkv.weight": fused("weight"),
        "self_attention.linear_proj.weight": own["self_attn.o_proj.weight"],
        "mlp.linear_fc1.layer_norm_weight": own["post_attention_layernorm.weight"],
        "mlp.linear_fc1.weight": torch.cat([own["mlp.gate_proj.weight"], own["mlp.up_proj.weight"]]),
        "mlp.linear_fc2.weight": own["mlp.down_proj.weight"],
    }
    return made | ({"self_attention.linear_qkv.bias": fused("bias")} if biased else {})


@pytest.mark.parametrize("stacked", [True, False])
def test_a_dense_decoder(tmp_path: Path, stacked: bool) -> None:
    model = Model(tmp_path / "hf", "qwen2")
    root = model.to_megatron(tmp_path / "m", Options(dialect="lm", stacked=stacked, ranks=Ranks(tp=2, pp=3)))
    held = dcp_tensors(locate(root).path)
    wanted = {
        "embedding.word_embeddings.weight": model.ours["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": model.ours["model.norm.weight"],
    }
    for layer in range(3):
        for name, value in expected_layer(model.ours, f"model.layers.{layer}.", 2, True).items():
            wanted[f"decoder.layers.{layer}.{name}"] = value
    if stacked:
        held = {
            new: part
            for name, value in held.items()
            for new, part in (
                [(name, value)]
                if ".layers." not in name
                else [(name.replace(".layers.", f".layers.{i}."), value[i]) for i in range(3)]
            )
        }
    assert held.keys() == wanted.keys()
    assert all(torch.equal(held[name], wanted[name]) for name in wanted)


def test_ranks_hold_their_shards(tmp_path: Path) -> None:
    """Groups of heads, gate beside up, columns of row-parallel matrices; layers count from zero on every stage."""
    model = Model(tmp_path / "hf", "llama")
    options = Options(dialect="lm", format=LEGACY, ranks=Ranks(tp=2, pp=3))
    root = model.to_megatron(tmp_path / "m", options)
    for pp in range(3):
        layer = expected_layer(model.ours, f"model.layers.{pp}.", 2, False)
        for tp in range(2):
            held = rank_tensors(root, tp, pp)
            wanted = {f"decoder.layers.0.{name}": value for name, value in layer.items() if "layer_norm" in name}
            wanted["decoder.layers.0.self_attention.linear_qkv.weight"] = layer[
                "self_attention.linear_qkv.weight"
            ].chunk(2)[tp]
            gate, up = layer["mlp.linear_fc1.weight"].chunk(2)
            wanted["decoder.layers.0.mlp.linear_fc1.weight"] = torch.cat([gate.chunk(2)[tp], up.chunk(2)[tp]])
            for name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
                wanted[f"decoder.layers.0.{name}"] = layer[name].chunk(2, 1)[tp]
            if pp == 0:
                embedding = model.ours["model.embed_tokens.weight"]
                wanted["embedding.word_embeddings.weight"] = embedding.chunk(2)[tp]
            if pp == 2:
                wanted["output_layer.weight"] = model.ours["lm_head.weight"].chunk(2)[tp]
                wanted["decoder.final_layernorm.weight"] = model.ours["model.norm.weight"]
            assert held.keys() == wanted.keys()
            assert all(torch.equal(held[name], wanted[name]) for name in wanted), (tp, pp)


@pytest.mark.parametrize("local", [True, False])
def test_experts_are_dealt_to_expert_ranks(tmp_path: Path, local: bool) -> None:
    model = Model(tmp_path / "hf", "qwen3_moe")
    options = Options(dialect="lm", format=LEGACY, ranks=Ranks(tp=2, ep=4), local=local)
    root = model.to_megatron(tmp_path / "m", options)
    stack = model.ours["model.layers.1.mlp.experts.gate_up_proj"]
    norm = "input_layernorm.weight" if local else "self_attention.linear_qkv.layer_norm_weight"
    for ep in range(4):
        held = rank_tensors(root, 1, ep)
        for own in range(2):
            gate, up = stack[2 * ep + own].chunk(2)
            sequential, grouped = f"local_experts.{own}.linear_fc1.weight", f"linear_fc1.weight{own}"
            name = f"decoder.layers.1.mlp.experts.{sequential if local else grouped}"
            assert torch.equal(held[name], torch.cat([gate.chunk(2)[1], up.chunk(2)[1]]))
        assert torch.equal(held[f"decoder.layers.1.{norm}"], model.ours["model.layers.1.input_layernorm.weight"])
        post = model.ours["model.layers.1.post_attention_layernorm.weight"]
        assert torch.equal(held["decoder.layers.1.pre_mlp_layernorm.weight"], post)


def test_a_fused_tower_is_interleaved_by_heads(tmp_path: Path) -> None:
    model = Model(tmp_path / "hf", "qwen3_vl")
    root = model.to_megatron(tmp_path / "m", Options(dialect="pai", stacked=False))
    held = dcp_tensors(locate(root).path)
    qkv = model.ours["model.visual.blocks.1.attn.qkv.weight"]
    heads = qkv.view(3, 2, 16, 32).transpose(0, 1).reshape(-1, 32)
    assert torch.equal(held["vision_model.decoder.layers.1.self_attention.linear_qkv.weight"], heads)
    merger = model.ours["model.visual.deepstack_merger_list.1.norm.bias"]
    assert torch.equal(held["vision_model.decoder.deepstack_norm_list.1.bias"], merger)


@pytest.mark.parametrize("tp", [1, 4])
def test_heads_that_ranks_cannot_share_are_padded(tmp_path: Path, tp: int) -> None:
    """A tower of two heads for four ranks: two empty ones, zero in every matrix and norm; they are stripped again."""
    path = tmp_path / "hf"
    model = Model(path, "internvl", num_key_value_heads=4)
    config = {**model.config, "vision_config": {**model.config["vision_config"], "use_qk_norm": True}}
    import json

    from tessera.models.init import init_weights
    from tessera.weights import hf

    with torch.device("meta"):
        module = model.family.build(config)
    init_weights(module, config, 0, dtype=torch.bfloat16)
    hf.save(module.state_dict(), path, model.family.weightmap(config, []))
    (path / "config.json").write_text(json.dumps(config))
    model.reload()
    root = model.to_megatron(tmp_path / "m", Options(dialect="lm", format=LEGACY, ranks=Ranks(tp=tp)))
    names = {"qkv": "linear_qkv.weight", "norm": "q_layernorm.weight", "proj": "linear_proj.weight"}
    stem = "vision_model.decoder.layers.0.self_attention."
    ranks = [rank_tensors(root, rank) for rank in range(tp)]
    qkv, norm, proj = (
        torch.cat([held[stem + name] for held in ranks], int(key == "proj")) for key, name in names.items()
    )
    heads = max(2, tp)
    assert qkv.shape == (heads * 48, 32) and norm.shape == (heads * 16,) and proj.shape == (32, heads * 16)
    assert not qkv[96:].any() and not norm[32:].any() and not proj[:, 32:].any()
    assert qkv[:96].abs().sum() > 0 and (norm[:32] == 1).all()
    model.same_weights(model.to_hf(root, tmp_path / "back"))


@pytest.mark.parametrize("name", ["mcore-0.13.1-stacked", "mcore-0.16.1-per_layer", "mcore-0.13.1-torch"])
def test_checkpoints_that_megatron_wrote(tmp_path: Path, recorded: Path, name: str) -> None:
    """Their weights were those of the same seeded model: read back, they are it, bit for bit."""
    model = Model(tmp_path / "hf", "qwen3_moe", dtype=torch.float32, **RECORDED_MODEL)
    root = recorded / name
    found = locate(root)
    assert found.iteration == 7 and found.args is not None and found.args.num_layers == 2
    out = model.to_hf(root, tmp_path / "back")
    back, held = load_file(out / "model.safetensors"), load_file(model.path / "model.safetensors")
    assert back.keys() == held.keys() and all(torch.equal(back[key], held[key]) for key in held)


@pytest.mark.parametrize(("name", "stacked"), [("mcore-0.13.1-stacked", True), ("mcore-0.16.1-per_layer", False)])
def test_we_write_what_megatron_asks_for(tmp_path: Path, recorded: Path, name: str, stacked: bool) -> None:
    """Every tensor with the same shape, type and values, and every object (extra states) that real ones hold."""
    model = Model(tmp_path / "hf", "qwen3_moe", dtype=torch.float32, **RECORDED_MODEL)
    root = model.to_megatron(tmp_path / "m", Options(dialect="lm", stacked=stacked, local=True))
    theirs, ours = described(locate(recorded / name).path), described(locate(root).path)
    assert {key for key, kind in theirs.items() if kind} == {key for key, kind in ours.items() if kind}
    assert all(ours[key] == kind for key, kind in theirs.items())
    held = dcp_tensors(locate(root).path)
    if "0.16" in name:  # PyTorch alone cannot open the older ones
        assert all(torch.equal(value, held[key]) for key, value in dcp_tensors(locate(recorded / name).path).items())


def described(folder: Path) -> dict[str, tuple[object, ...] | None]:
    """Shape and type of every tensor of a ``torch_dist`` directory; None of objects."""
    from tessera.weights.megatron.unpickle import loads

    held = loads((folder / ".metadata").read_bytes(), "x").field("state_dict_metadata")
    return {
        name: None if entry.field("size") is None else (tuple(entry.field("size")), entry.field("properties").state[0])
        for name, entry in held.items()
    }


def test_extra_states_are_empty_lists(tmp_path: Path) -> None:
    """As Megatron stores objects: a list of one; Transformer Engine takes None for "nothing to set"."""
    model = Model(tmp_path / "hf", "llama")
    root = model.to_megatron(tmp_path / "m", Options(dialect="lm"))
    import torch.distributed.checkpoint as dcp

    folder = locate(root).path
    metadata = dcp.FileSystemReader(str(folder)).read_metadata()
    place = next(v for k, v in metadata.storage_data.items() if k.fqn.endswith("linear_qkv._extra_state/shard_1_3"))
    assert archive.load(folder / place.relative_path, place.offset, place.length) == [None]


def test_arguments_for_readers_that_compare_them(tmp_path: Path) -> None:
    model = Model(tmp_path / "hf", "qwen3_vl_moe")
    root = model.to_megatron(tmp_path / "m", Options(dialect="pai", ranks=Ranks(tp=2, pp=3, ep=2), iteration=None))
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "release"
    held = torch.load(root / "release" / "common.pt", weights_only=False)
    args = held["args"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.num_experts) == (2, 3, 8)
    assert (args.num_layers, args.hidden_size, args.num_attention_heads, args.num_query_groups) == (3, 64, 4, 2)
    assert held["content_metadata"] == {"non_homogeneous_layers": True}
    names = dcp_tensors(root / "release")
    assert "language_model.decoder.layers.0.mlp.router.weight" in names
    assert sorted(path.name for path in (root / "release").glob("*.distcp"))[0] == "__0_0.distcp"


def test_a_padded_vocabulary_is_zero_and_cut_again(tmp_path: Path) -> None:
    model = Model(tmp_path / "hf", "llama")
    root = model.to_megatron(tmp_path / "m", Options(dialect="lm", vocab_divisor=100, ranks=Ranks(tp=2)))
    held = dcp_tensors(locate(root).path)
    assert held["output_layer.weight"].shape[0] == 600 and not held["output_layer.weight"][512:].any()
    assert locate(root).args.padded_vocab_size == 600  # type: ignore[union-attr]
    model.same_weights(model.to_hf(root, tmp_path / "back"))


def test_spare_heads_go_if_they_are_empty(tmp_path: Path) -> None:
    """Two heads that count and six that do not: files of two ranks have two. What has values is not dropped."""
    model = Model(tmp_path / "hf", "NVLM_D")
    stem = "model.vision_tower.encoder.layer.0.attention."
    assert model.ours[f"{stem}q_proj.weight"].shape == (8 * 16, 32)
    root = model.to_megatron(tmp_path / "m", Options(dialect="lm", format=LEGACY, ranks=Ranks(tp=2)))
    theirs = "vision_model.decoder.layers.0.self_attention.linear_qkv.weight"
    assert rank_tensors(root, 0)[theirs].shape == (48, 32)
    model.same_weights(model.to_hf(root, tmp_path / "back"))
    file = model.path / "model.safetensors"
    held = load_file(file)
    name = next(key for key in held if key.endswith("layers.0.attn.q_norm.weight"))
    held[name][-1] = 1
    save_file(held, file, metadata={"format": "pt"})
    model.reload()
    with pytest.raises(UserError, match=r"q_layernorm.weight: has values in heads that must be empty, beyond the 32"):
        model.to_megatron(tmp_path / "full", Options(dialect="lm", format=LEGACY, ranks=Ranks(tp=2)))
