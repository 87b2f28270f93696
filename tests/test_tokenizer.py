"""Tokenizers of every layout: ids and offsets are those of AutoTokenizer, or a sentence says why not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxdelta.errors import JaxDeltaError
from jaxdelta.text import tokenizer as tokenizer_module
from jaxdelta.text.documents import shipped_prompts
from jaxdelta.text.tokenizer import CUT_UP, load_encoder

NASTY = [
    "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n",
    " leading and trailing ",
    "in the <tool> of <tool>s, a<tool>b, <|pad|> x <|pad|>",
    "e\u0301 \u212b nai\u0308ve ﬁ ½ ΣΑΣ",
    "tabs\tand\r\nlines\r\n\r\n   end\u00a0\u3000.",
    "Über 漢字 🙂🏽 \u200d x\u0000y",
    "I'll THEY'RE we'd 12345 1,000.50",
    "   \n \n\n",
    "",
    "<|endoftext|><|endoftext|> </s><s>[INST]x[/INST]",
]
WORDS = tokenizer_module._QWEN_WORDS
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROUND = {"lstrip": True, "rstrip": True, "single_word": False, "normalized": False, "special": False}


def byte_level(normalizer: Any = None, split: Any = None, specials: list[str] = SPECIALS) -> Tokenizer:
    """As GPT-2, Qwen and Llama 3 have it."""
    made = Tokenizer(models.BPE())
    if normalizer:
        made.normalizer = normalizer
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only]) if split else bytes_only
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(made, trainers.BpeTrainer, 600, initial_alphabet=alphabet, special_tokens=specials)


def qwen(specials: list[str] = SPECIALS) -> Tokenizer:
    made = byte_level(normalizers.NFC(), pre_tokenizers.Split(Regex(WORDS), "isolated"), specials)
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return made


def metaspace() -> Tokenizer:
    """As Llama 2 and Mistral have it: a space before the text, bytes for unknown characters."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Metaspace()
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return trained(made, trainers.BpeTrainer, 600, special_tokens=names)


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["<unk>", "<s>", "</s>"]
    return trained(made, trainers.UnigramTrainer, 300, special_tokens=names, unk_token="<unk>")


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(made, trainers.WordPieceTrainer, 400, special_tokens=["[UNK]", "[CLS]", "[SEP]"])


def word_level() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return trained(made, trainers.WordLevelTrainer, 200, special_tokens=["<unk>"])


def trained(made: Tokenizer, trainer: Any, size: int, **options: Any) -> Tokenizer:
    made.train_from_iterator(shipped_prompts() * 3, trainer(vocab_size=size, show_progress=False, **options))
    return made


def with_tokens(made: Tokenizer, **flags: Any) -> Tokenizer:
    made.add_tokens([AddedToken("<tool>", **ROUND | flags)])
    made.add_special_tokens([AddedToken("<|pad|>", normalized=False)])
    return made


def decoder_of(made: Tokenizer, **changes: dict[str, Any]) -> dict[str, Any]:
    """The `added_tokens_decoder` of a tokenizer, with changed flags by content."""
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {
        str(number): {flag: getattr(token, flag) for flag in flags} | changes.get(token.content, {})
        for number, token in made.get_added_tokens_decoder().items()
    }


