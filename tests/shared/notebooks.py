"""Running notebooks with claims about their results, for the tests of the tutorials."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]


def execute(folder: Path, claims: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every notebook after its run, side by side; or the exception that ended it."""
    clients = {}
    with pytest.MonkeyPatch.context() as patch:
        paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # Agg, shown in the notebook
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        home = tmp_path_factory.mktemp("home")
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(home / name))
        for name, claim in claims.items():
            notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
            notebook.cells.append(nbformat.v4.new_code_cell(claim))
            place = {"metadata": {"path": str(tmp_path_factory.mktemp(name))}}
            clients[name] = NotebookClient(notebook, timeout=120, kernel_name="python3", resources=place)

        async def run() -> list[Any]:
            runs = [client.async_execute() for client in clients.values()]
            return await asyncio.gather(*runs, return_exceptions=True)

        return dict(zip(clients, asyncio.run(run()), strict=True))
