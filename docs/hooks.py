"""MkDocs hooks: pages from outside docs/, and generated tables.

README.md, BUILD.md and others stay where GitHub shows them and become pages of the site, too. Links are
written for GitHub; here they lead to the page or, where there is none, to the file. Three comments are
replaced by generated text: `<!-- commands -->` by every command with its flags, `<!-- modules -->` by every
module, and `<!-- results: FILE -->` by the medians of a file of benchmarks/results.
"""

import json
import logging
import posixpath
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markdown import Extension, Markdown
from markdown.inlinepatterns import HtmlInlineProcessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OUTSIDE = {
    "index.md": "README.md",
    "build.md": "BUILD.md",
    "changelog.md": "CHANGELOG.md",
    "demo-model.md": "jaxdelta/data/demo/README.md",
}
_LINK = re.compile(r'(?:(?<=\]\()|(?<=src="))(?![a-z]+:)([^)#\s"]+)')
_MARK = re.compile(r"<!-- (commands|modules|results)(?:: (\S+))? -->")
_log = logging.getLogger("mkdocs.hooks")


class KnownTags(Extension):
    """Markdown with only a few HTML tags: in a docstring <u, v> is a product and not a tag."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Replaces the processor of all tags by one of a few."""
        md.inlinePatterns.register(HtmlInlineProcessor(r"(</?(?:a|br|img|sub|sup)\b[^<>]*>)", md), "html", 90)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Applies KnownTags to every page and every docstring."""
    config.markdown_extensions.append(KnownTags())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside docs/."""
    for uri, source in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces the page's comments by generated text, and resolves its links."""
    makers: dict[str, Callable[..., str]] = {"commands": _commands, "modules": _modules, "results": _results}
    if page.file.src_uri == "performance.md":
        for file in sorted(RESULTS.glob("*.json")):
            if f"<!-- results: {file.name} -->" not in markdown:
                _log.warning("performance.md: lacks benchmarks/results/%s", file.name)
    markdown = _MARK.sub(lambda mark: makers[mark[1]](*filter(None, [mark[2]])), markdown)
    here = Path(str(page.file.abs_src_path)).parent
    return _LINK.sub(lambda link: _follow(here / link[1], page, config, files) or link[1], markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> None:
    """Checks that the page works without a network: nothing may come from elsewhere."""
    elsewhere = r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=.?(?:https?:)?//[^>]*>"
    for found in re.findall(elsewhere, output):
        _log.warning("%s: needs the network for %s", page.file.src_uri, found)


def _follow(target: Path, page: Page, config: MkDocsConfig, files: Files) -> str | None:
    """The relative link from the page to a file, which is added to the site if it is missing."""
    target = target.resolve()
    if target == RESULTS:
        uri = "performance.md"
    elif not target.is_file() or not target.is_relative_to(ROOT):
        return None  # mkdocs reports it
    else:
        uri = next(
            (file.src_uri for file in files if file.abs_src_path == str(target)),
            target.relative_to(ROOT).as_posix(),
        )
        if uri not in files.src_uris:
            files.append(File.generated(config, uri, abs_src_path=str(target)))
    return posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))


def _commands() -> str:
    """The help of every command, and of every script with its own flags."""
    run = [sys.executable, ROOT / "docs" / "flags.py"]
    done = subprocess.run(run, capture_output=True, text=True)
    if done.returncode:
        raise PluginError(f"docs/flags.py: {done.stderr.strip().splitlines()[-1]}")
    return "\n\n".join(map(_command, json.loads(done.stdout)))


def _command(command: dict[str, Any]) -> str:
    parts = [f"## {command['name']}", command["about"]]
    if command["script"]:
        parts.append(f"From a checkout: `python scripts/{command['script']}`.")
    for heading, flags in command["flags"].items():
        rows = "\n".join(map(_flag, flags))
        parts += [f"### {heading}", f"| flag | default | |\n|---|---|---|\n{rows}"]
    return "\n\n".join(parts)


def _flag(flag: dict[str, Any]) -> str:
    meaning = flag["meaning"]
    if flag["choices"]:
        meaning += "; one of " + ", ".join(f"`{choice}`" for choice in flag["choices"])
    default = "required" if flag["required"] else flag["default"]
    if flag["default"] and not flag["switch"]:
        default = f"`{default}`"
    return f"| `--{flag['name']}` | {default} | {meaning} |"


def _modules() -> str:
    """The docstrings of every module of the package."""
    package = ROOT / "jaxdelta"
    paths = [path for path in sorted(package.rglob("*.py")) if not path.name.startswith("__")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return "\n\n".join(
        f"::: {name}\n    options:\n      show_root_full_path: true\n      skip_local_inventory: true"
        for name in names
    )


def _results(name: str) -> str:
    """The medians of a file of benchmarks/results."""
    figures = json.loads((RESULTS / name).read_text())["figures"]
    return "\n".join(
        ["| | first | second | ratio |", "|---|---|---|---|", *(_result(figure) for figure in figures)]
    )


def _result(figure: dict[str, Any]) -> str:
    if "gigabytes" in figure:
        first, second = (
            f"{statistics.median(peaks):.2f} GB ({name})" for name, peaks in figure["gigabytes"].items()
        )
    else:
        first, second = (
            f"{statistics.median(figure[key]):.2f}&nbsp;s" for key in ("seconds", "seconds_beside")
        )
    return f"| {figure['title']} | {first} | {second} | {figure['ratio']:.2f} |"
