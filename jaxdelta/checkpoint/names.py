"""Names of tensors as people store them -> those of a causal language model.

Wrappers put prefixes in front of names (`torch.compile`, DDP, FSDP, PEFT, vision-language models), embedding
models lack `model.`, and files hold parts that no layer needs: heads of other tasks, multi-token prediction,
buffers. A prefix is stripped, such a part left out, and a note says so. Any other unknown tensor stays, and
`mismatch` refuses it; a tensor under two names is refused here.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jaxdelta.checkpoint.source import EMBEDDING, HEAD, TensorSource, TensorSpec, held_twice
from jaxdelta.errors import JaxDeltaError, listed, short

# Segments that wrappers insert, in front of a name or inside it.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# A name's end as every supported family has it, and any prefix in front.
_LAYER = r"layers\.[0-9]{1,9}\..+"
_TRUNK = re.compile(rf"(?:(?P<prefix>.*?)\.)?(?P<rest>{_LAYER}|(?:embed_tokens|norm)\.weight)")
_LM_HEAD = re.compile(r"(?P<before>(?:.*?\.)?)(?P<head>lm_head\..+)")
_IN_LAYER = re.compile(rf"(?:.*?\.)?{_LAYER}")
# Outside the layers: heads of other tasks, which read the last state.
_OTHER_HEAD = re.compile(r"score|scorer|classifier|cls|summary|pooler|qa_outputs|\w*heads?")
_PREDICTION = re.compile(r"mtp\w*|nextn\w*|multi_token_\w+")  # of several tokens
_PREDICTION_PARTS = {"eh_proj", "enorm", "hnorm"}  # DeepSeek's, in layers behind the last
_BUFFER = re.compile(
    r"(.*\.)?(rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)|_extra_state|position_ids)"
)
_MASK = re.compile(r".*\.self_attn\.(bias|masked_bias)")  # a causal mask, of four axes or none


class _Quantised(NamedTuple):
    marker: str  # what a name ends in
    format: str
    fix: str


_BY_TORCH = "try --loader=torch, with transformers' library for it"
_NEEDS_PLAIN = "give the model's plain weights"
_QUANTISED = (
    _Quantised(r"\.(qweight|qzeros|g_idx)", "GPTQ or AWQ", _BY_TORCH),
    _Quantised(r"\.(absmax|SCB|quant_map|nested_absmax)|bitsandbytes__\w+", "bitsandbytes", _BY_TORCH),
    _Quantised(r"\.(weight_packed|weight_zero_point)", "compressed-tensors", _BY_TORCH),
    _Quantised(r"\.(weight_scale_2|input_scale|pre_quant_scale)", "modelopt, or as vLLM does", _NEEDS_PLAIN),
    _Quantised(
        r"\.weight_scale", "whole tensors or rows, in float8 (compressed-tensors, modelopt)", _NEEDS_PLAIN
    ),
    _Quantised(r"\.scales", "MLX", _NEEDS_PLAIN),
    _Quantised(r"\.(W_q|codebooks|weight\._data|weight\._scale)", "HQQ, AQLM or quanto", _NEEDS_PLAIN),
)


def refuse_quantised(where: object, names: Collection[str]) -> None:
    """Refuses weights of quantised formats, which only some names of their tensors tell.

    Raises:
        JaxDeltaError: the format, and what opens it.
    """
    for marker, form, fix in _QUANTISED:
        pattern = re.compile(f".*(?:{marker})")
        if found := [name for name in names if pattern.fullmatch(name)]:
            raise JaxDeltaError(
                f"{where}: is quantised by {form} ({listed(found)}), which jaxdelta does not read; {fix}"
            )


def causal(where: object, source: TensorSource, wanted: Collection[str], layers: int) -> TensorSource:
    """The same tensors by the names of a causal language model, without the tensors that no layer needs.

    Args:
        where: the files, for messages.
        source: tensors by their names on disk.
        wanted: the names of the model's tensors, its head among them.
        layers: the model's number of layers.

    Raises:
        JaxDeltaError: a tensor is there under two names, names have several prefixes, or LoRA weights wait to
            be merged.
    """
    notes = [*source.notes]
    plain = {name: _unwrapped(name) for name in source.specs}
    if unwrapped := [name for name, after in plain.items() if name != after]:
        wrappers = sorted({part for name in unwrapped for part in name.split(".") if part in _WRAPPERS})
        notes.append(f"{', '.join(wrappers)} stripped from the names: {listed(unwrapped)}")
    plain = _without_base_layer(where, plain, notes)
    kept, unneeded = _divided(plain, source.specs, wanted, layers)
    notes += _about(unneeded)
    names = _canonical(where, kept, notes)
    return _renamed(source, names, tuple(notes))


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS) or name


def _without_base_layer(where: object, plain: Mapping[str, str], notes: list[str]) -> dict[str, str]:
    """PEFT's name of a weight with an adapter on it; alone, the adapter has been merged."""
    wrapped = [name for name, after in plain.items() if ".base_layer." in after]
    if not wrapped:
        return dict(plain)
    if lora := [name for name, after in plain.items() if _is_lora(after)]:
        raise JaxDeltaError(
            f"{where}: holds weights of a LoRA adapter that is not merged: {listed(lora)}; merge it "
            "(PEFT's merge_and_unload), or give the base model and --adapter"
        )
    notes.append(f"base_layer, of PEFT, stripped from the names: {listed(wrapped)}")
    return {name: after.replace(".base_layer.", ".") for name, after in plain.items()}


