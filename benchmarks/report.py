"""Tables of what was measured: for the terminal, as JSON, as Markdown."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import crp
from benchmarks.harness import Row, Spread

#: What stands after this line of a page is written by hand and kept.
BY_HAND = "<!-- by hand from here on -->"


#: What a section of figures was measured on, where that was no GPU.
CPU = "CPU"


def device_name(device: str) -> str:
    """Name of the card that measures on ``"cuda"``, or `CPU`."""
    return torch.cuda.get_device_name() if device == "cuda" else CPU


def machine() -> str:
    """Class of the machine, without its name."""
    best = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores {platform.machine()} ({best})"


def environment(peers: dict[str, str], device: str = "cpu") -> dict[str, str]:
    """Day, device, machine and versions."""
    versions = {name: version(name) for name in ("torch", "torchvision", "zennit")}
    theirs = {f"{name} (peers)": found for name, found in peers.items() if versions.get(name) != found}
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    about = {"date": day, "device": device_name(device), "machine": machine()}
    return about | {"crp": crp.__version__, **versions, **theirs}


@dataclass
class Section:
    """Lines of one section, and in which circumstances they were measured."""

    title: str
    environment: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    @property
    def device(self) -> str:
        """Name of the card, or `CPU`."""
        return self.environment.get("device", CPU)


class Record:
    """What was measured, section by section.

    Parameters
    ----------
    path : Path, optional
        JSON file that is read and, by `save`, written; sections that are not measured again stay in it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self.sections: dict[str, Section] = {}
        if path is not None and path.exists():
            for name, found in json.loads(path.read_text(encoding="utf-8")).items():
                rows = [Row.from_json(row) for row in found["rows"]]
                self.sections[name] = Section(found["title"], found["environment"], rows)

    def add(self, name: str, section: Section) -> None:
        """Keep a section, in place of the one that was measured on the same device before."""
        self.sections[name if section.device == CPU else f"{name} on {section.device}"] = section

    def save(self) -> None:
        """Write the file, where there is one."""
        if self._path is not None:
            text = json.dumps(self.as_json(), indent=1, ensure_ascii=False)
            self._path.write_text(text + "\n", encoding="utf-8")

    def as_json(self) -> dict[str, Any]:
        """Plain dict."""
        return {
            name: {
                "title": section.title,
                "environment": section.environment,
                "rows": [row.as_json() for row in section.rows],
            }
            for name, section in self.sections.items()
        }

    def markdown(self) -> str:
        """All sections as tables, those of a device together; the CPU's come first."""
        lines = ["# Results", "", "Printed by `python -m benchmarks --markdown`; README.md says how it is measured."]
        device = CPU
        for name, section in sorted(self.sections.items(), key=lambda item: (item[1].device != CPU, item[1].device)):
            if section.device != device:
                device = section.device
                lines += ["", f"# Results on a GPU: {device}"]
            about = ", ".join(f"{key} {value}" for key, value in section.environment.items())
            lines += ["", f"## {name}: {section.title}", "", f"{about}.", ""]
            lines += ["| # | metric | case | goal | measured | | peer |", "|---|---|---|---|---|---|---|"]
            lines += [f"| {' | '.join(cells(row))} |" for row in section.rows]
        return "\n".join(lines) + "\n"

    def write_markdown(self, path: Path) -> None:
        """Write the tables into a page, and keep what was written there by hand."""
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        _, mark, rest = old.partition(BY_HAND)
        path.write_text(f"{self.markdown()}\n{BY_HAND}{rest if mark else chr(10)}", encoding="utf-8")


def show(spread: Spread | None, note: str = "") -> str:
    """Median, with the extremes where they differ."""
    if spread is None:
        return note or "–"
    text = number(spread.median)
    least, most = number(spread.least), number(spread.most)
    return text if least == most else f"{text} ({least} to {most})"


def number(value: float) -> str:
    """Three digits or so; whole numbers as they are."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.2e}" if abs(value) >= 1e6 or abs(value) < 1e-3 else f"{value:.3f}"[:5].rstrip(".")


def cells(row: Row) -> list[str]:
    """Cells of a line of the table."""
    verdict = {None: "", True: "met", False: "**missed**"}[row.met]
    bound = str(row.bound) if row.bound else ""
    ours = show(row.measured, row.note)
    theirs = show(row.peer, row.note if row.measured is not None else "")
    return [row.goal, row.metric, row.case, bound, ours, verdict, theirs if theirs != "–" else ""]


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Table for the terminal."""
    head = ["#", "metric", "case", "goal", "measured", "", "peer"]
    table = [head] + [[cell.replace("**", "") for cell in cells(row)] for row in rows]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    for line in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
