"""What holds for every family: packing changes nothing, nothing leaks, recomputation and the cache are exact."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.config.errors import UserError
from tessera.contract.batch import Batch
from tessera.contract.memory import Recompute
from tessera.contract.plan import within
from tessera.models.cache import Budget, KVCache
from tessera.models.families import FAMILIES, family_of
from tessera.models.init import DECODER
from tessera.models.vlm import VLM, Trunk
from tests.parity import reference as ref

SAMPLES: list[ref.Sample] = [[5, (1, 4, 6), 7], [9], [3, (1, 8, 8), 4, (1, 4, 4), 6], [4]]
PLAIN: list[ref.Sample] = [[12], [9], [20], [9], [4]]


AFTER_THE_TOWER = {
    "qwen2_5_vl": "model.visual.merger.mlp.2.bias",
    "composite": "model.visual.merger.mlp.2.bias",
    "glm4v_moe": "model.visual.merger.post_projection_norm.bias",
    "internvl": "model.multi_modal_projector.layer_norm.bias",
    "internvl_chat": "model.multi_modal_projector.layer_norm.bias",
    "NVLM_D": "model.multi_modal_projector.layer_norm.bias",
}
"""A parameter behind a tower's last block."""


def samples_of(name: str) -> list[ref.Sample]:
    return SAMPLES if name in ref.SEEING else PLAIN


def made(name: str) -> tuple[VLM, Batch]:
    config = ref.config_of(name)
    return ref.ours(config), ref.batch_of(config, samples_of(name))


