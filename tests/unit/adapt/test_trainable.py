"""Freeze groups, learning rates, and the summary, against the rules other tools use."""

from __future__ import annotations

import pytest

import tessera.adapt as adapt
from tessera.config.errors import UserError

LLM, VIT = "model.language_model.", "model.visual."
ALIGNER = ("model.visual.merger.", "model.visual.deepstack_merger_list.")


def part(name: str) -> str:
    if name.startswith(ALIGNER):
        return "aligner"
    return "vit" if name.startswith(VIT) else "head" if name.startswith("lm_head") else "llm"


@pytest.mark.parametrize(
    ("llm", "vit", "aligner"), [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1) if not a * b * c]
)
def test_full_training_freezes_by_part(vl, adapt_args, llm, vit, aligner) -> None:
    model = vl.make()
    flags = {"freeze_llm": bool(llm), "freeze_vit": bool(vit), "freeze_aligner": bool(aligner)}
    made = adapt.apply(model, adapt_args(train_type="full", **flags), vl.plan, seed=1)
    expected = {"llm": not llm, "head": not llm, "vit": not vit, "aligner": not aligner}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == expected[part(name)], name
    assert set(made.trainable) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert made.mode == "full" and made.config is None and not made.targets


def test_prefixes_have_the_last_word(vl, adapt_args) -> None:
    model = vl.make()
    frozen = ("model.language_model.layers.0", "model.visual.merger")
    args = adapt_args(train_type="full", freeze_aligner=False, freeze_parameters=frozen)
    adapt.apply(model, args, vl.plan, seed=1)
    state = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not state["model.language_model.layers.0.mlp.up_proj.weight"]
    assert state["model.language_model.layers.1.mlp.up_proj.weight"]
    assert state["model.visual.merger.norm.weight"], "an unfrozen aligner comes after --freeze_parameters"
    args = adapt_args(train_type="full", freeze_llm=True, trainable_parameters=("lm_head", "model.visual.pos_embed"))
    made = adapt.apply(vl.make(), args, vl.plan, seed=1)
    assert set(made.trainable) == {"lm_head.weight", "model.visual.pos_embed.weight"}


def test_a_text_model_is_all_llm(adapt_args, oracle) -> None:
    if oracle.plan.groups.vit:
        pytest.skip("has a tower")
    model = oracle.make()
    made = adapt.apply(model, adapt_args(train_type="full"), oracle.plan, seed=1)
    assert len(made.trainable) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"freeze_llm": True}, "nothing to train: every parameter is frozen"),
        ({"freeze_parameters": ("model.vision",)}, "--freeze_parameters model.vision.*nearest: .*model.visual"),
        ({"trainable_parameters": ("nope",)}, "--trainable_parameters nope"),
        ({"use_dora": True}, "--use_dora is for adapters"),
        ({"modules_to_save": ("lm_head",)}, "--modules_to_save is for adapters"),
        ({"train_type": "longlora"}, "--train_type longlora"),
        ({"train_type": "lora", "trainable_parameters": ("lm_head",)}, "--trainable_parameters lm_head acts on"),
    ],
)
def test_mistakes_are_sentences(vl, adapt_args, changes, match) -> None:
    with pytest.raises(UserError, match=match):
        adapt.apply(vl.make(), adapt_args(**{"train_type": "full", **changes}), vl.plan, seed=1)


