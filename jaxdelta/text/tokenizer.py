"""The tokenizer of a checkpoint: texts to token ids and character offsets."""

from collections.abc import Callable, Sequence
from pathlib import Path

from jaxdelta.errors import JaxDeltaError

# Texts -> of each, its token ids and the characters at which the tokens begin.
Tokenize = Callable[[Sequence[str]], list[tuple[list[int], list[int]]]]


def load_encoder(directory: Path) -> Tokenize:
    """The model's own tokenizer, straight from tokenizer.json where there is one, else by transformers.

    Raises:
        JaxDeltaError: there is no tokenizer, or its file is damaged.
    """
    file = directory / "tokenizer.json"
    if not file.exists():
        return _transformers_encoder(directory)
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception.
        raise JaxDeltaError(f"{file}: is not a tokenizer ({error})") from error
    # The file may carry the settings of its last use; transformers, and so the reference, drops them too.
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(found.ids, [start for start, _ in found.offsets]) for found in encodings]

    return encode


def _transformers_encoder(directory: Path) -> Tokenize:
    if not any(
        (directory / name).exists() for name in ("vocab.json", "tokenizer.model", "tokenizer_config.json")
    ):
        raise JaxDeltaError(f"{directory}: has no tokenizer.json; copy the model's tokenizer files there")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise JaxDeltaError(f"{directory}: has no usable tokenizer ({str(error).splitlines()[0]})") from error

    def encode(texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        found = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        offsets = ([start for start, _ in of_text] for of_text in found["offset_mapping"])
        return list(zip(found["input_ids"], offsets, strict=True))

    return encode
