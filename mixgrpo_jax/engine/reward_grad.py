"""Gradients of rewards in the clean samples, through the decoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, lax

from mixgrpo_jax.models.policy import Policy
from mixgrpo_jax.rewards.contract import Reward
from mixgrpo_jax.rewards.on_device import weighted
from mixgrpo_jax.runtime import compiler
from mixgrpo_jax.runtime import mesh as meshes


class RewardGrad:
    """`(frozen, x0 [B, S, C], prompts, metadata) -> scores {name: [B]}, dR/dx0 [B, S, C]`, a program on the whole mesh.

    R is the sum of the differentiable rewards by their weights. Samples are decoded and scored in `chunks` [n, b], see
    `programs.decode_chunks`, where they are: none moves, and memory is that of a chunk. Raises ValueError for a reward
    with a weight that has no gradient.
    """

    def __init__(
        self, policy: Policy, rewards: Sequence[Reward], weights: Mapping[str, float], chunks: np.ndarray, mesh: Any
    ):
        self.weighted, self.mesh, count = weighted(rewards, weights, mesh), mesh, chunks.size
        ways = meshes.batch_ways(mesh) if count % meshes.batch_ways(mesh) == 0 else 1
        function = self.weighted.function

        def split(a: Array) -> Array:  # [B, ...] -> [n, b, ...]
            return a.reshape(ways, len(chunks), -1, *a.shape[1:]).swapaxes(0, 1).reshape(*chunks.shape, *a.shape[1:])

        def join(a: Array) -> Array:
            return a.reshape(len(chunks), ways, -1, *a.shape[2:]).swapaxes(0, 1).reshape(count, *a.shape[2:])

        def reward_grad(vae: Any, params: Any, x0: Array, inputs: Any) -> tuple[dict[str, Array], Array]:
            def total(x: Array, inputs: Any) -> tuple[Array, dict[str, Array]]:
                value, scores = function(params, policy.pixels(vae, x), inputs)
                return value.sum(), scores

            def one(chunk: tuple[Array, Any]) -> tuple[dict[str, Array], Array]:
                (_, scores), gradient = jax.value_and_grad(total, has_aux=True)(*chunk)
                return scores, gradient

            return jax.tree.map(join, lax.map(one, jax.tree.map(split, (x0, inputs))))

        by_sample: Any = meshes.batch_sharding(mesh, count)
        self._program = jax.jit(
            reward_grad,
            out_shardings=(meshes.replicated(mesh), by_sample),
            compiler_options=compiler.options(mesh.devices.flat),
        )

    def __call__(
        self, frozen: Any, x0: Array, prompts: list[str], metadata: list[dict]
    ) -> tuple[dict[str, Array], Array]:
        """See the class; prompts and metadata have one entry a sample, the same on every process."""
        inputs = jax.tree.map(np.asarray, self.weighted.inputs(prompts, metadata))
        return self._program(_vae(frozen), self.weighted.params, x0, meshes.spread(inputs, self.mesh))

    def lower(self, frozen: Any, x0: Any) -> jax.stages.Lowered:
        """The program for parameters and samples that are shapes, with inputs as of empty prompts."""
        inputs = jax.tree.map(np.asarray, self.weighted.inputs([""] * len(x0), [{}] * len(x0)))
        inputs = meshes.placed(inputs, jax.tree.map(lambda a: meshes.batch_sharding(self.mesh, len(a)), inputs))
        return self._program.lower(_vae(frozen), self.weighted.params, x0, inputs)


def _vae(frozen: Any) -> dict[str, Any]:
    return {name: tree for name, tree in frozen.items() if name == "vae"}