def test_groups_carry_rate_and_decay(vl, adapt_args, train_args) -> None:
    model = vl.make()
    made = adapt.apply(model, adapt_args(train_type="full", freeze_vit=False, freeze_aligner=False), vl.plan, seed=1)
    train = train_args(learning_rate=1e-3, vit_lr=1e-4, aligner_lr=1e-2, weight_decay=0.1)
    groups = adapt.param_groups(model, train, made)
    assert {g.name for g in groups} == {p + d for p in ("llm", "vit", "aligner") for d in ("", ".no_decay")}
    for group in groups:
        assert group.lr == {"llm": 1e-3, "vit": 1e-4, "aligner": 1e-2}[group.name.partition(".")[0]]
        assert group.weight_decay == (0.0 if group.name.endswith("no_decay") else 0.1)
        for name, parameter in zip(group.names, group.params, strict=True):
            assert part(name).replace("head", "llm") == group.name.partition(".")[0]
            assert (parameter.ndim > 1) == (group.weight_decay > 0)
            assert model.get_parameter(name) is parameter
    assert sorted(name for g in groups for name in g.names) == sorted(made.trainable)
    plain = adapt.param_groups(model, train_args(learning_rate=1e-3), made)
    assert {g.lr for g in plain} == {1e-3}


def test_loraplus_raises_b(vl, adapt_args, train_args) -> None:
    model = vl.make()
    args = adapt_args(lorap_lr_ratio=16.0, freeze_vit=False, use_dora=True)
    made = adapt.apply(model, args, vl.plan, seed=1)
    groups = adapt.param_groups(model, train_args(learning_rate=1e-4, vit_lr=1e-5), made)
    rates = {g.name: g.lr for g in groups}
    assert rates == pytest.approx(
        {
            "llm": 1e-4,
            "llm.lora_B": 1.6e-3,
            "llm.no_decay": 1e-4,
            "vit": 1e-5,
            "vit.lora_B": 1.6e-4,
            "vit.no_decay": 1e-5,
        }
    )
    for group in groups:
        assert all((".lora_B." in name) == ("lora_B" in group.name) for name in group.names)


def test_a_tied_weight_is_counted_once(vl_tied, adapt_args, train_args) -> None:
    model = vl_tied.make()
    made = adapt.apply(model, adapt_args(train_type="full"), vl_tied.plan, seed=1)
    groups = adapt.param_groups(model, train_args(), made)
    ids = [id(p) for g in groups for p in g.params]
    assert len(ids) == len(set(ids))
    table = adapt.trainable_table(model, groups)
    assert table.total == sum(p.numel() for p in model.parameters())


def test_the_table_fits_on_a_screen(vl, adapt_args, train_args) -> None:
    model = vl.make()
    made = adapt.apply(model, adapt_args(train_type="full", freeze_vit=False, freeze_aligner=False), vl.plan, seed=1)
    table = adapt.trainable_table(model, adapt.param_groups(model, train_args(vit_lr=1e-6), made))
    assert table.trainable == table.total == sum(row.parameters for row in table.rows)
    assert sum(row.tensors for row in table.rows) == len(made.trainable)
    assert len(table.rows) < 20
    assert not any(part.isdigit() for row in table.rows for part in row.pattern.split("."))
    patterns = {row.pattern: row.lr for row in table.rows}
    assert patterns["model.language_model.layers.*.mlp.{gate_proj,up_proj,down_proj}"] == train_args().learning_rate
    assert patterns["model.visual.blocks.*.attn.{qkv,proj}"] == 1e-6
    assert "trainable" in str(table)


def test_the_table_of_an_adapter(vl, adapt_args, train_args) -> None:
    model = vl.make()
    made = adapt.apply(model, adapt_args(), vl.plan, seed=1)
    table = adapt.trainable_table(model, adapt.param_groups(model, train_args(), made))
    attention = "model.language_model.layers.*.self_attn.{q_proj,k_proj,v_proj,o_proj}.{lora_A,lora_B}"
    assert table.rows[0].pattern == attention and len(table.rows) == 2
    assert table.rows[0].tensors == 16
    made = adapt.apply(model := vl.make(), adapt_args(lorap_lr_ratio=4.0), vl.plan, seed=1)
    rows = adapt.trainable_table(model, adapt.param_groups(model, train_args(), made)).rows
    assert len(rows) == 4 and {row.pattern.rpartition(".")[2] for row in rows} == {"lora_A", "lora_B"}
