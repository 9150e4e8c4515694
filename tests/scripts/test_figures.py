# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of README.md and docs/benchmarks are those that the CSV files give: if not, run `make figures`."""

import pytest

figures = pytest.importorskip("figures", reason="needs matplotlib")


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_tables_are_what_the_csv_files_give(page):
    text = page.read_text(encoding="utf-8")
    assert figures.MARKED.search(text)
    assert figures.with_tables(text) == text


def test_a_changed_table_is_seen():
    page = figures.FOLDER / "cuda.md"
    assert figures.with_tables(page.read_text().replace("| 1 row |", "| 2 rows |")) == page.read_text()


@pytest.mark.parametrize("name", figures.plots.PLOTS)
def test_plots_are_drawn_from_the_csv_files_as_they_are(name):
    image = pytest.importorskip("PIL.Image")
    csv, _ = figures.plots.PLOTS[name]
    with image.open(figures.FOLDER / f"{name}.png") as picture:
        assert picture.info[figures.KEY] == figures.digest(csv)


def test_every_plot_is_shown_in_a_page():
    pages = "".join(page.read_text(encoding="utf-8") for page in figures.PAGES)
    assert not [name for name in figures.plots.PLOTS if f"{name}.png" not in pages]
