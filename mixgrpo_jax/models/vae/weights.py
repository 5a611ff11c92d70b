"""The autoencoder's weights in diffusers' layout: a folder with config.json and one safetensors file."""

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util

from mixgrpo_jax.models.io import weights
from mixgrpo_jax.models.io.weights import Rule
from mixgrpo_jax.models.vae.model import Params, VAEConfig, init

CLASS_NAME = "AutoencoderKL"
FILE_NAME = "diffusion_pytorch_model.safetensors"
# Older files name the attention's projections differently.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
TO_OURS = {2: (1, 0), 4: (2, 3, 1, 0)}  # linear and convolution kernels, by their number of axes


def _release(config: VAEConfig) -> dict[str, Any]:
    """What config.json says besides the sizes; other values are of models that this one cannot run."""
    stages = len(config.block_out_channels)
    return {
        "_class_name": CLASS_NAME,
        "act_fn": "silu",
        "down_block_types": stages * ["DownEncoderBlock2D"],
        "up_block_types": stages * ["UpDecoderBlock2D"],
        "latents_mean": None,
        "latents_std": None,
    }


def _skeleton(config: VAEConfig) -> Params:
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def _table(config: VAEConfig) -> list[Rule]:
    return [_rule(path, leaf) for path, leaf in traverse_util.flatten_dict(_skeleton(config), sep="/").items()]


def _rule(path: str, leaf: jax.ShapeDtypeStruct) -> Rule:
    module, _, name = path.rpartition("/")
    return Rule(f"{module.replace('/', '.')}.{'bias' if name == 'bias' else 'weight'}", path, TO_OURS.get(leaf.ndim))


def read_config(folder: str | os.PathLike) -> VAEConfig:
    """The sizes in a folder's config.json. Raises ValueError for another model or an unsupported config."""
    raw = weights.read_config(folder, {"_class_name": CLASS_NAME})
    config = weights.sized(VAEConfig, folder, raw)
    weights.read_config(folder, _release(config))
    return config


def load_folder(folder: str | os.PathLike, dtype: Any = None) -> tuple[VAEConfig, Params]:
    """Reads an autoencoder as diffusers saves it, today's or an older one with `query`, `key`, `value`, `proj_attn`.

    Returns the config and the parameters as host arrays, in `dtype` or else in the files' own. Raises ValueError for a
    folder of another model, an unsupported config, or tensors that do not fit the config.
    """
    config = read_config(folder)
    tensors = {_current(name): tensor for name, tensor in weights.read_safetensors(folder).items()}
    return config, weights.load(_table(config), _skeleton(config), tensors, dtype=dtype)


def _current(name: str) -> str:
    return re.sub(r"\.(query|key|value|proj_attn)\.", lambda match: f".{RENAMED[match[1]]}.", name)


def save_folder(folder: str | os.PathLike, config: VAEConfig, params: Params) -> None:
    """Writes a folder that `load_folder` and diffusers' AutoencoderKL.from_pretrained open."""
    weights.write_config(folder, _release(config) | dataclasses.asdict(config))
    weights.write_safetensors(Path(folder) / FILE_NAME, weights.export(_table(config), params))
