"""Rewards that are a model on the device."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mixgrpo_jax.rewards import probe
from mixgrpo_jax.rewards.contract import Images, Reward


class Options(TypedDict, total=False):
    """What the builders share.

    dtype: of parameters and matmuls; embeddings are normalised and compared in fp32.
    probe, tolerance: the known score of `probe.picture()`, and how far from it, relatively, a load may be.
    """

    dtype: Any
    probe: float | None
    tolerance: float


@dataclass(frozen=True, eq=False)  # by identity: parameters do not compare
class OnDevice:
    """`Reward.score` of a model on the device: one program from bytes to scores, compiled once for a batch's shape.

    It runs where its images are: those that are sharded over a mesh are scored in their places, and others are dealt
    out over the mesh that is set, if their number divides. Each of its devices keeps a part of the parameters, and has
    all of them only while the program runs.

    Attributes:
        function: `(params, images, tokens) -> scores`, differentiable in float images.
        params: of the model, on the host; or their shapes, of a model that is not to run, see `lower`.
        tokenize: prompts -> the function's tokens.
    """

    function: Callable[..., jax.Array]
    params: Any
    tokenize: Callable[[list[str]], Any]

    def __call__(self, images: Images, prompts: list[str], metadata: list[dict]) -> jax.Array:
        """Scores [B]."""
        del metadata
        images = _spread(images)
        mesh: Any = images.sharding.mesh if isinstance(images.sharding, NamedSharding) else None
        return self._program(mesh, self._placed(mesh), images, self.tokenize(prompts))

    def lower(self, images: int, size: Sequence[int], mesh: Mesh) -> tuple[jax.stages.Lowered, Any]:
        """The program for so many images of `size` over a mesh, and its parameters' shapes as they lie there."""
        parts = _parts(self.params, mesh)
        params = jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), self.params, parts)
        dealt = NamedSharding(mesh, P(mesh.axis_names) if images % mesh.size == 0 else P())
        pixels = jax.ShapeDtypeStruct((images, *size, 3), np.uint8, sharding=dealt)
        return self._program.lower(mesh, params, pixels, self.tokenize([""] * images)), params

    # Properties, so that each model has its own: several take turns, chunk by chunk.
    @functools.cached_property
    def _program(self) -> Any:
        def run(mesh: Mesh | None, params: Any, images: jax.Array, tokens: Any) -> jax.Array:
            if mesh is not None:
                params = jax.lax.with_sharding_constraint(params, NamedSharding(mesh, P()))
            return self.function(params, images, tokens)

        return jax.jit(run, static_argnums=0)

    @functools.cached_property
    def _placed(self) -> Callable[[Mesh | None], Any]:
        @functools.lru_cache(maxsize=1)
        def place(mesh: Mesh | None) -> Any:
            return jax.device_put(self.params, None if mesh is None else _parts(self.params, mesh))

        return place


def _parts(params: Any, mesh: Mesh) -> Any:
    """Shardings that cut the last axis of each parameter over the whole mesh, where it divides."""

    def place(leaf: Any) -> NamedSharding:
        cut = leaf.ndim and leaf.shape[-1] % mesh.size == 0
        return NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), mesh.axis_names) if cut else P())

    return jax.tree.map(place, params)


def _spread(images: Images) -> jax.Array:
    if isinstance(images, jax.Array):
        return images
    mesh = jax.sharding.get_mesh()
    dealt = not mesh.empty and len(images) % mesh.size == 0
    return jax.device_put(images, NamedSharding(mesh, P(mesh.axis_names)) if dealt else None)


def build(name: str, function: Callable, params: Any, tokenize: Callable[[list[str]], Any], options: Options) -> Reward:
    """The reward of an `OnDevice` score. Raises ValueError for an unknown option, or a probe that fails."""
    if unknown := sorted(options.keys() - Options.__annotations__):
        raise ValueError(
            f"reward {name!r} has no option {', '.join(unknown)}: it takes {', '.join(Options.__annotations__)}"
        )
    reward = Reward(name, "device", OnDevice(function, params, tokenize))
    if (expected := options.get("probe")) is not None:
        probe.check(reward, expected, options.get("tolerance", probe.TOLERANCE))
    return reward