def trained(model: VLM, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    total = model(batch, ref.loss).total
    total.backward()
    return total.detach(), {name: grad.clone() for name, grad in ref.gradients(model).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_changing_one_segment_leaves_the_others_bit_equal(name: str) -> None:
    model, batch = made(name)
    before = model(batch)
    start, end = batch.segments.cu_seqlens[1:3].tolist()
    tokens = batch.tokens.clone()
    tokens[start:end] = (tokens[start:end] + 50) % 200 + 20
    after = model(replace(batch, tokens=tokens))
    same = torch.ones(batch.num_tokens, dtype=torch.bool)
    same[start:end] = False
    if model.decoder.config.moe is None:
        assert torch.equal(before[same], after[same])
    else:  # An expert multiplies rows of several segments at once, and how it rounds depends on how many.
        torch.testing.assert_close(before[same], after[same], rtol=2e-6, atol=2e-6)
    assert not torch.equal(before[~same], after[~same])


def test_pixels_of_one_segment_stay_there() -> None:
    for name in ref.SEEING:
        model, batch = made(name)
        assert batch.media is not None
        before = model(batch)
        patches = batch.media.patches.clone()
        patches[:24] = 255 - patches[:24]
        after = model(replace(batch, media=replace(batch.media, patches=patches)))
        first = batch.segments.lengths[0]
        assert torch.equal(before[first:], after[first:])
        assert not torch.equal(before[:first], after[:first])


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_equals_one_by_one(name: str) -> None:
    config = ref.config_of(name)
    model, samples = ref.ours(config), samples_of(name)
    generator_seed = 3
    batch = ref.batch_of(config, samples[:2], generator_seed)
    alone = ref.batch_of(config, samples[:1], generator_seed)
    assert torch.equal(batch.tokens[: alone.num_tokens], alone.tokens)
    media = alone.media
    if media is not None and batch.media is not None:
        alone = replace(alone, media=replace(media, patches=batch.media.patches[: media.patches.shape[0]]))
    torch.testing.assert_close(model(batch)[: alone.num_tokens], model(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("bf16", [False, True])
def test_recompute_is_bit_equal(name: str, bf16: bool) -> None:
    model, batch = made(name)
    plan = family_of({"model_type": name}).plan(ref.config_of(name))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        model.set_recompute(plan, decoder=False, tower=False)
        plain = trained(model, batch)
        model.set_recompute(plan, decoder=True, tower=True)
        again = trained(model, batch)
    assert torch.equal(plain[0], again[0])
    assert plain[1].keys() == again[1].keys()
    assert all(torch.equal(plain[1][key], again[1][key]) for key in plain[1])


def test_recompute_reaches_layers_and_blocks_separately() -> None:
    model, batch = made("qwen3_vl")
    plan = family_of({"model_type": "qwen3_vl"}).plan(ref.config_of("qwen3_vl"))
    counts = {"layer": 0, "block": 0}
    visual = model.visual
    assert visual is not None
    norm = model.decoder.layers["0"].get_submodule("self_attn.q_proj")
    norm.register_forward_hook(lambda *_: counts.__setitem__("layer", counts["layer"] + 1))
    fc1 = visual.get_submodule("blocks.0.mlp.linear_fc1")
    fc1.register_forward_hook(lambda *_: counts.__setitem__("block", counts["block"] + 1))
    for decoder, tower in ((False, False), (True, False), (False, True), (True, True)):
        counts.update(layer=0, block=0)
        model.set_recompute(plan, decoder=decoder, tower=tower)
        trained(model, batch)
        assert counts == {"layer": 1 + decoder, "block": 1 + tower}


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Recompute(), {"q": (1, 1, 1), "core": (1, 1, 1), "up": (1, 1, 1), "norm": (1, 1, 1)}),
        (Recompute("full"), {"q": (2, 2, 2), "core": (2, 2, 2), "up": (2, 2, 2), "norm": (2, 2, 2)}),
        (Recompute("full", "uniform", 2), {"q": (2, 2, 2), "core": (2, 2, 2), "up": (2, 2, 2), "norm": (2, 2, 2)}),
        (Recompute("full", "block", 1), {"q": (2, 1, 1), "core": (2, 1, 1), "up": (2, 1, 1), "norm": (2, 1, 1)}),
        (Recompute("selective", modules=("mlp",)), {"q": (1,) * 3, "core": (1,) * 3, "up": (2,) * 3, "norm": (1,) * 3}),
        (
            Recompute("selective", modules=("layernorm",)),
            {"q": (1,) * 3, "core": (1,) * 3, "up": (1,) * 3, "norm": (2,) * 3},
        ),
    ],
)
def test_each_layer_runs_as_often_as_it_must(how: Recompute, expected: dict[str, tuple[int, ...]]) -> None:
    """No part is run a third time, and nothing that was kept is run a second time."""
    config = ref.config_of("qwen3")
    config["num_hidden_layers"] = 3
    model = ref.ours(config).train()
    model.set_recompute(family_of(config).plan(config), decoder=how, tower=False)
    parts = {"q": "self_attn.q_proj", "core": "self_attn.core", "up": "mlp.up_proj", "norm": "input_layernorm"}
    counts = {part: [0, 0, 0] for part in parts}
    for part, path in parts.items():
        for index in range(3):

            def count(*_: object, part: str = part, index: int = index) -> None:
                counts[part][index] += 1

            model.decoder.layers[str(index)].get_submodule(path).register_forward_pre_hook(count)
    trained(model, ref.batch_of(config, [[9], [5]]))
    assert {part: tuple(found) for part, found in counts.items()} == expected


@pytest.mark.parametrize("name", ref.SEEING)
@pytest.mark.parametrize("level", [1.0, float("inf")])
def test_minimal_frame_changes_nothing_and_reaches_every_parameter(name: str, level: float) -> None:
    config = ref.config_of(name)
    model = ref.ours(config)
    plain = ref.batch_of(config, PLAIN)
    framed = ref.batch_of(config, PLAIN, minimal=True)
    assert framed.media is not None and framed.media.minimal
    expected, _ = trained(model, plain)
    last = model.get_parameter(AFTER_THE_TOWER.get(name, "model.visual.merger.norm.bias"))
    with torch.no_grad():
        last.mul_(level)
    total, grads = trained(model, framed)
    assert torch.equal(total, expected)
    assert grads.keys() == {key for key, _ in model.named_parameters()}
    seeing = [key for key in grads if not within(DECODER, key)]
    if level == 1.0:
        assert all(float(grads[key].abs().max()) == 0 for key in seeing)
    assert all(grad.isfinite().all() for key, grad in grads.items() if key not in seeing)


@pytest.mark.parametrize("name", FAMILIES)
def test_autocast_keeps_masters_and_a_bf16_stream(name: str) -> None:
    model, batch = made(name)
    with torch.no_grad():
        exact = F.linear(model(batch), model.head_weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model(batch)
        assert hidden.dtype == torch.bfloat16
        rough = F.linear(hidden.float(), model.head_weight)
    assert F.cosine_similarity(rough, exact, dim=-1).min() > 0.99
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = model(batch, ref.loss).total
    total.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert model.to(torch.bfloat16)(batch).dtype == torch.bfloat16


def test_tied_head_is_the_embedding() -> None:
    model, _ = made("qwen3_vl")
    assert model.head_weight is model.decoder.embed_tokens.weight
    assert not any(name.startswith("lm_head") for name, _ in model.named_parameters())
    untied, _ = made("qwen2_5_vl")
    assert untied.head_weight is untied.get_parameter("lm_head.weight")


@pytest.mark.parametrize("name", FAMILIES)
def test_cache_steps_equal_the_packed_forward(name: str) -> None:
    """Prefill, then three tokens each, with one row dropped on the way: the hidden states of a full pass."""
    config = ref.config_of(name)
    model = ref.ours(config).eval()
    longer = [[*sample[:-1], sample[-1] + 3] for sample in samples_of(name)]  # type: ignore[operator]
    full, prompts = ref.batch_of(config, longer, 5), ref.batch_of(config, samples_of(name), 5)
    ends = full.segments.cu_seqlens[1:].long() - 3
    tokens, keep = prompts.tokens.clone(), []
    for row, end in enumerate(ends.tolist()):
        first = full.segments.cu_seqlens[row]
        keep.append(torch.arange(int(first), end))
    tokens = full.tokens[torch.cat(keep)]
    media = prompts.media
    if media is not None and full.media is not None:
        media = replace(media, patches=full.media.patches)
    prompts = replace(prompts, tokens=tokens, positions=full.positions[..., torch.cat(keep)], media=media)
    lengths = prompts.segments.lengths
    config_ = model.decoder.config
    cache = KVCache(config_.layers, config_.kv_heads, config_.head_dim, model.head_weight, Budget(10**6))
    with torch.no_grad():
        hidden = model(full)
        rows = [cache.join(length) for length in lengths]
        features = (
            model.model.look(media, torch.float32) if media is not None and isinstance(model.model, Trunk) else None
        )
        through = cache.filling(list(zip(rows, lengths, strict=True)))
        dest = None if media is None else media.dest
        first = model.extend(prompts.tokens, prompts.positions, through, features, dest)
        torch.testing.assert_close(first, hidden[ends - 1], rtol=1e-4, atol=1e-5)
        for step in range(3):
            if step == 1:
                cache.leave(rows[1])
            stepping = cache.stepping()
            where = torch.tensor([int(ends[rows.index(row)]) for row in stepping.rows]) + step
            out = model.extend(full.tokens[where], full.positions[..., where], stepping)
            torch.testing.assert_close(out, hidden[where], rtol=1e-4, atol=1e-5)


def test_unknown_model_type_is_refused() -> None:
    with pytest.raises(UserError, match="no model_type"):
        family_of({})
    with pytest.raises(UserError, match="model_type 'mamba'"):
        family_of({"model_type": "mamba"})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None}, "rope_type"),
    ],
)
def test_unsupported_options_are_refused(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message), torch.device("meta"):
        family_of({"model_type": name}).build(ref.config_of(name, **changes))


def test_both_config_styles_build_the_same_decoder() -> None:
    """transformers 5 nests what transformers 4 wrote flat."""
    from transformers import AutoConfig

    for name in {*ref.VLMS, *ref.TEXTS} - set(ref.REMOTE):
        config = ref.config_of(name)
        nested = AutoConfig.for_model(**config).to_dict()
        with torch.device("meta"):
            first, second = (family_of(c).build(c) for c in (config, nested))
        assert isinstance(first, VLM) and isinstance(second, VLM)
        one, two = first.decoder.config, second.decoder.config
        assert replace(one, rope=replace(one.rope, scaling=None)) == replace(two, rope=replace(two.rope, scaling=None))


def test_text_models_do_not_import_transformers() -> None:
    code = (
        "import sys, torch\n"
        "from tessera.models.families import family_of\n"
        "for name in ('qwen2', 'qwen3', 'llama'):\n"
        "    family = family_of({'model_type': name})\n"
        "    config = family.tiny()\n"
        "    with torch.device('meta'): family.build(config)\n"
        "    family.geometry(config, {}); family.plan(config); family.weightmap(config, [])\n"
        "assert not any(name.split('.')[0] == 'transformers' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
