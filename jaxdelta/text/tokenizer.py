"""The tokenizer of a checkpoint: texts to token ids and character offsets."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxdelta.errors import JaxDeltaError, plain_errors
from jaxdelta.utils.files import check_whole

# Texts -> for each, its token ids and the offset of each token's first character.
Tokenize = Callable[[Sequence[str]], list[tuple[list[int], list[int]]]]


def load_encoder(directory: Path) -> Tokenize:
    """The model's tokenizer, from tokenizer.json if it exists, else by transformers.

    Raises:
        JaxDeltaError: there is no tokenizer, or its file is damaged.
    """
    file = directory / "tokenizer.json"
    if not os.path.lexists(file):
        return _transformers_encoder(directory)
    from tokenizers import Tokenizer

    check_whole(file)
    with plain_errors(file, {Exception: "{}: is not a tokenizer ({})"}):  # tokenizers raises bare Exception.
        tokenizer = Tokenizer.from_file(str(file))
    # The file may carry the settings of its last use; transformers, and so the reference, drops them too.
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, [start for start, _ in encoding.offsets]) for encoding in encodings]

    return encode


def _transformers_encoder(directory: Path) -> Tokenize:
    if not any(
        (directory / name).exists() for name in ("vocab.json", "tokenizer.model", "tokenizer_config.json")
    ):
        raise JaxDeltaError(f"{directory}: has no tokenizer.json; copy the model's tokenizer files there")
    from transformers import AutoTokenizer

    with plain_errors(directory, {(OSError, ValueError, KeyError): "{}: has no usable tokenizer ({})"}):
        tokenizer = AutoTokenizer.from_pretrained(directory)

    def encode(texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        starts = ([start for start, _ in offsets] for offsets in encoded["offset_mapping"])
        return list(zip(encoded["input_ids"], starts, strict=True))

    return encode
