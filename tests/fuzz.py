"""Damaged and hostile files: every kind that a user can bring, mutated at random.

A mutated file must be read, or end in a JaxDeltaError of at most 5 lines and 800 characters.

    python tests/fuzz.py --count=10000 [--seed=0] [--kinds=config,index]

`test_fuzz.py` runs a part of it.
"""

import argparse
import copy
import csv
import gzip
import io
import json
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdelta.errors import JaxDeltaError

Random = np.random.Generator
Mutate = Callable[[bytes, Random], bytes]

# Values of every JSON type, and those that surprise readers of numbers and names.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *(
        "",
        "x",
        "\0",
        "../x",
        "/etc/passwd",
        "é" * 300,
        "\ud800",
        "float32",
        "yarn",
        [],
        [0],
        [None],
        ["x", 1],
    ),
    *([[[]]], {}, {"": None}, {"rope_type": []}, {"a": {"b": {}}}, [1e400], {"type": {}}, "9" * 5000),
)
CHUNKS = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"',
    b"{",
    b"]",
    b"\n",
    b"\r",
    b"NaN",
    b"\x80",
    b"{" * 5000,
)


class Target(NamedTuple):
    """A kind of file: what it is mutated by, and what reads it.

    `read(directory)` reads the directory whose `file` was mutated.
    """

    file: str
    mutations: tuple[Mutate, ...]
    read: Callable[[Path], Any]


def in_json(content: bytes, rng: Random) -> bytes:
    """One to three values, keys or items of a JSON document changed."""
    root = [json.loads(content)]
    for _ in range(rng.integers(1, 4)):
        _change(root, rng)
    return json.dumps(root[0]).encode("utf-8", "surrogatepass")


def in_header(content: bytes, rng: Random) -> bytes:
    """The header of a safetensors file changed as JSON; its length is right."""
    size = int.from_bytes(content[:8], "little")
    header = in_json(content[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def in_lines(content: bytes, rng: Random) -> bytes:
    """One line of a .jsonl changed as JSON."""
    lines = content.splitlines(keepends=True)
    row = int(rng.integers(len(lines)))
    lines[row] = in_json(lines[row], rng) + b"\n"
    return b"".join(lines)


def in_bytes(content: bytes, rng: Random) -> bytes:
    """Bytes replaced, inserted, removed, doubled or cut off."""
    for _ in range(rng.integers(1, 4)):
        start, end = sorted(rng.integers(0, len(content) + 1, 2).tolist())
        end = min(end, start + int(rng.integers(1, 64)))
        chunk = CHUNKS[rng.integers(len(CHUNKS))]
        content = {
            0: lambda c=content, s=start, e=end: c[:s] + rng.bytes(e - s) + c[e:],
            1: lambda c=content, s=start, k=chunk: c[:s] + k + c[s:],
            2: lambda c=content, s=start, e=end: c[:s] + c[e:],
            3: lambda c=content, s=start, e=end: c[:e] + c[s:],
            4: lambda c=content, s=start: c[:s],
        }[int(rng.integers(5))]()
    return content


def in_start(content: bytes, rng: Random) -> bytes:
    """Bytes of a file's beginning changed."""
    return in_bytes(content[:2000], rng) + content[2000:]


def in_zip(content: bytes, rng: Random) -> bytes:
    """What a .gz holds changed."""
    return gzip.compress(in_bytes(gzip.decompress(content), rng), mtime=0)


def _change(root: list[Any], rng: Random) -> None:
    """Replaces, removes, renames or adds one value somewhere below `root[0]`."""
    places = list(_places(root))
    parent, key = places[rng.integers(len(places))]
    value, kind = copy.deepcopy(VALUES[rng.integers(len(VALUES))]), rng.integers(5)
    if parent is root or kind == 0:
        parent[key] = value
    elif kind == 1:
        del parent[key]
    elif kind == 2 and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
    elif kind == 3:
        other, there = places[rng.integers(len(places))]
        parent[key] = copy.deepcopy(other[there])
    elif isinstance(parent, dict):
        parent["extra" if rng.random() < 0.5 else ""] = value
    else:
        parent.insert(int(rng.integers(len(parent) + 1)), value)


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield node, key
        yield from islice(_places(value), 300)


# What is mutated


def _open(directory: Path) -> Any:
    from jaxdelta.checkpoint.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(directory))
    checkpoint.final_norm()
    return checkpoint


def _config(directory: Path) -> Any:
    from jaxdelta.model.families.registry import read_config

    return read_config(directory / "config.json")


def _adapted(directory: Path) -> Any:
    from jaxdelta.checkpoint.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(directory.parent / "base"), adapter=str(directory))
    return checkpoint.source.read("model.layers.1.self_attn.q_proj.weight")


