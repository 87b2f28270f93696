"""Squared norms and inner products of each token of an update."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float64

from jaxdelta.spectra.linalg import row_sums
from jaxdelta.sweep.sweep import Update


def token_products(
    delta: Float[Array, "n d"], h: Float[Array, "n d"]
) -> tuple[Float64[Array, " n"], Float64[Array, " n"], Float64[Array, " n"]]:
    """Each token's <δ_i, δ_i>, <h_i, h_i> and <δ_i, h_i>: all that `token_statistics` need."""
    delta, h = delta.astype(jnp.float64), h.astype(jnp.float64)
    first, second, third = row_sums([delta * delta, h * h, delta * h])
    return first, second, third


def state_products(update: Update) -> dict[str, Float64[Array, " n"]]:
    """Each token's squared norms: of the state before the layer and after it, of what each sublayer wrote,
    of the whole update; `cross`, 2<attention, mlp>; and the products of the three writes with h."""
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
