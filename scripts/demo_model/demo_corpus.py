r"""Collects the training text of the demo model: free documentation, dictionaries and source code.

Everything is read from installed packages; nothing is downloaded. On Debian 12:

    apt-get install --no-install-recommends python3.11-doc debian-handbook debian-reference-en \
        developers-reference debian-policy maint-guide installation-guide-amd64 git-doc perl-doc \
        postgresql-doc-15 apache2-doc dict-gcide dict-wn
    python scripts/demo_model/demo_corpus.py --out=demo_work/corpus

Takes about a minute and writes `<source>.txt` for each source (about 32 MB in total) and `manifest.json`,
which lists each source's package, version, licence, documents and bytes. Documents are separated by lines
`\x1e`.

To keep the mix balanced, a source larger than its cap keeps the documents with the smallest hashes, so the
choice depends only on the text and not on the machine.
"""

import gzip
import hashlib
import html
import html.parser
import json
import pathlib
import platform
import re
import subprocess
import sysconfig
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from absl import app, flags, logging

_OUT = flags.DEFINE_string("out", None, "Folder to write the texts and manifest.json to.", required=True)

SEPARATOR = "\n\x1e\n"
STDLIB = "(running interpreter)"  # the only source without a Debian package
MIN_DOCUMENT = 200  # characters: shorter ones are stubs and index pages
SHARE = pathlib.Path("/usr/share")


@dataclass(frozen=True)
class Source:
    """One kind of text: where it is, how it becomes plain text, and how much of it is kept."""

    name: str
    package: str
    licence: str
    kind: str  # "prose", "code" or "mixed" (documentation with code in it)
    root: str  # below /usr/share, or absolute
    glob: str
    read: Callable[[pathlib.Path], Iterable[str]]
    cap: int  # bytes
    skip: str = r"(?!)"  # matched against the path below root


