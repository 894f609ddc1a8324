"""TRL's SFTTrainer on the benchmark's rows, as its documentation shows it: model, dataset, processor, config.

Weights are float32, the autocast dtype as asked, gradient checkpointing off (TRL's default is on, and slower).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import vision_ops  # beside this file


def main() -> None:
    """Train; SFTTrainer prints a line with the loss after every step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    operators = vision_ops.declare()
    import torch
    from datasets import Dataset, Features, Image, List, Value
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
    from trl import SFTConfig, SFTTrainer

    features = Features(
        {"messages": List({"role": Value("string"), "content": Value("string")}), "images": List(Image())}
    )
    rows = [json.loads(text) for text in args.dataset.read_text().splitlines()]
    for row in rows:
        for message in row["messages"]:
            message["content"] = message["content"].replace("<image>", "")
    dataset = Dataset.from_list(rows, features=features)
    bf16 = args.dtype == "bfloat16"
    config = SFTConfig(
        output_dir=args.output_dir, per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulation,
        max_steps=args.steps, learning_rate=1e-5, lr_scheduler_type="constant", weight_decay=0.1, adam_beta2=0.95,
        optim="adamw_torch_fused", bf16=bf16, fp16=False, use_cpu=True, gradient_checkpointing=False, logging_steps=1,
        save_strategy="no", report_to="none", max_length=None, train_sampling_strategy="sequential", seed=0,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(args.model)
    SFTTrainer(model, args=config, train_dataset=dataset, processing_class=processor).train()
    del operators


if __name__ == "__main__":
    main()
