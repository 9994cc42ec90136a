"""Plain English: the docstrings, comments and documents avoid the forms that are hard to read.

The check looks at docstrings and comments of the Python, Cython and C sources, and at docs/*.md.
It finds words of `FORBIDDEN`, and sentences of more than `LONGEST` words outside tables and code.
`DONE` names the folders and documents that must have no finding.
"""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
LONGEST = 25  # words of a sentence; a code span counts as one word

#: Folders and documents that are written in plain English.
DONE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "docs/api.md",
    "docs/architecture.md",
    "docs/decisions",
    "docs/format.md",
    "docs/fsck.md",
    "docs/glossary.md",
    "docs/performance.md",
    "docs/protocol.md",
    "docs/semantics.md",
    "docs/setup.md",
    "docs/testing.md",
    "docs/troubleshooting.md",
    "docs/uses",
    "bench",
    "ivshmemfs/__init__.py",
    "ivshmemfs/__main__.py",
    "ivshmemfs/api",
    "ivshmemfs/cli",
    "ivshmemfs/command.py",
    "ivshmemfs/doorbell",
    "ivshmemfs/engine",
    "ivshmemfs/errors.py",
    "ivshmemfs/format",
    "ivshmemfs/fsck",
    "ivshmemfs/fuse",
    "ivshmemfs/manual.py",
    "ivshmemfs/native",
    "ivshmemfs/printing.py",
    "ivshmemfs/region",
    "ivshmemfs/shm",
    "examples",
    "mkfs",
    "noxfile.py",
    "packaging",
    "setup.py",
    "tests",
)

FORBIDDEN = re.compile(
    r"\b(who|whom|whoever|whatever|whichever|somebody|anybody|everybody|nobody|as of"
    r"|bears?|bore|borne|stands?|stood|standing|(?<!there )(?:is|are) no(?! longer)(?! more)\b"
    r"|so that\b.*\bso that)\b",
    re.IGNORECASE,
)
CODE_SPAN = re.compile(r"`+[^`]*`+")
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
SENTENCE_END = re.compile(r"[.?!]['\")*]*(?=\s|$)")
GENERATED = re.compile(r"<!-- table:.*?<!-- end -->", re.DOTALL)

Text = tuple[int, str]  # first line, lines of one paragraph


def paragraphs(first: int, text: str) -> Iterator[Text]:
    """Split prose into paragraphs and list items; leave out what is indented as code is."""
    found: list[str] = []
    start = first
    for number, line in enumerate([*text.split("\n"), ""], first):
        bullet = re.match(r"\s*([*-]|\d+\.) +", line)
        code = line.startswith("    ") and not found and not bullet
        if found and (bullet or not line.strip()):
            yield start, "\n".join(found)
            found = []
        if line.strip() and not code:
            if not found:
                start = number
            found.append(line[bullet.end() :] if bullet else line)


def outdented(text: str) -> str:
    """Return a docstring with the indentation of its later lines removed."""
    first, _, rest = text.partition("\n")
    margins = [len(line) - len(line.lstrip()) for line in rest.split("\n") if line.strip()]
    margin = min(margins, default=0)
    return "\n".join([first, *(line[margin:] for line in rest.split("\n"))])


def of_python(path: Path) -> Iterator[Text]:
    """Yield the docstrings and comments of a Python source."""
    for node in ast.walk(ast.parse(path.read_text())):
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, holders) and ast.get_docstring(node):
            constant = node.body[0].value  # type: ignore[attr-defined]  # a docstring is an Expr
            yield from paragraphs(constant.lineno, outdented(constant.value))
    with path.open("rb") as file:
        yield from _comments(file.readline)


def _comments(readline: object) -> Iterator[Text]:
    """Yield the comments; full lines that follow each other are one text."""
    block: list[str] = []
    start = 0
    for token in tokenize.tokenize(readline):  # type: ignore[arg-type]
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        alone = not token.line[: token.start[1]].strip()
        if block and (not alone or line != start + len(block)):
            yield from paragraphs(start, "\n".join(block))
            block = []
        text = re.sub(r"^#[:!]? ?|(fmt|type|noqa): .*$", "", token.string)
        if alone:
            start = start if block else line
            block.append(text)
        else:
            yield from paragraphs(line, text)
    if block:
        yield from paragraphs(start, "\n".join(block))


def of_c(path: Path) -> Iterator[Text]:
    """Yield the comments of a C source."""
    source = path.read_text()
    for match in re.finditer(r"/\*(.*?)\*/", source, re.DOTALL):
        text = re.sub(r"^ ?\* ?", "", match[1], flags=re.MULTILINE)
        yield from paragraphs(source.count("\n", 0, match.start()) + 1, text.lstrip("*").strip(" "))


