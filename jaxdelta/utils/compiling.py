"""jax.jit for the programs every run needs, which on a CPU compile in half the time so."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# Their time goes into products and LAPACK, which are in libraries: there is little for LLVM to make faster,
# and it took two of the thirteen CPU seconds of a run over 28 layers of 0.6B shape.
_QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}


class QuickJit:
    """`jax.jit(function, **options)`, but not to be called inside another jitted function.

    The backend is asked for at the first call, not when the function is defined: asking starts it.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        functools.update_wrapper(self, function)
        self._options = options

    @functools.cached_property
    def _jitted(self) -> Any:
        return jax.jit(self.__wrapped__, compiler_options=compiler_options(), **self._options)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Calls the compiled function."""
        return self._jitted(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        """`lower`, `trace` and the rest."""
        return getattr(self._jitted, name)


@functools.cache
def compiler_options() -> dict[str, Any]:
    """The XLA options for a quick compilation on a CPU: of `_QUICK` those that this version of XLA has."""
    if jax.default_backend() != "cpu":
        return {}
    return {name: value for name, value in _QUICK.items() if _known(name, value)}


def _known(name: str, value: Any) -> bool:
    """Whether XLA accepts the option: version 0.12 of jaxlib has no `xla_cpu_use_fusion_emitters`."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
