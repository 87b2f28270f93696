"""The tokenizer of a checkpoint: texts to token ids and character offsets, as transformers' AutoTokenizer."""

import contextlib
import dataclasses
import json
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxdelta.errors import JaxDeltaError, first_line, plain_errors
from jaxdelta.utils.files import check_whole
from jaxdelta.utils.hub import silent

# Texts -> for each, its token ids and the offset of each token's first character.
Tokenize = Callable[[Sequence[str]], list[tuple[list[int], list[int]]]]

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCABULARIES = (FILE, "vocab.json", "tokenizer.model", "tekken.json", "vocab.txt")
SPECIALS = ("added_tokens.json", "special_tokens_map.json")
CUT_UP = (
    "vocab.json and merges.txt name no special tokens, so markers such as <|im_start|> in the text are cut "
    "up; copy the model's tokenizer.json and tokenizer_config.json"
)
# Keys of tokenizer_config.json that change no id, besides the keys that name tokens.
_NEUTRAL = (
    *("add_bos_token", "add_eos_token", "backend", "chat_template", "clean_up_tokenization_spaces", "errors"),
    *(
        "is_local",
        "local_files_only",
        "model_input_names",
        "model_max_length",
        "name_or_path",
        "pad_token_id",
    ),
    *("padding_side", "processor_class", "tokenizer_class", "truncation_side"),
)
_UNSET = ("add_prefix_space", "split_special_tokens")  # neutral while false
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")
# Qwen2Tokenizer's own pipeline, which transformers uses in place of the file's, and its own tokens.
_QWEN = "Qwen2Tokenizer"
_QWEN_TOKENS = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
_BPE_SETTINGS = (
    *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback"),
    "ignore_merges",
)
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN_SPLIT = {"type": "Split", "pattern": {"Regex": _QWEN_WORDS}, "behavior": "Isolated", "invert": False}
_QWEN_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A tokenizer as a function of texts, and notes on how it was read, a sentence each."""

    tokenize: Tokenize
    notes: tuple[str, ...] = ()

    def __call__(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Token ids and offsets of each text, without tokens before or after it."""
        return self.tokenize(texts)


def load_encoder(directory: Path) -> Encoder:
    """The model's tokenizer, with the ids of transformers' AutoTokenizer.

    tokenizer.json is read directly where AutoTokenizer would use it unchanged: importing transformers takes
    seconds.

    Raises:
        JaxDeltaError: there is no tokenizer, or its files are damaged.
    """
    _check_files(directory)
    if (directory / FILE).is_file() and (encoder := _direct(directory)):
        return encoder
    tokenizer = load_tokenizer(directory)

    def encode(texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        wanted = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        with _failures(directory):
            encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, **wanted)
        starts = ([start for start, _ in offsets] for offsets in encoded["offset_mapping"])
        return list(zip(encoded["input_ids"], starts, strict=True))

    return Encoder(encode, (CUT_UP,) if _lacks_specials(directory) else ())


def load_tokenizer(directory: Path) -> Any:
    """transformers' AutoTokenizer; it never runs code of the checkpoint.

    Raises:
        JaxDeltaError: there is no tokenizer, or transformers cannot read it.
    """
    _check_files(directory)
    from transformers import AutoTokenizer
    from transformers.utils import logging

    with silent(logging), _failures(directory, "{}: has no usable tokenizer ({})"):
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    if not tokenizer.is_fast:
        raise JaxDeltaError(f"{directory}: has no usable tokenizer (no offsets); add its {FILE}")
    # Without the files of its class, AutoTokenizer returns an empty vocabulary.
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
        raise JaxDeltaError(f"{directory}: has no usable tokenizer (no vocabulary was found); add its {FILE}")
    return tokenizer


def _check_files(directory: Path) -> None:
    """Raises a JaxDeltaError if there is no vocabulary, or a JSON file is not what it should be."""
    for name in (*VOCABULARIES, CONFIG, *SPECIALS, "merges.txt"):
        if os.path.lexists(directory / name):
            check_whole(directory / name)
    if not any((directory / name).is_file() for name in VOCABULARIES):
        alone = f"; {CONFIG} holds no vocabulary" if (directory / CONFIG).is_file() else ""
        raise JaxDeltaError(
            f"{directory}: has no tokenizer.json{alone}; copy the model's tokenizer files there"
        )
    for name in (CONFIG, *SPECIALS):
        _json(directory / name)


