"""From words to values: the grammar of a command line, and the sentence for every way to get it wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tessera.config.errors import UserError
from tessera.config.flags import BY_NAME
from tessera.config.parse import convert, nearest, split, words_of


def value(name: str, *words: str) -> Any:
    return convert(BY_NAME[name], words, f"--{name}")


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("model", ["DIR"], "DIR"),
        ("system", [""], ""),
        ("packing", [], True),
        ("packing", ["True"], True),
        ("packing", ["no"], False),
        ("max_steps", ["-1"], -1),
        ("max_steps", ["1e3"], 1000),
        ("learning_rate", ["1e-4"], 1e-4),
        ("quant_bits", ["4"], 4),
        ("dataset", ["a.jsonl", "b#5"], ("a.jsonl", "b#5")),
        ("report_to", ["tensorboard", "wandb"], ("tensorboard", "wandb")),
        ("eval_steps", ["50"], 50),
        ("eval_steps", ["-1"], -1),
        ("eval_steps", ["0.25"], 0.25),
        ("max_shard_size", ["5GB"], 5_000_000_000),
        ("max_shard_size", ["1.5 MiB"], 1_572_864),
        ("max_shard_size", ["4000000000"], 4_000_000_000),
        ("columns", ['{"question": "query"}'], {"question": "query"}),
    ],
)
def test_values(name: str, words: list[str], expected: Any) -> None:
    found = value(name, *words)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        ("lora_rank", ["0"], "--lora_rank 0: expected a whole number >= 1"),
        ("lora_rank", ["1.5"], "--lora_rank 1.5: expected a whole number >= 1"),
        ("learning_rate", ["fast"], "--learning_rate fast: expected a number >= 0"),
        ("learning_rate", ["nan"], "--learning_rate nan: expected a number >= 0"),
        ("max_skip_ratio", ["1.5"], "--max_skip_ratio 1.5: expected a number >= 0 and <= 1"),
        ("packing", ["maybe"], "--packing maybe: expected true or false"),
        ("optim", ["sgd"], "--optim sgd: allowed are adamw_torch_fused, adamw_torch, muon"),
        ("report_to", ["swanlab"], "--report_to swanlab: allowed are tensorboard, wandb, none"),
        ("quant_bits", ["3"], "--quant_bits 3: allowed are 4, 8"),
        ("eval_steps", ["0"], "--eval_steps 0: expected a number of steps, a share of the run below 1, or -1"),
        ("eval_steps", ["2.5"], "--eval_steps 2.5: expected a number of steps, a share of the run below 1, or -1"),
        ("max_shard_size", ["big"], "--max_shard_size big: expected a size such as 5GB or 500MB"),
        ("columns", ["{"], "--columns: not valid JSON"),
        ("columns", ["missing.json"], "--columns missing.json: expected a JSON object or the path of a JSON file"),
        ("model", [], "--model needs a value"),
        ("optim", [], "--optim needs a value; allowed are adamw_torch_fused, adamw_torch, muon"),
        ("dataset", [], "--dataset needs at least one value"),
        ("model", ["a", "b"], "--model takes one value but got 2: a b"),
    ],
)
def test_bad_values_name_the_flag_the_value_and_what_is_allowed(name: str, words: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        value(name, *words)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_json_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "columns.json"
    path.write_text(json.dumps({"q": "query"}))
    assert value("columns", str(path)) == {"q": "query"}
    path.write_text("[1]")
    with pytest.raises(UserError, match="expected a JSON object"):
        value("columns", str(path))


def test_spellings_of_a_flag() -> None:
    words = split(["run.yaml", "--max-length=5", "--packing", "--dataset", "a", "b", "--eval_steps", "-1"], "sft")
    assert words.positional == ("run.yaml",)
    assert words.flags == {"max_length": ["5"], "packing": [], "dataset": ["a", "b"], "eval_steps": ["-1"]}
    assert words.notes == ()
    assert split(["--tuner_type", "full"], "sft").flags == {"train_type": ["full"]}
    assert split(["--system=a=b"], "sft").flags == {"system": ["a=b"]}


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("--modle", "--modle: tessera sft has no such flag; nearest: --model"),
        ("--learning", "--learning: tessera sft has no such flag; nearest: --learning_rate"),
        ("--zzzzzz", "--zzzzzz: tessera sft has no such flag (tessera sft --help lists them)"),
        ("--merge_lora", "--merge_lora: tessera sft has no such flag; it belongs to export"),
    ],
)
def test_unknown_flags_are_refused_with_the_nearest_names(word: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        split([word, "x"], "sft")
    assert str(caught.value).startswith(sentence)


def test_a_flag_given_twice_keeps_the_last_and_says_so() -> None:
    words = split(["--max_length", "8192", "--max_length", "4196", "--packing", "true", "--packing", "true"], "sft")
    assert words.flags == {"max_length": ["4196"], "packing": ["true"]}
    assert words.notes == ("--max_length is given twice: 4196 holds, 8192 is dropped",)


def test_a_backslash_followed_by_a_space_is_noticed() -> None:
    words = split(["--packing", "true", " "], "sft")
    assert words.flags == {"packing": ["true"]}
    assert words.cut_after == "--packing"
    assert "the command seems cut after --packing" in words.notes[0]
    assert split(["--system", ""], "sft").flags == {"system": [""]}


def test_nearest_prefers_abbreviations() -> None:
    assert nearest("lora_r", ["lora_alpha", "lora_rank", "lora_bias"])[0] == "lora_rank"
    assert nearest("qqq", ["model"]) == []


def test_words_of_parsed_values() -> None:
    assert words_of(True) == ["True"]
    assert words_of([1, "a"]) == ["1", "a"]
    assert words_of({"a": 1}) == ['{"a": 1}']
    assert words_of(1e-5) == ["1e-05"]
