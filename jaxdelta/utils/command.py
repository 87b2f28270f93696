"""A command's flags: defined under headings, parsed, and described by --help.

absl-py holds the flags, including JAX's own. It and JAX are imported in functions, after `cli.install`.
"""

import dataclasses
import difflib
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxdelta._version import __version__
from jaxdelta.errors import UsageError

WIDTH = 80  # columns of the help
INDENT = 24  # the column of the flags' meanings
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}
HELP = ("help", "h", "helpshort", "?")
FOOTER = """JAX
  All of JAX's own flags work too, such as --jax_platforms=cpu; --helpfull lists
  them.

Help
  --help, -h            this text
  --helpfull            this text, and all flags of JAX and absl
  --version             the version of jaxdelta
"""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that a user types.

    Attributes:
        action: called with the positional arguments after the flags are parsed.
        about: the beginning of the help: purpose, example, running time.
        options: heading -> function that defines the flags under it; None if a script has defined its flags.
        required: name of a required flag -> its meaning, with an example.
        arguments: positional arguments as the help shows them; empty for none.
        choices: values of a single positional argument.
    """

    action: Callable[..., None]
    about: str
    options: Mapping[str, Callable[[], None]] | None = None
    required: Mapping[str, str] = dataclasses.field(default_factory=dict)
    arguments: str = ""
    choices: Sequence[str] = ()

    def define(self) -> dict[str, list[str]]:
        """Defines the flags; returns their names by heading."""
        from absl import flags

        if self.options is None:
            return {"Options": [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]}
        names = {}
        for heading, define in self.options.items():
            before = set(flags.FLAGS)
            define()
            names[heading] = [name for name in flags.FLAGS if name not in before]
        return names


@dataclasses.dataclass(frozen=True)
class Option:
    """A flag as the help and the site show it."""

    name: str
    meaning: str
    default: str  # empty for none, or for a switch that is off
    choices: tuple[str, ...]
    switch: bool  # --name or --noname, and no value

    @classmethod
    def of(cls, name: str) -> "Option":
        """Describes a defined flag."""
        from absl import flags

        flag = flags.FLAGS[name]
        choices = tuple(getattr(flag.parser, "enum_values", None) or ())
        meaning = flag.help.partition(">: ")[2] if choices else flag.help  # absl puts the choices first
        if flag.boolean:
            default = "on" if flag.default else ""
        elif isinstance(flag.default, list):
            default = ",".join(flag.default)
        else:
            default = "" if flag.default is None else str(flag.default)
        return cls(name, meaning, default, choices, flag.boolean)


def program_name() -> str:
    """The program's name: `jaxdelta`, or `delta_svd.py` for a script."""
    path = sys.argv[0]
    return os.path.basename(os.path.dirname(path) if path.endswith("__main__.py") else path)


def answer(command: Command, argv: Sequence[str]) -> str | None:
    """The text for --help, --helpfull or --version; None without any of them."""
    before = itertools.takewhile(lambda argument: argument != "--", argv[1:])
    given = {argument.lstrip("-") for argument in before if argument.startswith("-")}
    if "version" in given:
        return f"jaxdelta {__version__}"
    if given.isdisjoint((*HELP, "helpfull")):
        return None
    text = help_text(command, command.define())
    if "helpfull" in given:
        import jax
        from absl import flags

        jax.config.config_with_absl()
        text += f"\nAll flags\n{flags.FLAGS.get_help()}"
    return text


def help_text(command: Command, headings: Mapping[str, Sequence[str]]) -> str:
    """The help: purpose, usage, and flags by heading."""
    required = [f"--{name}={name.upper()}" for name in command.required]
    arguments = command.arguments or "|".join(command.choices)
    usage = " ".join(filter(None, ["Usage:", program_name(), arguments, *required, "[--flag=value ...]"]))
    sections = [command.about.strip(), textwrap.fill(usage, WIDTH, subsequent_indent="  ")]
    for heading, names in headings.items():
        lines = [_described(Option.of(name), name in command.required) for name in names]
        sections.append("\n".join([heading, *lines]))
    return "\n\n".join([*sections, FOOTER])


def _described(option: Option, required: bool) -> str:
    meaning = ("required: " if required else "") + option.meaning
    if option.choices:
        meaning += "; one of " + ", ".join(option.choices)
    if option.default:
        meaning += f" (default: {option.default.replace(',', ', ')})"
    name = f"  --{'[no]' if option.switch else ''}{option.name}"
    lines = textwrap.wrap(meaning, WIDTH - INDENT, break_on_hyphens=False)
    return f"{name:<{INDENT - 1}} " + ("\n" + " " * INDENT).join(lines)


def parse(command: Command, argv: Sequence[str]) -> list[str]:
    """Defines and parses the flags, including JAX's own; returns the program's name and the arguments.

    Raises:
        UsageError: an unknown or missing flag, an impossible value, an unexpected argument.
    """
    import jax
    from absl import flags

    command.define()
    try:
        jax.config.parse_flags_with_absl()
        flags.FLAGS.set_gnu_getopt(True)  # Flags may come after the arguments.
        rest = list(flags.FLAGS(argv))
    except flags.UnrecognizedFlagError as error:
        raise UsageError(_unknown(error.flagname)) from error
    except flags.IllegalFlagValueError as error:
        raise UsageError(_impossible(str(error))) from error
    except flags.Error as error:
        without = re.fullmatch(r"Missing value for flag (\S+)", str(error))
        raise UsageError(f"{without[1]} needs a value" if without else str(error)) from error
    missing = [name for name in command.required if flags.FLAGS[name].value is None]
    if missing:
        raise UsageError("; ".join(f"--{name} is missing: {command.required[name]}" for name in missing))
    if command.choices and (len(rest) < 2 or rest[1] not in command.choices):
        raise UsageError(f"say what to do: {', '.join(command.choices)}")
    if not command.arguments and (extra := rest[1 + bool(command.choices) :]):
        raise UsageError(f"unexpected argument {extra[0]!r}; every option is --name=value")
    return rest


def _unknown(name: str) -> str:
    from absl import flags

    known = [*flags.FLAGS, *(f"no{flag}" for flag in flags.FLAGS if flags.FLAGS[flag].boolean)]
    near = difflib.get_close_matches(name, known, 1, cutoff=0.7)
    return f"--{name} is not an option" + (f"; did you mean --{near[0]}?" if near else "")


def _impossible(message: str) -> str:
    """Rewords absl's `flag --top_k=many: invalid literal for int() ...` for users."""
    from absl import flags

    match = re.match(r"flag --(\w+)=(.*?): ", message, re.DOTALL)
    if not match or match[1] not in flags.FLAGS:
        return message
    parser = flags.FLAGS[match[1]].parser
    choices = getattr(parser, "enum_values", None)
    kind: Any = f"one of {', '.join(choices)}" if choices else KINDS.get(parser.flag_type())
    return f"--{match[1]} must be {kind}, not {match[2]!r}" if kind else message
