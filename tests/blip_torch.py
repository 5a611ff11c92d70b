"""ImageReward, restated in plain PyTorch over its released tensors' names, and random releases of any size."""

import numpy as np
import pytest

from mixgrpo_jax.models.blip.weights import TABLE, skeleton
from mixgrpo_jax.models.io import weights

torch = pytest.importorskip("torch")
F = torch.nn.functional

SHIFT, SCALE = 0.16717362830052426, 1.0333394966054072


def random_release(config, seed=0):
    """Tensors by name, scaled so that features neither vanish nor grow from block to block."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, tensor in weights.lazy_export(TABLE, lazy_zeros(config)).items():
        noise = rng.normal(size=tensor.shape)
        is_norm_scale = tensor.shape[0] > 1 and len(tensor.shape) == 1 and "norm" in name.lower() and "weight" in name
        fan_in = np.prod(tensor.shape[1:]) if len(tensor.shape) in (2, 4) else 10
        if "embed" in name and "proj" not in name:
            fan_in = 2
        tensors[name] = (is_norm_scale + noise * fan_in**-0.5).astype(np.float32)
    return tensors


def lazy_zeros(config):
    return weights.traverse_util.unflatten_dict(
        {
            path: weights.Lazy(leaf.shape, np.dtype(np.float32), lambda index: None)
            for path, leaf in weights.traverse_util.flatten_dict(skeleton(config)).items()
        }
    )


class ImageReward:
    """Reads a release by name; every method is one equation of the model."""

    def __init__(self, config, release):
        self.config = config
        self.tensors = {name: torch.tensor(tensor) for name, tensor in release.items()}

    def linear(self, name, x):
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def norm(self, name, x, eps):
        return F.layer_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], eps)

    def image_features(self, images):
        """[B, 3, H, W] -> [B, N, D]"""
        config, v = self.config.vision, "blip.visual_encoder"
        kernel, bias = (self.tensors[f"{v}.patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
        x = F.conv2d(images, kernel, bias, stride=config.patch_size).flatten(2).transpose(1, 2)
        first = self.tensors[f"{v}.cls_token"].expand(len(x), -1, -1)
        x = torch.cat([first, x], 1) + self.tensors[f"{v}.pos_embed"]
        for i in range(config.num_hidden_layers):
            block, eps = f"{v}.blocks.{i}", config.layer_norm_eps
            qkv = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, eps)).chunk(3, -1)
            x = x + self.linear(f"{block}.attn.proj", attend(*qkv, config.num_attention_heads))
            h = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, eps))
            x = x + self.linear(f"{block}.mlp.fc2", F.gelu(h))
        return self.norm(f"{v}.norm", x, config.layer_norm_eps)

    def attention(self, name, x, memory, mask):
        eps, heads = self.config.text.layer_norm_eps, self.config.text.num_attention_heads
        q, k, v = (
            self.linear(f"{name}.self.{part}", y) for part, y in (("query", x), ("key", memory), ("value", memory))
        )
        y = self.linear(f"{name}.output.dense", attend(q, k, v, heads, mask))
        return self.norm(f"{name}.output.LayerNorm", x + y, eps)

    def text_features(self, tokens, mask, memory):
        """[B, L], [B, L], [B, N, D] -> [B, L, D']"""
        config, t = self.config.text, "blip.text_encoder"
        words = self.tensors[f"{t}.embeddings.word_embeddings.weight"][tokens]
        x = words + self.tensors[f"{t}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
        x = self.norm(f"{t}.embeddings.LayerNorm", x, config.layer_norm_eps)
        for i in range(config.num_hidden_layers):
            layer = f"{t}.encoder.layer.{i}"
            x = self.attention(f"{layer}.attention", x, x, mask)
            x = self.attention(f"{layer}.crossattention", x, memory, None)
            y = self.linear(f"{layer}.output.dense", F.gelu(self.linear(f"{layer}.intermediate.dense", x)))
            x = self.norm(f"{layer}.output.LayerNorm", x + y, config.layer_norm_eps)
        return x

    def score(self, images, tokens, mask):
        x = self.text_features(tokens, mask, self.image_features(images))[:, 0]
        for layer in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{layer}", x)
        return (x[:, 0] - SHIFT) / SCALE


def attend(q, k, v, heads, mask=None):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        logits = logits - 10_000.0 * (1 - mask.float())[:, None, None]
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
