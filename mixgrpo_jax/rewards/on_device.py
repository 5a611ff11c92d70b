"""Rewards that are a program on the device, with a gradient: learned models, and formulas."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mixgrpo_jax.rewards import probe
from mixgrpo_jax.rewards.contract import Differentiable, Images, Reward


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
    """A differentiable `Reward.score`: one program from bytes to scores, compiled once for a batch's shape.

    It runs where its images are: those that are sharded over a mesh are scored in their places, and others are dealt
    out over the mesh that is set, if their number divides. Each of its devices keeps a part of the parameters, and has
    all of them only while the program runs.

    Attributes:
        function: `(params, images, inputs) -> scores [B]`, pure JAX, of images [B, H, W, 3], uint8 or float from 0 to
            255; differentiable in float ones, which are neither rounded nor clipped.
        params: of the model, on the host; or their shapes, of a model that is not to run, see `lower`. {} if none.
        inputs: `(prompts, metadata) ->` the function's inputs, a tree of arrays with leading axis B, or None.
    """

    function: Callable[..., jax.Array]
    params: Any
    inputs: Callable[[list[str], list[dict]], Any]

    def __call__(self, images: Images, prompts: list[str], metadata: list[dict]) -> jax.Array:
        """Scores [B]."""
        images = _spread(images)
        mesh: Any = images.sharding.mesh if isinstance(images.sharding, NamedSharding) else None
        return self._program(mesh, self._placed(mesh), images, self.inputs(prompts, metadata))

    def lower(self, images: int, size: Sequence[int], mesh: Mesh) -> tuple[jax.stages.Lowered, Any]:
        """The program for so many images of `size` over a mesh, and its parameters' shapes as they lie there."""
        parts = _parts(self.params, mesh)
        params = jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), self.params, parts)
        dealt = NamedSharding(mesh, P(mesh.axis_names) if images % mesh.size == 0 else P())
        pixels = jax.ShapeDtypeStruct((images, *size, 3), np.uint8, sharding=dealt)
        return self._program.lower(mesh, params, pixels, self.inputs([""] * images, [{}] * images)), params

    # Properties, so that each model has its own: several take turns, chunk by chunk.
    @functools.cached_property
    def _program(self) -> Any:
        def run(mesh: Mesh | None, params: Any, images: jax.Array, inputs: Any) -> jax.Array:
            return self.function(params if mesh is None else _whole(params, mesh), images, inputs)

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


def _whole(params: Any, mesh: Mesh) -> Any:
    """Inside a program: parameters gathered from their parts."""
    return jax.lax.with_sharding_constraint(params, NamedSharding(mesh, P()))


def _spread(images: Images) -> jax.Array:
    if isinstance(images, jax.Array):
        return images
    mesh = jax.sharding.get_mesh()
    dealt = not mesh.empty and len(images) % mesh.size == 0
    return jax.device_put(images, NamedSharding(mesh, P(mesh.axis_names)) if dealt else None)


class Weighted(NamedTuple):
    """sum_k w_k R_k of differentiable rewards, for a program that differentiates it.

    function: `(params, images, inputs) -> (sum [B], {name: R_k [B]})`, pure JAX, in fp32, of images [B, H, W, 3], float
        from 0 to 255, in which it is differentiable. It gathers the parameters from their parts.
    params: {name: parameters}, cut over the mesh.
    inputs: `(prompts, metadata) -> {name: inputs}`, on the host; trees of arrays with leading axis B.
    """

    function: Callable[[Any, jax.Array, Any], tuple[jax.Array, dict[str, jax.Array]]]
    params: dict[str, Any]
    inputs: Callable[[list[str], list[dict]], dict[str, Any]]


def differentiable(rewards: Sequence[Reward], weights: Mapping[str, float]) -> dict[str, Differentiable]:
    """By name, what of the rewards with a positive weight is differentiated; raises as `weighted` does."""
    scores = {reward.name: reward.differentiable for reward in rewards if weights.get(reward.name, 0) > 0}
    if not scores:
        raise ValueError(f"rewards={dict(weights)}: give one a positive weight")
    parts: dict[str, Differentiable] = {}
    for name, part in scores.items():
        if part is None:
            raise ValueError(
                f"rewards.{name}={weights[name]}: this reward has no gradient in the images, which the objective "
                "needs; only watch it (`watched`), or train on one that has, such as ocr_dense, colour or a learned one"
            )
        parts[name] = part
    return parts


def weighted(rewards: Sequence[Reward], weights: Mapping[str, float], mesh: Mesh) -> Weighted:
    """The weighted sum of rewards as a function with a gradient in the images.

    Args:
        rewards: built ones. Those without a positive weight are left out.
        weights: by reward, as in a config's `rewards`; used as they are.
        mesh: of the program, over all processes. Each device keeps a part of the parameters; where they are shapes,
            they stay shapes, with their places.

    Raises:
        ValueError: a reward with a positive weight has no gradient, or none has a positive weight.
    """
    parts = differentiable(rewards, weights)

    def function(params: Any, images: jax.Array, inputs: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores = {
            name: part.function(_whole(params[name], mesh), images, inputs[name]).astype(jnp.float32)
            for name, part in parts.items()
        }
        return sum((weights[name] * score for name, score in scores.items()), jnp.zeros(len(images))), scores

    return Weighted(
        function,
        {name: _put(part.params, mesh) for name, part in parts.items()},
        lambda prompts, metadata: {name: part.inputs(prompts, metadata) for name, part in parts.items()},
    )


def _put(params: Any, mesh: Mesh) -> Any:
    """Parameters in parts over a mesh whose devices may be several processes'; each process has them all."""

    def put(leaf: Any, at: NamedSharding) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)
        return jax.make_array_from_callback(leaf.shape, at, lambda index: np.asarray(leaf)[index])

    return jax.tree.map(put, params, _parts(params, mesh))


def build(
    name: str, function: Callable, params: Any, inputs: Callable[[list[str], list[dict]], Any], options: Options
) -> Reward:
    """The reward of an `OnDevice` score. Raises ValueError for an unknown option, or a probe that fails."""
    if unknown := sorted(options.keys() - Options.__annotations__):
        raise ValueError(
            f"reward {name!r} has no option {', '.join(unknown)}: it takes {', '.join(Options.__annotations__)}"
        )
    reward = Reward(name, "device", OnDevice(function, params, inputs))
    if (expected := options.get("probe")) is not None:
        probe.check(reward, expected, options.get("tolerance", probe.TOLERANCE))
    return reward
