"""What a real browser makes of a page: Chromium without a window."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest


def page(address: str, profile: Path, width: int = 3000) -> str:
    """The page's elements as HTML, once its scripts are done."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += [f"--window-size={width},1200", "--virtual-time-budget=20000", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


class Grid(HTMLParser):
    """The rows of MLflow's runs table: of each, the text of its cells by column, such as ``params.`alpha` ``."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self._rows: dict[int, dict[str, str]] = {}
        self._row, self._column, self._depth = 0, "", 0
        self.feed(html)

    @property
    def rows(self) -> list[dict[str, str]]:
        """From top to bottom."""
        return [row for _, row in sorted(self._rows.items())]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("role") == "row" and "row-index" in values:
            self._row = int(values["row-index"] or 0)
        if values.get("role") == "gridcell":
            self._column, self._depth = values.get("col-id") or "", 0
        if tag == "div":
            self._depth += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self._depth -= 1

    def handle_data(self, data: str) -> None:
        if self._depth > 0 and self._column:
            row = self._rows.setdefault(self._row, {})
            row[self._column] = row.get(self._column, "") + data
