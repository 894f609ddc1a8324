"""The one screen before step 1 fits a terminal and says what matters; facts survive their file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tessera.observe.facts import RunFacts, TrainedModule, hardware, load_facts, versions
from tessera.observe.screen import summary_screen

MODULES = tuple(
    TrainedModule(f"model.language_model.layers.*.self_attn.{name}_proj.lora_A.default.weight", 28, 3_000_000 + i, 1e-4)
    for i, name in enumerate("abcdefghijklmnopqrst")
)
FACTS = RunFacts(
    model="/somewhere/far/away/" + "deep/" * 30 + "model",
    family="tiny",
    train_type="lora",
    parameters=8_290_000_000,
    trainable=40_370_176,
    modules=MODULES,
    steps=900,
    epochs=3.0,
    train_samples=4790,
    val_samples=120,
    skipped_samples=3,
    tokens_per_step=8190.4,
    samples_per_step=16.0,
    batch="1 packs of 8192 x 16 microbatches",
    dtype="bfloat16",
    memory="~23.8 GiB (estimate: " + ", ".join(f"part {i} 1.00 GiB" for i in range(6)) + ")",
    output="output/v0-20260101-000000",
    hardware=hardware(),
    versions=versions(),
    flags={"dataset": (["a.jsonl"], "flag")},
)


def test_screen_fits_and_is_aligned() -> None:
    lines = summary_screen(FACTS).splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    head = next(i for i, line in enumerate(lines) if line.startswith("trained modules"))
    rows = lines[head : head + 13]
    assert len({len(row) for row in rows}) == 1
    assert lines[head + 13].startswith("… and 8 more rows")


def test_screen_says_what_matters() -> None:
    text = summary_screen(FACTS)
    for expected in (
        "(tiny)",
        "8.29B, of which 40.37M trained (0.49 %)",
        "8,190 tokens in 16.0 samples",
        "900 (3 epochs)",
    ):
        assert expected in text
    for expected in ("4,790 training samples, 120 for validation, 3 skipped", "~23.8 GiB (estimate", "1.00e-04"):
        assert expected in text


def test_unknown_facts_leave_no_empty_lines() -> None:
    small = replace(FACTS, memory="", hardware="", tokens_per_step=0.0, batch="", modules=())
    labels = [line.split(" ")[0] for line in summary_screen(small).splitlines()]
    assert "memory" not in labels and "per" not in labels and "model" in labels


def test_facts_survive_their_file(tmp_path: Path) -> None:
    assert load_facts(tmp_path) is None
    FACTS.save(tmp_path)
    assert load_facts(tmp_path) == FACTS
    (tmp_path / "run_facts.json").write_text("{")
    assert load_facts(tmp_path) is None


def test_versions_and_hardware() -> None:
    assert {"python", "torch"} <= set(versions())
    assert "core" in hardware() or " x " in hardware()


def test_long_patterns_keep_what_tells_them_apart() -> None:
    names = "{q_proj,k_proj,v_proj,o_proj,q_norm,k_norm}"
    row = TrainedModule(f"model.language_model.layers.*.self_attn.{names}", 18, 1000, 1e-4)
    text = summary_screen(replace(FACTS, modules=(row,)))
    assert ".layers.*.self_attn.{{q,k,v,o}_proj,{q,k}_norm} " in text
