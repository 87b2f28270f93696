"""Of a text without lines as much is tokenized as is asked for, and the ids are those of the whole text."""

import codecs
import random
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import one_line
from test_calibration import WORDS, letters
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from jaxdelta.errors import JaxDeltaError
from jaxdelta.run.analyze import analyze
from jaxdelta.text import file_kinds
from jaxdelta.text.documents import read_documents, shuffled
from jaxdelta.text.parts import parts
from jaxdelta.text.tokenizer import Tokenize, load_encoder
from jaxdelta.text.tokens import Tokens
from jaxdelta.text.windows import SEPARATOR, tokenize

WANTED = 300  # tokens
# Digits in groups of three from the right: where a group ends depends on the end of the number.
FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))|[^\p{N}]+"


def drawn(pieces: Sequence[str], count: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(pieces, k=count))


def characters(first: int, last: int) -> list[str]:
    return [chr(code) for code in range(first, last)]


TEXTS = {
    "one letter": "a" * 6500,
    "two letters in turn": "ab" * 3200,
    "words": drawn(["the", "cat", " ", " ", "'re", "'r", "'", "100%", "naïve"], 2600),
    "Chinese": drawn(characters(0x4E00, 0x4E40), 6500),
    "Thai": drawn(characters(0xE01, 0xE3A), 6500),
    "joined emoji": drawn(["👩‍👩‍👧", "😀", "👍🏽", "\u200d", "🇩🇪", "☎️"], 2000),
    "marks in any order": drawn([*"aeou", *"\u0301\u0323\u0308\u0327"], 6500),
    "Hangul in pieces": unicodedata.normalize("NFD", drawn(characters(0xAC00, 0xAC40), 2600)),
    "ends of lines": drawn(["ab", "\r", "\r\n ", " ", "  \n ", "cd", "/"], 3200),
    "lines": drawn(["ab", "cd\n", "e", "\n", "x ", "\nab"], 3200),
    "special tokens and halves": drawn(["<|im_start|>", "<|im_sta", "rt|>", "<", "|", "x "], 1600),
    "digits": drawn("0123456789", 6500),
    "rules": drawn([".", "-", "=", "_" * 40, "#", "/"], 1600),
    "spaces": drawn([" " * 9, "x", " " * 40, "\t"], 1000),
}


def bytes_of(*splits: str, **settings: Any) -> tuple[Tokenizer, Any]:
    """A byte-level BPE that splits text by these expressions first."""
    tokenizer = Tokenizer(models.BPE(**settings))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)


def qwen() -> tuple[Tokenizer, Any]:
    tokenizer, trainer = bytes_of(WORDS)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer, trainer


def llama2() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return tokenizer, trainers.BpeTrainer(vocab_size=900, special_tokens=first, show_progress=False)


def unigram() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=500, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )


MAKERS: dict[str, Callable[[], tuple[Tokenizer, Any]]] = {
    "qwen": qwen,
    "llama3": lambda: bytes_of(WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|"), ignore_merges=True),
    "llama2": llama2,
    "no words": bytes_of,
    "digits from the right": lambda: bytes_of(FROM_THE_RIGHT),
    "unigram": unigram,
}


@pytest.fixture(scope="module", params=MAKERS)
def encode(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenize:
    """Tokenizers trained on the texts that they are tried on, so that their tokens span all that they can."""
    tokenizer, trainer = MAKERS[request.param]()
    tokenizer.train_from_iterator([text[:1500] for text in TEXTS.values()], trainer)
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)])
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))
    return load_encoder(directory)


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_those_of_the_whole_text(name: str, encode: Tokenize, request: pytest.FixtureRequest) -> None:
    if (request.node.callspec.params["encode"], name) == ("unigram", "rules"):
        name = "digits"  # divisions of a long rule into tokens have equal scores, and rounding decides
    whole, _ = encode([TEXTS[name]])[0]
    for layout, count in (("stream", 60), ("packed", WANTED), ("stream", 700)):
        tokens = tokenize(
            [TEXTS[name]], encode, max_tokens=count, vocab_size=10**6, layout=layout, seq_len=10**6
        )
        assert tokens.ids[0].tolist() == whole[:count], (layout, count)


def test_parts_are_the_text(encode: Tokenize) -> None:
    for text in (TEXTS["words"], TEXTS["lines"], TEXTS["joined emoji"]):
        chunks = (text[start : start + 700] for start in range(0, len(text), 700))
        found = list(parts(chunks, encode, 2500))
        assert "".join(part.text for part in found) == text
        ends = np.cumsum([len(part.text) for part in found]).tolist()
        assert all(
            text[:end].endswith(part.before + part.text) for part, end in zip(found, ends, strict=True)
        )


