"""Squared norms and inner products of the tokens of an update."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float64

from jaxdelta.spectra.linalg import row_sums
from jaxdelta.sweep.sweep import Update


def token_products(
    delta: Float[Array, "n d"], h: Float[Array, "n d"]
) -> tuple[Float64[Array, " n"], Float64[Array, " n"], Float64[Array, " n"]]:
    """<δ_i, δ_i>, <h_i, h_i> and <δ_i, h_i> for each token i."""
    delta, h = delta.astype(jnp.float64), h.astype(jnp.float64)
    updates, states, mixed = row_sums([delta * delta, h * h, delta * h])
    return updates, states, mixed


def state_products(update: Update) -> dict[str, Float64[Array, " n"]]:
    """For each token: the squared norms of the states `entering` and `leaving` the layer, of both sublayers'
    parts and of the whole `update`; `cross`, 2<attention, mlp>; and `*_h`, the products of these with h."""
    attention, mlp, h = (part.astype(jnp.float64) for part in update)
    delta = jnp.asarray(update.delta).astype(jnp.float64)
    factors = {
        "entering": (h, h),
        "leaving": (h + delta, h + delta),
        "attention": (attention, attention),
        "mlp": (mlp, mlp),
        "cross": (2 * attention, mlp),
        "update": (delta, delta),
        "update_h": (delta, h),
        "attention_h": (attention, h),
        "mlp_h": (mlp, h),
    }
    return dict(zip(factors, row_sums([x * y for x, y in factors.values()]), strict=True))
