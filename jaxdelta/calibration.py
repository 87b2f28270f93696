"""The calibration text: prompts -> one stream of tokens that knows which document each token is from."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32

from jaxdelta.errors import JaxDeltaError, UsageError

SEPARATOR = "\n\n"
DEFAULT_MAX_TOKENS = 2048

# Text -> token ids and the character at which each token begins.
Encoder = Callable[[str], tuple[list[int], list[int]]]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids and, for each, the index of the document it begins in and, if known, its text."""

    ids: Int32[np.ndarray, "B T"]
    documents: Int32[np.ndarray, "B T"]
    texts: tuple[tuple[str, ...], ...] | None = None

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.ids.size

    @property
    def counted(self) -> Bool[np.ndarray, "B T"]:
        """The tokens that figures are taken of: the first of each window is left out, as in the reference."""
        counted = np.ones(self.ids.shape, bool)
        counted[:, 0] = False
        return counted

    def text(self, window: int, position: int) -> str:
        """A token's text, or else its id in angle brackets."""
        if self.texts is None:
            return f"<{self.ids[window, position]}>"
        return self.texts[window][position]


def load_documents(path: str | Path | None = None) -> list[str]:
    """The documents of a calibration file: a .txt is one, a .json holds a list of them.

    Without a path, the 25 prompts that ship with the package.

    Raises:
        JaxDeltaError: the file is missing, empty, not UTF-8, or not a list of strings.
    """
    if path is None:
        text = (resources.files("jaxdelta") / "data" / "calibration_prompts.json").read_text(encoding="utf-8")
        return list(json.loads(text))
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise JaxDeltaError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise JaxDeltaError(f"{path}: is not UTF-8 text (byte {error.start}); convert it first") from error
    documents = _json_list(path, text) if path.suffix == ".json" else [text]
    if not any(document.strip() for document in documents):
        raise JaxDeltaError(f"{path}: is empty; a calibration text needs at least a few hundred tokens")
    return documents


def tokenize(
    documents: Sequence[str], encode: Encoder, *, max_tokens: int = DEFAULT_MAX_TOKENS, vocab_size: int
) -> Tokens:
    """Joins the documents by a blank line and tokenizes them as one stream, as the reference does.

    No token is added before or after; a token belongs to the document in which it begins, a separator to
    the document before it.

    Args:
        documents: the texts.
        encode: the model's tokenizer, see `load_encoder`.
        max_tokens: the stream is cut after so many tokens.
        vocab_size: the model's; a token beyond it is an error.

    Raises:
        UsageError: max_tokens below 2.
        JaxDeltaError: fewer than two tokens, one the model has no embedding for, or no Unicode text.
    """
    if max_tokens < 2:
        raise UsageError(f"max_tokens must be at least 2 (the first token is left out), not {max_tokens}")
    text = SEPARATOR.join(documents)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise JaxDeltaError(
            f"the calibration text is not Unicode (half a character at {error.start})"
        ) from error
    ids, offsets = encode(text)
    pieces = [text[start:end] for start, end in pairwise([*offsets, len(text)])][:max_tokens]
    ids, offsets = ids[:max_tokens], offsets[:max_tokens]
    if len(ids) < 2:
        raise JaxDeltaError(
            f"the calibration text has {len(ids)} token{'s' * (len(ids) != 1)}; at least 2 are needed, "
            "since the first is left out of every figure"
        )
    if max(ids) >= vocab_size:
        raise JaxDeltaError(
            f"the tokenizer gives token {max(ids)}, the model has {vocab_size}: they do not belong together"
        )
    starts = np.cumsum([0] + [len(document) + len(SEPARATOR) for document in documents[:-1]])
    owners = np.searchsorted(starts, np.asarray(offsets), side="right") - 1
    return Tokens(np.asarray([ids], np.int32), owners[None].astype(np.int32), (tuple(pieces),))


def load_encoder(directory: Path) -> Encoder:
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

    def encode(text: str) -> tuple[list[int], list[int]]:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    return encode


def _transformers_encoder(directory: Path) -> Encoder:
    if not any(
        (directory / name).exists() for name in ("vocab.json", "tokenizer.model", "tokenizer_config.json")
    ):
        raise JaxDeltaError(f"{directory}: has no tokenizer.json; copy the model's tokenizer files there")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise JaxDeltaError(f"{directory}: has no usable tokenizer ({str(error).splitlines()[0]})") from error

    def encode(text: str) -> tuple[list[int], list[int]]:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoding["input_ids"], [start for start, _ in encoding["offset_mapping"]]

    return encode


def _json_list(path: Path, text: str) -> list[str]:
    try:
        documents = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise JaxDeltaError(f"{path}: is not JSON ({error})") from error
    if not isinstance(documents, list) or not all(isinstance(document, str) for document in documents):
        raise JaxDeltaError(f"{path}: must hold a JSON list of strings, one a document")
    return documents
