"""The variants that other writers leave: spellings, prefixes, single experts, halves, virtual stages; and bad input."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.config.errors import UserError
from tessera.config.sources import is_mcore
from tessera.contract.model import Family
from tessera.weights.megatron import convert
from tessera.weights.megatron.checkpoint import LEGACY, locate, open_as_ours
from tessera.weights.megatron.options import Options
from tessera.weights.megatron.ranks import Ranks
from tests.megatron import Model, dcp_tensors, rank_tensors


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("sparse") / "hf", "qwen3_moe", mlp_only_layers=[])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("dense") / "hf", "qwen3")


def tensors_of(model: Model, folder: Path) -> dict[str, Tensor]:
    """All canonical tensors, layer by layer."""
    root = model.to_megatron(folder, Options(dialect="lm", stacked=False))
    return dcp_tensors(locate(root).path)


def dcp_save(root: Path, tensors: dict[str, Any]) -> Path:
    """A ``torch_dist`` checkpoint that PyTorch's own code wrote."""
    import torch.distributed.checkpoint as dcp

    folder = root / "iter_0000002"
    folder.mkdir(parents=True)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (root / "latest_checkpointed_iteration.txt").write_text("2\n")
    return root


def read_back(model: Model, root: Path, out: Path) -> None:
    out.mkdir()
    found = locate(root).assembled(model.family, model.config)
    convert.to_hf(convert.from_megatron(found), model.family, model.config, out, layout=model.path)
    model.same_weights(out)


def singletons(name: str, value: Tensor) -> dict[str, Tensor]:
    """One tensor per expert, and gate and up apart."""
    if ".experts.experts." in name:
        stem, leaf = name.split(".experts.experts.")
        held = {f"{stem}.experts.experts.{e}.{leaf}": part for e, part in enumerate(value)}
    else:
        held = {name: value}
    halves = {}
    for key, part in held.items():
        if key.endswith("linear_fc1.weight"):
            halves |= {f"{key}_{half}": piece for half, piece in zip("wv", part.chunk(2), strict=True)}
        else:
            halves[key] = part
    return halves