def _encode(directory: Path) -> Any:
    from jaxdelta.text.tokenizer import load_encoder

    return load_encoder(directory)(["some text, <|im_end|> and more"])


def _documents(name: str) -> Callable[[Path], Any]:
    def read(directory: Path) -> Any:
        from jaxdelta.text.documents import read_documents

        return list(read_documents(directory / name))

    return read


def _chats(directory: Path) -> Any:
    from jaxdelta.text.chat import ChatTemplate, rendered
    from jaxdelta.text.documents import read_documents

    template = ChatTemplate(directory.parent / "model", "assistant")
    return list(rendered(read_documents(directory / "chats.jsonl"), template))


def _ids(directory: Path) -> Any:
    from jaxdelta.text.documents import read_ids

    return list(read_ids(directory / "ids.jsonl", "ids"))


def _saved(directory: Path) -> Any:
    from jaxdelta.report.analysis import Analysis
    from jaxdelta.report.result import whole
    from jaxdelta.report.tables import tables
    from jaxdelta.report.write import shown

    run = directory / "run.json"
    with whole(run):
        analysis = Analysis.load(run)
        return tables(analysis), shown(analysis, run.with_suffix(".html"), None)


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "added_tokens_decoder": {"256": {"content": "<|im_end|>", "special": True, "lstrip": False}},
    "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    "model_max_length": 512,
}
CHAT = [
    {"role": "system", "content": "You are kind."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": "Hello!", "reasoning_content": "well", "tool_calls": None},
]
DOCUMENT = {"text": "The cat sat on the mat.", "meta": {"text": "Über"}, "n": 3}
ROWS = [DOCUMENT, DOCUMENT | {"text": "7 + 3"}, DOCUMENT | {"text": "x\ny"}]


def text_files() -> dict[str, bytes]:
    """A text of every kind, by its file's name."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = io.StringIO()
    writer = csv.DictWriter(table, ROWS[0].keys())
    writer.writeheader()
    writer.writerows(ROWS)
    return {
        "text.txt": b"Some text.\n\nMore of it: \xc3\xbc.\n",
        "text.json": json.dumps([row["text"] for row in ROWS]).encode(),
        "rows.json": json.dumps(ROWS).encode(),
        "text.jsonl": lines,
        "text.csv": table.getvalue().encode(),
        "text.tsv": table.getvalue().replace(",", "\t").encode(),
        "text.jsonl.gz": gzip.compress(lines, mtime=0),
        "chats.jsonl": b"".join(json.dumps({"messages": CHAT}).encode() + b"\n" for _ in range(3)),
        "ids.jsonl": b"".join(json.dumps({"ids": [1, 2, 30]}).encode() + b"\n" for _ in range(3)),
    }


def targets() -> dict[str, Target]:
    """All kinds, by name."""
    more: dict[str, tuple[Mutate, ...]] = {".json": (in_json,), ".jsonl": (in_lines,), ".gz": (in_zip,)}
    texts = {
        name: Target(name, (*more.get(Path(name).suffix, ()), in_bytes), _documents(name))
        for name in text_files()
    }
    texts["chats.jsonl"] = Target("chats.jsonl", (in_lines, in_lines, in_bytes), _chats)
    texts["ids.jsonl"] = Target("ids.jsonl", (in_lines, in_bytes), _ids)
    return texts | {
        "config": Target("config.json", (in_json, in_json, in_bytes), _config),
        "header": Target("model.safetensors", (in_header, in_header, in_bytes), _open),
        "index": Target("model.safetensors.index.json", (in_json, in_bytes), _open),
        "adapter": Target("adapter_model.safetensors", (in_header, in_bytes), _adapted),
        "adapter_config": Target("adapter_config.json", (in_json, in_json, in_bytes), _adapted),
        "gguf": Target("model.gguf", (in_start, in_start, in_bytes), _open),
        "tokenizer": Target("tokenizer.json", (in_json, in_bytes), _encode),
        "tokenizer_config": Target("tokenizer_config.json", (in_json, in_bytes), _encode),
        "result": Target("run.json", (in_json, in_bytes), _saved),
        "arrays": Target("run.safetensors", (in_header, in_bytes), _saved),
    }


def prepare(root: Path) -> dict[str, Path]:
    """A directory for every kind."""
    from conftest import PHASES, TEXT, torch_model, write_tokenizer
    from gguf_models import to_gguf
    from test_adapter import train

    from jaxdelta.run.analyze import analyze

    model, split = root / "model", root / "split"
    for directory, size in ((model, "1GB"), (split, "60KB")):
        torch_model(0, num_hidden_layers=2).save_pretrained(directory, max_shard_size=size)
        write_tokenizer(directory)
        (directory / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    saved = root / "saved"
    saved.mkdir()
    few = {"bootstrap": 20, "null_draws": 20, "top_k": 2}
    analyze(str(model), TEXT, phases=PHASES.replace("2-3", "1").replace("0-1", "0"), **few).save(
        saved / "run.json"
    )
    texts = root / "texts"
    texts.mkdir()
    for name, content in text_files().items():
        (texts / name).write_bytes(content)
    to_gguf(model, root / "gguf" / "model.gguf")
    _, adapter = train(root, r=2, target_modules=["q_proj", "down_proj"])
    places = {
        "adapter": adapter,
        "adapter_config": adapter,
        "gguf": root / "gguf",
        "index": split,
        "result": saved,
        "arrays": saved,
    } | dict.fromkeys(text_files(), texts)
    return {kind: places.get(kind, model) for kind in targets()}


class Fault(NamedTuple):
    """A mutation that ended in neither success nor a short JaxDeltaError."""

    kind: str
    seed: int
    what: str


def run(kind: str, target: Target, directory: Path, seeds: range, patience: float = 20.0) -> list[Fault]:
    """Mutates the target's file once for each seed, and restores it at the end."""
    path, faults = directory / target.file, []
    original = path.read_bytes()
    for seed in seeds:
        rng = np.random.default_rng([seed, *kind.encode()])
        mutate = target.mutations[int(rng.integers(len(target.mutations)))]
        path.write_bytes(mutate(original, rng))
        started = time.monotonic()
        if what := _fault(lambda: target.read(directory)):
            faults.append(Fault(kind, seed, what))
        elif (seconds := time.monotonic() - started) > patience:
            faults.append(Fault(kind, seed, f"took {seconds:.0f} s"))
    path.write_bytes(original)
    return faults


def _fault(read: Callable[[], Any]) -> str | None:
    try:
        read()
    except JaxDeltaError as error:
        message = str(error)
        if len(message) > 800 or len(message.splitlines()) > 5:
            return f"message of {len(message)} characters: {message[:200]}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in where if "jaxdelta" in f.filename]
        return f"{type(error).__name__}: {str(error)[:200]} ({' < '.join(reversed(ours[-3:]))})"
    return None


def main() -> None:
    """Mutates every kind `--count` times and prints the faults, each sort once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        places = prepare(Path(root))
        for kind, target in targets().items():
            if given.kinds and kind not in given.kinds.split(","):
                continue
            started = time.monotonic()
            faults = run(kind, target, places[kind], range(given.seed, given.seed + given.count))
            print(
                f"{kind}: {given.count} mutations, {len(faults)} faults, {time.monotonic() - started:.0f} s"
            )
            sorts = {fault.what.partition(":")[0] + fault.what[-60:]: fault for fault in faults}
            for fault in sorts.values():
                print(f"   seed {fault.seed}: {fault.what}", flush=True)


if __name__ == "__main__":
    main()
