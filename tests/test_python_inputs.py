"""What callers give to analyze(): used as it is meant, or refused by name; against transformers' own
tokenizers and models, and against Tokens put together by hand."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import jax.numpy as jnp
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from conftest import EXPERTS, TEXT, torch_model, write_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import jaxdelta
from jaxdelta.report.analysis import Analysis
from jaxdelta.run.analyze import analyze
from jaxdelta.text.python_values import IdDocuments, read_value
from jaxdelta.text.tokens import Tokens

FAST: dict[str, Any] = {"top_k": 2, "bootstrap": 0, "null_draws": 0, "views": "raw"}
ROWS = [{"text": text} for text in TEXT]


def run(model: Any, calibration: Any = None, **options: Any) -> Analysis:
    return analyze(model, calibration, **FAST | options)


def print_of(model: Any, calibration: Any, **options: Any) -> str:
    """The fingerprint of the exact tokens."""
    return str(run(model, calibration, **options).run["text_fingerprint"])


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def theirs(raw: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="!")


# Texts

TEXTS: dict[str, Callable[[], Any]] = {
    "tuple": lambda: tuple(TEXT),
    "generator": lambda: (text for text in TEXT),
    "NumPy": lambda: np.array(TEXT),
    "NumPy objects": lambda: np.array(TEXT, object),
    "Dataset": lambda: datasets.Dataset.from_list(ROWS),
    "a column of a Dataset": lambda: datasets.Dataset.from_list(ROWS)["text"],
    "IterableDataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "a stream without columns": lambda: datasets.IterableDataset.from_generator(lambda: iter(ROWS)),
    "DataFrame": lambda: pandas.DataFrame(ROWS),
    "Series": lambda: pandas.Series(TEXT),
    "Arrow": lambda: pyarrow.table({"text": TEXT}),
    "a column of Arrow": lambda: pyarrow.table({"text": TEXT})["text"],
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str) -> None:
    found = read_value(TEXTS[name](), "text")
    assert isinstance(found, Iterator) and list(found) == TEXT


def test_texts_of_another_column(tiny_checkpoint: Path) -> None:
    frame = pandas.DataFrame({"body": TEXT, "text": ["x"] * len(TEXT)})
    assert print_of(tiny_checkpoint, frame, text_key="body") == print_of(tiny_checkpoint, TEXT)


def test_chats_pass_as_they_are() -> None:
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    for given in ([chat, chat], [{"messages": chat}], [{"conversations": chat}]):
        assert list(read_value(given, "text")) == given  # type: ignore[arg-type]


# Token ids


def ids_of(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text).ids for text in TEXT]


def documents(given: Any) -> list[list[int]]:
    found = read_value(given, "text")
    assert isinstance(found, IdDocuments)
    return [document.ids.tolist() for document in found.documents]


def test_token_ids_of_every_kind(raw: Tokenizer, theirs: PreTrainedTokenizerFast) -> None:
    rows = ids_of(raw)
    even = [row[:20] for row in rows]
    for wanted, given in [
        (rows, rows),
        (rows, [tuple(row) for row in rows]),
        (rows, (np.array(row) for row in rows)),
        (rows, [torch.tensor(row) for row in rows]),
        (rows, np.array([*map(np.array, rows), None], object)[:-1]),
        (rows, theirs(TEXT)),
        (rows, dict(theirs(TEXT))),
        (rows, [theirs(text) for text in TEXT]),
        (rows, theirs(TEXT, padding=True)),
        (rows, theirs(TEXT, padding=True, return_tensors="pt")),
        (rows, theirs(TEXT, padding=True, return_tensors="np", padding_side="left")),
        (rows, raw.encode_batch(TEXT)),
        (rows[:1], raw.encode(TEXT[0])),
        (rows[:1], theirs(TEXT[0])),
        (rows[:1], rows[0]),
        (rows[:1], pandas.Series(rows[0])),
        (rows[:1], np.array(rows[0], np.uint16)),
        (even, np.array(even, np.int64)),
        (even, torch.tensor(even)),
        (even, jnp.array(even)),
    ]:
        assert documents(given) == wanted


def test_ids_are_measured_as_sequences_of_their_own(tiny_checkpoint: Path, raw: Tokenizer) -> None:
    """Each is a segment, as in Tokens by hand; packed, they are the texts' own packed tokens."""
    rows = ids_of(raw)
    length = max(map(len, rows))
    ids, owners = np.zeros((3, length), np.int32), np.full((3, length), -1, np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)], owners[number, : len(row)] = row, number
    wanted, found = run(tiny_checkpoint, Tokens(ids, owners)), run(tiny_checkpoint, rows)
    assert found.n_calib_tokens == wanted.n_calib_tokens == sum(map(len, rows))
    np.testing.assert_allclose(found.singular_values, wanted.singular_values, rtol=1e-5, atol=1e-5)
    packed = {"layout": "packed", "seq_len": 64}
    assert print_of(tiny_checkpoint, rows, **packed) == print_of(tiny_checkpoint, TEXT, **packed)