VARIANTS: dict[str, Callable[[str, Tensor], dict[str, Tensor]]] = {
    "plain": lambda name, value: {name: value},
    "module.": lambda name, value: {f"module.{name}": value},
    "model.": lambda name, value: {f"model.{name}": value},
    "model0.": lambda name, value: {f"model0.{name}": value},
    "own norms": lambda name, value: {name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm."): value},
    "fused sparse norm": lambda name, value: {
        name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"): value
    },
    "singletons": singletons,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_names(sparse: Model, tmp_path: Path, variant: str) -> None:
    """With other states beside the weights, and without a single extra state."""
    held: dict[str, Any] = {}
    for name, value in tensors_of(sparse, tmp_path / "m").items():
        held |= VARIANTS[variant](name, value)
    held |= {
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(3),
        "rng_state/shard_0.0_1.1": [1, 2],
        "rerun_state_machine_state/shard_0.0_1.1": {"mode": "x"},
    }
    root = dcp_save(
        tmp_path / "theirs", {key: v.contiguous() if isinstance(v, Tensor) else v for key, v in held.items()}
    )
    read_back(sparse, root, tmp_path / "back")


def test_metadata_that_names_classes_of_megatron(dense: Model, tmp_path: Path) -> None:
    """Written by versions whose plans are classes of their own, which are not installed here."""
    root = dense.to_megatron(tmp_path / "m", Options(dialect="lm"))
    file = locate(root).path / ".metadata"
    data = pickle.loads(file.read_bytes())
    data.planner_data = Foreign()
    here, there = type(Foreign()).__module__.encode(), b"megatron.core.dist_checkpointing.strategies.torch"
    blob = pickle.dumps(data, 0)
    assert here in blob
    file.write_bytes(blob.replace(here, there))
    read_back(dense, root, tmp_path / "back")


class Foreign:
    """Stands for a class that is not there."""

    def __init__(self) -> None:
        self.plans = [1, 2]


def legacy_save(root: Path, files: dict[str, dict[str, Any]], **common: Any) -> Path:
    """A rank by rank checkpoint that torch.save wrote."""
    for folder, held in files.items():
        (root / "iter_0000002" / folder).mkdir(parents=True)
        models = held if any(key.startswith("model") for key in held) else {"model": held}
        torch.save({**common, **models, "iteration": 2}, root / "iter_0000002" / folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("2")
    return root


def by_layer(name: str) -> int | None:
    return int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else None


def test_virtual_stages_go_round_the_ranks(dense: Model, tmp_path: Path) -> None:
    """Rank 0 has layers 0 and 2, rank 1 layer 1 and the end: model0 and model1 of each."""
    held = tensors_of(dense, tmp_path / "m")
    places = {0: ("mp_rank_00_000", "model0"), 1: ("mp_rank_00_001", "model0"), 2: ("mp_rank_00_000", "model1")}
    files: dict[str, dict[str, Any]] = {"mp_rank_00_000": {"model0": {}, "model1": {}}}
    files["mp_rank_00_001"] = {"model0": {}, "model1": {}}
    for name, value in held.items():
        layer = by_layer(name)
        if layer is None:
            folder, part = ("mp_rank_00_000", "model0") if "embedding" in name else ("mp_rank_00_001", "model1")
        else:
            folder, part = places[layer]
        files[folder][part][name if layer is None else name.replace(f".layers.{layer}.", ".layers.0.")] = value
    root = legacy_save(tmp_path / "theirs", files, args=argparse.Namespace(pipeline_model_parallel_size=2))
    read_back(dense, root, tmp_path / "back")


@pytest.mark.parametrize("told", [True, False])
def test_experts_in_one_tensor(sparse: Model, tmp_path: Path, told: bool) -> None:
    """GroupedMLP's weight1 and weight2: experts side by side in memory, each transposed; one suffix is the expert's."""
    held = tensors_of(sparse, tmp_path / "m")
    files: dict[str, dict[str, Any]] = {}
    for ep in range(2):
        model = files[f"mp_rank_00_{ep:03d}"] = {}
        for name, value in held.items():
            if ".experts.experts." not in name:
                model[name] = value
                continue
            mine = value[4 * ep : 4 * ep + 4].transpose(1, 2).contiguous()
            first = "linear_fc1" in name
            stem = name.split(".experts.experts.")[0]
            shape = (mine.shape[1], -1) if first else (-1, mine.shape[2])
            model[f"{stem}.experts.weight{1 if first else 2}"] = mine.view(*shape)
    args = argparse.Namespace(pipeline_model_parallel_size=1, expert_model_parallel_size=2)
    root = legacy_save(tmp_path / "theirs", files, **({"args": args} if told else {}))
    read_back(sparse, root, tmp_path / "back")


def test_ranks_of_a_job_whose_experts_are_whole(sparse: Model, tmp_path: Path) -> None:
    """Expert tensor size 1 under tensor size 2: the files of a real job are the diagonal of (tensor, expert)."""
    options = Options(dialect="lm", format=LEGACY, ranks=Ranks(tp=2, ep=2, etp=1))
    root = sparse.to_megatron(tmp_path / "m", options)
    for folder in ("mp_rank_00_001", "mp_rank_01_000"):
        shutil.rmtree(locate(root).path / folder)
    sparse.same_weights(sparse.to_hf(root, tmp_path / "back"))


def test_what_is_a_checkpoint(dense: Model, tmp_path: Path) -> None:
    root = dense.to_megatron(tmp_path / "m", Options(dialect="lm", iteration=12))
    assert is_mcore(root) and is_mcore(root / "iter_0000012") and not is_mcore(dense.path)
    assert locate(root / "iter_0000012").root == root
    (root / "latest_checkpointed_iteration.txt").unlink()
    assert locate(root).iteration == 12


def damaged(model: Model, root: Path, damage: str) -> dict[str, Any]:
    """Spoil a checkpoint; the config to read it with, if another."""
    folder = locate(root).path
    largest = max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size, default=None)
    match damage:
        case "cut short":
            assert largest is not None
            os.truncate(largest, largest.stat().st_size // 2)
        case "missing":
            assert largest is not None
            largest.unlink()
        case "no metadata":
            (folder / ".metadata").unlink()
        case "bad metadata":
            (folder / ".metadata").write_bytes(b"junk")
        case "code":
            (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        case "another format":
            (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
        case "bad tracker":
            (root / "latest_checkpointed_iteration.txt").write_text("newest")
        case "tracker names nothing":
            (root / "latest_checkpointed_iteration.txt").write_text("77")
        case "overwritten":
            assert largest is not None
            size = largest.stat().st_size
            largest.write_bytes(b"\0" * size)
        case "more layers":
            return {**model.config, "num_hidden_layers": 4}
        case "fewer layers":
            return {**model.config, "num_hidden_layers": 2}
        case "wider":
            return {**model.config, "intermediate_size": 160}
        case "more tokens":
            return {**model.config, "vocab_size": 600}
    return model.config


LINES = {
    "cut short": r"distcp: is cut short \(\d+ bytes of \d+\); copy the checkpoint again",
    "missing": r"distcp: is missing; copy the checkpoint again",
    "no metadata": r"has no .metadata: the checkpoint was not finished",
    "bad metadata": r".metadata: not a readable pickle",
    "code": r".metadata: asks for os.system, which is neither a tensor nor a plain container",
    "another format": r"metadata.json: format zarr is not supported; save it with --ckpt-format torch_dist or torch",
    "bad tracker": r'latest_checkpointed_iteration.txt: expected an iteration or "release", found \'newest\'',
    "tracker names nothing": r"iter_0000077: is missing, although .* names it",
    "overwritten": r"distcp: not a file that torch.save writes",
    "more layers": r"do not fit config.json; 8 missing: decoder.layers.3.mlp.linear_fc1.layer_norm_weight",
    "fewer layers": r"do not fit config.json; 8 unexpected: decoder.layers.2.mlp",
    "wider": r"6 of another shape: .*linear_fc1.weight \(model \[320, 64\], file \[256, 64\]\)",
    "more tokens": r"2 of another shape: embedding.word_embeddings.weight \(model \[600, 64\], file \[512, 64\]\)",
}


@pytest.mark.parametrize("damage", LINES)
def test_bad_input_is_one_line(dense: Model, tmp_path: Path, damage: str) -> None:
    root = dense.to_megatron(tmp_path / "m", Options(dialect="lm"))
    config = damaged(dense, root, damage)
    with pytest.raises(UserError, match=LINES[damage]) as caught:
        read_all(root, dense.family, config)
    assert "\n" not in str(caught.value)


def read_all(root: Path, family: Family, config: dict[str, Any]) -> None:
    """Read every tensor."""
    checkpoint = open_as_ours(root, family, config)
    for name in checkpoint.names:
        checkpoint.read(name)


@pytest.mark.parametrize(
    ("gone", "line"),
    [
        ("mp_rank_01_000", r"tensor rank 1 of pipeline stage 0 is missing"),
        ("mp_rank_01_*", r"tensor_model_parallel_size is 2, but rank 1 is missing"),
        ("mp_rank_*_002", r"pipeline_model_parallel_size is 3, but rank 2 is missing"),
        ("mp_rank_00_001/*", r"mp_rank_00_001: has no model_optim_rng.pt"),
    ],
)
def test_ranks_that_are_missing(dense: Model, tmp_path: Path, gone: str, line: str) -> None:
    options = Options(dialect="lm", format=LEGACY, ranks=Ranks(tp=2, pp=3))
    root = dense.to_megatron(tmp_path / "m", options)
    for path in locate(root).path.glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=line):
        locate(root).assembled(dense.family, dense.config)


def test_a_wrong_number_of_tensor_ranks(dense: Model, tmp_path: Path) -> None:
    """Shards of two ranks presented as the only one: their shapes give them away."""
    root = dense.to_megatron(tmp_path / "m", Options(dialect="lm", format=LEGACY, ranks=Ranks(tp=2)))
    held = rank_tensors(root, 0)
    alone = legacy_save(tmp_path / "one", {"mp_rank_00": dict(held)})
    with pytest.raises(UserError, match=r"has shape .* of 1 tensor ranks; config.json does not fit these weights"):
        locate(alone).assembled(dense.family, dense.config)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (Options(dialect="lm", ranks=Ranks(tp=4)), r"size 4: does not divide .*linear_qkv.weight \(2 rows or heads\)"),
        (Options(dialect="lm", ranks=Ranks(pp=2)), r"--target_pipeline_parallel_size 2: does not divide the 3 layers"),
        (Options(dialect="lm", ranks=Ranks(ep=2)), r"--target_expert_parallel_size 2: the model has no experts"),
        (Options(dialect="lm", padded_vocab_size=500), r"--padded_vocab_size 500: the model has 512 tokens"),
        (Options(dialect="lm", ranks=Ranks(tp=0)), r"must be at least 1"),
    ],
)
def test_layouts_that_cannot_be(dense: Model, tmp_path: Path, options: Options, line: str) -> None:
    root = tmp_path / "m"
    root.mkdir()
    with pytest.raises(UserError, match=line):
        convert.to_megatron(dense.source, dense.family, dense.config, root, options)
    assert not list(root.iterdir())


def test_a_family_that_a_dialect_lacks(tmp_path: Path) -> None:
    model = Model(tmp_path / "hf", "glm4v_moe")
    with pytest.raises(
        UserError, match=r"--mcore_dialect pai: has no layout for model_type 'glm4v_moe'; choose one of b"
    ):
        convert.to_megatron(model.source, model.family, model.config, tmp_path, Options(dialect="pai"))


def test_an_iteration_that_exists_is_kept(dense: Model, tmp_path: Path) -> None:
    root = dense.to_megatron(tmp_path / "m", Options(dialect="lm"))
    with pytest.raises(UserError, match=r"iter_0000001: exists already"):
        convert.to_megatron(dense.source, dense.family, dense.config, root, Options(dialect="lm"))
    dense.same_weights(dense.to_hf(root, tmp_path / "back"))


@pytest.mark.parametrize("kind", ["torch_dist", "torch"])
def test_a_full_disk_leaves_nothing(dense: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    root, pwrite, copy = tmp_path / "m", os.pwrite, os.copy_file_range
    root.mkdir()
    left = [200_000]

    def take(count: int) -> None:
        left[0] -= count
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", lambda to, data, at: (take(len(data)), pwrite(to, data, at))[1])
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, count, *at: (take(count), copy(a, b, count, *at))[1])
    with pytest.raises(OSError, match="No space left"):
        convert.to_megatron(dense.source, dense.family, dense.config, root, Options(dialect="lm", format=kind))
    assert not list(root.iterdir())


def test_tensors_that_hf_lacks_are_named(dense: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"do not fit config.json; .* missing: model.layers.3"):
        convert.from_hf(dense.checkpoint, dense.family, {**dense.config, "num_hidden_layers": 4})


def test_json_beside_the_weights_survives(dense: Model, tmp_path: Path) -> None:
    root = dense.to_megatron(tmp_path / "m", Options(dialect="lm"))
    assert json.loads((root / "config.json").read_text()) == dense.config
