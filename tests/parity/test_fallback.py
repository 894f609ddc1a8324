"""A transformers model run whole, on padded rows, against itself run segment by segment."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessera.config.errors import UserError
from tessera.contract.batch import Batch
from tessera.contract.memory import Recompute
from tessera.contract.model import Head
from tessera.models.families import family_of
from tessera.models.families.fallback import FAMILY
from tessera.models.tower import channel_major, normalise
from tessera.weights.hf import Checkpoint, load, save
from tests.parity import reference as ref

IMAGE = (1, 1, 1)
SAMPLES: list[ref.Sample] = [[5, IMAGE, 7], [9], [3, IMAGE, 4, IMAGE, 6], [2]]


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, Any], nn.Module]:
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    reference = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**FAMILY.tiny()))
    reference.save_pretrained(tmp_path / "in")
    return tmp_path / "in", json.loads((tmp_path / "in/config.json").read_text()), reference


def loaded(path: Path, config: dict[str, Any]) -> nn.Module:
    family = family_of(config)
    assert family is FAMILY
    with torch.device("meta"):
        model = family.build(config)
    assert all(p.is_meta for p in model.parameters())
    source = Checkpoint(path)
    load(model, source, family.weightmap(config, source.names), dtype=torch.float32)
    return model


def one_by_one(reference: nn.Module, batch: Batch) -> Tensor:
    assert batch.media is not None
    outs, image = [], 0
    for index, ids in enumerate(batch.tokens.split(list(batch.segments.lengths))):
        count = batch.media.owners.count(index)
        patches = batch.media.patches[image : image + count]
        image += count
        pixels = channel_major(normalise(patches, batch.media.normalisation), 3).view(-1, 3, 28, 28)
        extra = {"pixel_values": pixels} if count else {}
        outs.append(reference(input_ids=ids[None], use_cache=False, **extra).logits[0])
    return torch.cat(outs)


def test_forward_and_backward(checkpoint: tuple[Path, dict[str, Any], nn.Module]) -> None:
    path, config, reference = checkpoint
    model = loaded(path, config)
    batch = ref.batch_of(config, SAMPLES)
    expected = one_by_one(reference, batch)
    logits = model.get_submodule("lm_head")(model(batch))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-6)
    model(batch, ref.loss).total.backward()
    ref.loss(expected, Head(torch.eye(expected.shape[-1])), batch).total.backward()
    worst, where = ref.worst_gradient(ref.gradients(model), ref.gradients(reference))
    assert worst < 1e-5, where

    gradients = {name: grad.clone() for name, grad in ref.gradients(model).items()}
    model.zero_grad()
    model.train()
    model.set_recompute(FAMILY.plan(config), decoder=True, tower=True)  # type: ignore[operator]
    model(batch, ref.loss).total.backward()
    assert all(torch.equal(grad, gradients[name]) for name, grad in ref.gradients(model).items())
    plan, switch = FAMILY.plan(config), model.set_recompute
    switch(plan, decoder=Recompute("full", "block", 1), tower=False)  # type: ignore[operator]
    on = [name for name, module in model.named_modules() if vars(module).get("gradient_checkpointing")]
    assert on == ["model.language_model.layers.0"]
    for how, words in (
        (Recompute("selective", modules=("mlp",)), "--recompute_modules mlp: this model has no such part"),
        (Recompute("full", "uniform", 2), "--recompute_num_layers 2: this model's layers run in transformers' own"),
    ):
        with pytest.raises(UserError, match=words):
            switch(plan, decoder=how, tower=False)  # type: ignore[operator]


def test_rows_are_isolated(checkpoint: tuple[Path, dict[str, Any], nn.Module]) -> None:
    path, config, _ = checkpoint
    model = loaded(path, config)
    batch = ref.batch_of(config, SAMPLES)
    tokens = batch.tokens.clone()
    start, end = batch.segments.cu_seqlens[1:3].tolist()
    tokens[start:end] = tokens[start:end] % 100 + 100
    before, after = model(batch), model(replace(batch, tokens=tokens))
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])


def test_minimal_frame_reaches_the_tower_with_zeros(checkpoint: tuple[Path, dict[str, Any], nn.Module]) -> None:
    path, config, _ = checkpoint
    model = loaded(path, config)
    plain = model(ref.batch_of(config, [[9], [2]]))
    framed = ref.batch_of(config, [[9], [2]], minimal=True)
    torch.testing.assert_close(model(framed), plain, rtol=1e-5, atol=1e-6)
    model(framed, ref.loss).total.backward()
    grads = ref.gradients(model)
    assert float(grads["model.multi_modal_projector.linear_1.weight"].abs().max()) == 0


def test_round_trip_keeps_the_names_on_disk(tmp_path: Path, checkpoint: tuple[Path, dict[str, Any], nn.Module]) -> None:
    path, config, _ = checkpoint
    model = loaded(path, config)
    (tmp_path / "out").mkdir()
    table = FAMILY.weightmap(config, Checkpoint(path).names)
    save(model.named_parameters(), tmp_path / "out", table, source=path)
    for file in path.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_plan_groups_every_parameter(checkpoint: tuple[Path, dict[str, Any], nn.Module]) -> None:
    path, config, _ = checkpoint
    groups = FAMILY.plan(config).groups
    found = {groups.of(name) for name, _ in loaded(path, config).named_parameters()}
    assert found == {"llm", "aligner", "vit"}
    assert FAMILY.plan(config).recompute_decoder == ("model.language_model.layers.*",)


def test_what_would_train_wrong_is_refused() -> None:
    config = FAMILY.tiny()
    with pytest.raises(UserError, match="do_center_crop"):
        FAMILY.geometry(config, {"size": {"shortest_edge": 28}, "do_center_crop": True})
    with pytest.raises(UserError, match="tie_word_embeddings"):
        FAMILY.build(config | {"tie_word_embeddings": True})
    with pytest.raises(UserError, match="changes the logits"):
        FAMILY.build(config | {"text_config": config["text_config"] | {"final_logit_softcapping": 30.0}})
