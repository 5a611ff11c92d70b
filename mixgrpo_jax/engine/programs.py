"""The compiled programs of an iteration: prompt features, rollout, decoding and update, on a mesh."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from mixgrpo_jax.config import BatchSizes, Optimizer, Settings, refusing, share
from mixgrpo_jax.flow import plans
from mixgrpo_jax.flow.plans import Layout, Plan
from mixgrpo_jax.flow.rollout import Rollout, Rows, initial_noise, rollout
from mixgrpo_jax.models import families
from mixgrpo_jax.models.families import Parts, Rules
from mixgrpo_jax.models.policy import Policy
from mixgrpo_jax.models.trainable import Trainable, attachment, trainable_shapes
from mixgrpo_jax.rl import replay, select
from mixgrpo_jax.rl.marble import mix
from mixgrpo_jax.rl.samples import Roles, Tools
from mixgrpo_jax.rl.terms import make_terms
from mixgrpo_jax.rl.update import Batch, MakeRoles, TrainState, init_state, make_update
from mixgrpo_jax.runtime import chips, compiler
from mixgrpo_jax.runtime import mesh as meshes
from mixgrpo_jax.runtime.metrics import compilations


class Programs(NamedTuple):
    """Jitted functions. `trained` is what the optimiser changes, `frozen` the policy's other parameters by part:
    the text encoders, the VAE, and "base", see `Trainable`."""

    init: Any  # trained -> TrainState; takes the buffers over
    features: Any  # frozen, tokens -> cond
    rollout: Any  # trained, frozen, plan, cond, key -> Rollout
    decode: Any  # frozen, x0 [B, S, C], k -> images [b, H, W, 3] uint8 of the samples chunks[k]
    join: Any  # Batch, Plan, Batch, Plan -> those of all their groups
    keep: Any  # Batch, Plan, positions [K, G] -> those of some groups
    update: Any  # TrainState, base, Batch, plan, chosen [P', G'] -> TrainState, metrics
    chunks: np.ndarray  # [n, b]: the samples that are decoded at a time
    places: Rollout  # shardings of a rollout
    compiled: int  # versions of a rollout or an update that the process had compiled before

    def compilations(self) -> int:
        """Versions of the rollout and of the update compiled so far: two, if nothing moved that should be data."""
        return compilations("draw_samples", "update_policy") - self.compiled


def make_programs(settings: Settings, parts: Parts, trainable: Trainable, mesh: Any) -> Programs:
    """Jit the iteration's programs for a mesh: parameters by the model's rules, samples over the batch axes."""
    settings = fit(settings, parts, mesh)
    policy = parts.family.make(parts, settings.model)
    if (tokens := settings.model.text_length) % mesh.shape["context"]:  # those of a picture are padded
        raise ValueError(
            f"mesh.context={mesh.shape['context']} does not divide the {tokens} tokens of model.text_length: choose a "
            "divisor"
        )
    whole: Any = meshes.replicated(mesh)
    chunks = decode_chunks(settings.samples, settings.batch.decode, meshes.batch_ways(mesh))
    sampled = rollout_places(settings, mesh)

    fresh = _fresh(settings, parts)
    place = meshes.shardings(jax.eval_shape(fresh, trainable.params), parts.family.rules, mesh)
    jit: Any = functools.partial(jax.jit, compiler_options=compiler.options(mesh.devices.flat))
    return Programs(
        init=jit(fresh, out_shardings=place, donate_argnums=(0,)),
        features=jit(policy.features, out_shardings=meshes.batch_sharding(mesh, settings.batch.prompts)),
        rollout=jit(make_rollout(settings, parts, trainable.attach, mesh), out_shardings=sampled),
        decode=jit(
            functools.partial(_decode, policy, len(chunks), meshes.batch_ways(mesh)),
            out_shardings=meshes.batch_sharding(mesh, chunks.shape[1]),
        ),
        join=jit(functools.partial(_laid, mesh, replay.join)),
        keep=jit(functools.partial(_laid, mesh, functools.partial(replay.keep, group=settings.batch.group))),
        # The state must leave as it came: in another layout, it would compile both programs again.
        update=jit(
            _make_update(settings, parts, policy, trainable.attach, meshes.batch_ways(mesh)),
            donate_argnums=(0,),
            out_shardings=(place, whole),
        ),
        chunks=chunks,
        places=sampled,
        compiled=compilations("draw_samples", "update_policy"),
    )


def group_places(mesh: Any, batch: Batch, plan: Plan) -> tuple[Any, Any]:
    """Shardings of whole groups that an update is given: samples over the batch axes."""

    def place(axis: int) -> Callable[[Any], Any]:
        return lambda a: meshes.batch_sharding(mesh, a.shape[axis], axis)

    fields = (jax.tree.map(place(axis), field) for axis, field in zip(replay.AXES, batch))
    return Batch(*fields), jax.tree.map(lambda a: meshes.replicated(mesh), plan)


def _laid(mesh: Any, made: Callable, *given: Any) -> tuple[Batch, Plan]:
    """Groups that a function makes, laid out as those that it made before."""
    groups = made(*given)
    return jax.lax.with_sharding_constraint(groups, group_places(mesh, *groups))


def idle(settings: Settings, mesh: Any) -> list[str]:
    """What of a config leaves devices of a mesh without work of their own, and what would help."""
    ways, found = meshes.batch_ways(mesh), []
    for what, size in (("an iteration", settings.samples), ("an update", settings.update_samples)):
        if size % ways:
            common = math.gcd(size, ways)
            found.append(
                f"the {size} samples of {what} do not divide over data x fsdp = {ways}: every device computes all of "
                f"them. Choose batch.prompts, group and updates so that {ways} divides them, or mesh.context=-1 beside "
                f"mesh.fsdp=-1, for data x fsdp = {common}"
            )
    if (size := settings.evaluation.batch) % ways:
        found.append(
            f"evaluation.batch={size} does not divide over data x fsdp = {ways}: every device draws all of it. Choose "
            "a multiple"
        )
    return found


def decode_chunks(samples: int, at_most: int, ways: int) -> np.ndarray:
    """Which samples are decoded together, [n, b]: so many of those that each of `ways` devices holds, see `share`.

    >>> decode_chunks(8, 2, ways=2).tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    size, ways = share(samples, at_most, ways), ways if samples % ways == 0 else 1
    return np.arange(samples).reshape(ways, -1, size).swapaxes(0, 1).reshape(-1, ways * size)


