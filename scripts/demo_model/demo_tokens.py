"""Tokens of the demo corpus: the byte-level BPE, and the split into training and held-out documents.

    python scripts/demo_model/demo_tokens.py --corpus_dir=demo_work/corpus --work_dir=demo_work

Takes about a minute and prints the size of both splits (about 9.8 M and 0.3 M tokens, 3.2 bytes each).
`train_demo.py` and `demo_baselines.py` run it if needed.
"""

import hashlib
import json
import pathlib
from typing import Any

import numpy as np
import tokenizers
from absl import app, flags, logging
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS_DIR = flags.DEFINE_string("corpus_dir", "demo_work/corpus", "Folder that demo_corpus.py wrote.")
WORK_DIR = flags.DEFINE_string("work_dir", "demo_work", "Folder for tokens, checkpoints and logs.")

VOCAB = 4096
EOT = "<|endoftext|>"  # ends every document; also the padding token
HELD_OUT = 60  # one document in 60 is held out,
HELD_TOKENS = 2**17  # and this number of their tokens is scored
SEPARATOR = "\n\x1e\n"  # as demo_corpus.py writes it

# Qwen's pattern: contractions, words with at most one leading character, single digits, punctuation, blanks.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_held_out(text: str) -> bool:
    """Whether a document is held out; decided by its hash, so it does not change when the corpus grows."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % HELD_OUT == 0


def read_documents(corpus_dir: pathlib.Path) -> tuple[list[str], list[str]]:
    """Training and held-out documents of all sources, in the order of their hashes."""
    manifest = json.loads((corpus_dir / "manifest.json").read_text())
    texts = [
        text for row in manifest for text in (corpus_dir / f"{row['name']}.txt").read_text().split(SEPARATOR)
    ]
    texts.sort(key=lambda text: hashlib.sha256(b"order" + text.encode()).digest())
    return [text for text in texts if not is_held_out(text)], [text for text in texts if is_held_out(text)]


def train_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE of `VOCAB` entries: lossless for any text, no unknown token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[EOT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer=trainer, length=len(texts))
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: pathlib.Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json for transformers."""
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOT, pad_token=EOT)
    wrapped.model_max_length = 2048
    wrapped.clean_up_tokenization_spaces = False
    wrapped.save_pretrained(folder)


def encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> np.ndarray:
    """All documents as one stream of token ids, each ended by `EOT`."""
    end = tokenizer.token_to_id(EOT)
    return np.concatenate([np.array([*row.ids, end], np.uint16) for row in tokenizer.encode_batch(texts)])


def prepare(corpus_dir: pathlib.Path, work_dir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Token streams (training, held out); made on the first call, then read from a file."""
    stored = work_dir / "tokens.npz"
    if not stored.exists():
        train, held = read_documents(corpus_dir)
        tokenizer = train_tokenizer(train)
        save_tokenizer(tokenizer, work_dir / "tokenizer")
        sizes = {
            "train_bytes": sum(len(t.encode()) for t in train),
            "held_bytes": sum(len(t.encode()) for t in held),
        }
        arrays: dict[str, Any] = {"train": encode(tokenizer, train), "held": encode(tokenizer, held)}
        part = work_dir / "tokens.part.npz"
        np.savez(part, **arrays | sizes)
        part.rename(stored)
    with np.load(stored) as ids:
        for split in ("train", "held"):
            per_token = ids[f"{split}_bytes"] / len(ids[split])
            logging.info("%s: %d tokens, %.2f bytes each", split, len(ids[split]), per_token)
        return ids["train"], ids["held"][: HELD_TOKENS + 2]  # plus the first trigram's context of two


def main(_: list[str]) -> None:
    """Trains the tokenizer and writes the tokens of the training and the held-out text."""
    prepare(pathlib.Path(CORPUS_DIR.value), pathlib.Path(WORK_DIR.value))


if __name__ == "__main__":
    app.run(main)
