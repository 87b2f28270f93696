"""From texts to tokens: files, their faults, ids as transformers gives them, and whose each token is."""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jaxdelta.errors import JaxDeltaError, UsageError
from jaxdelta.text.documents import shipped_prompts
from jaxdelta.text.tokenizer import Tokenize, load_encoder
from jaxdelta.text.tokens import Tokens
from jaxdelta.text.windows import SEPARATOR, tokenize

# Qwen's own split into words.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

DOCUMENTS = [
    "The cat sat on the mat.",
    "",
    "Über den Wolken 漢字 😀 — naïve",
    "\n\nleading newlines",
    "trailing  \n\n",
    "def f(n):\n    return n ** 2  # 100%",
    " <|end|> and <|im_start|>user",
    "x",
]


def word_tokenizer(**settings: Any) -> Tokenizer:
    """A byte-level BPE of the build of Qwen's: its split into words, NFC, added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(shipped_prompts() * 3 + DOCUMENTS, trainer)
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)])
    return tokenizer


@pytest.fixture(scope="module")
def word_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("words")
    word_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return directory


@pytest.fixture(scope="module")
def encode(word_directory: Path) -> Tokenize:
    return load_encoder(word_directory)


def letters(texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """An encoder of one token a character."""
    return [([ord(letter) for letter in text], list(range(len(text)))) for text in texts]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Tokens


def test_documents_are_joined_by_a_blank_line() -> None:
    tokens = tokenize(["ab", "c"], letters, vocab_size=256)
    assert "".join(map(chr, tokens.ids[0])) == "ab\n\nc"
    assert tokens.ids.dtype == tokens.documents.dtype == np.int32
    assert tokens.ids.shape == tokens.documents.shape == (1, 5)
    assert tokens.count == 5
    np.testing.assert_array_equal(tokens.documents, [[0, 0, 0, 0, 1]])


def test_default_prompts_are_one_stream(encode: Tokenize) -> None:
    tokens = tokenize(shipped_prompts(), encode, vocab_size=500)
    np.testing.assert_array_equal(tokens.ids[0], encode(["\n\n".join(shipped_prompts())])[0][0])
    assert tokens.documents.max() == 24
    assert set(np.diff(tokens.documents[0])) == {0, 1}


def test_documents_by_the_bytes_of_the_tokens(encode: Tokenize, word_directory: Path) -> None:
    """A token begins where the bytes of those before it end; a document, where its text does."""
    documents = [document for document in DOCUMENTS if unicodedata.is_normalized("NFC", document)]
    tokens = tokenize(documents, encode, vocab_size=500)
    vocabulary = Tokenizer.from_file(str(word_directory / "tokenizer.json"))
    byte_of = {letter: byte for byte, letter in _byte_letters().items()}
    special = {"<|end|>", "<|im_start|>"}
    sizes = [
        len(piece.encode() if piece in special else bytes(byte_of[letter] for letter in piece))
        for piece in map(vocabulary.id_to_token, tokens.ids[0].tolist())
    ]
    begins = np.cumsum([0, *sizes])
    text = SEPARATOR.join(documents)
    assert begins[-1] == len(text.encode())
    starts = [
        len((SEPARATOR.join(documents[:i]) + SEPARATOR * (i > 0)).encode()) for i in range(len(documents))
    ]
    owners = [max(i for i, start in enumerate(starts) if start <= begin) for begin in begins[:-1]]
    assert tokens.documents[0].tolist() == owners


def test_documents_where_the_text_is_normalised(tiny_checkpoint: Path) -> None:
    """One token a byte of the normalised text: documents are counted out by their bytes."""
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()

    def encode(texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(found.ids, [start for start, _ in found.offsets]) for found in encodings]

    documents = [unicodedata.normalize("NFD", text) for text in ("éàü", "plain", "한국어 é", "é")]
    tokens = tokenize(documents, encode, vocab_size=256)
    sizes = [len(unicodedata.normalize("NFC", document + SEPARATOR).encode()) for document in documents]
    sizes[-1] -= len(SEPARATOR)
    np.testing.assert_array_equal(tokens.documents[0], np.repeat(np.arange(4), sizes))


def test_empty_documents_own_their_separators() -> None:
    tokens = tokenize(["", "a", "", "", "b"], letters, vocab_size=256)
    assert tokens.documents[0].tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("cut", [2, 3, 7, 10_000])
def test_truncation(encode: Tokenize, cut: int) -> None:
    whole = tokenize(DOCUMENTS, encode, vocab_size=500)
    tokens = tokenize(DOCUMENTS, encode, max_tokens=cut, vocab_size=500)
    assert tokens.count == min(cut, whole.count)
    np.testing.assert_array_equal(tokens.ids, whole.ids[:, :cut])
    np.testing.assert_array_equal(tokens.documents, whole.documents[:, :cut])


def test_default_truncation() -> None:
    assert tokenize(["a" * 3000], letters, vocab_size=256).count == 2048


@pytest.mark.parametrize("max_tokens", [1, 0, -5])
def test_max_tokens_below_two(max_tokens: int) -> None:
    with pytest.raises(UsageError, match=f"max_tokens must be at least 2 .*not {max_tokens}"):
        tokenize(["abc"], letters, max_tokens=max_tokens, vocab_size=256)


@pytest.mark.parametrize(
    ("documents", "count"), [(["a"], "1 token;"), ([""], "0 tokens;"), ([], "0 tokens;")]
)
def test_too_few_tokens(documents: list[str], count: str) -> None:
    with pytest.raises(JaxDeltaError, match=f"the calibration text has {count} at least 2 are needed"):
        tokenize(documents, letters, vocab_size=256)


def test_two_tokens_are_enough() -> None:
    assert tokenize(["ab"], letters, vocab_size=256).count == 2


def test_token_beyond_the_vocabulary() -> None:
    with pytest.raises(JaxDeltaError, match="gives token 100, the model has 100"):
        tokenize(["abcd"], letters, vocab_size=100)
    assert tokenize(["abcd"], letters, vocab_size=101).count == 4


def test_no_unicode_text(encode: Tokenize) -> None:
    """JSON can hold half of a surrogate pair, which no tokenizer can read."""
    with pytest.raises(JaxDeltaError, match=r"not Unicode .*at 3"):
        tokenize(["abc\ud800"], encode, vocab_size=500)


def test_tokens_check_their_arrays() -> None:
    with pytest.raises(UsageError, match=r"documents have shape \(1, 4\), the ids \(1, 3\)"):
        Tokens(np.zeros((1, 3), np.int32), np.zeros((1, 4), np.int32))


# Tokenizers


@pytest.mark.parametrize(
    "text",
    [
        SEPARATOR.join(DOCUMENTS),
        "e\u0301 \u212b nai\u0308ve",  # not in NFC
        "tabs\tand\r\nlines\n\n\n   end ",
        "<|end|><|im_start|>",
        "a" * 5000,
        "",
    ],
)
def test_ids_are_those_of_transformers(word_directory: Path, encode: Tokenize, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(word_directory)
    assert encode([text])[0][0] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_ids_of_the_tiny_checkpoint(tiny_checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    text = SEPARATOR.join(shipped_prompts())
    wanted = AutoTokenizer.from_pretrained(tiny_checkpoint)(text, add_special_tokens=False)["input_ids"]
    assert load_encoder(tiny_checkpoint)([text])[0][0] == wanted


def test_nothing_is_added(tmp_path: Path, word_directory: Path) -> None:
    """No token before or after the text, though the file's post-processor would add some."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(word_directory / "tokenizer.json"))
    end = tokenizer.token_to_id("<|end|>")
    tokenizer.post_processor = TemplateProcessing("<|end|> $A <|end|>", special_tokens=[("<|end|>", end)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_encoder(tmp_path)(["some text"]) == load_encoder(word_directory)(["some text"])


def test_settings_of_an_earlier_use_are_dropped(tmp_path: Path, word_directory: Path) -> None:
    """tokenizer.json can hold a truncation and a padding; transformers, and so the reference, drops both."""
    tokenizer = Tokenizer.from_file(str(word_directory / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=1000)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = SEPARATOR.join(DOCUMENTS)
    assert load_encoder(tmp_path)([text]) == load_encoder(word_directory)([text])


def test_directory_without_tokenizer_json(tmp_path: Path, word_directory: Path) -> None:
    """Older repositories carry vocab.json and merges.txt only; transformers reads those."""
    from transformers import Qwen2Tokenizer

    model = json.loads((word_directory / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    text = "The cat sat.\n\nÜber 漢字 100%"
    ((ids, offsets),) = load_encoder(tmp_path)([text])
    assert ids == Qwen2Tokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"]
    assert ids == load_encoder(word_directory)([text])[0][0]
    assert offsets == load_encoder(word_directory)([text])[0][1]


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(JaxDeltaError, match=r"has no tokenizer\.json"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "not JSON", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_damaged_tokenizer(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "tokenizer.json", content)
    with pytest.raises(JaxDeltaError) as raised:
        load_encoder(tmp_path)
    assert str(raised.value).startswith(f"{path}: is not a tokenizer")


def test_damaged_files_for_transformers(tmp_path: Path) -> None:
    write(tmp_path / "vocab.json", "{")
    with pytest.raises(JaxDeltaError, match="has no usable tokenizer"):
        load_encoder(tmp_path)


def _byte_letters() -> dict[int, str]:
    """GPT-2's letters for bytes: those that print stand for themselves, the others follow from 256 on."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printing]
    return {byte: chr(byte) for byte in printing} | {byte: chr(256 + i) for i, byte in enumerate(others)}
