"""The examples in the docstrings of the public interface run, and give what they say."""

import doctest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest

import jaxdelta
from jaxdelta import Analysis
from jaxdelta.report.notebook import Plot
from jaxdelta.report.result import Result

matplotlib.use("Agg")

# In the order in which a reader meets them: what one makes, the next use.
PUBLIC: dict[str, Any] = {
    "analyze": jaxdelta.analyze,
    "Result": Result,
    "Analysis.save": Analysis.save,
    "Analysis.load": Analysis.load,
    "Analysis.to_frame": Analysis.to_frame,
    "Analysis.plot": Analysis.plot,
    "Plot": Plot,
    "Analysis.save_directions": Analysis.save_directions,
    "load_model": jaxdelta.load_model,
    "residual_stream": jaxdelta.residual_stream,
}
NOT_FOR_USERS = {"ARRAYS", "arrays_file"}


def examples() -> Iterator[doctest.DocTest]:
    names = {"jaxdelta": jaxdelta}
    for name, thing in PUBLIC.items():
        test = doctest.DocTestParser().get_doctest(thing.__doc__, names, name, None, None)
        assert test.examples, f"{name} has no example"
        yield test
        names = test.globs


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for test in examples():
        runner.run(test, out=said.append, clear_globs=False)
    assert not said, "".join(said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "demo.safetensors", "late.gguf"]


def test_all_that_is_public_has_one() -> None:
    fields = Analysis.__dataclass_fields__
    members = {
        f"Analysis.{name}"
        for name in (vars(Result) | vars(Analysis)).keys() - fields.keys() - NOT_FOR_USERS
        if not name.startswith("_")
    }
    functions = {name for name in jaxdelta.__all__ if not name.endswith(("Error", "__", "Analysis"))}
    assert PUBLIC.keys() >= members | functions
