"""What all-linear means on a vision-language model, exactly; and sentences for names that mean nothing."""

from __future__ import annotations

import re

import pytest

from tessera.adapt.targets import select
from tessera.config.errors import UserError

LLM = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def alternatives(spec: str) -> set[str]:
    return set(spec.rpartition(".(")[2].rstrip(")$").split("|"))


def expected(model, groups, llm: bool, vit: bool, aligner: bool) -> set[str]:
    """By class name and prefix, written down independently of the implementation."""
    chosen = set()
    for name, module in model.named_modules():
        if type(module).__name__ != "Linear" or name == "lm_head":
            continue
        parts = {"aligner": groups.aligner, "vit": groups.vit}
        inside = next((part for part, prefixes in parts.items() if name.startswith(prefixes)), "llm")
        if {"llm": llm, "vit": vit, "aligner": aligner}[inside]:
            chosen.add(name)
    return chosen


def test_the_default_is_the_language_model_in_the_known_spelling(vl, adapt_args) -> None:
    targets = select(vl.make(), adapt_args(), vl.plan.groups)
    known = r"^(model\.language_model(?=\.).*\.(k_proj|v_proj|o_proj|up_proj|gate_proj|down_proj|q_proj))$"
    assert targets.spec.rpartition(".(")[0] == known.rpartition(".(")[0]
    assert alternatives(targets.spec) == alternatives(known) == LLM
    names = [name for name, _ in vl.make().named_modules()]
    assert {n for n in names if re.fullmatch(known, n)} == set(targets.names) and len(targets.names) == 14


@pytest.mark.parametrize("flags", range(7))
def test_all_linear_follows_the_freeze_flags(oracle, adapt_args, flags) -> None:
    frozen = {"freeze_llm": bool(flags & 1), "freeze_vit": bool(flags & 2), "freeze_aligner": bool(flags & 4)}
    model, groups = oracle.make(), oracle.plan.groups
    want = expected(model, groups, *(not value for value in frozen.values()))
    if not want:
        with pytest.raises(UserError, match="nothing to train"):
            select(model, adapt_args(**frozen), groups)
        return
    targets = select(model, adapt_args(**frozen), groups)
    assert set(targets.names) == want
    if isinstance(targets.spec, str):
        assert {n for n, _ in model.named_modules() if re.fullmatch(targets.spec, n)} == want
    assert not any(name.endswith(("patch_embed.proj", "lm_head")) for name in targets.names)


def test_a_text_model_gets_a_plain_list(oracle, adapt_args) -> None:
    if oracle.plan.groups.vit:
        pytest.skip("has a tower")
    targets = select(oracle.make(), adapt_args(), oracle.plan.groups)
    assert targets.spec == tuple(sorted(LLM))


def test_names_are_suffixes_and_ignore_freezing(vl, adapt_args) -> None:
    model = vl.make()
    targets = select(model, adapt_args(target_modules=("q_proj", "attn.qkv")), vl.plan.groups)
    assert targets.spec == ("attn.qkv", "q_proj")
    assert {name.rpartition(".")[2] for name in targets.names} == {"q_proj", "qkv"} and len(targets.names) == 4
    targets = select(model, adapt_args(target_regex=r".*layers\.0\.mlp\.(up|down)_proj"), vl.plan.groups)
    assert targets.names == tuple(f"model.language_model.layers.0.mlp.{x}_proj" for x in ("up", "down"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"target_modules": ("q_prj",)}, "--target_modules q_prj: .*nearest: q_proj"),
        ({"target_modules": ()}, "--target_modules is empty"),
        ({"target_modules": ("proj",)}, r"also means model.visual.patch_embed.proj, a Conv3d.*attn.proj"),
        ({"target_modules": ("lm_head",)}, "--modules_to_save lm_head"),
        ({"target_modules": ("embed_tokens",)}, "a Embedding|an Embedding"),
        ({"target_modules": ("all-linear", "qkv")}, "all-linear cannot be combined"),
        ({"target_regex": "q_proj"}, "--target_regex q_proj: matches no whole module name"),
        ({"target_regex": "("}, "not a regular expression"),
        ({"freeze_llm": True}, "--freeze_llm true --freeze_vit true --freeze_aligner true"),
    ],
)
def test_mistakes_are_sentences(vl, adapt_args, changes, match) -> None:
    with pytest.raises(UserError, match=match):
        select(vl.make(), adapt_args(**changes), vl.plan.groups)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"modules_to_save": ("lm_haed",)}, "--modules_to_save lm_haed: .*nearest: lm_head"),
        ({"modules_to_save": ("merger",), "freeze_aligner": False}, "both adapted and trained whole"),
    ],
)
def test_modules_to_save_mistakes(vl, adapt_args, changes, match) -> None:
    import tessera.adapt as adapt

    with pytest.raises(UserError, match=match):
        adapt.apply(vl.make(), adapt_args(**changes), vl.plan, seed=1)