def test_one_sequence_is_one_text(
    tiny_checkpoint: Path, raw: Tokenizer, theirs: PreTrainedTokenizerFast
) -> None:
    wanted = run(tiny_checkpoint, TEXT[:1])
    for given in (raw.encode(TEXT[0]).ids, theirs(TEXT[:1], return_tensors="pt")):
        assert run(tiny_checkpoint, given).run["text_fingerprint"] == wanted.run["text_fingerprint"]


def test_only_as_many_ids_as_asked_for(tiny_checkpoint: Path) -> None:
    def endless() -> Iterator[list[int]]:
        while True:
            yield list(range(40))

    assert run(tiny_checkpoint, endless(), max_tokens=100).n_calib_tokens == 100
    assert run(tiny_checkpoint, endless(), max_tokens=100, seq_len=16).n_calib_tokens == 100


# What is refused

REFUSED: dict[str, tuple[Any, str]] = {
    "bytes": (b"text", "must not be bytes: decode it"),
    "a number": (5, "must not be int; give"),
    "a function": (print, "must not be builtin_function_or_method; give"),
    "a class": (list, "must not be type"),
    "a set": ({"a", "b"}, "a set: its documents have no order"),
    "a long text": ("The cat sat. " * 200, "is a text itself, not a file: pass [text]"),
    "a text of lines": ("The cat\nsat.", "is a text itself, not a file: pass [text]"),
    "a text with NUL": ("The cat\0", "is a text itself, not a file: pass [text]"),
    "a dict of columns": ({"text": TEXT}, "must not be a dict with the keys ['text']"),
    "a DatasetDict": (
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
        "choose one of its splits",
    ),
    "another column": (pandas.DataFrame({"x": TEXT}), "the DataFrame has no column 'text', only ['x']"),
    "another column of a Dataset": (datasets.Dataset.from_dict({"x": TEXT}), "no column 'text', only ['x']"),
    "one column twice": (pandas.DataFrame([["a", "b"]], columns=["text", "text"]), "several columns 'text'"),
    "None in a list": (["a", None], "item 1 must be a text, not NoneType; leave it out"),
    "NaN in a table": (pandas.DataFrame({"text": ["a", None]}), "item 1 must be a text, not "),
    "bytes in a list": (["a", b"b"], "item 1 must be a text, not bytes"),
    "a path in a list": ([Path("a.txt")], "item 0 must be a text, not PosixPath"),
    "a dict in a list": (["a", {"text": "b"}], "item 1 must be a text, not dict"),
    "lists in a list": ([["a"], ["b"]], "item 0 must be a text, not list"),
    "ids among texts": (["a", [1, 2]], "item 1 must be a text, not list"),
    "texts among ids": ([[1, 2], "a"], "item 1 must be ids, not str"),
    "three axes": (np.ones((1, 2, 3), int), "ids) in one or two axes, not int64 of shape (1, 2, 3)"),
    "no axis": (np.array(3), "in one or two axes, not int64 of shape ()"),
    "floats": (np.ones(3), "not float64 of shape (3,)"),
    "floats of PyTorch": (torch.ones(2, 2), "not float32 of shape (2, 2)"),
    "booleans": (np.ones((2, 3), bool), "not bool of shape (2, 3)"),
    "a float among ids": ([1, 2.0], "2.0 at 1 is no id, but float"),
    "a boolean among ids": ([[1, True]], "True at 1 is no id, but bool"),
    "a tensor without values": (torch.ones(3, device="meta"), "is no array that NumPy can read"),
    "nothing": ([], "is empty"),
    "an empty array": (np.zeros((0, 4), int), "of shape (0, 4)"),
    "an empty sequence": ([[1, 2], []], "item 1 has no ids"),
    "no ids": ({"input_ids": None}, "must be ids, not NoneType"),
    "a label": ([[1, 2], [3, -100]], "item 1: -100 at 1 is no id; drop padding"),
    "a negative id": (np.array([[1, 2], [3, -5]]), "item 1: -5 at 1 is no id"),
    "an id beyond int32": ([2**40, 1], "1099511627776 at 0 is no id"),
    "an id beyond the model": ([[1, 2], [3, 4, 256]], "item 1: has token 256 at 2, the model has 256"),
    "a hole in a mask": (
        {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]},
        "leaves out ids between others",
    ),
    "another mask": ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1]]}, "must be 0 or 1 for each id"),
    "a mask of other rows": (
        {"input_ids": [1, 2, 3], "attention_mask": [[1, 1, 1]] * 2},
        "attention_mask has 2 rows, input_ids has 1",
    ),
    "sequences of one id": ([[1], [2]], "has 0 tokens; at least 2 are needed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text(tiny_checkpoint: Path, name: str) -> None:
    given, said = REFUSED[name]
    with pytest.raises(jaxdelta.UsageError) as raised:
        run(tiny_checkpoint, given)
    message = str(raised.value)
    assert said in message and "calibration" in message[:16]
    assert len(message) < 400 and "\n" not in message


# Tokens and the model's own function

IDS = np.arange(12).reshape(2, 6)
ONES = np.zeros((2, 6), int)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ((IDS - 5, ONES), "ids: -5 at window 0, position 0 is not one of 0 to"),
        ((IDS.astype(float), ONES), "ids must be whole numbers"),
        ((IDS > 3, ONES), "ids must be whole numbers of shape (windows, positions), not bool"),
        (
            (IDS[0], ONES[0]),
            "shape (windows, positions), not int64 of shape (6,)",
        ),
        ((IDS[:0], ONES[:0]), "ids is empty, of shape (0, 6)"),
        (([[1, 2], [3]], ONES), "ids is no array"),
        ((IDS + 2**40, ONES), "ids: 1099511627776 at window 0, position 0"),
        ((IDS, ONES[:, :5]), "documents have shape (2, 5), the ids (2, 6)"),
        ((IDS, ONES - 2), "documents: -2 at window 0, position 0"),
        ((IDS, ONES, None, IDS[:1]), "positions have shape (1, 6), the tokens (2, 6)"),
        ((IDS, ONES, None, IDS), "positions must begin with 0 in every window"),
        ((IDS, np.where(IDS % 6 < 2, -1, 0)), "text after padding must begin a segment"),
    ],
)
def test_tokens_that_are_none(arrays: Any, said: str) -> None:
    with pytest.raises(jaxdelta.UsageError) as raised:
        Tokens(*arrays)
    assert said in str(raised.value)