class Counted:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, encode: Tokenize = letters):
        self.encode, self.seen = encode, 0

    def __call__(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        self.seen += sum(map(len, texts))
        return self.encode(texts)


@pytest.mark.parametrize("layout", ["stream", "packed"])
@pytest.mark.parametrize("name", ["words", "Chinese", "Thai", "joined emoji", "special tokens and halves"])
def test_a_long_line_is_not_tokenized_whole(name: str, layout: str, demo: Tokenize) -> None:
    counted, text = Counted(demo), TEXTS[name] * 400
    tokens = tokenize([text], counted, max_tokens=WANTED, vocab_size=10**6, layout=layout)
    assert tokens.count == WANTED
    assert counted.seen < 100_000 < len(text)
    assert tokens.ids[0].tolist() == demo([TEXTS[name]])[0][0][:WANTED]


@pytest.fixture(scope="module")
def demo() -> Tokenize:
    return load_encoder(Path(file_kinds.__file__).parents[1] / "data" / "demo")


def same(found: Tokens, wanted: Tokens) -> None:
    assert found.fingerprint == wanted.fingerprint
    places = np.argwhere(wanted.documents >= 0).tolist()
    assert [found.text(*place) for place in places] == [wanted.text(*place) for place in places]


@pytest.mark.parametrize("layout", ["stream", "packed"])
@pytest.mark.parametrize("block", [4, 64, 100_000])
def test_a_file_in_blocks_is_the_file(
    layout: str, block: int, tmp_path: Path, demo: Tokenize, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["Über 漢字 😀.\r\n" * 20, "x", TEXTS["joined emoji"][:500], "a\n\nb" * 30]
    for number, text in enumerate(texts):
        mark = codecs.BOM_UTF8 if number == 2 else b""
        (tmp_path / f"{number}.txt").write_bytes(mark + text.encode())
    options: dict[str, Any] = {"vocab_size": 10**6, "layout": layout, "max_tokens": 900, "seq_len": 100}
    monkeypatch.setattr(file_kinds, "BLOCK", block)
    assert ["".join(document) for document in read_documents(tmp_path)] == texts
    same(tokenize(read_documents(tmp_path), demo, **options), tokenize(texts, demo, **options))
    in_order = tokenize(shuffled(read_documents(tmp_path), 3), demo, **options)
    same(in_order, tokenize(shuffled(texts, 3), demo, **options))


@pytest.mark.parametrize("layout", ["stream", "packed"])
def test_no_more_of_a_file_is_read_than_its_tokens_need(layout: str, tmp_path: Path, demo: Tokenize) -> None:
    path = tmp_path / "line.txt"
    path.write_bytes(b"some words " * 200_000 + b"\xff")
    tokens = tokenize(read_documents(path), demo, max_tokens=WANTED, vocab_size=10**6, layout=layout)
    assert tokens.count == WANTED
    with pytest.raises(JaxDeltaError, match=r"is not UTF-8 text \(byte 2200000\); convert it first"):
        ["".join(document) for document in read_documents(path)]


@pytest.mark.parametrize("block", [3, 4, 7, 100])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_the_byte_of_a_fault(
    block: int, mark: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_kinds, "BLOCK", block)
    path = tmp_path / "a.txt"
    for content in ("漢字".encode() + b"\xe6\xbc", b"ab\xe6\xbcx" + b"yz" * 9):
        path.write_bytes(mark + content)
        with pytest.raises(UnicodeDecodeError) as python:
            path.read_bytes().decode()
        message = one_line(lambda: ["".join(document) for document in read_documents(path)])
        assert message == f"{path}: is not UTF-8 text (byte {python.value.start}); convert it first"


class PanicException(BaseException):
    """As the tokenizers library's, which is no Exception and cannot be imported."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory while tokenizing; lower --max_tokens"),
        (
            PanicException("capacity overflow"),
            "the tokenizer fails on the calibration text (capacity overflow)",
        ),
    ],
)
def test_the_tokenizer_breaks_down(error: BaseException, message: str) -> None:
    def encode(texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        raise error

    assert one_line(tokenize, ["some text"], encode, vocab_size=10) == message


def test_memory_runs_out_while_a_text_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')

    def loads(text: str) -> Any:
        raise MemoryError

    monkeypatch.setattr("json.loads", loads)
    assert "out of memory" in one_line(analyze, "demo", tmp_path / "a.jsonl")


def test_documents_own_their_tokens_in_a_long_text(demo: Tokenize) -> None:
    texts = ["one line " * 3000, "zwei", TEXTS["Chinese"] * 2]
    tokens = tokenize(texts, demo, max_tokens=30_000, vocab_size=10**6, seq_len=10**6)
    ids, starts = demo([SEPARATOR.join(texts)])[0]
    assert tokens.ids[0].tolist() == ids[:30_000]
    bounds = np.cumsum([0, *(len(text) + 2 for text in texts[:-1])])
    owners = np.searchsorted(bounds, starts[:30_000], side="right") - 1
    np.testing.assert_array_equal(tokens.documents[0], owners)
