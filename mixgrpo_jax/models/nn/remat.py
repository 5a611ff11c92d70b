"""Rematerialisation: what the backward pass of a block finds stored, and what it computes again."""

from collections.abc import Callable
from typing import Any

import jax

ATTENTION = "attention"  # the name that attention gives to its residuals
PRODUCT = "product"  # that a linear layer gives to its output

_named = jax.checkpoint_policies.save_only_these_names(ATTENTION)


def _attention(primitive: Any, *args: Any, **params: Any) -> Any:
    # cuDNN's softmax statistics are made inside its custom derivative, where no name can be given to them.
    return primitive.name == "dot_product_attention_fwd_wrapper" or _named(primitive, *args, **params)


POLICIES: dict[str, Callable[..., Any]] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _attention, jax.checkpoint_policies.save_only_these_names(PRODUCT)
    ),
    "attention": _attention,
    "block": jax.checkpoint_policies.nothing_saveable,
    "auto": jax.checkpoint_policies.nothing_saveable,  # an update settles it before, see `engine.programs.fit`
}
REMAT = tuple(POLICIES)


def rematerialise(block: Callable, remat: str) -> Callable:
    """The body of a scan over blocks, keeping for its backward pass what `remat` names.

    Per token and block, of width D with H heads, in the activations' dtype. The last column is FLUX.1's 57 blocks in
    bf16 at 2,537 tokens (720 x 720), one sample.

      remat        keeps                                            recomputes           elements    FLUX.1
      "block"      the block's input                                the forward pass     D           0.9 GB
      "attention"  and attention's output with its softmax          all but attention    2 D         1.8 GB
                   statistics (H fp32; "xla" keeps none and
                   computes the scores again)
      "dots"       and the output of every matmul with a weight     norms, activations   10 to 11 D  9.2 GB
      "none"       everything                                       nothing              42 to 47 D  39 GB
      "auto"       as "block"

    Raises ValueError for another name.
    """
    if remat not in POLICIES:
        raise ValueError(f"remat={remat!r} is unknown: choose one of {REMAT}")
    if remat == "none":
        return block
    # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
    return jax.checkpoint(block, prevent_cse=False, policy=POLICIES[remat])
