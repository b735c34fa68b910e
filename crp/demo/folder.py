"""The demo's folder: told apart from other folders, and from demos with other settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crp.errors import CRPError
from crp.visualization.report.folder import discard
from crp.visualization.table.files import write_atomic
from crp.visualization.table.store import Table

SETTINGS = "demo.json"


class DemoError(CRPError):
    """The demo cannot run; the message says why and what to do."""


class DemoFolder:
    """Folder of one demo.

    Parameters
    ----------
    path : path
        Made where there is none.
    settings : mapping of str to value
        What the demo depends on.
    overwrite : bool
        Whether an earlier demo in the folder is discarded.

    Raises
    ------
    DemoError
        If the folder cannot be written, holds an earlier demo of other settings, or is not a demo's.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = Path(path)
        self.network = self.path / "net.safetensors"
        self.index = self.path / "index"
        self.atlas = self.path / "atlas"
        self.figures = self.path / "figures.json"
        try:
            self._claim(dict(settings), overwrite)
        except OSError as error:
            raise DemoError(f"cannot write to {self.path}: {error.strerror or error}. Give another --out.") from error

    def write_figures(self, figures: Mapping[str, Any]) -> None:
        """Write the figures that the demo found, for other programs."""
        write_atomic(self.figures, json.dumps(figures, indent=2).encode())

    def _claim(self, settings: dict[str, Any], overwrite: bool) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        marker = self.path / SETTINGS
        earlier = self._earlier(marker)
        if earlier is None and (foreign := next(self.path.iterdir(), None)):
            raise DemoError(
                f"{self.path} is not a folder of the demo: it holds {foreign.name!r}, and no {SETTINGS}. "
                "Nothing was changed; give another --out."
            )
        if earlier is not None and overwrite:
            self._discard()
        elif earlier not in (None, settings):
            raise DemoError(
                f"{self.path} holds a demo of other settings ({_differences(earlier, settings)}). "
                "Give another --out, the same settings to go on with it, or --overwrite to discard it."
            )
        write_atomic(marker, json.dumps(settings, indent=2).encode())

    def _earlier(self, marker: Path) -> Any:
        """Settings of the demo that is in the folder; None where there is none."""
        if not marker.exists():
            return None
        try:
            return json.loads(marker.read_bytes())
        except ValueError:
            return {}

    def _discard(self) -> None:
        """Delete what an earlier demo wrote, and nothing else."""
        Table.discard(self.index)
        discard(self.atlas)
        for file in (self.network, self.figures):
            file.unlink(missing_ok=True)


def _differences(earlier: Any, settings: Mapping[str, Any]) -> str:
    if not isinstance(earlier, dict) or not earlier:
        return f"its {SETTINGS} is damaged"
    names = [name for name in {**settings, **earlier} if earlier.get(name) != settings.get(name)]
    return ", ".join(f"{name} {earlier.get(name)} there, {settings.get(name)} here" for name in names)
