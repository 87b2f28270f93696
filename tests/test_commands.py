"""The commands that the wheel installs: their entry points, their help, and what they say of wrong flags."""

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import flags

import jaxdelta
from jaxdelta.errors import UsageError
from jaxdelta.utils.command import Command, parse

ROOT = Path(__file__).resolve().parents[1]
ENTRY_POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
SCRIPTS = {
    "jaxdelta": "delta_svd.py",
    "jaxdelta-compare": "compare_runs.py",
    "jaxdelta-convert": "convert_checkpoint.py",
    "jaxdelta-merge": "merge_runs.py",
    "jaxdelta-plot": "plot_run.py",
    "jaxdelta-report": "report.py",
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_every_entry_point_is_the_main_of_a_command() -> None:
    """In a process of their own, as importing a command prepares the process."""
    load = "import importlib, sys; print(*(callable(importlib.import_module(m).main) for m in sys.argv[1:]))"
    modules = [target.removesuffix(":main") for target in ENTRY_POINTS.values()]
    assert run("-c", load, *modules).stdout.split() == ["True"] * len(modules)
    for command, target in ENTRY_POINTS.items():
        assert (
            f"from {target.replace(':', ' import ')}\n" in (ROOT / "scripts" / SCRIPTS[command]).read_text()
        )


def test_each_package_is_found_by_setuptools() -> None:
    """A folder of modules without __init__.py would be left out of the wheel."""
    folders = {path.parent for path in (ROOT / "jaxdelta").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_command_describes_itself(command: str) -> None:
    found = run(f"scripts/{SCRIPTS[command]}", "-h")
    assert (found.returncode, found.stderr) == (0, "")
    assert f"    {command} " in found.stdout, "an example"
    assert f"\nUsage: {SCRIPTS[command]} " in found.stdout
    assert "\n\nOutput\n  --" in found.stdout
    assert max(map(len, found.stdout.splitlines())) <= 80


def test_help_groups_the_flags() -> None:
    found = run("-m", "jaxdelta", "--help")
    assert (found.returncode, found.stderr) == (0, "")
    assert "\nUsage: jaxdelta --model=MODEL --out=OUT " in found.stdout
    headings = ["Model", "Text", "What is measured", "Output", "Several devices", "JAX"]
    sections = {text.partition("\n")[0]: text for text in found.stdout.split("\n\n")}
    assert [heading for heading in sections if heading in headings] == headings
    assert "--model               required: " in sections["Model"]
    assert "--out                 required: " in sections["Output"]
    assert "--[no]report          write the HTML page (default: on)" in sections["Output"]
    assert "one of gram, full (default: gram)" in " ".join(sections["Arithmetic"].split())
    assert "--helpfull" in sections["JAX"] and "--jax_enable_x64" not in found.stdout


def test_full_help_and_version() -> None:
    found = run("-m", "jaxdelta", "--helpfull")
    assert (found.returncode, found.stderr) == (0, "")
    assert "--[no]jax_enable_x64" in found.stdout and "\nSeveral devices\n" in found.stdout
    found = run("-m", "jaxdelta", "--version")
    assert (found.returncode, found.stdout, found.stderr) == (0, f"jaxdelta {jaxdelta.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out=a.json"], "--model is missing: the checkpoint to measure, e.g. --model=demo"),
        (["--modle=demo"], "--modle is not an option; did you mean --model?"),
    ],
)
def test_a_wrong_flag_is_one_sentence(arguments: list[str], said: str) -> None:
    found = run("-m", "jaxdelta", *arguments)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"jaxdelta: {said} (--help lists the options)\n"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """A command with a flag of each kind."""
    monkeypatch.setattr(sys, "argv", ["command"])
    before = set(flags.FLAGS)

    def define() -> None:
        flags.DEFINE_string("name", None, "required")
        flags.DEFINE_integer("number", 1, "a number")
        flags.DEFINE_enum("kind", "a", ["a", "b"], "a choice")
        flags.DEFINE_bool("fast", False, "a switch")

    yield Command(print, "", {"Options": define}, {"name": "a name, e.g. --name=x"})
    for name in set(flags.FLAGS) - before:
        if not name.startswith("jax_"):  # JAX defines its own only once
            delattr(flags.FLAGS, name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--name is missing: a name, e.g. --name=x"),
        (["--nane=x"], "--nane is not an option; did you mean --name?"),
        (["--nofats"], "--nofats is not an option; did you mean --nofast?"),
        (["--jax_platfrms=cpu"], "--jax_platfrms is not an option; did you mean --jax_platforms?"),
        (["--banana"], "--banana is not an option"),
        (["--number=many"], "--number must be a whole number, not 'many'"),
        (["--number="], "--number must be a whole number, not ''"),
        (["--kind=c"], "--kind must be one of a, b, not 'c'"),
        (["--fast=perhaps"], "--fast must be true or false, not 'perhaps'"),
        (["--name"], "--name needs a value"),
        (["--name=x", "more"], "unexpected argument 'more'; every option is --name=value"),
        (["--name=x", "--", "-h"], "unexpected argument '-h'; every option is --name=value"),
    ],
)
def test_what_is_said_of_wrong_flags(command: Command, arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(command, ["command", *arguments])
    assert str(raised.value) == said