def _json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file."""
    if not file.is_file():
        return {}
    with plain_errors(file, {(OSError, ValueError, RecursionError): "{}: is not JSON ({})"}):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise JaxDeltaError(f"{file}: must hold a JSON object, not {type(content).__name__}")
    return content


@contextlib.contextmanager
def _failures(subject: Path, message: str = "{}: cannot tokenize the text ({})") -> Iterator[None]:
    """Turns whatever a tokenizer raises into a JaxDeltaError: bare exceptions, and panics, which are none."""
    try:
        yield
    except (JaxDeltaError, MemoryError):
        raise
    except BaseException as error:
        if isinstance(error, Exception):
            reason = textwrap.shorten(first_line(error), 300, placeholder=" ...")
        elif type(error).__name__ == "PanicException":
            reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        else:
            raise
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which is never run"
        raise JaxDeltaError(message.format(subject, reason)) from error


def _lacks_specials(directory: Path) -> bool:
    """Whether a vocabulary without tokenizer.json comes without any list of special tokens."""
    if (directory / FILE).is_file() or not (directory / "vocab.json").is_file():
        return False
    listed = [_json(directory / CONFIG).get(name) for name in ("added_tokens_decoder", *_LISTS)]
    return not any(listed) and not any(_json(directory / name) for name in SPECIALS)


def _direct(directory: Path) -> Encoder | None:
    """tokenizer.json as it is, or None where AutoTokenizer would not use it so."""
    from tokenizers import Tokenizer

    file = directory / FILE
    with _failures(file, "{}: is not a tokenizer ({})"):
        tokenizer = Tokenizer.from_file(str(file))
    if not _used_unchanged(tokenizer, directory):
        return None
    # The file may carry the settings of its last use; transformers, and so the reference, drops them too.
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        with _failures(file):
            encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, [start for start, _ in encoding.offsets]) for encoding in encodings]

    return Encoder(encode)


def _used_unchanged(tokenizer: Any, directory: Path) -> bool:
    """Whether AutoTokenizer's ids are those of tokenizer.json; False if in doubt."""
    config, model = _json(directory / CONFIG), _model_config(directory)
    name, kind = config.get("tokenizer_class"), model.get("model_type")
    if "tokenizer_class" in model or not isinstance(name, str | None):
        return False
    name = name and name.removesuffix("Fast")
    generic = name in _GENERIC and kind in (None, "qwen3", "qwen3_moe", "llama")
    generic |= name is None and kind in (None, "llama")
    qwen = name in (None, _QWEN, *_GENERIC) and kind in (None, "qwen2", "qwen3", "qwen3_moe", "llama")
    if not generic and not (qwen and _is_qwen(tokenizer)):
        return False
    if "added_tokens_decoder" not in config and any((directory / other).exists() for other in SPECIALS):
        return False
    return _adds_nothing(config if generic else _QWEN_TOKENS | config, tokenizer.get_added_tokens_decoder())


def _model_config(directory: Path) -> dict[str, Any]:
    try:
        return _json(directory / "config.json")
    except JaxDeltaError:
        return {"tokenizer_class": None}  # AutoTokenizer decides


def _is_qwen(tokenizer: Any) -> bool:
    """Whether a tokenizer's pipeline is Qwen2Tokenizer's."""
    model, parts = tokenizer.model, (tokenizer.normalizer, tokenizer.pre_tokenizer)
    if type(model).__name__ != "BPE" or None in parts:
        return False
    plain = not any(getattr(model, setting) for setting in _BPE_SETTINGS)
    normalizer, splitter = (json.loads(part.__getstate__()) for part in parts)
    for part in splitter.get("pretokenizers", ()):
        part.pop("trim_offsets", None)
    wanted = {"type": "Sequence", "pretokenizers": [_QWEN_SPLIT, _QWEN_BYTES]}
    return plain and normalizer == {"type": "NFC"} and splitter == wanted


def _adds_nothing(config: Mapping[str, Any], known: Mapping[int, Any]) -> bool:
    """Whether the tokens in tokenizer_config.json are those `known` to tokenizer.json, with equal flags."""
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    tokens = {number: {flag: getattr(token, flag) for flag in flags} for number, token in known.items()}
    plain = {
        token["content"] for token in tokens.values() if list(token.values())[1:] == [False] * 4 + [True]
    }
    for key, value in config.items():
        if key == "added_tokens_decoder" and isinstance(value, dict):
            same = all(key.isdecimal() and tokens.get(int(key)) == token for key, token in value.items())
        elif key in _LISTS or key.endswith("_token"):
            same = all(isinstance(name, str) and name in plain for name in _named(value))
        else:
            same = key in _NEUTRAL or (key in _UNSET and value in (None, False))
        if not same:
            return False
    return True


def _named(value: Any) -> Iterator[Any]:
    """The tokens that a value of tokenizer_config.json names."""
    yield from value if isinstance(value, list) else [value] if value else []