class _PlainText(html.parser.HTMLParser):
    """HTML to text: a line break per block, code unchanged, navigation and tables of contents left out."""

    BLOCK = re.compile(r"p|div|li|[uod]l|d[td]|tr|table|pre|h[1-6]|[bh]r|blockquote|section")
    VOID = re.compile(r"br|hr|wbr|img|input|link|meta|col|area|base|embed|source|track")
    DROP = re.compile(
        r"nav|toc|footer|header|menu|sidebar|lang|top$|titlepage.*legal|docnav|quickview|toplang"
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.open: list[tuple[str, bool]] = []  # open tags, and whether each began a dropped region
        self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.BLOCK.fullmatch(tag):
            self.parts.append("\n- " if tag == "li" else "\n")
        if self.VOID.fullmatch(tag):
            return
        names = " ".join(value or "" for key, value in attrs if key in ("class", "id"))
        dropped = tag in ("script", "style", "head", "nav", "footer") or (
            tag in ("div", "table", "ul", "dl", "p") and bool(self.DROP.search(names))
        )
        self.open.append((tag, dropped))
        self.pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if not any(tag == name for name, _ in self.open):
            return
        while self.open:  # also closes tags that the page left open, such as <p> and <li>
            name, _ = self.open.pop()
            self.pre -= name == "pre"
            if name == tag:
                break
        if self.BLOCK.fullmatch(tag):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if any(dropped for _, dropped in self.open):
            return
        text = data if self.pre else re.sub(r"\s+", " ", data)
        starts_line = bool(self.parts) and self.parts[-1].endswith(("\n", "\n- "))
        self.parts.append(text.lstrip(" ") if starts_line and not self.pre else text)


def read_text(path: pathlib.Path) -> Iterator[str]:
    """The text of a plain file, compressed or not."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    yield data.decode("utf-8", errors="ignore")


def read_html(path: pathlib.Path) -> Iterator[str]:
    """The text of one HTML page."""
    parser = _PlainText()
    parser.feed(next(read_text(path)))
    text = "".join(parser.parts)
    yield re.sub(r"\n- \s+", "\n- ", text)


def read_dictionary(entry: Callable[[str, str], str], path: pathlib.Path) -> Iterator[str]:
    """A dictd dictionary: entries start in column 0, about 50 of them make a document."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
    entries = re.findall(r"^(\S[^\n]*)\n((?:[ ][^\n]*\n|\n)+)", text, flags=re.MULTILINE)
    clean = [made for head, body in entries if (made := entry(head, body))]
    for start in range(0, len(clean), 50):
        yield "\n\n".join(clean[start : start + 50])


def gcide_entry(head: str, body: str) -> str:
    """`Arpent: A measure of land in France, ...` from the GNU Collaborative Dictionary of English."""
    word = head.split("\\")[0].strip()
    body = re.sub(r"^\s*([^\n\]]*\][^\n]*)\n", "", body) if head.count("[") > head.count("]") else body
    body = re.sub(r"\[(1913 Webster|PJC|WordNet[^]]*|Webster[^]]*|R\. [^]]*|Obs\.|R\.)[^]]*\]", "", body)
    body = re.sub(r'\["?(\w+)\]|\[[`\'^~=](\w)\]', lambda m: m[1] or m[2], re.sub(r"[{}]", "", body))
    paragraphs = [" ".join(part.split()) for part in body.split("\n\n")]
    text = "\n".join(part for part in paragraphs if len(part) > 3)
    return f"{word}: {text}" if len(text) > 40 else ""


def wordnet_entry(head: str, body: str) -> str:
    """`bid` and its numbered senses, one per line, from WordNet, without synonyms and antonyms."""
    body = re.sub(r"\[(syn|ant|also)[^]]*\]", "", re.sub(r"\n +(?! |[a-z]* ?\d+:)", " ", "\n" + body))
    senses = [" ".join(line.split()) for line in body.splitlines() if line.strip()]
    text = "\n".join(sense for sense in senses if len(sense) > 12)
    return f"{head.strip()}\n{text}" if len(text) > 60 else ""


_TESTS = r"(^|/)(test|tests|site-packages|encodings|pydoc_data|lib2to3|__phello__|config-[^/]*)/"
_CHANGES = r"changelog|HISTORY|index\.|genindex|bookindex|release-|delta\.pod$"

SOURCES = (
    Source("python-doc", "python3.11-doc", "PSF-2.0 (examples 0BSD)", "mixed",
           "doc/python3.11/html/_sources", "**/*.rst.txt", read_text, 7_000_000, _CHANGES),
    Source("python-stdlib", STDLIB, "PSF-2.0", "code",
           sysconfig.get_path("stdlib"), "**/*.py", read_text, 5_000_000, _TESTS),
    Source("debian-handbook", "debian-handbook", "GPL-2+ or CC-BY-SA-3.0", "prose",
           "doc/debian-handbook/html/en-US", "*.html", read_html, 2_000_000),
    Source("debian-reference", "debian-reference-en", "GPL-2+", "prose",
           "debian-reference", "*.en.html", read_html, 2_000_000, "index"),
    Source("developers-reference", "developers-reference", "GPL-2+", "prose",
           "developers-reference/_sources", "*.rst.txt", read_text, 1_000_000),
    Source("debian-policy", "debian-policy", "GPL-2+", "prose",
           "doc/debian-policy/policy.html/_sources", "*.rst.txt", read_text, 1_000_000),
    Source("maint-guide", "maint-guide", "GPL-2+", "prose",
           "doc/maint-guide/html", "*.en.html", read_html, 500_000),
    Source("installation-guide", "installation-guide-amd64", "GPL-2", "prose",
           "doc/installation-guide-amd64/en", "*.html", read_html, 1_000_000),
    Source("git-doc", "git-doc", "GPL-2", "mixed",
           "doc/git-doc", "**/*.txt", read_text, 2_500_000, "RelNotes"),
    Source("perl-doc", "perl-doc", "GPL-1+ or Artistic", "mixed",
           "perl", "**/pod/*.pod", read_text, 2_000_000, _CHANGES),
    Source("postgresql-doc", "postgresql-doc-15", "PostgreSQL", "prose",
           "doc/postgresql-doc-15/html", "*.html", read_html, 4_000_000, _CHANGES),
    Source("apache2-doc", "apache2-doc", "Apache-2.0", "prose",
           "doc/apache2-doc/manual/en", "**/*.html", read_html, 2_000_000, _CHANGES),
    Source("gcide", "dict-gcide", "GPL-2+", "prose",
           "dictd", "gcide.dict.dz", partial(read_dictionary, gcide_entry), 4_500_000),
    Source("wordnet", "dict-wn", "WordNet-3.0 (permissive)", "prose",
           "dictd", "wn.dict.dz", partial(read_dictionary, wordnet_entry), 3_000_000),
)  # fmt: skip


def normalise(text: str) -> str:
    """Drops control characters, trailing blanks and runs of empty lines."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text.replace("\r\n", "\n").replace("\u00a0", " "))
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return textwrap.dedent(re.sub(r"\n{3,}", "\n\n", text)).strip()


def documents(source: Source) -> list[str]:
    """Cleaned documents of one source, at most `cap` bytes, in the order of their paths."""
    root = SHARE / source.root
    paths = sorted(path for path in root.glob(source.glob) if path.is_file() and not path.is_symlink())
    paths = [path for path in paths if not re.search(source.skip, path.relative_to(root).as_posix())]
    if not paths:
        raise FileNotFoundError(f"{source.name}: nothing at {root}/{source.glob}; install {source.package}")
    texts = [
        text for path in paths for raw in source.read(path) if len(text := normalise(raw)) >= MIN_DOCUMENT
    ]
    texts = list(dict.fromkeys(texts))  # the same page under two names counts once
    kept, size = set(), 0
    for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if (size := size + len(text.encode())) <= source.cap:
            kept.add(text)
    return [text for text in texts if text in kept]


def version(package: str) -> str:
    """The installed version of a Debian package, or of the interpreter for the standard library."""
    if package == STDLIB:
        return platform.python_version()
    query = ["dpkg-query", "--show", "--showformat=${Version}", package]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout


def main(_: list[str]) -> None:
    """Writes a text for each source, and manifest.json with packages, licences, sizes and SHA-256."""
    out = pathlib.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    manifest = []
    for source in SOURCES:
        texts = documents(source)
        data = SEPARATOR.join(texts).encode()
        (out / f"{source.name}.txt").write_bytes(data)
        about: dict[str, Any] = {
            "name": source.name,
            "package": source.package,
            "version": version(source.package),
        }
        about |= {"licence": source.licence, "kind": source.kind, "documents": len(texts), "bytes": len(data)}
        manifest.append(about | {"sha256": hashlib.sha256(data).hexdigest()})
        logging.info("%-22s %5d documents %6.2f MB", source.name, len(texts), len(data) / 1e6)
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    logging.info("%.1f MB in total, in %s", sum(row["bytes"] for row in manifest) / 1e6, out)


if __name__ == "__main__":
    app.run(main)