def test_tokens_are_compared_by_their_numbers() -> None:
    one, other = Tokens(IDS, ONES), Tokens(IDS.astype(np.uint8), ONES.astype(np.int8))  # type: ignore[arg-type]
    assert one == other and hash(one) == hash(other) and one != Tokens(IDS + 1, ONES) and one != "text"


def test_no_id_beyond_the_model_reaches_it(tiny_checkpoint: Path) -> None:
    with pytest.raises(jaxdelta.UsageError, match=r"ids: 256 at window 1, position 5 is not one of 0 to 255"):
        run(tiny_checkpoint, Tokens(IDS + 245, ONES))
    with pytest.raises(jaxdelta.UsageError, match="no token that counts"):
        run(tiny_checkpoint, Tokens(IDS, ONES - 1))
    model = jaxdelta.load_model(tiny_checkpoint)
    for tokens, positions, said in [
        (IDS - 100, None, r"tokens: -100 at window 0, position 0 is not one of 0 to 255"),
        (torch.tensor([[1, 256]]), None, r"tokens: 256 at window 0, position 1"),
        (IDS[0], None, "shape"),
        ([[1.0]], None, "whole numbers"),
        (None, None, "whole numbers"),
        (IDS, IDS[:1], r"positions have shape \(1, 6\)"),
        (IDS, IDS + 1, "positions must begin with 0"),
    ]:
        with pytest.raises(jaxdelta.UsageError, match=said):
            jaxdelta.residual_stream(model, tokens, positions)
    with pytest.raises(jaxdelta.UsageError, match="compute_dtype must be a dtype"):
        jaxdelta.residual_stream(model, IDS, compute_dtype="float33")
    with pytest.raises(jaxdelta.UsageError, match="model must be a loaded model"):
        jaxdelta.residual_stream("demo", IDS)
    wanted = jaxdelta.residual_stream(model, IDS).states
    np.testing.assert_array_equal(jaxdelta.residual_stream(model, torch.tensor(IDS)).states, wanted)