def _decode(policy: Policy, num_chunks: int, ways: int, frozen: Any, x0: Array, chunk: Array) -> Array:
    """Pictures of the samples that `decode_chunks` has in row `chunk`."""
    ways = ways if len(x0) % ways == 0 else 1
    parts = x0.reshape(ways, num_chunks, -1, *x0.shape[1:])  # as it is sharded, so that no sample moves
    x = jax.lax.dynamic_index_in_dim(parts, chunk, axis=1, keepdims=False)
    return policy.decode(frozen, x.reshape(-1, *x0.shape[1:]))


def rollout_places(settings: Settings, mesh: Any) -> Any:
    """Shardings of a rollout: samples, and the nodes of recorded steps, over the batch axes."""
    layout, whole = settings.planner.layout, cast(Any, meshes.replicated(mesh))
    sizes = plans.nodes(layout, prefix_rows(layout, settings.batch, drawing(settings, mesh)), settings.samples)
    by_node: list[Any] = [meshes.batch_sharding(mesh, n, axis=1) for s, n in zip(layout, sizes) if s.record]
    rows = tuple(Rows(*[place] * len(Rows._fields)) for place in by_node)
    by_sample: Any = meshes.batch_sharding(mesh, settings.samples)
    return Rollout(by_sample, rows, whole, whole)


def drawing(settings: Settings, mesh: Any) -> Any:
    """The mesh as a rollout sees it: without the axis context, where an iteration's samples divide over all devices.

    Tokens are cut for the sake of an update, which has fewer samples than a rollout.
    """
    whole = meshes.without_context(mesh)
    return whole if settings.samples % meshes.batch_ways(whole) == 0 else mesh


