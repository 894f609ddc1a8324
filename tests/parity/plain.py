"""A tower of tiles with spare heads, its projector and a decoder of transformers, as plainly as a paper would say it.

Nothing is packed, fused or block-major: a tile is a picture, attention is a softmax, and the two by two patches of a
token are brought together by moving axes about.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainTiles(nn.Module):
    """The model of ``config`` with the values of ``state`` (our names); called and asked like transformers' models."""

    def __init__(self, config: dict[str, Any], state: dict[str, Tensor]) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__()
        self.config = config
        text = {key: value for key, value in config["llm_config"].items() if key != "architectures"}
        self.decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text))
        own = {self.decoder_name(name): value for name, value in state.items()}
        self.decoder.load_state_dict({name: value for name, value in own.items() if name is not None})
        self.seeing = {n: nn.Parameter(v.clone()) for n, v in state.items() if self.decoder_name(n) is None}

    @staticmethod
    def decoder_name(name: str) -> str | None:
        if name.startswith("model.language_model."):
            return name.replace("model.language_model.", "model.", 1)
        return name if name.startswith("lm_head.") else None

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.seeing.items()
        for name, parameter in self.decoder.named_parameters():
            yield name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name, parameter

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, use_cache: bool = False) -> Any:
        return self.decoder(inputs_embeds=self.embedded(input_ids, pixel_values), use_cache=use_cache)

    def generate(self, input_ids: Tensor, pixel_values: Tensor | None = None, **how: Any) -> Tensor:
        embedded = self.embedded(input_ids, pixel_values)
        out: Tensor = self.decoder.generate(input_ids=input_ids, inputs_embeds=embedded, **how)
        return out

    def embedded(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Embeddings of the tokens, those of the image token replaced by the features of the tiles, in order."""
        embedded: Tensor = self.decoder.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embedded
        here = (input_ids == self.config["image_token_id"])[..., None].expand_as(embedded)
        return embedded.masked_scatter(here, self.features(pixel_values))

    def features(self, pixels: Tensor) -> Tensor:
        """``pixels [n, 3, S, S]`` to ``[n * tokens, H]``."""
        w = {name.removeprefix("model."): value for name, value in self.seeing.items()}
        x = self.tower(w, pixels)[:, 1:]
        side = int(x.shape[1] ** 0.5)
        x = x.view(len(x), side // 2, 2, side // 2, 2, -1).permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(0, 2)
        name = "multi_modal_projector"
        x = F.layer_norm(x, x.shape[-1:], w[f"{name}.layer_norm.weight"], w[f"{name}.layer_norm.bias"])
        return F.gelu(x @ w[f"{name}.linear_1.weight"].t()) @ w[f"{name}.linear_2.weight"].t()

    def tower(self, w: dict[str, Tensor], pixels: Tensor) -> Tensor:
        """``pixels [n, 3, S, S]`` to ``[n, 1 + patches, E]``; there is no norm behind the last block."""
        vision, at = self.config["vision_config"], "vision_tower.embeddings"
        projection = f"{at}.patch_embeddings.projection"
        x = F.conv2d(pixels, w[f"{projection}.weight"], w[f"{projection}.bias"], stride=vision["patch_size"])
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([w[f"{at}.cls_token"].expand(len(x), 1, -1), x], dim=1) + w[f"{at}.position_embeddings"]
        for index in range(vision["num_hidden_layers"]):
            name = f"vision_tower.encoder.layer.{index}"
            b = {key.removeprefix(f"{name}."): value for key, value in w.items() if key.startswith(f"{name}.")}
            x = x + b["lambda_1"] * self.attention(b, rms(x, b["layernorm_before.weight"], x.shape[-1]))
            inner = F.gelu(
                F.linear(rms(x, b["layernorm_after.weight"], x.shape[-1]), b["mlp.fc1.weight"], b["mlp.fc1.bias"])
            )
            x = x + b["lambda_2"] * F.linear(inner, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
        return x

    def attention(self, b: dict[str, Tensor], x: Tensor) -> Tensor:
        size = x.shape[-1] // self.config["vision_config"]["num_attention_heads"]
        q, k, v = (x @ b[f"attention.{part}_proj.weight"].t() for part in "qkv")
        q, k = (rms(part, b[f"attention.{name}_norm.weight"], x.shape[-1]) for part, name in ((q, "q"), (k, "k")))
        q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in (q, k, v))
        mixed = (q @ k.transpose(-1, -2) * size**-0.5).softmax(-1) @ v
        out = mixed.transpose(1, 2).flatten(2)
        return F.linear(out, b["attention.projection_layer.weight"], b["attention.projection_layer.bias"])


def rms(x: Tensor, weight: Tensor, counted: int) -> Tensor:
    """RMSNorm by the first ``counted`` entries."""
    return weight * x / (x[..., :counted].square().mean(-1, keepdim=True) + 1e-6).sqrt()
