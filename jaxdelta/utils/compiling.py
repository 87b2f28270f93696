"""XLA options that halve compile time on a CPU for the programs that every run needs."""

import functools
from typing import Any

import jax

# These programs spend their time in library calls (products, LAPACK): LLVM has little left to optimise.
_QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}


@functools.cache
def compiler_options() -> dict[str, Any]:
    """`compiler_options` for `jax.jit`: the quick ones that this XLA knows on a CPU, none elsewhere.

    Starts JAX's backend, so call it no earlier than a program's first use.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {name: value for name, value in _QUICK.items() if _known(name, value)}


def _known(name: str, value: Any) -> bool:
    """Whether XLA accepts the option: jaxlib 0.12 has no `xla_cpu_use_fusion_emitters`."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
