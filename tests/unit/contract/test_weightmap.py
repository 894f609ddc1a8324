"""The name table reads the same in both directions."""

from __future__ import annotations

import random

import pytest

from tessera.contract.weightmap import Rename, Tie, WeightMap
from tessera.models.families import FAMILIES, family_of

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


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_round_trips_its_own_names(name: str) -> None:
    import torch

    family = family_of({"model_type": name})
    config = family.tiny()
    with torch.device("meta"):
        names = {key: key for key, _ in family.build(config).named_parameters()}
    for disk_names in ([], ["model.language_model.norm.weight"], ["lm_head.weight"]):
        table = family.weightmap(config, disk_names)
        assert table.inverse(table.forward(names)) == names
