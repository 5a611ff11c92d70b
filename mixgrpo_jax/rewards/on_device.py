"""Rewards that are a model on the device."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import jax
from jax.sharding import NamedSharding
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
    out over the mesh that is set, if their number divides. Parameters are put on every device of it, once.

    Attributes:
        function: `(params, images, tokens) -> scores`, differentiable in float images.
        params: of the model, on the host.
        tokenize: prompts -> the function's tokens.
    """

    function: Callable[..., jax.Array]
    params: Any
    tokenize: Callable[[list[str]], Any]

    def __call__(self, images: Images, prompts: list[str], metadata: list[dict]) -> jax.Array:
        """Scores [B]."""
        del metadata
        images = _spread(images)
        sharding = images.sharding
        everywhere = NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else None
        return self._program(self._placed(everywhere), images, self.tokenize(prompts))

    @functools.cached_property
    def _program(self) -> Callable[..., jax.Array]:
        return jax.jit(self.function)

    @functools.lru_cache(maxsize=1)  # noqa: B019  (as long-lived as the parameters that it holds)
    def _placed(self, sharding: NamedSharding | None) -> Any:
        return jax.device_put(self.params, sharding)


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
