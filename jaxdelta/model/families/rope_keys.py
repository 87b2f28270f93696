"""The keys of a config.json about rotary position embedding, in the forms of all versions of transformers."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxdelta.errors import JaxDeltaError
from jaxdelta.model.config import Rope
from jaxdelta.model.families.inert_keys import unknown_keys
from jaxdelta.model.families.values import agreed, disagreement, flag, listed, number, positive, shown

# transformers 5 writes rope_parameters. Where an older file has both, the other one counts there.
BLOCKS = ("rope_scaling", "rope_parameters")
ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"
# What a file may state outside the blocks.
ROPE_KEYS = frozenset({*BLOCKS, "rope_theta", ORIGINAL, PARTIAL})
# rope_type -> the keys of a block that it reads in transformers, besides _COMMON.
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
_READ: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "yarn": frozenset(
        {"factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
        | {"truncate"}
    ),
    "llama3": frozenset({*_LLAMA3, ORIGINAL}),
}
_COMMON = frozenset({"rope_theta", "rope_type", "type", PARTIAL})
# Keys that only other programs read: YaRN's own code has them.
_FOREIGN = frozenset({"attn_factor", "extrapolation_factor", "finetuned"})
_KNOWN = _COMMON.union(_FOREIGN, *_READ.values())


def read_rope(raw: Mapping[str, Any], max_positions: int) -> tuple[Rope, tuple[str, ...]]:
    """The embedding, and a note where the block has keys that its rope_type does not read.

    Raises:
        JaxDeltaError: a wrong or unsupported value, an unknown key, or statements that disagree.
    """
    for name in BLOCKS:
        if not isinstance(raw.get(name), Mapping | None):
            raise JaxDeltaError(f"{name} must be an object, not {shown(raw[name])}")
    names = [name for name in BLOCKS if raw.get(name)] or [BLOCKS[1]]
    ropes = {name: _rope(raw, name, max_positions) for name in names}
    if len({*ropes.values()}) > 1:
        raise disagreement({name: raw[name] for name in names})
    return ropes[names[0]], _unread(raw, names[0], ropes[names[0]].kind)


def _rope(raw: Mapping[str, Any], name: str, max_positions: int) -> Rope:
    """The embedding by one of the blocks, which may be absent, and by the keys outside."""
    block = raw.get(name) or {}

    def stated(key: str) -> dict[str, Any]:
        return {key: agreed({key: raw.get(key), f"{name}.{key}": block.get(key)})}

    kind = agreed({f"{name}.rope_type": block.get("rope_type"), f"{name}.type": block.get("type")})
    kind = "default" if kind is None else kind
    if not isinstance(kind, str) or kind not in _READ:
        raise JaxDeltaError(f"rope_type={shown(kind)} is not supported (only {', '.join(_READ)})")
    if unknown := [key for key in block if key not in _KNOWN]:
        raise unknown_keys(name, unknown)
    partial = stated(PARTIAL)[PARTIAL]
    if partial not in (None, 1):
        raise JaxDeltaError(f"{PARTIAL}={shown(partial)} is not supported (only 1)")
    rope = Rope(theta=number(stated("rope_theta"), "rope_theta", Rope.theta), kind=kind)  # type: ignore[arg-type]
    original = positive(stated(ORIGINAL), ORIGINAL, max_positions)
    if kind == "default":
        return rope
    if kind == "yarn" and rope.theta == 1:
        raise JaxDeltaError("rope_theta must not be 1 with rope_type='yarn'")
    factor = _factor(block, kind, max_positions / original)
    if kind == "linear":
        return dataclasses.replace(rope, factor=factor)
    scaling = _llama3_fields(block) if kind == "llama3" else _yarn_fields(block, factor)
    return dataclasses.replace(rope, factor=factor, original_max_positions=original, **scaling)


def _factor(block: Mapping[str, Any], kind: str, extension: float) -> float:
    """The factor of a block; with yarn null means the ratio of the two ranges, as in transformers."""
    if kind == "yarn" and "factor" in block:
        return number(block, "factor", extension)
    for key in _LLAMA3 if kind == "llama3" else ("factor",):
        if block.get(key) is None:
            raise JaxDeltaError(f"rope_type={kind!r} needs a {key}")
    return number(block, "factor")


def _unread(raw: Mapping[str, Any], name: str, kind: str) -> tuple[str, ...]:
    block = raw.get(name) or {}
    unread = [key for key in block if key not in _COMMON | _READ[kind] and block[key] is not None]
    if not unread:
        return ()
    values = listed([f"{key}={shown(block[key])}" for key in unread])
    return (f"config.json: {name} has {values}, which rope_type {kind} does not read in transformers",)


def _llama3_fields(block: Mapping[str, Any]) -> dict[str, Any]:
    low, high = number(block, "low_freq_factor"), number(block, "high_freq_factor")
    if low >= high:
        raise JaxDeltaError(f"high_freq_factor={high:g} must be greater than low_freq_factor={low:g}")
    return {"low_freq_factor": low, "high_freq_factor": high}


def _yarn_fields(block: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {
        "beta_fast": number(block, "beta_fast", Rope.beta_fast),
        "beta_slow": number(block, "beta_slow", Rope.beta_slow),
        "attention_factor": _yarn_attention_factor(block, factor),
        # In transformers null means false, and only an absent key true.
        "truncate": flag(block, "truncate", "truncate" not in block),
    }


def _yarn_attention_factor(block: Mapping[str, Any], factor: float) -> float:
    """The scale of cos and sin: 0.1 m ln(factor) + 1, or a ratio of two such terms (YaRN, section 3.4)."""

    def mscale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if block.get("attention_factor") is not None:
        return number(block, "attention_factor")
    # A zero counts as absent.
    given = {key: block.get(key) for key in ("mscale", "mscale_all_dim")}
    scales = [None if value in (None, 0) else number(given, key) for key, value in given.items()]
    if None in scales:
        return mscale(1.0)
    return mscale(number(given, "mscale")) / mscale(number(given, "mscale_all_dim"))


def rope_dict(rope: Rope) -> dict[str, Any]:
    """The `rope_parameters` of a config.json."""
    parameters: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind in ("yarn", "llama3"):
        parameters[ORIGINAL] = rope.original_max_positions
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        parameters |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.attention_factor,
            "truncate": rope.truncate,
        }
    return parameters
