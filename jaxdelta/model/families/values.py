"""Values of a config.json: of the type that their key needs, and the same under all names of one thing.

Null counts as absent unless a docstring says otherwise.
"""

import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxdelta.errors import JaxDeltaError

LARGEST = 2**31 - 1
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist = 2, 6, 4
_SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 48, 32, 48


def positive(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer, of at most LARGEST."""
    return _integer(raw, key, default, 1)


def count(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer from 0 to LARGEST."""
    return _integer(raw, key, default, 0)


def _integer(raw: Mapping[str, Any], key: str, default: int | None, least: int) -> int:
    value = _value(raw, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise JaxDeltaError(
            f"{key} must be {'a positive integer' if least else 'an integer from 0'}, not {shown(value)}"
        )
    if value > LARGEST:
        raise JaxDeltaError(f"{key} must be at most {LARGEST}, not {shown(value)}")
    return value


def number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number that float32 can hold."""
    value = _value(raw, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-37 < value < 1e38:
        raise JaxDeltaError(f"{key} must be a positive number, not {shown(value)}")
    return float(value)


def flag(raw: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """True or false."""
    value = _value(raw, key, default)
    if not isinstance(value, bool):
        raise JaxDeltaError(f"{key} must be true or false, not {shown(value)}")
    return value


def _value(raw: Mapping[str, Any], key: str, default: Any) -> Any:
    return default if raw.get(key) is None else raw[key]


def agreed(statements: Mapping[str, Any], meaning: Callable[[Any], Any] = lambda value: value) -> Any:
    """The value of one thing that a file may state under several names, or None.

    Args:
        statements: the value under each name.
        meaning: equal for values that mean the same.

    Raises:
        JaxDeltaError: two statements disagree; the message shows both.
    """
    given = {name: value for name, value in statements.items() if value is not None}
    first, *others = given.values() or (None,)
    if any(meaning(value) != meaning(first) for value in others):
        raise disagreement(given)
    return first


def disagreement(statements: Mapping[str, Any]) -> JaxDeltaError:
    """The error of statements that disagree, by name."""
    both = " and ".join(f"{name}={shown(value)}" for name, value in statements.items())
    return JaxDeltaError(f"{both} disagree; remove the wrong one")


def shown(value: Any) -> str:
    """A value in a message: one line, long ones shortened."""
    return _SHORT.repr(value)


def listed(names: Collection[str]) -> str:
    """Names in a message: the first three, and how many more there are."""
    first = ", ".join(name if name.isprintable() and len(name) < 60 else shown(name) for name in [*names][:3])
    return first + (f" and {len(names) - 3} more" if len(names) > 3 else "")
