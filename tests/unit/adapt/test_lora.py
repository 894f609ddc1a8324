"""Adapters: same numbers in peft and here, in both directions; merged equals unmerged; masters stay float32."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import tessera.adapt as adapt
from tessera.config.errors import UserError
from tests.merging import merged
from tests.ranks import run_ranks

VARIANTS = [
    {},
    {"use_dora": True},
    {"use_rslora": True},
    {"lora_bias": "all"},
    {"modules_to_save": ("lm_head", "norm")},
]
IDS = ["lora", "dora", "rslora", "bias", "saved"]


def _close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_training_starts_at_the_base_model(oracle, adapt_args) -> None:
    before = oracle.logits(oracle.make())
    for variant in ({}, {"use_dora": True}):
        model = oracle.make()
        adapt.apply(model, adapt_args(**variant), oracle.plan, seed=1)
        _close(oracle.logits(model), before)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_peft_reads_our_adapter(oracle, adapt_args, shake, tmp_path, variant) -> None:
    from peft import PeftModel

    model = oracle.make()
    made = adapt.apply(model, adapt_args(**variant), oracle.plan, seed=1)
    shake(model)
    assert not torch.allclose(oracle.logits(model), oracle.logits(oracle.make()), atol=1e-3)
    adapt.save_adapter(adapt.adapter_tensors(model, made), made, tmp_path, base_model="some/base")
    theirs = PeftModel.from_pretrained(oracle.make(), str(tmp_path))
    # DoRA's row norms are added up in another order than peft's.
    close = 1e-6 if variant.get("use_dora") else 0
    torch.testing.assert_close(oracle.logits(theirs), oracle.logits(model), atol=close, rtol=close)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_we_read_pefts_adapter(oracle, shake, tmp_path, variant) -> None:
    from peft import LoraConfig, get_peft_model

    renamed = {"lora_bias": "bias", "modules_to_save": "modules_to_save"}
    fields = {renamed.get(key, key): list(v) if isinstance(v, tuple) else v for key, v in variant.items()}
    names = ["q_proj", "down_proj"]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=names, rank_pattern={"down_proj": 2}, **fields)
    theirs = get_peft_model(oracle.make(), config)
    shake(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = oracle.make()
    found = adapt.load_adapter(ours, tmp_path, oracle.plan.groups, trainable=True)
    torch.testing.assert_close(oracle.logits(ours), oracle.logits(theirs), atol=1e-6, rtol=1e-6)
    assert found.mode == "lora" and all(name.endswith(("q_proj", "down_proj")) for name in found.targets)
    trained = {name for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(found.trainable) == len(trained)
    again = tmp_path / "again"
    adapt.save_adapter(adapt.adapter_tensors(ours, found), found, again, base_model=None)
    first, second = (load_file(str(place / "adapter_model.safetensors")) for place in (tmp_path, again))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_equals_unmerged(oracle, adapt_args, shake, variant, dtype, tmp_path) -> None:
    def base() -> torch.nn.Module:
        return oracle.make().to(dtype)

    model, names = base(), [name for name, _ in base().named_parameters()]
    made = adapt.apply(model, adapt_args(**variant, freeze_vit=False, freeze_aligner=False), oracle.plan, seed=1)
    shake(model)
    adapt.save_adapter(adapt.adapter_tensors(model, made), made, tmp_path, base_model=None)
    plain, adapted = merged(base, tmp_path, oracle.plan.groups)
    assert adapted == len(made.targets)
    assert [name for name, _ in plain.named_parameters()] == names
    assert plain.get_submodule(made.targets[0]).weight.dtype == dtype
    if dtype == torch.float32:
        _close(oracle.logits(plain), oracle.logits(model))


def test_merging_rounds_once(vl, adapt_args, shake, tmp_path) -> None:
    """A bf16 base: the merged weight is the float32 sum, rounded, not a sum of rounded terms."""
    model = vl.make().to(torch.bfloat16)
    made = adapt.apply(model, adapt_args(), vl.plan, seed=1)
    shake(model)
    layer = model.get_submodule(made.targets[0])
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = (layer.base_layer.weight.float() + 2.0 * (b @ a)).to(torch.bfloat16)
    adapt.save_adapter(adapt.adapter_tensors(model, made), made, tmp_path, base_model=None)
    plain, _ = merged(lambda: vl.make().to(torch.bfloat16), tmp_path, vl.plan.groups)
    torch.testing.assert_close(plain.get_submodule(made.targets[0]).weight, expected, atol=0, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_bf16_base_trains_float32_adapters_under_autocast(vl, adapt_args, variant) -> None:
    model = vl.make().to(torch.bfloat16).train()
    made = adapt.apply(model, adapt_args(**variant), vl.plan, seed=1)
    parameters = dict(model.named_parameters())
    for name in made.trainable:
        adapter_or_saved = "lora_" in name or "modules_to_save" in variant
        assert parameters[name].dtype == (torch.float32 if adapter_or_saved else torch.bfloat16)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in vl.inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    assert frozen and all(parameters[name].grad is None for name in frozen)
    touched = [name for name in made.trainable if parameters[name].grad is not None]
    assert any(".lora_B." in name for name in touched)
    assert all(parameters[name].grad.dtype == parameters[name].dtype for name in touched)


def test_an_adapter_that_is_only_used_keeps_the_base_dtype(vl, adapt_args, shake, tmp_path) -> None:
    """bf16 without autocast, as inference runs: modules to save take the model's dtype, adapters stay exact."""
    model = vl.make().to(torch.bfloat16)
    made = adapt.apply(model, adapt_args(modules_to_save=("lm_head", "norm")), vl.plan, seed=1)
    shake(model)
    adapt.save_adapter(adapt.adapter_tensors(model, made), made, tmp_path, base_model=None)
    ours = vl.make().to(torch.bfloat16)
    found = adapt.load_adapter(ours, tmp_path, vl.plan.groups, trainable=False)
    assert found.trainable == () and ours.lm_head.weight.dtype == torch.bfloat16
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in vl.inputs.items()}
    with torch.no_grad():
        unmerged = ours(**inputs).logits.float()
        plain, _ = merged(lambda: vl.make().to(torch.bfloat16), tmp_path, vl.plan.groups)
        together = plain(**inputs).logits.float()
    assert (unmerged - together).norm() < 0.02 * unmerged.norm()


