"""Norm, rotation and patch embedding against the formulas they stand for, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tessera.config.errors import UserError
from tessera.models.layers import PatchEmbed, RMSNorm, gated
from tessera.models.rope import Rope, RopeConfig, rotate


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * wide.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_the_formula(dtype: torch.dtype) -> None:
    norm = RMSNorm(16, 1e-6)
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 16).to(dtype).requires_grad_()
    assert torch.equal(norm(x), plain_norm(x, norm.weight, 1e-6))
    weight = torch.randn(3, 5, 16)
    mine = torch.autograd.grad((norm(x).float() * weight).sum(), [x, norm.weight])
    expected = torch.autograd.grad((plain_norm(x, norm.weight, 1e-6).float() * weight).sum(), [x, norm.weight])
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for a, b in zip(mine, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_norm_frozen_weight_and_frozen_input() -> None:
    norm = RMSNorm(4, 1e-6)
    norm.requires_grad_(False)
    x = torch.randn(2, 4, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and norm.weight.grad is None
    norm.requires_grad_(True)
    norm(x.detach()).sum().backward()
    assert norm.weight.grad is not None


def test_rotation_and_its_gradient() -> None:
    rope = Rope(RopeConfig(theta=100.0), 8)
    angles = rope.angles(torch.tensor([0, 3, 11]), torch.float32)
    x = torch.randn(3, 2, 8, requires_grad=True)
    cos, sin = torch.cat([angles.cos] * 2, -1), torch.cat([angles.sin] * 2, -1)
    half = torch.cat([-x[..., 4:], x[..., :4]], -1)
    expected = x * cos + half * sin
    torch.testing.assert_close(rotate(x, x, angles)[0], expected)
    assert torch.equal(rotate(x, x, angles)[0][0], x[0])
    weight = torch.randn(3, 2, 8)
    (mine,) = torch.autograd.grad((rotate(x, x, angles)[0] * weight).sum(), x)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("interleaved", [False, True])
def test_multimodal_positions_follow_their_axes(interleaved: bool) -> None:
    rope = Rope(RopeConfig(theta=100.0, sections=(2, 1, 1), interleaved=interleaved), 8)
    same = torch.tensor([[4], [4], [4]])
    assert torch.equal(rope.angles(same, torch.float32).cos, rope.angles(same[0], torch.float32).cos)
    plain = Rope(RopeConfig(theta=100.0), 8)
    cos = rope.angles(torch.tensor([[1], [2], [3]]), torch.float32).cos[0, 0]
    owners = [1, 2, 3, 1] if interleaved else [1, 1, 2, 3]
    for index, position in enumerate(owners):
        assert cos[index] == plain.angles(torch.tensor([position]), torch.float32).cos[0, 0, index]


def test_unsupported_rope_says_so() -> None:
    with pytest.raises(UserError, match="rope_type 'yarn' is not supported"):
        Rope(RopeConfig(theta=1e4, kind="yarn", scaling={"factor": 4.0}), 8)
    with pytest.raises(UserError, match="mrope_section"):
        Rope(RopeConfig(theta=1e4, sections=(2, 2, 2)), 8)


def test_constants_survive_the_meta_device() -> None:
    with torch.device("meta"):
        rope = Rope(RopeConfig(theta=1e4, sections=(2, 1, 1)), 8)
    assert rope.angles(torch.arange(3), torch.float32).cos.isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
def test_patch_embedding_is_the_convolution(bias: bool) -> None:
    conv = nn.Conv3d(3, 10, (2, 4, 4), stride=(2, 4, 4), bias=bias)
    patches = torch.randn(7, 3 * 2 * 4 * 4)
    expected = conv(patches.view(-1, 3, 2, 4, 4)).view(-1, 10)
    embed = PatchEmbed(3, 2, 4, 10, bias)
    embed.proj.load_state_dict(conv.state_dict())
    last = patches.view(-1, 3, 2, 4, 4).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(embed(last.flatten(1)), expected, rtol=1e-5, atol=1e-6)
    frame = torch.randn(7, 3, 1, 4, 4)
    twice = conv(frame.expand(7, 3, 2, 4, 4)).view(-1, 10)
    torch.testing.assert_close(embed(frame.permute(0, 2, 3, 4, 1).flatten(1)), twice, rtol=1e-5, atol=1e-6)
    assert dict(embed.named_parameters()).keys() == {"proj.weight"} | ({"proj.bias"} if bias else set())


@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_same_bits(partial: float, dtype: torch.dtype) -> None:
    """The shorter ways that inference takes through norms, rotations and gates change nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 96, generator=generator).to(dtype)
    q, k = (torch.randn(7, heads, 32, generator=generator).to(dtype) for heads in (6, 2))
    norm, rope = RMSNorm(96, 1e-6), Rope(RopeConfig(1e4, partial=partial), 32)
    with torch.no_grad():
        norm.weight.add_(torch.randn(96, generator=generator))

    def computed() -> list[torch.Tensor]:
        turned = rotate(q, k, rope.angles(torch.arange(7), dtype))
        return [norm(x), *turned, gated(x, x.flip(0))]

    learning = computed()
    with torch.inference_mode():
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(computed(), learning, strict=True))
