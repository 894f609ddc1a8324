"""Conversions that can be asked for, what they are called by default, and directories that need none."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tessera.config.errors import UserError
from tessera.config.resolve import resolve
from tessera.config.run import Run
from tessera.config.sources import is_mcore, newest


def run(line: str, **env: str) -> Run:
    return resolve(shlex.split(line), env)


def mcore(path: Path, *, name: str = "release", legacy: bool = False) -> Path:
    place = path / name
    (place / "mp_rank_00" if legacy else place).mkdir(parents=True)
    if not legacy:
        (place / "metadata.json").write_text("{}")
    return path


def finished_run(path: Path, *, adapter: bool) -> Path:
    """A run directory of ours with two checkpoints."""
    for step in (9, 10):
        place = path / f"checkpoint-{step}"
        place.mkdir(parents=True)
        name = "adapter_config.json" if adapter else "config.json"
        (place / name).write_text(json.dumps({"base_model_name_or_path": "org/base"}))
        (place / "args.json").write_text(json.dumps({"model": "org/base", "dataset": ["d"]}))
    return path


def test_what_a_megatron_checkpoint_looks_like(tmp_path: Path) -> None:
    assert is_mcore(mcore(tmp_path / "a"))
    assert is_mcore(mcore(tmp_path / "b", name="iter_0000005", legacy=True))
    assert is_mcore(tmp_path / "b" / "iter_0000005")
    (tmp_path / "c").mkdir()
    assert not is_mcore(tmp_path / "c") and not is_mcore(tmp_path / "nowhere")
    (tmp_path / "c" / "latest_checkpointed_iteration.txt").write_text("5")
    assert is_mcore(tmp_path / "c")
    assert not is_mcore(finished_run(tmp_path / "d", adapter=False))
    assert newest(tmp_path / "d") == tmp_path / "d" / "checkpoint-10"
    assert newest(tmp_path / "d" / "checkpoint-9") == tmp_path / "d" / "checkpoint-9"
    assert newest(tmp_path / "c") is None


def test_default_names(tmp_path: Path) -> None:
    model = mcore(tmp_path / "m")
    assert run("export --model org/name --to_mcore true").save.output_dir == "org/name-mcore"
    assert run(f"export --mcore_model {model} --to_hf true").save.output_dir == f"{model}-hf"
    assert run(f"export --mcore_model {model} --to_mcore true").save.output_dir == f"{model}-mcore"
    assert run(f"export --model {model} --to_hf true").convert.mcore_model == str(model)
    assert run(f"megatron export --load {model} --to_hf true --save x").save.output_dir == "x"
    with_config = run(f"export --mcore_model {model} --model org/name --to_hf true")
    assert (with_config.model.hf_dir, with_config.model.model) == ("org/name", None)
    text = run(
        f"export --mcore_model {model} --to_mcore true --mcore_format torch --target_tensor_parallel_size 8"
        " --padded_vocab_size 64 --test_convert_precision true"
    ).convert.describe()
    assert text == f"{model} to Megatron torch tp8 vocabulary padded to 64 compared in float32"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--to_mcore true --to_hf true --model a", "--to_mcore true and --to_hf true: one command converts one way"),
        ("--to_hf true --model a", "--to_hf true needs --mcore_model DIR or --mcore_adapters DIR"),
        ("--mcore_model {m}", "--mcore_model {m}: add --to_hf true, or --to_mcore true"),
        (
            "--mcore_model {m} --to_hf true --target_tensor_parallel_size 2",
            "--target_tensor_parallel_size 2 nee",
        ),
        ("--mcore_model nowhere --to_hf true", "--mcore_model nowhere: no such directory"),
        ("--mcore_model {here} --to_hf true", "--mcore_model {here}: neither a Megatron checkpoint"),
        ("--mcore_adapters {m} --to_hf true", "--mcore_adapters {m}: no args.json names its base model"),
        ("--model a --mcore_vision_model {m} --to_mcore true", "--mcore_vision_model needs --mcore_model"),
        (
            "--model a --to_mcore true --mcore_format torch --mcore_layer_layout stacked",
            "--mcore_layer_layout",
        ),
        ("--model a --to_mcore true --padded_vocab_size 9 --make_vocab_size_divisible_by 3", "--make_vocab_size_div"),
        ("--model a --test_convert_precision true", "--test_convert_precision true needs --to_mcore true or --to_hf"),
        (
            "--model a --to_mcore true --test_convert_dtype bfloat16",
            "--test_convert_dtype bfloat16 needs --test",
        ),
        ("--to_mcore true", "tessera export: --model or --adapters is required"),
    ],
)
def test_contradictions(line: str, sentence: str, tmp_path: Path) -> None:
    places = {"m": mcore(tmp_path / "m"), "here": tmp_path / "here"}
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError) as caught:
        run(f"export {line.format(**places)}")
    assert str(caught.value).startswith(sentence.format(**places))
    assert caught.value.exit_code == 2


def test_runs_of_ours_need_no_conversion(tmp_path: Path) -> None:
    full, lora = finished_run(tmp_path / "full", adapter=False), finished_run(tmp_path / "lora", adapter=True)
    found = run(f"export --mcore_model {full} --to_hf true --test_convert_precision true")
    assert not found.convert.asked
    assert (found.model.model, found.save.output_dir) == (str(full / "checkpoint-10"), f"{full}-hf")
    assert found.notes == (
        f"--mcore_model {full}: {full / 'checkpoint-10'} is in Hugging Face format, not converted; there is no "
        "conversion to test",
    )
    found = run(f"export --mcore_adapters {lora} --to_hf true --output_dir out")
    assert (found.model.adapters, found.export.merge_lora) == ((str(lora / "checkpoint-10"),), True)
    assert (found.model.model, found.save.output_dir, found.convert.asked) == ("org/base", "out", False)
    found = run(f"export --mcore_model {full} --to_mcore true --output_dir out")
    assert (found.convert.to_mcore, found.model.model) == (True, str(full / "checkpoint-10"))


def test_the_base_of_a_megatron_adapter(tmp_path: Path) -> None:
    adapter = mcore(tmp_path / "adapter")
    (adapter / "args.json").write_text('{"model": "org/base"}')
    found = run(f"export --mcore_adapters {adapter} --to_hf true")
    assert (found.model.model, found.convert.mcore_adapters) == ("org/base", (str(adapter),))
    (adapter / "args.json").write_text('{"model": "no/such/place"}')
    with pytest.raises(UserError, match=f"--mcore_adapters {adapter}: its base model no/such/place: no such directory"):
        run(f"export --mcore_adapters {adapter} --to_hf true")


def test_load_takes_the_newest_checkpoint_of_a_run(tmp_path: Path) -> None:
    full, lora = finished_run(tmp_path / "full", adapter=False), finished_run(tmp_path / "lora", adapter=True)
    tail = "--dataset d --max_epochs 1"
    found = run(f"megatron sft --load {full} {tail}")
    assert found.model.model == str(full / "checkpoint-10")
    assert "the newest checkpoint of this run is read" in found.notes[0]
    found = run(f"megatron sft --load {lora} --train_type lora {tail}")
    assert (found.model.model, found.model.adapters) == ("org/base", (str(lora / "checkpoint-10"),))
    assert run(f"megatron infer --load {full} --load_data_args true").data.dataset == ("d",)
    assert run(f"megatron sft --load {full / 'checkpoint-9'} {tail}").notes == ()
    with pytest.raises(UserError, match=f"--load {tmp_path}/nowhere: no such directory"):
        run(f"megatron sft --load {tmp_path}/nowhere {tail}")