# Models and tokenizers in memory


@pytest.mark.parametrize("kind", [{}, EXPERTS, {"model_type": "qwen2", "tie_word_embeddings": True}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_transformers(
    tmp_path: Path, make_checkpoint: Callable[..., Path], theirs: Any, kind: dict[str, Any], dtype: str
) -> None:
    """The numbers are those of the same model from its directory."""
    sizes = {"num_hidden_layers": 2} | kind
    wanted = run(make_checkpoint(tmp_path / "model", dtype=dtype, **sizes), TEXT)
    found = run(torch_model(**sizes).to(getattr(torch, dtype)), TEXT, tokenizer=theirs)
    np.testing.assert_allclose(found.singular_values, wanted.singular_values, rtol=1e-6, atol=1e-6)
    assert found.run["calibration_loss"] == pytest.approx(wanted.run["calibration_loss"], rel=1e-6)
    for key in ("text_fingerprint", "weights_dtype"):
        assert found.run[key] == wanted.run[key]
    assert found.model == type(torch_model(**sizes)).__name__
    json.dumps(found.run["flags"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch, about itself
def test_a_compiled_model(tiny_checkpoint: Path, theirs: Any) -> None:
    for wrapped in (torch.compile(torch_model()), torch.nn.DataParallel(torch_model())):
        found = run(wrapped, TEXT[:1], tokenizer=theirs)
        np.testing.assert_allclose(
            found.singular_values, run(tiny_checkpoint, TEXT[:1]).singular_values, rtol=1e-6, atol=1e-6
        )


def test_models_that_cannot_be_read(theirs: Any) -> None:
    model = torch_model(num_hidden_layers=2)
    with pytest.raises(jaxdelta.UsageError, match="no transformers model"):
        run(torch.nn.Linear(2, 2), TEXT, tokenizer=theirs)
    with pytest.raises(jaxdelta.JaxDeltaError, match="model_type is 'gpt2'"):
        from transformers import GPT2Config, GPT2LMHeadModel

        run(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)), TEXT, tokenizer=theirs)
    with pytest.raises(jaxdelta.UsageError, match="meta device and has no values"):
        run(torch_model(num_hidden_layers=2).to("meta"), TEXT, tokenizer=theirs)
    with pytest.raises(jaxdelta.JaxDeltaError, match=r"dtype torch\.float64"):
        run(torch_model(num_hidden_layers=2).double(), TEXT, tokenizer=theirs)
    with pytest.raises(jaxdelta.UsageError, match="tokenizer is missing"):
        run(model, TEXT)
    for option in ({"revision": "main"}, {"loader": "torch"}, {"checkpoint_dir": "a"}):
        with pytest.raises(jaxdelta.UsageError, match="needs a model by its name"):
            run(model, TEXT, tokenizer=theirs, **option)
    model.peft_config = {"default": None}
    with pytest.raises(jaxdelta.UsageError, match=r"has a PEFT adapter; give model\.merge_and_unload"):
        run(model, TEXT, tokenizer=theirs)


@pytest.mark.parametrize("model", [None, 5, b"demo", ["demo"], "a\0b", dict, object()])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(jaxdelta.UsageError, match="model must be"):
        run(model, TEXT)


def test_tokenizers(tiny_checkpoint: Path, tmp_path: Path, raw: Tokenizer, theirs: Any) -> None:
    model = jaxdelta.load_model(tiny_checkpoint)
    wanted = print_of(tiny_checkpoint, TEXT)
    directory = write_tokenizer(tmp_path)
    for tokenizer, name in [
        (raw, "Tokenizer"),
        (theirs, type(theirs).__name__),
        (directory, str(directory)),
        (str(directory), str(directory)),
    ]:
        for given in (model, tiny_checkpoint):
            found = run(given, TEXT, tokenizer=tokenizer)
            assert (found.run["text_fingerprint"], found.run["flags"]["tokenizer"]) == (wanted, name)
    other = print_of(tiny_checkpoint, ["ab" * 20], tokenizer=_merging(raw))
    assert other != print_of(tiny_checkpoint, ["ab" * 20])


def _merging(raw: Tokenizer) -> Tokenizer:
    """The same tokenizer with one merge: half as many tokens of `abab`."""
    state = json.loads(raw.to_str())
    vocabulary = state["model"]["vocab"]
    del vocabulary[max(vocabulary, key=lambda letter: vocabulary[letter])]
    state["model"] |= {"vocab": vocabulary | {"ab": 255}, "merges": [["a", "b"]]}
    return Tokenizer.from_str(json.dumps(state))


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (5, "tokenizer must be a directory"),
        (b"x", "tokenizer must be a directory"),
        (torch.nn.Linear(1, 1), "tokenizer must be a directory"),
        ("nowhere/at/all", "tokenizer: nowhere/at/all: no such directory"),
    ],
)
def test_what_is_no_tokenizer(tiny_checkpoint: Path, tokenizer: Any, said: str) -> None:
    with pytest.raises(jaxdelta.JaxDeltaError, match=said):
        run(tiny_checkpoint, TEXT, tokenizer=tokenizer)


def test_a_tokenizer_for_ids(tiny_checkpoint: Path, raw: Tokenizer) -> None:
    with pytest.raises(jaxdelta.UsageError, match="token ids already"):
        run(tiny_checkpoint, [1, 2, 3], tokenizer=raw)


# Options


def test_options_of_other_types(tiny_checkpoint: Path, tmp_path: Path) -> None:
    given = {
        "top_k": np.int64(2),
        "seed": np.uint8(3),
        "shuffle": np.bool_(False),
        "sink_factor": np.float32(3),
        "device_memory_gb": np.int32(2),
        "layout": np.str_("packed"),
        "scratch": tmp_path,
    }
    flags = run(tiny_checkpoint, TEXT, **given).run["flags"]
    assert json.loads(json.dumps(flags)) == flags
    assert {name: flags[name] for name in given} == {
        **{"top_k": 2, "seed": 3, "shuffle": False, "sink_factor": 3.0, "device_memory_gb": 2.0},
        **{"layout": "packed", "scratch": str(tmp_path)},
    }