def make_rollout(settings: Settings, parts: Parts, attach: Any, mesh: Any) -> Any:
    """`draw_samples(trained, frozen, plan, cond, key) -> Rollout` of every prompt's group; cond has leading axis P.

    With a sixth argument, ids of the rows' noise and of the samples, only these samples are drawn.
    """
    policy = parts.family.make(parts, settings.model, remat="none")  # nothing is kept, so nothing is recomputed
    batch, layout = settings.batch, settings.planner.layout
    dtype, cut = jnp.dtype(settings.model.dtype), rollout_fsdp(settings, parts, mesh)
    mesh = drawing(settings, mesh)
    rows = prefix_rows(layout, batch, mesh)
    light = None if cut == mesh.shape["fsdp"] else meshes.with_fsdp(mesh, cut)

    def draw(trained, frozen, plan, cond, key, addresses=None) -> Rollout:
        noise_key, step_key = jax.random.split(key)
        per_prompt = rows // batch.prompts if batch.shared_noise else 1
        noise, samples = addresses or (jnp.arange(rows) // per_prompt, jnp.arange(settings.samples))
        with jax.named_scope("lighten"):
            own = (_lighten(params, dtype, parts.family.rules, light) for params in (trained, frozen["base"]))
            params = attach(*own)
        return rollout(
            functools.partial(policy.velocity, params),
            plan,
            initial_noise(settings.sampler, noise_key, noise, policy.latent_shape),
            cond,
            step_key,
            samples,
            layout=layout,
            sampler=settings.sampler,
        )

    def draw_samples(*given) -> Rollout:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return draw(*jax.tree.map(meshes.seen, given))

    return draw_samples


class _Memory(NamedTuple):
    """A device's memory while a model is trained, in bytes."""

    left: float  # of nine tenths, beside what stays and two gathered blocks
    position: float  # of a block's widest activation
    trained: Any  # shapes of what the optimiser changes
    frozen: Any  # and of the base
    copy: Any  # and of both as products read them
    held: Callable[..., float]  # (tree, mesh) -> of a tree of parameters


def _memory(settings: Settings, parts: Parts, mesh: Any) -> _Memory | None:
    """What is left beside the training's state, the other models and two blocks' parameters, as they are gathered.

    None where the memory is not known, as on a CPU.
    """
    if (memory := chips.memory(mesh.devices.flat[0])) is None:
        return None
    rules, dtype, lora = parts.family.rules, jnp.dtype(settings.model.dtype), settings.model.lora

    def held(tree: Any, mesh: Any = mesh) -> float:
        return meshes.bytes_per_device(meshes.placed(tree, meshes.shardings(tree, rules, mesh)))

    master = jnp.dtype(jnp.bfloat16 if lora.rank else settings.optimizer.dtype)
    params = families.shapes(parts, text=settings.data.name != "features", dtype=master)
    made = trainable_shapes(parts, params.pop("transformer"), lora, settings.keep_base)
    state = jax.eval_shape(_fresh(settings, parts), made.params)
    copy = jax.eval_shape(functools.partial(_cast, dtype), (made.params, made.base if lora.rank else None))
    widest = max((max(leaf.shape, default=1) for leaf in _blocks(copy)), default=1)
    left = 0.9 * memory - held(state) - held(params) - held(made.base) - 2 * _bytes(_blocks(copy))
    return _Memory(left, widest / mesh.shape["tensor"] * dtype.itemsize, made.params, made.base, copy, held)


def _blocks(params: Any) -> list[Any]:
    """Shapes of the parameters of one block of each kind."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    blocks = (leaf for path, leaf in leaves if "blocks/" in meshes.path_name(path))
    return [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in blocks]


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def rollout_fsdp(settings: Settings, parts: Parts, mesh: Any) -> int:
    """Parts of each parameter in rollouts: `mesh.rollout_fsdp`, or the fewest with which a device's memory suffices.

    The copy that a rollout reads lies beside what `_memory` counts, and beside activations, which are counted as three
    of a block's widest for all samples of the device. Where the memory is not known, the parts are fsdp's.
    """
    drawn = drawing(settings, mesh)
    fsdp = drawn.shape["fsdp"]
    if (asked := settings.mesh.rollout_fsdp) is not None:
        with refusing():
            meshes.with_fsdp(drawn, asked)
        return asked
    if fsdp == 1 or (memory := _memory(settings, parts, mesh)) is None:
        return fsdp
    ways = meshes.batch_ways(drawn)
    samples = settings.samples // ways if settings.samples % ways == 0 else settings.samples
    left = memory.left - 3 * samples * _positions(settings, parts, drawn) * memory.position
    divisors = (n for n in range(1, fsdp) if fsdp % n == 0)
    return next((n for n in divisors if memory.held(memory.copy, meshes.with_fsdp(drawn, n)) <= left), fsdp)


def fit(settings: Settings, parts: Parts, mesh: Any) -> Settings:
    """The settings with model.remat="auto" settled: what an update keeps, and the samples of a device in a pass.

    Of the policies "dots", "attention" and "block" the first with which a pass of one sample fits a device's memory,
    and with it as many samples as fit, up to batch.micro_batch: by the compiler's schedule, what is not recomputed is
    worth more than parameters that are gathered, and gradients that are reduced, less often. If none fits, it is
    "block" and one sample. Where the memory is not known, as on a CPU, it is "block" and batch.micro_batch. Another
    model.remat than "auto" leaves both as they are.

    A pass lies beside what `_memory` counts; beside the accumulated gradient and its own, in fp32, cut as parameters
    are; and beside the gradient of a block of each kind, in fp32, before it is scattered. A sample takes what the
    policy keeps of it, and in the backward pass of a block activations, which are counted as five of its widest. So
    three samples of FLUX.1-dev on v5p:2x4x4 take 31.0 GiB by "dots" and 10.1 GiB by "attention" beside what stays and
    the cut gradients; the compiler says 30.4 and 10.1.
    """
    if settings.model.remat != "auto":
        return settings
    remat, at_most = "block", settings.batch.micro_batch
    if memory := _memory(settings, parts, mesh):
        gradients = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), memory.trained)
        apart = settings.gradients if settings.gradients > 1 else 0  # each reward's is kept until they are mixed
        left = memory.left - (2 + apart) * memory.held(gradients) - _bytes(_blocks(gradients))
        activations = 5 * _positions(settings, parts, mesh) * memory.position
        for remat in ("dots", "attention", "block"):
            kept = _kept(settings, parts, memory, remat) / mesh.shape["context"]
            if fits := int(max(left, 0) // (kept + activations)):
                break
        at_most = min(at_most, max(fits, 1))
    return dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, remat=remat),
        batch=dataclasses.replace(settings.batch, micro_batch=at_most),
    )


def _positions(settings: Settings, parts: Parts, mesh: Any) -> float:
    """Latent positions and text tokens of a sample that a device has."""
    policy = parts.family.make(parts, settings.model)
    return (policy.latent_shape[0] + settings.model.text_length) / mesh.shape["context"]


def _kept(settings: Settings, parts: Parts, memory: _Memory, remat: str) -> int:
    """Bytes that a policy keeps of a sample for the backward pass, all tokens and heads on one device."""
    policy, attach = parts.family.make(parts, settings.model, remat=remat), attachment(settings.model.lora)

    def pullback(trained: Any, frozen: Any, x: Array, cond: Any) -> Any:
        velocity = lambda trained: policy.velocity(attach(trained, frozen), x, jnp.ones(len(x)), cond)  # noqa: E731
        return jax.vjp(velocity, trained)[1]

    def residuals(samples: int) -> int:
        x = jax.ShapeDtypeStruct((samples, *policy.latent_shape), jnp.float32)
        return _bytes(jax.eval_shape(pullback, memory.trained, memory.frozen, x, policy.cond_shapes(samples)))

    # The leaves of a pullback are its residuals; parameters among them do not grow with the samples.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return residuals(2) - residuals(1)


def _lighten(params: Any, dtype: Any, rules: Rules, mesh: Any) -> Any:
    """Parameters as a rollout reads them, made once an iteration: `_cast`, and where a mesh is given, every leaf
    gathered to its layout there."""
    params = _cast(dtype, params)
    return params if mesh is None else jax.lax.with_sharding_constraint(params, meshes.shardings(params, rules, mesh))


def _cast(dtype: Any, params: Any) -> Any:
    """Parameters whose kernels and biases, which every step would cast to the products' dtype, are cast."""

    def cast(path, leaf):
        read = meshes.path_name(path).endswith(("kernel", "bias")) and leaf.dtype == jnp.float32
        return leaf.astype(dtype) if read else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def prefix_rows(layout: Layout, batch: BatchSizes, mesh: Any) -> int:
    """Rows with which a rollout begins: one a prompt where the group shares its noise, else one a sample.

    Prompts that do not divide over the batch axes would run whole on every device, so each then has as many rows as
    it takes and as the layout's branches allow; at most its group.
    """
    if not batch.shared_noise:
        return batch.prompts * batch.group

    def fits(rows: int) -> bool:  # every branch makes whole rows of whole rows
        sizes = [rows, *plans.nodes(layout, rows, batch.group)]
        return all(after % before == 0 for before, after in itertools.pairwise(sizes))

    ways = meshes.batch_ways(mesh)
    allowed = [rows for rows in range(1, batch.group + 1) if batch.group % rows == 0 and fits(rows)]
    return batch.prompts * next((rows for rows in allowed if batch.prompts * rows % ways == 0), 1)


def make_roles(settings: Settings, velocity: Callable, attach: Any) -> MakeRoles:
    """`(params, averages, base) -> roles`: the policy's velocity, bound to each of the parameters asked for."""

    def roles(params: Any, averages: Mapping[str, Any], base: Any) -> Roles:
        trained = {"train": params} | {name: averages[name] for name in averages if name in settings.roles}
        bound = {name: functools.partial(velocity, attach(own, base)) for name, own in trained.items()}
        return bound | ({"base": functools.partial(velocity, base)} if "base" in settings.roles else {})

    return roles


def _optimiser(settings: Settings, parts: Parts) -> optax.GradientTransformation:
    updates = settings.config.iterations * settings.batch.updates
    fixed = "" if settings.model.lora.rank else parts.family.fixed
    return make_optimiser(settings.optimizer, updates, settings.gradients, fixed)


def _fresh(settings: Settings, parts: Parts) -> Callable[[Any], TrainState]:
    return functools.partial(init_state, optimiser=_optimiser(settings, parts), averages=settings.averages)


def _make_update(settings: Settings, parts: Parts, policy: Policy, attach: Any, ways: int) -> Any:
    update = make_update(
        settings.objective,
        make_roles(settings, policy.velocity, attach),
        _optimiser(settings, parts),
        Tools(settings.sampler, make_terms(settings.terms, settings.sampler), policy.tokens),
        num_updates=settings.batch.updates,
        micro_batch=settings.micro_batch(ways),
        averages=settings.averages,
        key=jax.random.fold_in(jax.random.key(settings.config.seed), 2**31 - 2),  # apart from every iteration's
    )

    def update_policy(state, base, batch, plan, chosen=None):
        if chosen is not None:
            batch, plan = select.take(batch, plan, chosen, settings.batch.group)
        return update(state, base, batch, plan)

    return update_policy


def make_schedule(options: Optimizer, num_updates: int) -> optax.Schedule:
    """The learning rate of update k, from 0."""
    rate, warmup = options.learning_rate, max(options.warmup, 1)
    rise = optax.linear_schedule(rate / warmup, rate, warmup - 1) if warmup > 1 else optax.constant_schedule(rate)
    fall = optax.linear_schedule(rate, rate * options.final_rate, max(num_updates - warmup, 1))
    return optax.join_schedules([rise, fall], [warmup])


def learning_rate(settings: Settings, iteration: int) -> float:
    """That of the last update of an iteration, from 1."""
    updates = settings.batch.updates
    return float(make_schedule(settings.optimizer, settings.config.iterations * updates)(iteration * updates - 1))


def make_optimiser(
    options: Optimizer, num_updates: int, rewards: int = 1, fixed: str = ""
) -> optax.GradientTransformation:
    """AdamW or Adafactor behind gradient-norm clipping; the rate warms up, and falls until the last update, linearly.
    With `mix`, gradients have a leading axis of so many rewards.

    Parameters in whose paths the regex `fixed` is found have no gradient; they get no moments, and do not decay.
    Adafactor keeps a row and a column of second moments for each matrix, and no first moment; b1, b2, eps are AdamW's.
    """
    schedule = make_schedule(options, num_updates)
    if options.name == "adafactor":
        # Not optax.adafactor, whose weight decay does not follow the rate.
        step = optax.chain(
            optax.scale_by_factored_rms(),
            optax.add_decayed_weights(options.weight_decay),
            optax.scale_by_learning_rate(schedule),
        )
    else:
        step = optax.adamw(schedule, options.b1, options.b2, options.eps, weight_decay=options.weight_decay)
    mixed = [mix(rewards, options.mix_decay)] if options.mix != "none" else []
    if fixed:

        def moves(path: Any, leaf: Any) -> bool:
            return not re.search(fixed, jax.tree_util.keystr(path, simple=True, separator="/"))

        step = optax.masked(step, functools.partial(jax.tree_util.tree_map_with_path, moves))
    return optax.chain(*mixed, optax.clip_by_global_norm(options.max_grad_norm), step)
