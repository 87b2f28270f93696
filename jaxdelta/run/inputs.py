"""What a caller gives: the model, the tokenizer and the text of a run."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdelta.checkpoint import hub
from jaxdelta.checkpoint.checkpoint import Checkpoint, open_checkpoint
from jaxdelta.checkpoint.torch_model import LoadedCheckpoint, is_torch_model, open_torch_model, unwrapped
from jaxdelta.checkpoint.weights import InMemoryWeights, Weights
from jaxdelta.errors import JaxDeltaError, UsageError, first_line
from jaxdelta.model.decoder import Decoder
from jaxdelta.run.options import Options
from jaxdelta.text.documents import read_documents, shuffled
from jaxdelta.text.python_values import IdDocuments, read_value, windows_of_ids
from jaxdelta.text.tokenizer import load_encoder
from jaxdelta.text.tokens import Tokens
from jaxdelta.text.windows import tokenize


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
        return name, open_checkpoint(name, revision=options.revision, loader=options.loader)
    for option, plain in (("revision", None), ("loader", "auto"), ("checkpoint_dir", None)):
        if getattr(options, option) != plain:
            raise UsageError(f"{option} needs a model by its name; a loaded one cannot be recognised again")
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


def read_tokens(calibration: Any, tokenizer: Any, weights: Weights, options: Options) -> Tokens:
    """The tokens of a text of any kind.

    Raises:
        UsageError: a value that is no text; an id that the model has no embedding for; no tokenizer.
        JaxDeltaError: an unusable text or tokenizer.
    """
    text, size = read_value(calibration, options.text_key), weights.config.vocab_size
    documents: Any
    windows: dict[str, Any] = {
        name: getattr(options, name) for name in ("max_tokens", "layout", "seq_len")
    } | {"vocab_size": size}
    if isinstance(text, Tokens | IdDocuments) and tokenizer is not None:
        raise UsageError("tokenizer is given, but the calibration text is token ids already")
    if isinstance(text, Tokens):
        text.check_vocabulary(size)
        if text.counted.sum() == 0:
            raise UsageError("calibration has no token that counts: all are padding or begin a segment")
        return text
    if isinstance(text, IdDocuments):
        documents = text.documents
        documents = shuffled(documents, options.seed) if options.shuffle else documents
        return windows_of_ids(documents, **windows)
    with _tokenizer_directory(tokenizer, weights) as directory:
        if text is None or isinstance(text, str | Path):
            documents = read_documents(
                text, text_key=options.text_key, split=options.split, config=options.dataset_config
            )
        else:
            documents = text
        documents = shuffled(documents, options.seed) if options.shuffle else documents
        return tokenize(documents, load_encoder(directory), **windows)


def tokenizer_name(tokenizer: Any) -> str | None:
    """A tokenizer as the run's record names it: its directory, or the class of an object and its origin."""
    if tokenizer is None:
        return None
    if isinstance(tokenizer, str | os.PathLike):
        return str(tokenizer)
    origin = getattr(tokenizer, "name_or_path", None)
    return type(tokenizer).__name__ + (f" of {origin}" if isinstance(origin, str) and origin else "")


@contextlib.contextmanager
def _tokenizer_directory(tokenizer: Any, weights: Weights) -> Iterator[Path]:
    """The directory of a tokenizer's files; an object is written to a temporary one, to be read like them."""
    if tokenizer is None:
        if not isinstance(weights, Checkpoint) or isinstance(weights, LoadedCheckpoint):
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
