"""One rank of a Megatron job on the CPU: loads a checkpoint, says how far its logits are from given ones, saves it.

    RANK=.. WORLD_SIZE=.. python megatron_job.py <checkpoint root> <config.json> <tokens and logits> <out> <tp> <ep>

Megatron asks for a CUDA device in a few places where none is needed; those calls are answered here.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    """Load, compare, save."""
    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    root, config, answers, out = map(Path, sys.argv[1:5])
    tp, ep = map(int, sys.argv[5:])
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None
    dist.init_process_group("gloo")
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    random.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    moe_utils.te_general_gemm = None
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1 if ep > 1 else tp
    )
    rank = parallel_state.get_tensor_model_parallel_rank()
    fields = json.loads(config.read_text())
    model, metadata = made(fields, tp, ep), {} if "mlp_only_layers" not in fields else {"non_homogeneous_layers": True}
    folder = root / f"iter_{int((root / 'latest_checkpointed_iteration.txt').read_text()):07d}"
    if (folder / "metadata.json").exists():
        held = dist_checkpointing.load(model.sharded_state_dict(metadata=metadata), str(folder))
    else:
        expert = f"_{parallel_state.get_expert_model_parallel_rank():03d}" if ep > 1 else ""
        held = torch.load(folder / f"mp_rank_{rank:02d}{expert}" / "model_optim_rng.pt", weights_only=False)["model"]
    report = model.load_state_dict(held, strict=False)
    assert not [name for name in report.missing_keys if "_extra_state" not in name], report.missing_keys
    tokens, logits = torch.load(answers)
    size = tokens.shape[1]
    mask = torch.triu(torch.ones(size, size, dtype=torch.bool), 1)[None, None]
    with torch.no_grad():
        found = model.eval()(tokens, torch.arange(size)[None], mask)[0]
    part = logits.chunk(tp, -1)[rank]
    print("largest difference", (found - part).abs().max().item(), flush=True)
    folder = out / "iter_0000005"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        (out / "latest_checkpointed_iteration.txt").write_text("5")
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), str(folder))
    dist.destroy_process_group()


def made(fields: dict[str, Any], tp: int, ep: int) -> Any:
    """Megatron's model of a ``config.json``, of its own modules."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    heads, sparse = fields["num_attention_heads"], "num_experts" in fields
    options: dict[str, Any] = {
        "num_layers": fields["num_hidden_layers"], "hidden_size": fields["hidden_size"], "num_attention_heads": heads,
        "num_query_groups": fields["num_key_value_heads"], "ffn_hidden_size": fields["intermediate_size"],
        "kv_channels": fields.get("head_dim", fields["hidden_size"] // heads), "normalization": "RMSNorm",
        "gated_linear_unit": True, "activation_func": torch.nn.functional.silu, "add_bias_linear": False,
        "add_qkv_bias": fields["model_type"] == "qwen2", "qk_layernorm": fields["model_type"].startswith("qwen3"),
        "layernorm_epsilon": fields["rms_norm_eps"], "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "use_cpu_initialization": True, "bias_activation_fusion": False, "apply_rope_fusion": False,
        "masked_softmax_fusion": False, "bias_dropout_fusion": False,
        "tensor_model_parallel_size": tp, "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": 1 if ep > 1 else tp,
    }  # fmt: skip
    if sparse:
        dense = fields["mlp_only_layers"]
        options |= {
            "num_moe_experts": fields["num_experts"], "moe_router_topk": fields["num_experts_per_tok"],
            "moe_ffn_hidden_size": fields["moe_intermediate_size"], "moe_token_dispatcher_type": "allgather",
            "moe_layer_freq": [int(i not in dense) for i in range(fields["num_hidden_layers"])],
            "moe_router_load_balancing_type": "none", "sequence_parallel": False,
        }  # fmt: skip
    config = TransformerConfig(**options)
    if sparse:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    else:
        norms = options["qk_layernorm"]
        spec = get_gpt_layer_local_spec(qk_layernorm=norms, normalization="RMSNorm")
    return GPTModel(
        config, spec, vocab_size=fields["vocab_size"], max_sequence_length=128, position_embedding_type="rope",
        rotary_base=int(fields.get("rope_theta", 10000)),
        share_embeddings_and_output_weights=fields["tie_word_embeddings"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
