"""Small runs, whole or stopped before a layer, and how two of them differ."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import summarise_from
from same_statistics import INTERVAL_FACTOR, differences

from jaxdelta import Analysis, analyze
from jaxdelta.run.memory_plan import MemoryDemand
from jaxdelta.sweep.sweep import Blocks, Sweep
from jaxdelta.text.tokens import Tokens
from jaxdelta.text.windows import tokenize

OPTIONS: dict[str, Any] = {"top_k": 4, "bootstrap": 20, "null_draws": 20}

Stopped = RuntimeError


def text(count: int = 14) -> Tokens:
    """Documents in windows of 64."""
    words = [f"document {i} says {'something ' * (i % 7 + 1)}" for i in range(count)]
    return tokenize(
        words, lambda texts: [(list(text.encode()), list(range(len(text)))) for text in texts],
        max_tokens=700, vocab_size=256, layout="packed", seq_len=64,
    )  # fmt: skip


TEXT = text()


def in_blocks(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Runs that follow pass the text in several blocks and take moments."""
    summarise_from(monkeypatch, "moments")
    monkeypatch.setattr(MemoryDemand, "_divisions", lambda work, groups: iter([Blocks(3, 64, place)]))


def stop_at(monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    """The next run stops when this layer is to pass; behind the last one, when the loss is to be computed."""

    def fails(*_: object) -> None:
        raise Stopped("the machine is taken away")

    step = Sweep._step

    def stops(sweep: Sweep, kind: Any, layers: Any, window: Any) -> Any:
        steps.append(None)
        return fails() if sweep.start + len(steps) > layer else step(sweep, kind, layers, window)

    steps: list[None] = []
    monkeypatch.setattr(Sweep, "_step", stops)
    monkeypatch.setattr(Sweep, "finish", fails)


def run(
    model: Path, directory: Path | None, tokens: Tokens = TEXT, **options: Any
) -> tuple[Analysis, list[str]]:
    """The result, and what is said of going on."""
    said: list[str] = []
    where = None if directory is None else str(directory)
    result = analyze(str(model), tokens, listener=said.append, checkpoint_dir=where, **OPTIONS | options)
    return result, told(said)


def stopped(model: Path, directory: Path, layer: int, **options: Any) -> list[str]:
    """A run that is stopped before this layer; what is said of going on."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stopped):
        stop_at(patched, layer)
        where = str(directory)
        analyze(str(model), TEXT, listener=said.append, checkpoint_dir=where, **OPTIONS | options)
    return told(said)


def told(said: list[str]) -> list[str]:
    return [line.strip() for line in said if "resumed" in line or "damaged" in line]


def bits(result: Analysis) -> tuple[str, bytes]:
    """All but times and the directories' names."""
    facts = {name: x for name, x in result.run.items() if "second" not in name}
    facts["flags"] = facts["flags"] | {"checkpoint_dir": None, "scratch": None}
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    kept = {name: x for name, x in fields.items() if name not in Analysis.ARRAYS}
    return json.dumps(kept | {"run": facts}), result.arrays_file()


def differing(one: Analysis, other: Analysis) -> dict[str, float]:
    """The difference of every statistic, null and interval of two runs, by its place; all but `run`."""

    def entries(result: Analysis) -> dict[str, Any]:
        fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name != "run"}
        return fields | {name: fields[name].tolist() for name in Analysis.ARRAYS}

    found = differences(entries(one), entries(other))
    return {place: x * (INTERVAL_FACTOR if "interval" in place else 1) for x, place in found}
