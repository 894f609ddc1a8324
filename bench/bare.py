"""The bare loop: what one would write by hand over transformers' model, and the yardstick of every ratio here.

float32 weights, bfloat16 autocast where asked, fused AdamW, clipped gradients, padding to the longest row of the
batch, the loss on the assistant's tokens, no gradient checkpointing, transformers' model and image processor as they
come. Rows are taken in file order and start over at the end. ``--data ready`` prepares every batch before the first
step, so that the loop is *only* forward, backward and step (the hardest yardstick); ``--data live`` prepares each one
when it is needed.

After every step it prints one line ``{'loss': ..., 'step': ..., 'tokens': ...}``, as every tool here does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


class Encoder:
    """Rows to padded batches with the checkpoint's tokenizer and transformers' own image processor (PIL)."""

    def __init__(self, model: Path) -> None:
        from tokenizers import Tokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(model)
        self.image_id = int(self.tokenizer.token_to_id("<|image_pad|>") or 0)
        self.pad_id = int(self.tokenizer.token_to_id("<|endoftext|>") or 0)

    def row(self, row: dict[str, Any]) -> tuple[list[int], list[int], Any, Any]:
        """(token ids, labels, pixel rows or None, grids or None) of one row."""
        from PIL import Image

        pixels = grids = None
        if row["images"]:
            images = [Image.open(path).convert("RGB") for path in row["images"]]
            done = self.processor(images=images, return_tensors="pt")
            pixels, grids = done["pixel_values"], done["image_grid_thw"]
        question, answer = (message["content"] for message in row["messages"])
        prompt = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        prompt += question.replace("<image>", IMAGE) + "<|im_end|>\n<|im_start|>assistant\n"
        ids: list[int] = []
        cells = [] if grids is None else [int(grid.prod()) // 4 for grid in grids]
        for token in self.tokenizer.encode(prompt).ids:
            ids += [token] * (cells.pop(0) if token == self.image_id else 1)
        target = self.tokenizer.encode(answer + "<|im_end|>\n").ids
        return ids + target, [-100] * len(ids) + target[:-1] + [-100], pixels, grids

    def batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The keyword arguments of the model's forward for these rows, padded on the right."""
        import torch

        encoded = [self.row(row) for row in rows]
        longest = max(len(ids) for ids, *_ in encoded)
        tokens = torch.full((len(rows), longest), self.pad_id)
        labels = torch.full((len(rows), longest), -100)
        mask = torch.zeros((len(rows), longest), dtype=torch.int64)
        for index, (ids, wanted, _, _) in enumerate(encoded):
            tokens[index, : len(ids)] = torch.tensor(ids)
            labels[index, : len(ids)] = torch.tensor(wanted)
            mask[index, : len(ids)] = 1
        out: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
        out["mm_token_type_ids"] = torch.eq(tokens, self.image_id).long()
        media = [(pixels, grids) for _, _, pixels, grids in encoded if pixels is not None]
        if media:
            out["pixel_values"] = torch.cat([pixels for pixels, _ in media])
            out["image_grid_thw"] = torch.cat([grids for _, grids in media])
        return out


def steps(encoder: Encoder, rows: list[Any], batch: int, accumulation: int, count: int) -> Iterator[list[Any]]:
    """``count`` lists of ``accumulation`` batches over ``rows`` in file order, starting over at the end."""
    position = 0
    for _ in range(count):
        group = []
        for _ in range(accumulation):
            group.append(encoder.batch([rows[(position + i) % len(rows)] for i in range(batch)]))
            position += batch
        yield group


def main() -> None:
    """Train and print a line per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--data", choices=("ready", "live"), default="ready")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="autocast dtype")
    args = parser.parse_args()

    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = [json.loads(text) for text in args.dataset.read_text().splitlines()]
    source: Any = steps(Encoder(args.model), rows, args.batch, args.accumulation, args.steps)
    if args.data == "ready":
        source = list(source)
        print("batches ready", flush=True)
    for number, group in enumerate(source, start=1):
        supervised = sum(int((batch["labels"] != -100).sum()) for batch in group)
        total = 0.0
        for batch in group:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = model(**batch, num_items_in_batch=supervised, use_cache=False).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in group)
        print({"loss": round(total, 5), "step": number, "tokens": tokens}, flush=True)


if __name__ == "__main__":
    main()
