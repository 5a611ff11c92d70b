"""FLUX.1's weights: folders in diffusers' layout, Orbax checkpoints of our own, and the original single file."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mixgrpo_jax.models.flux import release
from mixgrpo_jax.models.flux.model import FluxConfig, Params, init
from mixgrpo_jax.models.io import orbax_io, weights
from mixgrpo_jax.models.io.safetensors_io import SHARD_SIZE, Progress
from mixgrpo_jax.models.io.weights import Rule, linear

CLASS_NAME = "FluxTransformer2DModel"
FILE_STEM = "diffusion_pytorch_model"
CHECKPOINT = "orbax"

DOUBLE = "transformer_blocks.{i}"
SINGLE = "single_transformer_blocks.{i}"


def _embedder(theirs: str, ours: str) -> list[Rule]:
    return [rule for n in ("linear_1", "linear_2") for rule in linear(f"time_text_embed.{theirs}.{n}", f"{ours}/{n}")]


TABLE = [
    *linear("x_embedder", "image_in"),
    *linear("context_embedder", "text_in"),
    *_embedder("timestep_embedder", "time_in"),
    *_embedder("guidance_embedder", "guidance_in"),
    *_embedder("text_embedder", "pooled_in"),
    *linear(f"{DOUBLE}.norm1.linear", "double_blocks/image/modulation"),
    *linear(f"{DOUBLE}.attn.to_q", "double_blocks/image/attention/q"),
    *linear(f"{DOUBLE}.attn.to_k", "double_blocks/image/attention/k"),
    *linear(f"{DOUBLE}.attn.to_v", "double_blocks/image/attention/v"),
    Rule(f"{DOUBLE}.attn.norm_q.weight", "double_blocks/image/attention/q_norm/scale"),
    Rule(f"{DOUBLE}.attn.norm_k.weight", "double_blocks/image/attention/k_norm/scale"),
    *linear(f"{DOUBLE}.attn.to_out.0", "double_blocks/image/attention_out"),
    *linear(f"{DOUBLE}.ff.net.0.proj", "double_blocks/image/mlp_in"),
    *linear(f"{DOUBLE}.ff.net.2", "double_blocks/image/mlp_out"),
    *linear(f"{DOUBLE}.norm1_context.linear", "double_blocks/text/modulation"),
    *linear(f"{DOUBLE}.attn.add_q_proj", "double_blocks/text/attention/q"),
    *linear(f"{DOUBLE}.attn.add_k_proj", "double_blocks/text/attention/k"),
    *linear(f"{DOUBLE}.attn.add_v_proj", "double_blocks/text/attention/v"),
    Rule(f"{DOUBLE}.attn.norm_added_q.weight", "double_blocks/text/attention/q_norm/scale"),
    Rule(f"{DOUBLE}.attn.norm_added_k.weight", "double_blocks/text/attention/k_norm/scale"),
    *linear(f"{DOUBLE}.attn.to_add_out", "double_blocks/text/attention_out"),
    *linear(f"{DOUBLE}.ff_context.net.0.proj", "double_blocks/text/mlp_in"),
    *linear(f"{DOUBLE}.ff_context.net.2", "double_blocks/text/mlp_out"),
    *linear(f"{SINGLE}.norm.linear", "single_blocks/modulation"),
    *linear(f"{SINGLE}.attn.to_q", "single_blocks/attention/q"),
    *linear(f"{SINGLE}.attn.to_k", "single_blocks/attention/k"),
    *linear(f"{SINGLE}.attn.to_v", "single_blocks/attention/v"),
    Rule(f"{SINGLE}.attn.norm_q.weight", "single_blocks/attention/q_norm/scale"),
    Rule(f"{SINGLE}.attn.norm_k.weight", "single_blocks/attention/k_norm/scale"),
    *linear(f"{SINGLE}.proj_mlp", "single_blocks/mlp_in"),
    *linear(f"{SINGLE}.proj_out", "single_blocks/out"),
    *linear("norm_out.linear", "final_modulation"),
    *linear("proj_out", "final_out"),
]


class Source(NamedTuple):
    """A transformer that can be read: config.json's fields as found, and parameters as a tree of `weights.Lazy`.

    `checkpoint` is the folder of an Orbax checkpoint that holds them, None where they are in safetensors.
    """

    config: FluxConfig
    fields: dict[str, Any]
    params: Params
    checkpoint: Path | None = None


@functools.cache
def skeleton(config: FluxConfig) -> Params:
    """Shapes of the parameters."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def open_source(path: str | os.PathLike, dtype: Any = None) -> Source:
    """Opens a transformer: everything is checked, and no data are read yet.

    `path` is a folder that diffusers saved, a folder with config.json and an Orbax checkpoint of our parameters in
    orbax/, or FLUX.1's original single file. The parameters come in `dtype`, or else as stored. Raises ValueError for
    anything else, an unsupported config, or tensors that do not fit the config.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no {path}: give a transformer's folder, or FLUX.1's original .safetensors file")
    if path.is_file():
        config, tensors = release.read_file(path)
        return Source(config, _fields(config), weights.lazy_load(release.TABLE, skeleton(config), tensors, dtype=dtype))
    config, fields = _read_config(path)
    if (path / CHECKPOINT).is_dir():
        params = orbax_io.lazy_restore(path / CHECKPOINT, dtype=dtype)
        weights.check_shapes(skeleton(config), params, str(path / CHECKPOINT))
        return Source(config, fields, params, path / CHECKPOINT)
    tensors = weights.read_safetensors(path)
    return Source(config, fields, weights.lazy_load(TABLE, skeleton(config), tensors, dtype=dtype))


def read_config(path: str | os.PathLike) -> FluxConfig:
    """The sizes of what `open_source` opens, without its tensors. Raises ValueError as it does."""
    path = Path(path)
    return release.read_file(path)[0] if path.is_file() else _read_config(path)[0]


def _read_config(folder: Path) -> tuple[FluxConfig, dict[str, Any]]:
    raw = weights.read_config(folder, {"_class_name": CLASS_NAME})
    config = FluxConfig(**weights.known_fields(FluxConfig, raw))
    if raw.get("patch_size", 1) != 1 or (raw.get("out_channels") or config.in_channels) != config.in_channels:
        raise ValueError(
            f"{folder}: patch_size={raw.get('patch_size')}, out_channels={raw.get('out_channels')} are not supported; "
            f"use a model with patch_size=1 and out_channels=in_channels={config.in_channels}"
        )
    return config, raw


def _fields(config: FluxConfig) -> dict[str, Any]:
    return {"_class_name": CLASS_NAME, "patch_size": 1, **dataclasses.asdict(config)}


def load_folder(
    path: str | os.PathLike, dtype: Any = None, shardings: Callable[[Params], Any] | None = None
) -> tuple[FluxConfig, Params]:
    """Reads what `open_source` opens.

    Args:
      path: a folder as diffusers saves it or as `mixgrpo_jax.convert` writes it, or FLUX.1's original single file.
      dtype: of the parameters; the files' own by default.
      shardings: shapes of the parameters -> their shardings. Each process then reads what its devices hold.

    Returns:
      The config and the parameters, on the host or as sharded.

    Raises:
      ValueError: another model, an unsupported config, or tensors that do not fit the config.
    """
    source = open_source(path, dtype)
    places = None if shardings is None else shardings(skeleton(source.config))
    if source.checkpoint is None or places is None:
        return source.config, weights.place(source.params, places)

    def struct(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return source.config, orbax_io.restore(source.checkpoint, jax.tree.map(struct, source.params, places))


def save_folder(
    folder: str | os.PathLike,
    config: FluxConfig,
    params: Params,
    *,
    fields: Mapping[str, Any] | None = None,
    shard_size: int = SHARD_SIZE,
    progress: Progress = lambda num_bytes: None,
) -> None:
    """Writes a folder that `load_folder` and diffusers' FluxTransformer2DModel.from_pretrained open.

    Args:
      folder: where to; it is made if need be.
      config: sizes of `params`.
      params: arrays, or `weights.Lazy`, of which one block's tensor is held at a time.
      fields: config.json's; made from `config` by default.
      shard_size: bytes above which the tensors are cut into several files with an index.
      progress: called with the bytes of each tensor that was written.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = weights.lazy_export(TABLE, params)
    weights.write_shards(folder, FILE_STEM, tensors, shard_size=shard_size, progress=progress)
    weights.write_config(folder, _fields(config) if fields is None else fields)


def save_checkpoint(
    folder: str | os.PathLike,
    config: FluxConfig,
    params: Params,
    *,
    fields: Mapping[str, Any] | None = None,
    progress: Progress = lambda num_bytes: None,
) -> None:
    """As `save_folder`, with an Orbax checkpoint of our parameters: `Lazy`, of which one is held at a time."""
    orbax_io.save(Path(folder) / CHECKPOINT, params, progress)
    weights.write_config(folder, _fields(config) if fields is None else fields)
