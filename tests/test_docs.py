"""The documentation keeps to the code: links lead somewhere, messages and flags are those that there are."""

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxdelta.run.options import Options

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "BUILD.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!\w+:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    for path, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def strings(path: Path) -> Iterator[str]:
    """A program's strings, with … for what is filled in."""
    if path.suffix == ".sh":
        yield path.read_text(encoding="utf-8")
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_every_message_that_is_explained_can_be_met() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    programs = [*(ROOT / "jaxdelta").rglob("*.py"), *(ROOT / "scripts").rglob("*.*")]
    said = "\n".join(line for path in programs for text in strings(path) for line in text.splitlines())
    unknown = [message for message in explained if not re.search(re.escape(message).replace("…", ".*"), said)]
    assert len(explained) > 40
    assert not unknown


def test_the_picture_of_the_rooms_is_fresh() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "rooms.py"))
    assert drawn["PICTURE"].read_text(encoding="utf-8") == drawn["picture"](), "run python docs/rooms.py"
    assert "commands" in drawn["imports"]()


def test_the_readme_names_every_option() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in vars(Options()) if f"`--{name}`" not in readme] == []
