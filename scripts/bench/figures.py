# SPDX-License-Identifier: Apache-2.0
"""Writes every table and plot of README.md and docs/benchmarks again, from the CSV files: `make figures`.

Usage: python scripts/bench/figures.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; tables_of_quality.py and tables_of_speed.py have them.
Each PNG carries a digest of its CSV and of plots.py; tests/scripts/test_figures.py compares both.
"""

import hashlib
import re
import sys
from pathlib import Path

import plots
import tables_of_quality
import tables_of_speed
from benchmarking import ROOT
from matplotlib import pyplot as plt
from tables import FOLDER

TABLES = {**tables_of_quality.TABLES, **tables_of_speed.TABLES}
PAGES = [ROOT / "README.md", *(FOLDER / f"{page}.md" for page in ("cpu", "quality", "cuda", "encode"))]
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
KEY = "Source"
"""PNG text entry that holds the digest."""


def with_tables(page: str) -> str:
    """The text of a page with its tables as the CSV files give them now."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", page)


def digest(csv: str) -> str:
    """Of a CSV file and of the code that draws it."""
    content = (FOLDER / f"{csv}.csv").read_bytes() + Path(plots.__file__).read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def main() -> int:
    """Writes what has changed; returns the exit code."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    for name, (csv, draw) in plots.PLOTS.items():
        figure = draw()
        figure.savefig(FOLDER / f"{name}.png", metadata={KEY: digest(csv)})
        plt.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
