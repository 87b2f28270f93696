"""What a caller gives: the model, the tokenizer and the text of a run."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.checkpoint import Checkpoint, open_checkpoint
from jaxdelta.checkpoint.torch_model import LoadedCheckpoint, is_torch_model, open_torch_model, unwrapped
from jaxdelta.checkpoint.weights import InMemoryWeights, Weights
from jaxdelta.errors import JaxDeltaError, UsageError, first_line
from jaxdelta.model.decoder import Decoder
from jaxdelta.run.options import Options
from jaxdelta.text.chat import ChatTemplate, rendered
from jaxdelta.text.documents import DEFAULT_TEXT_KEY, ahead, read_documents, read_ids, shuffled
from jaxdelta.text.from_ids import IdDocuments, load_texts, windows_of_ids
from jaxdelta.text.measure import measured_role
from jaxdelta.text.python_values import read_value
from jaxdelta.text.rows import Reading
from jaxdelta.text.tokenizer import load_encoder
from jaxdelta.text.tokens import Tokens
from jaxdelta.text.windows import tokenize

_OPENING = ("revision", "loader", "ignore_config_keys", "adapter")  # options of a model on disk


def open_model(model: Any, options: Options) -> tuple[str, Weights]:
    """The name of a model and its weights: by a name, a loaded Decoder, or a transformers model in memory.

    Raises:
        UsageError: none of these, or an option that a model in memory cannot have.
        JaxDeltaError: an unusable checkpoint.
    """
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        if not isinstance(name, str) or "\0" in name:
            raise UsageError(f"model must be the name of a model, not {name!r:.80}")
        opening = {option: getattr(options, option) for option in _OPENING}
        return name, open_checkpoint(name, **opening)
    for option in (*_OPENING, "checkpoint_dir"):
        if getattr(options, option) != getattr(Options, option):
            hint = "load_model takes it" if option in _OPENING else "a loaded one cannot be recognised again"
            raise UsageError(f"{option} needs a model by its name; {hint}")
    if isinstance(model, Decoder):
        if options.memory == "stream":
            raise UsageError("memory=stream needs a model by its name; this one is loaded already")
        return model.config.model_type, InMemoryWeights(model)
    if is_torch_model(model):
        weights = open_torch_model(model := unwrapped(model))
        return str(getattr(model.config, "name_or_path", "") or type(model).__name__), weights
    raise UsageError(
        f"model must be a name, a directory, a Decoder or a transformers model, not {type(model).__name__}"
    )


def read_text(calibration: Any, options: Options, reading: Reading) -> Any:
    """The documents of a text, the first of them read: texts, chats, IdDocuments; or Tokens.

    Raises:
        UsageError: a value that is no text, or an option that it cannot have.
        JaxDeltaError: the text cannot be read.
    """
    text = read_value(calibration, options.text_key)
    if text is not None and not isinstance(text, str | Path):
        if options.ids_key is not None:
            raise UsageError("ids_key: needs a file, a directory or a data set by its name")
        return text
    where: dict[str, Any] = {"split": options.split, "config": options.dataset_config, "reading": reading}
    if options.ids_key is None:
        return ahead(read_documents(text, text_key=options.text_key, **where))
    if options.text_key != DEFAULT_TEXT_KEY:
        raise UsageError("text_key: ids_key is given too, and a document has one or the other")
    return IdDocuments(ahead(read_ids(text, options.ids_key, **where)), joined=True)


def read_tokens(
    text: Any, tokenizer: Any, weights: Weights, options: Options
) -> tuple[Tokens, tuple[str, ...]]:
    """The tokens of what `read_text` returns, and notes on how they were read.

    Raises:
        UsageError: an id that the model has no embedding for; no tokenizer.
        JaxDeltaError: an unusable text or tokenizer.
    """
    size = weights.config.vocab_size
    if isinstance(text, Tokens | IdDocuments) and tokenizer is not None:
        raise UsageError("tokenizer is given, but the calibration text is token ids already")
    if isinstance(text, Tokens):
        text.check_vocabulary(size)
        if text.counted.sum() == 0:
            raise UsageError("calibration has no token that counts: all are padding or begin a segment")
        return text, ()
    windows: dict[str, Any] = {name: getattr(options, name) for name in ("max_tokens", "layout", "seq_len")}
    windows["vocab_size"] = size
    if isinstance(text, IdDocuments):
        if options.shuffle:
            text = dataclasses.replace(text, documents=shuffled(text.documents, options.seed))
        texts = load_texts(weights.directory) if _has_directory(weights) else None
        try:
            return windows_of_ids(text, text_of=texts, **windows), ()
        except JaxDeltaError as error:  # of a caller's values, not of a file
            raise error if text.joined else UsageError(str(error)) from error
    with _tokenizer_directory(tokenizer, weights) as directory:
        encode, template = load_encoder(directory), ChatTemplate(directory, measured_role(options.measure))
        ordered = shuffled(text, options.seed) if options.shuffle else text
        documents = rendered(ordered, template if options.chat == "auto" else None)
        tokens = tokenize(documents, encode, **windows)
        return tokens, encode.notes + template.notes


def tokenizer_name(tokenizer: Any) -> str | None:
    """A tokenizer as the run's record names it: its directory, or the class of an object and its origin."""
    if tokenizer is None:
        return None
    if isinstance(tokenizer, str | os.PathLike):
        return str(tokenizer)
    origin = getattr(tokenizer, "name_or_path", None)
    return type(tokenizer).__name__ + (f" of {origin}" if isinstance(origin, str) and origin else "")


def _has_directory(weights: Weights) -> TypeGuard[Checkpoint]:
    return isinstance(weights, Checkpoint) and not isinstance(weights, LoadedCheckpoint)


@contextlib.contextmanager
def _tokenizer_directory(tokenizer: Any, weights: Weights) -> Iterator[Path]:
    """The directory of a tokenizer's files; an object is written to a temporary one, to be read like them."""
    if tokenizer is None:
        if not _has_directory(weights):
            raise UsageError("tokenizer is missing, which a loaded model needs for a text; or give token ids")
        yield weights.directory
    elif isinstance(tokenizer, str | os.PathLike):
        directory = Path(os.path.expanduser(os.fspath(tokenizer)))
        if str(tokenizer) != hub.DEMO and not os.path.isdir(directory):
            raise JaxDeltaError(f"tokenizer: {directory}: no such directory")
        yield hub.resolve(str(tokenizer)) if str(tokenizer) == hub.DEMO else directory
    else:
        with tempfile.TemporaryDirectory(prefix="jaxdelta-tokenizer-") as made:
            _write(tokenizer, Path(made))
            yield Path(made)


def _write(tokenizer: Any, directory: Path) -> None:
    name, package = type(tokenizer).__name__, type(tokenizer).__module__.partition(".")[0]
    try:
        if package == "tokenizers" and hasattr(tokenizer, "save"):
            tokenizer.save(str(directory / "tokenizer.json"))
            return
        if hasattr(tokenizer, "save_pretrained") and hasattr(tokenizer, "convert_ids_to_tokens"):
            tokenizer.save_pretrained(str(directory))
            return
    except Exception as error:  # tokenizers raises bare Exception
        raise JaxDeltaError(f"tokenizer: the {name} cannot be saved ({first_line(error)[:200]})") from error
    raise UsageError(
        f"tokenizer must be a directory, or a tokenizer of transformers or tokenizers, not {name}"
    )