def of_cython(path: Path) -> Iterator[Text]:
    """Yield the docstrings and full-line comments of a Cython source."""
    source = path.read_text()
    for match in re.finditer(r'"""(.*?)"""|^ *# (.*)$', source, re.DOTALL | re.MULTILINE):
        text = match[1] if match[1] is not None else match[2].split("\n")[0]
        yield from paragraphs(source.count("\n", 0, match.start()) + 1, outdented(text))


def of_document(path: Path) -> Iterator[Text]:
    """Yield the paragraphs of a document; a row of a table is a paragraph, code is left out."""
    source = path.read_text()
    for pattern in (GENERATED, re.compile(r"```.*?```", re.DOTALL)):
        source = pattern.sub(lambda match: "\n" * match[0].count("\n"), source)
    block: list[str] = []
    start = 1
    for number, line in enumerate([*source.split("\n"), ""], 1):
        if line.startswith(("|", "#")):
            yield from paragraphs(start, "\n".join(block))
            block, start = [], number + 1
            yield number, line
        else:
            block.append(line)
    yield from paragraphs(start, "\n".join(block))


READERS = {
    ".py": of_python,
    ".pyi": of_python,
    ".c": of_c,
    ".h": of_c,
    ".pyx": of_cython,
    ".pxd": of_cython,
    ".md": of_document,
}


def findings(path: Path) -> Iterator[str]:
    """Yield a "file:line: what" for each finding in one file."""
    name = path.relative_to(TOP) if path.is_relative_to(TOP) else path.name
    for start, raw in READERS[path.suffix](path):
        text = CODE_SPAN.sub(lambda match: "X" + "\n" * match[0].count("\n"), raw)
        text = LINK.sub(r"\1", text)
        for match in FORBIDDEN.finditer(text):
            yield f"{name}:{start + text.count(chr(10), 0, match.start())}: {match[0]!r}"
        if text.startswith("|"):
            continue
        at = 0
        for end in [*(match.end() for match in SENTENCE_END.finditer(text)), len(text)]:
            words = [word for word in text[at:end].split() if re.search(r"\w", word)]
            if len(words) > LONGEST:
                line = start + text.count("\n", 0, at)
                yield f"{name}:{line}: {len(words)} words: {' '.join(words[:6])} ..."
            at = end


def files(place: Path) -> list[Path]:
    """Return the sources and documents at `place`, sorted."""
    found = [place] if place.is_file() else place.rglob("*")
    return sorted(path for path in found if path.suffix in READERS)


@pytest.mark.parametrize("place", DONE)
def test_plain_english(place: str) -> None:
    paths = files(TOP / place)
    assert paths, f"{place} has no text"
    found = [line for path in paths for line in findings(path)]
    assert not found, "\n".join([f"{place} is not in plain English (see CONTRIBUTING.md):", *found])


LONG = " ".join(["word"] * (LONGEST + 1))
SAMPLES = {
    "a.py": f'"""Whoever writes.\n\n{LONG}.\n"""\nA = 1  # bears a tag\n# as of\n# the opening\n',
    "a.c": f"/* Short. {LONG}. */\nint a; /* is no block */\n/* It\n * stands there. */\n",
    "a.pyx": f'"""{LONG}."""\n# somebody\n',
    "a.md": f"# Title\n\n{LONG}.\n\n| {LONG} |\n| nobody |\n\n```\nwho\n```\n* whatever\n",
}
FOUND = {
    "a.py": {1: "'Whoever'", 3: "26 words", 5: "'bears'", 6: "'as of'"},
    "a.c": {1: "26 words", 2: "'is no'", 4: "'stands'"},
    "a.pyx": {1: "26 words", 2: "'somebody'"},
    "a.md": {3: "26 words", 6: "'nobody'", 11: "'whatever'"},
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_check_finds_what_it_forbids(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(SAMPLES[name])
    found = {line.split(": ", 1)[0]: line.split(": ", 1)[1] for line in findings(path)}
    wanted = {f"{name}:{number}": what for number, what in FOUND[name].items()}
    assert found.keys() == wanted.keys()
    assert all(found[place].startswith(what) for place, what in wanted.items())


def test_what_is_allowed() -> None:
    for text in ("it is no longer there", "there is no journal", "a standard", "so that it ends"):
        assert not FORBIDDEN.search(text), text
    assert list(paragraphs(3, "One\ntwo.\n\n    code\n\n* item")) == [(3, "One\ntwo."), (8, "item")]
