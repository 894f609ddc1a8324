"""The name table reads the same in both directions."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tessera.contract.weightmap import Fuse, Rename, Stack, Tie, Turn, WeightMap
from tessera.models.families import FAMILIES, family_of
from tests.parity import reference as ref

OLD = WeightMap(
    renames=(Rename("model.visual.**", "visual.**"), Rename("model.language_model.**", "model.**")),
    ties=(Tie("model.language_model.embed_tokens.weight", "lm_head.weight"),),
    ignored=("model.layers.*.rotary_emb.inv_freq",),
)


def random_names(generator: random.Random) -> dict[str, int]:
    parts = ["model", "visual", "language_model", "layers", "0", "weight", "blocks", "norm"]
    prefixes = ["model.visual", "model.language_model"]
    names = {
        ".".join([generator.choice(prefixes), *generator.choices(parts, k=generator.randint(1, 4))]) for _ in range(50)
    }
    return {name: index for index, name in enumerate(sorted(names | {"model.language_model.embed_tokens.weight"}))}


@pytest.mark.parametrize("seed", range(20))
def test_inverse_undoes_forward(seed: int) -> None:
    ours = random_names(random.Random(seed))
    disk = OLD.forward(ours)
    assert OLD.inverse(disk) == ours
    assert disk["lm_head.weight"] == ours["model.language_model.embed_tokens.weight"]


def test_names_of_old_checkpoints() -> None:
    assert OLD.to_disk("model.visual.blocks.0.norm1.weight") == "visual.blocks.0.norm1.weight"
    assert OLD.to_disk("model.language_model.layers.7.mlp.up_proj.weight") == "model.layers.7.mlp.up_proj.weight"
    assert OLD.to_ours("model.layers.7.mlp.up_proj.weight") == "model.language_model.layers.7.mlp.up_proj.weight"
    assert OLD.to_disk("lm_head.weight") == "lm_head.weight"


def test_exact_rename_and_ignored() -> None:
    table = WeightMap((Rename("a.weight", "b.weight"),), ignored=("x.*.y",))
    assert table.forward({"a.weight": 1, "a.weights": 2}) == {"b.weight": 1, "a.weights": 2}
    assert table.inverse({"b.weight": 1, "x.3.y": 9, "x.3.z.y": 8}) == {"a.weight": 1, "x.3.z.y": 8}


def test_a_clash_of_names_is_a_defect() -> None:
    table = WeightMap((Rename("a.**", "c.**"), Rename("b.**", "c.**")))
    with pytest.raises(AssertionError, match="one disk name"):
        table.forward({"a.x": 1, "b.x": 2})
    with pytest.raises(AssertionError, match="one side"):
        Rename("a.**", "b")
    with pytest.raises(AssertionError, match="one side"):
        Rename("a.*.x.**", "b.x.**")


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("listed", [[], ["model.language_model.norm.weight"], ["lm_head.weight"], "ours"])
def test_every_family_round_trips_its_own_tensors(name: str, listed: list[str] | str) -> None:
    config = family_of({"model_type": name}).tiny()
    ours = dict(ref.ours(config).state_dict())
    table = family_of(config).weightmap(config, list(ours) if listed == "ours" else listed)
    disk = table.forward(ours)
    assert same(table.inverse(disk), ours)
    for key, value in ours.items():
        pieces = table.pieces(key, tuple(value.shape))
        assert pieces[0].disk == table.to_disk(key)
        for piece in pieces:
            held = disk[piece.disk]
            if piece.total:
                assert piece.total == len(held)
                held = held[piece.before : piece.before + len(value)]
                assert table.to_ours(piece.disk).rpartition(".")[2] == key.rpartition(".")[2]
            else:
                assert table.to_ours(piece.disk) == key
            assert torch.equal(piece.of(value), held)
            assert piece.shape(tuple(value.shape)) == tuple(disk[piece.disk].shape)


EXPERTS = WeightMap(
    renames=(
        Rename("model.language_model.**", "language_model.model.**"),
        Rename("tower.*.qkv.**", "vision.layers.*.attn.qkv.**"),
        Rename("tower.*.norm", "vision.layers.*.ls1"),
    ),
    stacks=(
        Stack("model.language_model.layers.*.gate_up", ("model.language_model.layers.*.#.gate", "x.*.#.up")),
        Stack("model.language_model.layers.*.down", ("model.language_model.layers.*.#.down.weight",)),
    ),
    turns=(Turn(("turned.*", "other")),),
    fuses=(
        Fuse(("tower.*.q.weight", "tower.*.k.weight", "tower.*.v.weight"), "tower.*.qkv.weight"),
        Fuse(("tower.*.q.bias", "tower.*.k.bias", "tower.*.v.bias"), "tower.*.qkv.bias"),
    ),
)


def random_tensors(seed: int) -> dict[str, Tensor]:
    random.seed(seed)
    torch.manual_seed(seed)
    experts, inner, hidden = (random.randint(1, 12), random.randint(1, 5), random.randint(1, 5))
    ours = {"turned.3": torch.randn(2, inner, hidden), "other": torch.randn(hidden, inner), "plain": torch.randn(3)}
    for layer in range(random.randint(1, 12)):
        ours[f"model.language_model.layers.{layer}.gate_up"] = torch.randn(experts, 2 * inner, hidden)
        ours[f"model.language_model.layers.{layer}.down"] = torch.randn(experts, hidden, inner)
        ours |= {f"tower.{layer}.{part}.weight": torch.randn(inner, hidden) for part in "qkv"}
        ours |= {f"tower.{layer}.{part}.bias": torch.randn(inner) for part in "kvq"}
        ours[f"tower.{layer}.norm"] = torch.randn(hidden)
    return ours


@pytest.mark.parametrize("seed", range(20))
def test_inverse_undoes_forward_for_parts_and_turns(seed: int) -> None:
    ours = random_tensors(seed)
    disk = EXPERTS.forward(ours)
    assert same(EXPERTS.inverse(disk), ours)
    shuffled = list(disk)
    random.shuffle(shuffled)
    assert same(EXPERTS.inverse({name: disk[name] for name in shuffled}), ours)
    assert disk["other"].shape == ours["other"].t().shape
    whole = ours["model.language_model.layers.0.gate_up"]
    half = whole.shape[1] // 2
    assert torch.equal(disk["language_model.model.layers.0.0.gate"], whole[0, :half])
    assert torch.equal(disk["x.0.0.up"], whole[0, half:])
    for kind in ("weight", "bias"):
        assert torch.equal(
            disk[f"vision.layers.0.attn.qkv.{kind}"], torch.cat([ours[f"tower.0.{part}.{kind}"] for part in "qkv"])
        )
    assert disk["vision.layers.0.ls1"] is ours["tower.0.norm"]


@pytest.mark.parametrize("seed", range(20))
def test_any_slice_is_found_in_the_pieces(seed: int) -> None:
    """Reading only what overlaps gives exactly the slice, every element once."""
    generator = random.Random(seed)
    ours = random_tensors(seed)
    disk = EXPERTS.forward(ours)
    for name, value in ours.items():
        cuts = [sorted(generator.sample(range(size + 1), 2)) for size in value.shape]
        part = tuple(slice(low, high) for low, high in cuts)
        out, seen = torch.full_like(value[part], float("nan")), torch.zeros_like(value[part])
        for piece in EXPERTS.pieces(name, tuple(value.shape)):
            found = piece.overlap(part)
            if found is not None:
                held = disk[piece.disk][found[0]]
                out[found[1]] = held.transpose(-1, -2) if piece.turned else held
                seen[found[1]] += 1
        assert torch.equal(out, value[part]) and bool((seen == 1).all())


def test_shapes_settle_how_experts_lie() -> None:
    """One tensor that is not square decides for all of its rule; a square one alone leaves the rule standing."""
    table = WeightMap(turns=(Turn(("a", "b")),))
    square, wide = (3, 4, 4), (3, 4, 2)
    assert not table.settled({"a": square, "b": wide}, {"a": square, "b": wide}).turns
    assert table.settled({"a": square, "b": wide}, {"a": square, "b": (3, 2, 4)}).turns
    assert table.settled({"a": square}, {"a": square}).turns


def test_missing_parts_are_a_defect() -> None:
    disk = EXPERTS.forward(random_tensors(0))
    del disk["x.0.0.up"]
    with pytest.raises(AssertionError, match="parts are missing"):
        EXPERTS.inverse(disk)
