"""Our own models: an adapter made here runs in peft on the transformers model, and the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tessera.adapt as adapt
from tessera.models.families import family_of
from tests.merging import merged
from tests.parity import reference as ref

SAMPLES: dict[str, list[ref.Sample]] = {
    "qwen2_5_vl": [[5, (1, 4, 6), 7], [3, (1, 8, 8), 4]],
    "qwen3_vl": [[5, (1, 4, 6), 7], [3, (1, 8, 8), 4]],
    "qwen2": [[13], [5]],
    "qwen3": [[13], [5]],
    "llama": [[13], [5]],
    "qwen3_moe": [[13], [5]],
    "qwen3_vl_moe": [[5, (1, 4, 6), 7], [3, (1, 8, 8), 4]],
    "glm4v_moe": [[5, (1, 4, 6), 7], [3, (1, 8, 8), 4]],
    "internvl": [[5, (1, 4, 6), 7], [3, (1, 8, 8), 4]],
}
EVERYWHERE = {"freeze_vit": False, "freeze_aligner": False}


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() < 5e-6 * theirs.abs().max()


ROUTERS = ({"target_modules": ("all-router",)}, {"target_modules": ("all-linear", "all-router")})


@pytest.mark.parametrize(("name", "variant"), [(name, how) for name in SAMPLES if "moe" in name for how in ROUTERS])
def test_routers_there_and_back(name: str, variant: dict, adapt_args, shake, tmp_path: Path) -> None:
    test_there_and_back(name, variant, adapt_args, shake, tmp_path)


@pytest.mark.parametrize("name", list(SAMPLES))
@pytest.mark.parametrize(
    "variant", [{}, {"use_dora": True, **EVERYWHERE}, {"modules_to_save": ("embed_tokens",), "lora_bias": "all"}]
)
def test_there_and_back(name: str, variant: dict, adapt_args, shake, tmp_path: Path) -> None:
    from peft import PeftModel

    config = ref.config_of(name)
    plan, batch = family_of(config).plan(config), ref.batch_of(config, SAMPLES[name])
    model = ref.ours(config).eval()
    if "moe" in name and "use_dora" in variant:
        variant = {"use_rslora": True, **EVERYWHERE}
    base = ref.theirs(config, model).eval()
    before = ref.logits_of(model, batch)
    made = adapt.apply(model, adapt_args(**variant), plan, seed=1)
    shake(model)
    moved = ref.logits_of(model, batch)
    assert (moved - before).abs().max() > 1e-2 * before.abs().max()
    adapt.save_adapter(adapt.adapter_tensors(model, made), made, tmp_path / "ours", base_model="base")
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "ours"))
    _same(moved, ref.reference_logits(theirs.eval(), config, batch))

    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = ref.ours(config).eval()
    adapt.load_adapter(again, tmp_path / "theirs", plan.groups, trainable=False)
    _same(ref.logits_of(again, batch), moved)
    plain, adapted = merged(lambda: ref.ours(config), tmp_path / "theirs", plan.groups)
    _same(ref.logits_of(plain.eval(), batch), moved)
    assert adapted == len(made.targets)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_the_expression_selects_the_same_modules_in_both_trees(name: str, adapt_args) -> None:
    import re

    config = ref.config_of(name)
    plan, model = family_of(config).plan(config), ref.ours(config)
    theirs = ref.theirs(config, model)
    made = adapt.apply(model, adapt_args(**EVERYWHERE), plan, seed=1)
    names = {n for n, _ in theirs.named_modules() if re.fullmatch(made.config.target_modules, n)}
    assert names == set(made.targets)
    linear = {n for n, m in theirs.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    assert names == linear


def test_a_tied_head_can_be_named_though_it_is_no_module(adapt_args) -> None:
    config = ref.config_of("qwen3_vl")
    plan = family_of(config).plan(config)
    for word in ("lm_head", "embed_tokens"):
        made = adapt.apply(ref.ours(config), adapt_args(modules_to_save=(word,)), plan, seed=1)
        assert set(made.saved) == {"lm_head", "model.language_model.embed_tokens"}
        assert "model.language_model.embed_tokens.weight" in made.trainable


@pytest.mark.parametrize("quantised", [False, True])
def test_bf16_training_with_recomputation(quantised: bool, adapt_args) -> None:
    """The real step: bf16 base, float32 adapters, autocast, activation recomputation in decoder and tower."""
    if quantised:
        pytest.importorskip("bitsandbytes")
    config = ref.config_of("qwen3_vl")
    plan, batch = family_of(config).plan(config), ref.batch_of(config, SAMPLES["qwen3_vl"])
    model = ref.ours(config).to(torch.bfloat16).train()
    quantisation = adapt.Quantisation(4) if quantised else None
    made = adapt.apply(model, adapt_args(**EVERYWHERE), plan, seed=1, quantisation=quantisation)
    model.set_recompute(plan, decoder=True, tower=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = model(batch, ref.loss).total / batch.weight
        total.backward()
        assert all(model.get_parameter(name).grad is not None for name in made.trainable)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    assert losses[-1] < losses[0] - 0.05, losses
