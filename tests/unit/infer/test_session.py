"""An opened model: adapters beside the weights, half precision, what ends an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera import adapt
from tessera.checkpoint import open as door
from tessera.config.errors import UserError
from tessera.config.resolve import resolve, run_of
from tessera.data.sample import BadRow
from tessera.infer.limits import max_positions, stop_ids
from tessera.infer.session import Session, load
from tessera.models.vlm import VLM
from tests.disk import save_checkpoint
from tests.parity import reference as ref

ROW = {"query": "what is this?", "response": "a test"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "base", "qwen3")


def adapter_of(base: Path, directory: Path, **flags: Any) -> Path:
    """An adapter whose B matrices are not zero."""
    run = run_of("sft", model=str(base), dataset=("rows.jsonl",), **flags)
    source = door.describe(run.model)
    module = door.load(source, dtype=torch.float32, device=torch.device("cpu"))
    adaptation = adapt.apply(module, run.adapt, source.plan, seed=1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.02)
    adapt.save_adapter(adapt.adapter_tensors(module, adaptation), adaptation, directory, base_model=str(base))
    (directory / "args.json").write_text(json.dumps(run.to_json()))
    return directory


def answer(session: Session, row: dict[str, Any] = ROW) -> tuple[int, ...]:
    [reply] = session.answer([session.question(row)])
    assert not isinstance(reply, BadRow)
    return reply.answer.tokens


def opened(*argv: str) -> Session:
    return Session.open(resolve(["infer", "--max_new_tokens", "8", *argv], {}))


def test_adapter_without_merging(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "checkpoint-1")
    beside = answer(opened("--adapters", str(adapter)))
    assert beside != answer(opened("--model", str(base)))
    assert beside == answer(opened("--model", str(base), "--adapters", str(adapter)))
    with pytest.raises(UserError, match="one adapter at a time"):
        opened("--adapters", str(adapter), str(adapter))


@pytest.mark.parametrize("flags", [None, {}, {"use_dora": True}, {"modules_to_save": ("embed_tokens", "lm_head")}])
def test_weights_are_cast_once(base: Path, tmp_path: Path, flags: dict[str, Any] | None) -> None:
    """bfloat16 without autocast: logits near those of float32, adapters still float32."""
    adapters = (str(adapter_of(base, tmp_path / "a", **flags)),) if flags is not None else ()
    batch = ref.batch_of(ref.config_of("qwen3"), [[13], [5]])
    logits = {}
    for dtype in ("float32", "bfloat16"):
        run = run_of("infer", model=str(base), adapters=adapters, torch_dtype=dtype)
        module = load(run, door.describe(run.model), torch.device("cpu"))
        assert isinstance(module, VLM)
        kinds = {str(p.dtype) for name, p in module.named_parameters() if ".lora_" not in name}
        assert kinds == {f"torch.{dtype}"}
        assert not any(parameter.requires_grad for parameter in module.parameters())
        with torch.inference_mode():
            logits[dtype] = ref.logits_of(module, batch).float()
    assert (logits["float32"] - logits["bfloat16"]).abs().max() < 0.05 * logits["float32"].abs().max()


def test_half_precision_answers(base: Path) -> None:
    session = opened("--model", str(base), "--torch_dtype", "bfloat16")
    assert answer(session) == answer(session)
    with pytest.raises(UserError, match="--torch_dtype float16: CPUs have no fast half precision"):
        opened("--model", str(base), "--torch_dtype", "float16")


def test_what_ends_an_answer(base: Path, tmp_path: Path) -> None:
    assert stop_ids({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {}, {"eos_token_id": None}) == {5, 6, 7}
    assert max_positions({"text_config": {"max_position_embeddings": 99}}) == 99
    assert max_positions({"max_position_embeddings": 98}) == 98
    limits = opened("--model", str(base)).limits
    assert limits.stop_ids == {0, 2}
    assert limits.max_positions == 2048
    assert limits.room(2045) == 3


def test_generation_config_decides_where_no_flag_does(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", "qwen3")
    config = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": 9}
    (base / "generation_config.json").write_text(json.dumps(config))
    session = opened("--model", str(base))
    assert str(session.sampling) == "temperature 0.5, top_p 0.9, repetition_penalty 1.1"
    assert 9 in session.limits.stop_ids
    assert opened("--model", str(base), "--temperature", "0").sampling.greedy
    assert not session.notes
    (base / "generation_config.json").write_text(json.dumps({"num_beams": 4, "min_length": 0}))
    assert opened("--model", str(base)).notes == [
        "generation_config.json: num_beams not used; tessera does not offer it"
    ]


def test_question_separates_prompt_and_label(base: Path) -> None:
    session = opened("--model", str(base), "--system", "Be brief.")
    question = session.question(ROW)
    assert question.labels == "a test"
    text = session.encoder.renderer.decode(question.encoded.tokens.tolist())
    wanted = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwhat is this?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text == wanted
    assert session.question({"query": "what is this?"}).encoded.tokens.tolist() == question.encoded.tokens.tolist()
    with pytest.raises(BadRow, match="nothing to answer"):
        session.question({"text": "a document"})
    with pytest.raises(BadRow, match="are more than --max_length 2047"):
        session.question({"query": "x" * 3000})


def test_quantised_base(base: Path, tmp_path: Path) -> None:
    """An adapter trained over a four-bit base is used over the same four-bit base."""
    pytest.importorskip("bitsandbytes")
    run = run_of("sft", model=str(base), dataset=("rows.jsonl",), quant_method="bnb", quant_bits=4)
    source = door.describe(run.model)
    module = door.load(source, dtype=torch.float32, device=torch.device("cpu"))
    quantisation = adapt.quant.requested(run.model, run.adapt)
    adaptation = adapt.apply(module, run.adapt, source.plan, seed=1, quantisation=quantisation)
    adapt.save_adapter(adapt.adapter_tensors(module, adaptation), adaptation, tmp_path / "a", base_model=str(base))
    (tmp_path / "a" / "args.json").write_text(json.dumps(run.to_json()))
    batch = ref.batch_of(ref.config_of("qwen3"), [[13], [5]])
    used = load(resolve(["infer", "--adapters", str(tmp_path / "a")], {}), source, torch.device("cpu"))
    assert isinstance(used, VLM)
    assert isinstance(module, VLM)
    with torch.no_grad():
        assert torch.equal(ref.logits_of(used, batch), ref.logits_of(module.eval(), batch))