def test_start_is_a_function_of_seed_and_name(vl, adapt_args) -> None:
    def start(seed: int, **changes: object) -> dict[str, torch.Tensor]:
        torch.manual_seed(torch.randint(99, ()).item())
        model = vl.make()
        state = torch.get_rng_state()
        adapt.apply(model, adapt_args(**changes), vl.plan, seed=seed)
        assert torch.equal(state, torch.get_rng_state()), "injection must not disturb the global random state"
        return {name: p.detach() for name, p in model.named_parameters() if ".lora_A." in name}

    first, again, other = start(1), start(1), start(2)
    wider = start(1, freeze_vit=False)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]) and torch.equal(tensor, wider[name])
        assert not torch.equal(tensor, other[name])
        assert tensor.abs().max() <= tensor.shape[1] ** -0.5
    q, k = (first[f"model.language_model.layers.0.self_attn.{x}_proj.lora_A.default.weight"] for x in "qk")
    assert not torch.equal(q, k)


def test_the_file_is_pefts(vl, adapt_args, tmp_path) -> None:
    model = vl.make()
    made = adapt.apply(model, adapt_args(use_dora=True), vl.plan, seed=1)
    adapt.save_adapter(adapt.adapter_tensors(model, made), made, tmp_path, base_model="Qwen/some-model")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM" and config["inference_mode"] is True
    assert config["base_model_name_or_path"] == "Qwen/some-model" and (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["target_modules"].startswith(r"^(model\.language_model(?=\.).*\.(")
    stem = "base_model.model.model.language_model.layers.0.self_attn.q_proj."
    names = load_file(str(tmp_path / "adapter_model.safetensors")).keys()
    assert {stem + "lora_A.weight", stem + "lora_B.weight", stem + "lora_magnitude_vector"} <= set(names)


def test_sharded_parameters_are_gathered_on_every_rank(vl, adapt_args) -> None:
    model = vl.make()
    made = adapt.apply(model, adapt_args(), vl.plan, seed=1)
    calls: list[int] = []

    def full(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return tensor

    assert len(adapt.adapter_tensors(model, made, full)) == len(calls) == len(made.trainable)


def test_tied_embeddings_stay_tied_and_peft_agrees(vl_tied, adapt_args, shake, tmp_path) -> None:
    from peft import PeftModel

    model = vl_tied.make()
    made = adapt.apply(model, adapt_args(modules_to_save=("embed_tokens",)), vl_tied.plan, seed=1)
    assert set(made.saved) == {"model.language_model.embed_tokens", "lm_head"}
    shake(model)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    adapt.save_adapter(adapt.adapter_tensors(model, made), made, tmp_path, base_model=None)
    theirs = PeftModel.from_pretrained(vl_tied.make(), str(tmp_path))
    _close(vl_tied.logits(theirs), vl_tied.logits(model))
    ours = vl_tied.make()
    adapt.load_adapter(ours, tmp_path, vl_tied.plan.groups, trainable=False)
    torch.testing.assert_close(vl_tied.logits(ours), vl_tied.logits(model), atol=0, rtol=0)
    assert not any(p.requires_grad for p in ours.parameters())


def test_an_adapter_that_unties_is_refused(vl_tied, adapt_args, shake, tmp_path) -> None:
    model = vl_tied.make()
    made = adapt.apply(model, adapt_args(modules_to_save=("embed_tokens",)), vl_tied.plan, seed=1)
    shake(model)
    adapt.save_adapter(adapt.adapter_tensors(model, made), made, tmp_path, base_model=None)
    path = str(tmp_path / "adapter_model.safetensors")
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.lm_head.weight": tensors["base_model.model.lm_head.weight"] + 1}, path)
    with pytest.raises(UserError, match="ties it to"):
        adapt.load_adapter(vl_tied.make(), tmp_path, vl_tied.plan.groups, trainable=True)
    save_file({k: v for k, v in tensors.items() if "lm_head" not in k}, path)
    with pytest.raises(UserError, match="one of two tensors"):
        adapt.load_adapter(vl_tied.make(), tmp_path, vl_tied.plan.groups, trainable=True)


def test_wrong_files_are_named(vl, adapt_args, tmp_path) -> None:
    with pytest.raises(UserError, match="no adapter_config.json"):
        adapt.load_adapter(vl.make(), tmp_path, vl.plan.groups, trainable=True)
    model = vl.make()
    made = adapt.apply(model, adapt_args(), vl.plan, seed=1)
    adapt.save_adapter(adapt.adapter_tensors(model, made), made, tmp_path, base_model=None)
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, fields = load_file(str(path)), json.loads(config.read_text())
    first = next(iter(tensors))

    def load(match: str) -> None:
        with pytest.raises(UserError, match=match):
            adapt.load_adapter(vl.make(), tmp_path, vl.plan.groups, trainable=True)

    save_file({**tensors, first: tensors[first][:, :-1].contiguous()}, str(path))
    load("in the file")
    save_file({k: v for k, v in tensors.items() if k != first}, str(path))
    load("incomplete|missing")
    save_file({**tensors, "base_model.model.nowhere.weight": torch.ones(1)}, str(path))
    load("no place for")
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": torch.ones(1)}, str(path))
    load("lm_head")
    path.unlink()
    load("no adapter_model.safetensors")
    for change, match in (
        ({"peft_type": "VERA"}, "VERA"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ):
        config.write_text(json.dumps({**fields, **change}))
        load(match)


def test_one_adapter_at_a_time(vl, adapt_args) -> None:
    model = vl.make()
    adapt.apply(model, adapt_args(), vl.plan, seed=1)
    with pytest.raises(UserError, match="has an adapter already"):
        adapt.apply(model, adapt_args(target_modules=("qkv",)), vl.plan, seed=1)


def test_older_names_can_be_mapped(vl, adapt_args, shake, tmp_path) -> None:
    model = vl.make()
    made = adapt.apply(model, adapt_args(), vl.plan, seed=1)
    shake(model)
    adapt.save_adapter(adapt.adapter_tensors(model, made), made, tmp_path, base_model=None)
    path = str(tmp_path / "adapter_model.safetensors")
    save_file({k.replace("model.language_model.", "model."): v for k, v in load_file(path).items()}, path)
    ours = vl.make()
    rename = lambda name: name.replace("model.layers.", "model.language_model.layers.")  # noqa: E731
    adapt.load_adapter(ours, tmp_path, vl.plan.groups, trainable=True, rename=rename)
    torch.testing.assert_close(vl.logits(ours), vl.logits(model), atol=0, rtol=0)


def _imported_by_plain_lora() -> bool:
    from torch import nn

    from tessera.adapt.lora import _inject
    from tessera.adapt.quant import peft_imports

    with peft_imports(quantised=False):
        from peft import LoraConfig
    _inject(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]), quantised=False)
    return "bitsandbytes" in sys.modules


def test_bitsandbytes_is_not_imported_for_nothing() -> None:
    """In a process of its own, since others here need it."""
    assert run_ranks(_imported_by_plain_lora, 1) == [False]
