"""The autoencoder's weights in diffusers' layout: a folder with config.json and one safetensors file."""

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from mixgrpo_jax.models.io import weights
from mixgrpo_jax.models.io.weights import Rule
from mixgrpo_jax.models.vae.model import Params, VAEConfig, flux2_vae, init

CLASS_NAMES = KL, FLUX2 = "AutoencoderKL", "AutoencoderKLFlux2"
FOREIGN = {  # what the one's config.json has, and the other's has not
    KL: ("decoder_block_out_channels", "batch_norm_eps"),
    FLUX2: ("scaling_factor", "shift_factor"),
}
COUNT = "bn.num_batches_tracked"  # of training, an integer
FILE_NAME = "diffusion_pytorch_model.safetensors"
# Older files name the attention's projections differently.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
TO_OURS = {2: (1, 0), 4: (2, 3, 1, 0)}  # linear and convolution kernels, by their number of axes


def _release(config: VAEConfig) -> dict[str, Any]:
    """What config.json says besides the sizes; other values are of models that this one cannot run."""
    stages, name = len(config.block_out_channels), KL if config.batch_norm_eps is None else FLUX2
    return {
        "_class_name": name,
        "act_fn": "silu",
        "down_block_types": stages * ["DownEncoderBlock2D"],
        "up_block_types": stages * ["UpDecoderBlock2D"],
        **({"latents_mean": None, "latents_std": None} if name == KL else {"patch_size": [2, 2]}),
    }


def _skeleton(config: VAEConfig) -> Params:
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def _table(config: VAEConfig) -> list[Rule]:
    return [_rule(path, leaf) for path, leaf in traverse_util.flatten_dict(_skeleton(config), sep="/").items()]


def _rule(path: str, leaf: jax.ShapeDtypeStruct) -> Rule:
    module, _, name = path.rpartition("/")
    theirs = "weight" if name in ("kernel", "scale") else name
    return Rule(f"{module.replace('/', '.')}.{theirs}", path, TO_OURS.get(leaf.ndim))


def read_config(folder: str | os.PathLike) -> VAEConfig:
    """The sizes in a folder's config.json. Raises ValueError for another model or an unsupported config."""
    raw = weights.read_config(folder, {})
    if (name := raw.get("_class_name")) not in CLASS_NAMES:
        file = Path(folder) / "config.json"
        raise ValueError(f"{file} has _class_name={name!r}, and this model needs {' or '.join(CLASS_NAMES)}")
    defaults = dataclasses.asdict(flux2_vae() if name == FLUX2 else VAEConfig())
    sizes = defaults | {n: raw[n] for n in raw if n not in FOREIGN[name]}
    sizes["decoder_block_out_channels"] = sizes["decoder_block_out_channels"] or ()  # null in files
    config = weights.sized(VAEConfig, folder, sizes)
    weights.read_config(folder, _release(config))
    return config


def load_folder(folder: str | os.PathLike, dtype: Any = None) -> tuple[VAEConfig, Params]:
    """Reads an autoencoder as diffusers saves it, today's or an older one with `query`, `key`, `value`, `proj_attn`.

    Returns the config and the parameters as host arrays, in `dtype` or else in the files' own. Raises ValueError for a
    folder of another model, an unsupported config, or tensors that do not fit the config.
    """
    config = read_config(folder)
    tensors = {_current(name): tensor for name, tensor in weights.read_safetensors(folder).items()}
    return config, weights.load(_table(config), _skeleton(config), tensors, dtype=dtype, ignore=(COUNT,))


def _current(name: str) -> str:
    return re.sub(r"\.(query|key|value|proj_attn)\.", lambda match: f".{RENAMED[match[1]]}.", name)


def save_folder(folder: str | os.PathLike, config: VAEConfig, params: Params) -> None:
    """Writes a folder that `load_folder` and from_pretrained of diffusers' class open."""
    release, tensors = _release(config), weights.export(_table(config), params)
    sizes = {n: size for n, size in dataclasses.asdict(config).items() if n not in FOREIGN[release["_class_name"]]}
    weights.write_config(folder, release | {n: None if size == () else size for n, size in sizes.items()})
    count = {} if config.batch_norm_eps is None else {COUNT: np.zeros((), np.int64)}
    weights.write_safetensors(Path(folder) / FILE_NAME, tensors | count)
