"""Reading the project's documents: their headings, links, code and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("experiments/*/README.md")),
)
_FENCE = re.compile(r"^\s*(```|~~~)")
_SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_LINK = re.compile(r"""\]\(([^)\s]+)\)|\bsrc="([^"]+)\"""")


@dataclass(frozen=True)
class Document:
    """A Markdown file, its code apart from its prose.

    Attributes:
        path: of the file.
        prose: its lines but for blocks of code.
        code: the lines of all blocks of code, fenced or indented, continued lines joined.
    """

    path: Path
    prose: str
    code: list[str]

    @property
    def spans(self) -> list[str]:
        """Code within the prose, without its backticks."""
        return [" ".join(span.split()) for _, span in _SPAN.findall(self.prose)]

    @property
    def links(self) -> list[str]:
        """Targets of links and pictures."""
        return [one or other for one, other in _LINK.findall(_SPAN.sub("", self.prose))]

    @property
    def anchors(self) -> set[str]:
        """What a link to a heading may name, as GitHub makes it."""
        headings = re.findall(r"^#+ +(.+?)\s*$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def read(path: Path) -> Document:
    """The document in a file."""
    return parsed(path, path.read_text(encoding="utf-8"))


def parsed(path: Path, text: str) -> Document:
    """A document from its text; a block of code is fenced, or indented after an empty line."""
    prose: list[str] = []
    code: list[str] = []
    is_fenced, after_code = False, True
    for line in text.splitlines():
        if _FENCE.match(line):
            is_fenced = not is_fenced
        elif is_fenced or (after_code and line.startswith("    ")):
            code.append(line.strip())
        else:
            prose.append(line)
            after_code = not line.strip()
    return Document(path, "\n".join(prose), _joined(code))


def _joined(lines: list[str]) -> list[str]:
    """Lines that end with a backslash and the next are one."""
    return re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()


def broken_links(document: Document) -> list[str]:
    """Relative links to files or headings that do not exist."""
    broken = []
    for link in document.links:
        name, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = document.path.parent / name
        anchors = document.anchors
        if name:
            anchors = read(target).anchors if target.suffix == ".md" and target.exists() else set()
        if (name and not target.exists()) or (anchor and anchor not in anchors):
            broken.append(link)
    return broken


def missing_files(document: Document) -> list[str]:
    """Files of the project that a document names and that do not exist.

    Names in capitals, as in conf/GROUP/OPTION.yaml, stand for others.
    """
    named = re.compile(
        r"(?:invmm|conf|docs|tests|experiments)/[\w./-]+\.(?:py|yaml|json|md|sh|txt)"
    )
    texts = [*document.spans, *document.code]
    names = {name for text in texts for name in named.findall(text)}
    return sorted(
        name
        for name in names
        if not re.search(r"/[A-Z]+[/.]", name.replace("README", "")) and not (ROOT / name).exists()
    )


def commands(document: Document) -> Iterator[str]:
    """Command lines of invmm: of blocks of code, of prose if they have values, and of tables.

    A table whose header says "after `invmm ...`" shows the rest of the command in its rows.
    """
    for line in document.code:
        if re.match(r"(\.venv/bin/)?invmm(-\w+)?( |$)", line):
            yield line.removeprefix(".venv/bin/")
    for span in document.spans:
        if re.match(r"invmm(-train|-threshold)? .*=", span):
            yield span
    beginning = None
    for line in document.prose.splitlines():
        if header := re.match(r"\|.*\bafter `(invmm [^`]+)` *\|$", line):
            beginning = header[1]
        elif not line.startswith("|"):
            beginning = None
        elif beginning:
            cells = line.split("|")[2:]
            for _, span in _SPAN.findall("|".join(cells)):
                yield f"{beginning} {span}"


def words(command: str) -> list[str]:
    """The arguments of a command line: no comment, nothing behind a pipe, no `...` for others."""
    found = shlex.split(command, comments=True)
    ends = [place for place, word in enumerate(found) if word in ("|", ">", "&", "<")]
    return found[: min(ends, default=len(found))]


def make_targets(document: Document) -> set[str]:
    """Targets of make in code."""
    found = set()
    for text in (*document.spans, *document.code):
        given = shlex.split(text, comments=True) if text.startswith("make ") else []
        for word in given[1:]:
            if re.fullmatch(r"[a-z0-9-]+", word):
                found.add(word)
    return found


def studies(document: Document) -> set[str]:
    """Names of studies that a command of make is given."""
    code = "\n".join((*document.spans, *document.code))
    return set(re.findall(r"\bSTUDY=([a-z0-9_]+)", code))
