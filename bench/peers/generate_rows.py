"""Questions about images answered one by one with ``transformers.generate``.

python bench/peers/generate_rows.py MODEL ROWS.jsonl MAX_NEW_TOKENS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import vision_ops  # beside this file


def main(model_dir: str, rows: str, tokens: int) -> None:
    """Load the model, answer every row."""
    operators = vision_ops.declare()
    from PIL import Image
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    assert operators is not None
    processor = AutoProcessor.from_pretrained(model_dir)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).eval()
    for line in Path(rows).read_text("utf-8").splitlines():
        row = json.loads(line)
        text = row["messages"][0]["content"].removeprefix("<image>")
        content = [{"type": "image"}, {"type": "text", "text": text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[prompt], images=[Image.open(row["images"][0])], return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
