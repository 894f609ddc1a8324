"""What a Megatron checkpoint is to be like, and what its readers want to be told beside the tensors."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tessera.config.errors import UserError
from tessera.contract.model import HFConfig
from tessera.weights.megatron.checkpoint import TORCH_DIST
from tessera.weights.megatron.ranks import Ranks
from tessera.weights.megatron.table import Table


@dataclass(frozen=True, slots=True)
class Options:
    """What is written: ``format`` torch_dist or torch; ``stacked`` None: as the dialect's own jobs would.

    ``local``: under the names of Megatron's own modules, not Transformer Engine's.
    The vocabulary has ``padded_vocab_size`` rows, or the next multiple of ``vocab_divisor`` times ``ranks.tp``; of
    neither, the model's own. ``iteration`` None is a release. ``dtype`` overrides the type of floating tensors.
    """

    dialect: str = "swift"
    format: str = TORCH_DIST
    stacked: bool | None = None
    ranks: Ranks = field(default_factory=Ranks)
    padded_vocab_size: int | None = None
    vocab_divisor: int | None = None
    iteration: int | None = 1
    dtype: torch.dtype | None = None
    local: bool = False


def vocabulary(table: Table, options: Options) -> int | None:
    """Rows of the embedding; UserError if they are fewer than the tokens."""
    if table.decoder is None:
        return None
    tokens = table.decoder.vocab
    if options.padded_vocab_size is not None:
        if options.padded_vocab_size < tokens:
            raise UserError(f"--padded_vocab_size {options.padded_vocab_size}: the model has {tokens} tokens")
        return options.padded_vocab_size
    if options.vocab_divisor is None:
        return None
    step = options.vocab_divisor * options.ranks.tp
    return -(-tokens // step) * step


def stacks(table: Table, options: Options) -> bool:
    """Whether equal layers become one tensor: as jobs of the dialect do it, unless told."""
    if options.stacked is not None:
        return options.stacked
    uniform = not table.sparse or len(table.sparse) == table.layers
    return uniform and not (options.dialect == "pai" and table.sparse)


def common(table: Table, dtypes: Mapping[str, torch.dtype], options: Options, config: HFConfig) -> dict[str, Any]:
    """What is not a tensor: the arguments that readers compare with their own, and no training state."""
    state = {"checkpoint_version": 3.0, "iteration": options.iteration or 0, "content_metadata": {}}
    if table.decoder is None:
        return state
    decoder, ranks, moe = table.decoder, options.ranks, table.decoder.moe
    dtype = dtypes[table.embedding]
    text = {**config, **config.get("text_config", {})}
    implementation = "local" if options.local else "transformer_engine"
    args = Namespace(
        num_layers=decoder.layers, hidden_size=decoder.hidden, ffn_hidden_size=decoder.inner,
        num_attention_heads=decoder.heads, num_query_groups=decoder.kv_heads, kv_channels=decoder.head_dim,
        group_query_attention=decoder.kv_heads != decoder.heads, add_position_embedding=True,
        position_embedding_type="rope", max_position_embeddings=text.get("max_position_embeddings"),
        rotary_base=int(decoder.rope.theta), normalization="RMSNorm", norm_epsilon=decoder.eps, swiglu=True,
        add_bias_linear=decoder.mlp_bias, add_qkv_bias=decoder.qkv_bias, qk_layernorm=decoder.qk_norm,
        untie_embeddings_and_output_weights=not decoder.tied, padded_vocab_size=table.rows[table.embedding].shape[0],
        make_vocab_size_divisible_by=options.vocab_divisor or 1, params_dtype=dtype,
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16,
        tensor_model_parallel_size=ranks.tp, pipeline_model_parallel_size=ranks.pp,
        expert_model_parallel_size=ranks.ep, expert_tensor_parallel_size=ranks.expert_tp,
        num_experts=moe.experts if moe else None, moe_router_topk=moe.top_k if moe else 2,
        moe_ffn_hidden_size=moe.inner if moe else None,
        world_size=max(ranks.tp, ranks.expert_tp * ranks.ep) * ranks.pp, data_parallel_size=1,
        iteration=options.iteration or 0, ckpt_format=options.format, transformer_impl=implementation,
        no_save_optim=True, no_save_rng=True,
        consumed_train_samples=0, consumed_valid_samples=0, skipped_train_samples=0,
    )  # fmt: skip
    return {"args": args, **state}
