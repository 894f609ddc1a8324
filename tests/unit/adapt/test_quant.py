"""QLoRA on this machine: the packed base trains through, saves, and refuses what would lose information."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

import tessera.adapt as adapt
from tessera.adapt import quant
from tessera.config.errors import UserError
from tests.merging import merged

bnb = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def model_args(method: str | None = "bnb", bits: int | None = 4) -> SimpleNamespace:
    return SimpleNamespace(quant_method=method, quant_bits=bits)


def _steps(model: torch.nn.Module, inputs: dict, count: int, lr: float = 0.01) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    losses = []
    for _ in range(count):
        # One context per forward: autocast keeps its casts of the weights until it is left.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@bnb
@pytest.mark.parametrize(("bits", "dora"), [(4, False), (4, True), (8, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_lowers_the_loss(vl, adapt_args, bits, dora, dtype) -> None:
    model = vl.make().to(dtype).train()
    made = adapt.apply(model, adapt_args(use_dora=dora), vl.plan, seed=1, quantisation=adapt.Quantisation(bits))
    assert len(made.quantised) == 14 and all(name.startswith("model.language_model.") for name in made.quantised)
    packed = adapt.quantised_parameters(model)
    assert {p.dtype for p in packed} == {torch.uint8 if bits == 4 else torch.int8} and len(packed) == 14
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in vl.inputs.items()}
    before = {id(p): p.detach().clone() for p in packed}
    losses = _steps(model, inputs, 4)
    assert losses[-1] < losses[0] - 1e-2, losses
    assert all(torch.equal(before[id(p)], p) for p in packed)


@bnb
def test_training_goes_on_after_an_evaluation(vl, adapt_args) -> None:
    model = vl.make()
    adapt.apply(model, adapt_args(), vl.plan, seed=1, quantisation=adapt.Quantisation(4))
    before = vl.logits(model)
    torch.testing.assert_close(vl.logits(model.train()), before, atol=0, rtol=0)
    model.train()
    losses = _steps(model, vl.inputs, 3)
    assert losses[-1] < losses[0]
    assert torch.isfinite(vl.logits(model)).all()


@bnb
def test_four_bits_are_close_and_the_head_is_exact(vl, adapt_args) -> None:
    model = vl.make()
    head = model.lm_head.weight.detach().clone()
    adapt.apply(model, adapt_args(), vl.plan, seed=1, quantisation=adapt.Quantisation(4))
    assert torch.equal(model.lm_head.weight, head)
    exact, coarse = vl.logits(vl.make()), vl.logits(model)
    assert 0 < (exact - coarse).norm() / exact.norm() < 0.3


@bnb
def test_its_adapter_is_an_ordinary_one(vl, adapt_args, shake, tmp_path) -> None:
    """Saved beside a quantised base, loaded beside a plain one (how it is merged) and beside a quantised one again."""
    model = vl.make()
    four = adapt.Quantisation(4)
    made = adapt.apply(model, adapt_args(modules_to_save=("lm_head",)), vl.plan, seed=1, quantisation=four)
    shake(model)
    adapt.save_adapter(adapt.adapter_tensors(model, made), made, tmp_path, base_model=None)
    plain = vl.make()
    adapt.load_adapter(plain, tmp_path, vl.plan.groups, trainable=False)
    together, _ = merged(vl.make, tmp_path, vl.plan.groups)
    torch.testing.assert_close(vl.logits(together), vl.logits(plain), atol=2e-5, rtol=2e-5)
    again = vl.make()
    names = quant.quantise(again, vl.plan.groups, adapt.Quantisation(4), keep=made.saved)
    adapt.load_adapter(again, tmp_path, vl.plan.groups, trainable=True, quantised=names)
    torch.testing.assert_close(vl.logits(again), vl.logits(model), atol=1e-6, rtol=1e-6)


@bnb
def test_a_machine_that_cannot_says_why(vl, adapt_args, monkeypatch) -> None:
    def broken(old: object, how: object) -> object:
        raise RuntimeError("no kernel for this device\nlong trace")

    monkeypatch.setattr(quant, "_quantised", broken)
    with pytest.raises(UserError, match=r"cannot train on cpu \(no kernel for this device\)"):
        adapt.apply(vl.make(), adapt_args(), vl.plan, seed=1, quantisation=adapt.Quantisation(4))


def test_flags_are_checked_before_weights_load(adapt_args, monkeypatch) -> None:
    assert quant.requested(model_args(None, None), adapt_args()) is None
    for method, bits, args, match in (
        (None, 4, {}, "--quant_bits 4 needs --quant_method bnb"),
        ("awq", 4, {}, "--quant_method awq: only bnb"),
        ("bnb", 3, {}, "--quant_bits 3"),
        ("bnb", 4, {"train_type": "full"}, "use --train_type lora"),
        ("bnb", 8, {"use_dora": True}, "use --quant_bits 4"),
    ):
        with pytest.raises(UserError, match=match):
            quant.requested(model_args(method, bits), adapt_args(**args))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'tessera\[qlora\]'"):
        quant.requested(model_args(), adapt_args())