def _is_lora(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _divided(
    plain: Mapping[str, str], specs: Mapping[str, TensorSpec], wanted: Collection[str], layers: int
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The names to keep, and those of tensors that no layer needs, by what they are."""
    predicting = {
        match[0]
        for after in plain.values()
        if (match := re.search(r"layers\.([0-9]{1,9})\.", after))
        and int(match[1]) >= layers
        and _PREDICTION_PARTS.intersection(after.split("."))
    }
    kept: dict[str, str] = {}
    unneeded: dict[str, list[str]] = {}
    for name, after in plain.items():
        match = re.search(r"layers\.[0-9]{1,9}\.", after)
        if match and match[0] in predicting:
            what: str | None = "prediction of several tokens"
        else:
            what = _unneeded(after, specs[name], wanted)
        if what is None:
            kept[name] = after
        else:
            unneeded.setdefault(what, []).append(name)
    return kept, unneeded


def _unneeded(name: str, spec: TensorSpec, wanted: Collection[str]) -> str | None:
    """What a tensor is that no layer needs; None for all others."""
    parts, inside = name.split("."), _IN_LAYER.fullmatch(name)
    if _is_lora(name):
        return "LoRA"
    if any(map(_PREDICTION.fullmatch, parts)):
        return "prediction of several tokens"
    if not inside and "lm_head" not in parts and any(map(_OTHER_HEAD.fullmatch, parts)):
        return "a head of another task"
    if _BUFFER.fullmatch(name) or (_MASK.fullmatch(name) and len(spec.shape) in (0, 4)):
        return "a buffer"
    match = _TRUNK.fullmatch(name)
    is_model = name in wanted or (match is not None and f"model.{match['rest']}" in wanted)
    # A mask of integers may prune weights.
    if spec.dtype.kind in "biu" and not is_model and "mask" not in parts[-1]:
        return "a buffer"
    return None


def _about(unneeded: Mapping[str, Collection[str]]) -> Iterator[str]:
    for what, names in unneeded.items():
        if what == "LoRA":
            given = f"LoRA weights beside the model's own: {listed(names)}"
            yield f"NOT APPLIED: {given}; to apply an adapter give --adapter"
        else:
            yield f"left out, as no layer needs it ({what}): {listed(names)}"


def _canonical(where: object, plain: Mapping[str, str], notes: list[str]) -> dict[str, str]:
    """Name on disk -> the model's name; the prefix of the trunk is replaced by `model.`."""
    matches = {name: match for name, after in plain.items() if (match := _TRUNK.fullmatch(after))}
    prefixes: dict[str, str] = {}  # prefix -> the first name with it
    for name, match in matches.items():
        prefixes.setdefault(match["prefix"] or "", name)
    found: dict[str, str] = {}  # the model's name -> the name on disk
    for name, after in plain.items():
        causal_name = f"model.{matches[name]['rest']}" if name in matches else _head(after, prefixes)
        if causal_name in found:
            raise held_twice(where, found[causal_name], name)
        found[causal_name] = name
    if len(several := prefixes.keys() - {"", "model"}) + bool(prefixes.keys() & {"", "model"}) > 1:
        examples = ", ".join(short(prefixes[prefix]) for prefix in sorted(prefixes)[:3])
        raise JaxDeltaError(f"{where}: the tensors' names have several prefixes: {examples}")
    if several:
        notes.append(f"the prefix {short(min(several))}. stripped from the names: {listed(list(matches))}")
    return {name: causal_name for causal_name, name in found.items()}


def _head(name: str, prefixes: Iterable[str]) -> str:
    """The name of a tensor outside the trunk: the head may have a part of the trunk's prefix, or none."""
    match = _LM_HEAD.fullmatch(name)
    if match and any(f"{prefix}.".startswith(match["before"]) for prefix in prefixes):
        return match["head"]
    return name


def _renamed(source: TensorSource, names: Mapping[str, str], notes: tuple[str, ...]) -> TensorSource:
    """The tensors that `names` has, by their new names."""
    stored = {new: old for old, new in names.items()}
    if all(new == old for new, old in stored.items()) and len(stored) == len(source.specs):
        return dataclasses.replace(source, notes=notes)

    def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return source.read(stored[name], start, stop)

    def fill(name: str, out: np.ndarray) -> None:
        source.read_into(stored[name], out)

    specs = {new: source.specs[old] for new, old in stored.items()}
    return TensorSource(specs, read, fill, notes, stored)


def with_embedding(source: TensorSource) -> TensorSource:
    """Of tied embeddings only the head is on disk: it is the embedding, as in transformers."""
    names = {name: EMBEDDING if name == HEAD else name for name in source.specs}
    said = f"{EMBEDDING} is not in the files: {HEAD}, tied to it, is used for both"
    return _renamed(source, names, (*source.notes, said))