def new_token(made: Tokenizer, content: str, **flags: Any) -> dict[str, Any]:
    """An `added_tokens_decoder` of the tokenizer's tokens and one that it lacks."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return decoder_of(made) | {str(made.get_vocab_size()): {"content": content} | plain | flags}


# name -> the tokenizer, its tokenizer_config.json, the config's model_type, other files.
Layout = tuple[Callable[[], Tokenizer], dict[str, Any] | None, str | None, dict[str, Any]]
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast"}
LAYOUTS: dict[str, Layout] = {
    "qwen alone": (qwen, None, "qwen3", {}),
    "qwen": (qwen, {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}, "qwen3", {}),
    "qwen experts": (qwen, {"tokenizer_class": "Qwen2TokenizerFast"}, "qwen3_moe", {}),
    "qwen2 with another class": (byte_level, GENERIC, "qwen2", {}),
    "bytes read as Qwen's": (byte_level, None, "qwen3", {}),
    "bytes": (byte_level, GENERIC, "qwen3", {}),
    "bytes, no config.json": (byte_level, GENERIC, None, {}),
    "bytes, Llama 3's class": (byte_level, {"tokenizer_class": "LlamaTokenizerFast"}, "llama", {}),
    "bytes, R1's class": (byte_level, {"tokenizer_class": "LlamaTokenizerFast"}, "qwen3", {}),
    "bytes, Llama": (byte_level, None, "llama", {}),
    "bytes, Mistral": (byte_level, GENERIC, "mistral", {}),
    "stripping token": (lambda: with_tokens(byte_level()), GENERIC, "llama", {}),
    "word token": (lambda: with_tokens(qwen(), single_word=True, rstrip=False), None, "qwen3", {}),
    "normalized token": (lambda: with_tokens(qwen(), normalized=True, lstrip=False), None, "qwen3", {}),
    "token in the config": (
        qwen,
        {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": new_token(qwen(), "<tool>")},
        "qwen3",
        {},
    ),
    "stripping token in the config": (
        byte_level,
        GENERIC | {"added_tokens_decoder": new_token(byte_level(), "<tool>", lstrip=True, special=False)},
        "qwen3",
        {},
    ),
    "flags in the config": (
        lambda: with_tokens(byte_level()),
        GENERIC
        | {"added_tokens_decoder": decoder_of(with_tokens(byte_level()), **{"<tool>": {"rstrip": False}})},
        "llama",
        {},
    ),
    "special in the config": (
        lambda: with_tokens(byte_level()),
        GENERIC
        | {"added_tokens_decoder": decoder_of(with_tokens(byte_level()), **{"<tool>": {"special": True}})},
        "qwen3",
        {},
    ),
    "additional": (byte_level, GENERIC | {"additional_special_tokens": ["<tool>"]}, "qwen3", {}),
    "extra": (byte_level, GENERIC | {"extra_special_tokens": {"a_token": "<tool>"}}, "qwen3", {}),
    "named": (qwen, {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|pad|>"}, "qwen3", {}),
    "token of its own name": (byte_level, GENERIC | {"image_token": "<tool>"}, "qwen3", {}),
    "token as an object": (
        byte_level,
        GENERIC | {"pad_token": {"__type": "AddedToken", "content": "<|pad|>", "lstrip": True}},
        "qwen3",
        {},
    ),
    "split specials": (qwen, {"split_special_tokens": True}, "qwen3", {}),
    "prefix space": (qwen, {"add_prefix_space": True}, "qwen3", {}),
    "prefix space, generic": (byte_level, GENERIC | {"add_prefix_space": True}, "llama", {}),
    "added_tokens.json": (byte_level, GENERIC, "qwen3", {"added_tokens.json": {"<tool>": 600}}),
    "special_tokens_map.json": (
        byte_level,
        GENERIC,
        "llama",
        {"special_tokens_map.json": {"pad_token": {"content": "<|pad|>", "lstrip": True}}},
    ),
    "metaspace": (metaspace, GENERIC, "llama", {}),
    "metaspace, Llama 2's class": (metaspace, {"tokenizer_class": "LlamaTokenizer"}, "llama", {}),
    "unigram": (unigram, GENERIC, "llama", {}),
    "word pieces": (word_piece, GENERIC, "qwen3", {}),
    "words": (word_level, GENERIC, "qwen3", {}),
    "a long vocabulary's name": (qwen, {"name_or_path": "x", "model_max_length": 4}, "qwen3", {}),
    "truncating": (lambda: _truncating(byte_level()), GENERIC, "qwen3", {}),
    "class in config.json": (
        byte_level,
        None,
        "llama",
        {"config.json": {"tokenizer_class": "Qwen2Tokenizer"}},
    ),
}


def _truncating(made: Tokenizer) -> Tokenizer:
    made.enable_truncation(5)
    made.enable_padding(length=100)
    return made


def write_layout(directory: Path, layout: Layout) -> Path:
    make, config, kind, files = layout
    make().save(str(directory / "tokenizer.json"))
    contents: dict[str, Any] = {} if config is None else {"tokenizer_config.json": config}
    if kind:
        contents["config.json"] = {"model_type": kind} | files.get("config.json", {})
    for name, content in (files | contents).items():
        (directory / name).write_text(json.dumps(content))
    return directory


def of_transformers(directory: Path, texts: list[str]) -> list[tuple[list[int], list[int]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    encoded = [tokenizer(t, add_special_tokens=False, return_offsets_mapping=True) for t in texts]
    return [(one["input_ids"], [start for start, _ in one["offset_mapping"]]) for one in encoded]


@pytest.mark.parametrize("name", LAYOUTS)
def test_ids_and_offsets_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    directory = write_layout(tmp_path, LAYOUTS[name])
    texts = NASTY + shipped_prompts()[:5]
    assert load_encoder(directory)(texts) == of_transformers(directory, texts)


DIRECT = (
    "qwen alone",
    "qwen",
    "qwen experts",
    "bytes",
    "bytes, Llama",
    "stripping token",
    "unigram",
    "words",
)


@pytest.mark.parametrize("name", LAYOUTS)
def test_transformers_is_not_needed_where_it_adds_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_layout(tmp_path, LAYOUTS[name])
    used = []
    monkeypatch.setattr(tokenizer_module, "load_tokenizer", lambda path: used.append(path))
    load_encoder(directory)
    if name in DIRECT:
        assert not used


def test_tokens_that_only_the_config_knows_are_read(tmp_path: Path) -> None:
    """Case C3: the ids of tokenizer.json alone would be others."""
    directory = write_layout(tmp_path, LAYOUTS["token in the config"])
    text = "in the <tool> of <tool>s"
    alone = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    ids = load_encoder(directory)([text])[0][0]
    assert ids != alone
    assert ids.count(qwen().get_vocab_size()) == 2


@pytest.mark.parametrize("damage", [[], 5, None, {"added_tokens_decoder": [1]}, {"pad_token": 5}])
def test_odd_settings_are_read_or_refused(tmp_path: Path, damage: Any) -> None:
    directory = write_layout(tmp_path, LAYOUTS["qwen"])
    (directory / "tokenizer_config.json").write_text(json.dumps(damage))
    try:
        ours = load_encoder(directory)(NASTY)
    except JaxDeltaError as error:
        assert str(tmp_path) in str(error)
        assert len(str(error)) < 800
    else:
        assert ours == of_transformers(directory, NASTY)


def byte_vocabulary(directory: Path) -> Path:
    """vocab.json and merges.txt, as older repositories have them."""
    model = json.loads(qwen([]).to_str())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (directory / "config.json").write_text('{"model_type": "qwen3"}')
    return directory


def test_vocabulary_and_merges_warn(tmp_path: Path) -> None:
    """Case C6: without special tokens a note says that they are cut up."""
    directory = byte_vocabulary(tmp_path)
    encoder = load_encoder(directory)
    assert encoder.notes == (CUT_UP,)
    assert encoder(NASTY) == of_transformers(directory, NASTY)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<|im_end|>": 600}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<|im_end|>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"600": {"content": "<|im_end|>"}}}),
        ("special_tokens_map.json", {"additional_special_tokens": ["<|im_end|>"]}),
    ],
)
def test_named_special_tokens_do_not_warn(tmp_path: Path, file: str, content: dict[str, Any]) -> None:
    directory = byte_vocabulary(tmp_path)
    (directory / file).write_text(json.dumps(content))
    encoder = load_encoder(directory)
    assert not encoder.notes
    assert encoder(NASTY) == of_transformers(directory, NASTY)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"}},
        {
            "tokenizer_config.json": {"added_tokens_decoder": new_token(qwen([]), "<|im_end|>")},
            "special_tokens_map.json": {"eos_token": "<|im_end|>"},
        },
        {"added_tokens.json": {"<|im_end|>": 0}, "merges.txt": "#version: 0.2"},
    ],
)
def test_no_vocabulary_is_no_tokenizer(tmp_path: Path, files: dict[str, Any]) -> None:
    """Case C4: transformers makes a vocabulary of one token, and drops nearly all of a text."""
    for name, content in (files | {"config.json": {"model_type": "qwen3"}}).items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(JaxDeltaError, match=r"has no tokenizer\.json"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("vocab.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("tokenizer.model", "version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("tokenizer.model", "not SentencePiece", "has no usable tokenizer"),
        ("tekken.json", "{}", "has no usable tokenizer"),
        ("tekken.json", "[", "has no usable tokenizer"),
        ("vocab.json", "{}", "has no usable tokenizer"),
        ("vocab.txt", "a\nb\nc", "has no usable tokenizer"),
        *(("tokenizer.json", text, "is not a tokenizer") for text in ("[]", "null", "5", '"x"', "{", "")),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(JaxDeltaError, match=message) as raised:
        load_encoder(tmp_path)
    assert len(str(raised.value)) < 800
    assert str(raised.value).count("\n") < 5


def test_code_of_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    directory = write_layout(tmp_path, LAYOUTS["qwen"])
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(own))
    (directory / "config.json").write_text('{"model_type": "unknown"}')
    (directory / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(JaxDeltaError, match="code of its own, which is never run"):
        load_encoder(directory)


def test_a_text_that_the_tokenizer_refuses(tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="<none>"))
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(JaxDeltaError, match="cannot tokenize the text"):
        load_encoder(tmp_path)(["c"])
