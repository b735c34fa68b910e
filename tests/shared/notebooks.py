"""Running notebooks with claims about their results, for the tests of the tutorials.

``python tests/shared/notebooks.py tutorials/1_attribution.ipynb ...`` runs notebooks, too, and stores their outputs.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
#: The trained net that several notebooks keep, under this name in their folder.
CHECKPOINT = "results/digits.safetensors"


def execute(folder: Path, claims: dict[str, str], make_folder: Callable[[str], Path]) -> dict[str, Any]:
    """Every notebook after its run, with its claims as the last cell; or the exception that ended it.

    As many run side by side as there are processors. The first that trains the net of `CHECKPOINT` passes it on to the
    others, which go on from there, as for a reader who runs one after the other in one folder.
    """
    clients, places, keeping = {}, {}, []
    with pytest.MonkeyPatch.context() as patch:
        paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # Agg, shown in the notebook
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        home = make_folder("home")
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(home / name))
        for name, claim in claims.items():
            notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
            notebook.cells.append(nbformat.v4.new_code_cell(claim))
            places[name] = make_folder(name)
            keeping += [name] * any(CHECKPOINT in cell.source for cell in notebook.cells)
            clients[name] = NotebookClient(
                notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(places[name])}}
            )

        async def run() -> list[Any]:
            free = asyncio.Semaphore(os.cpu_count() or 1)
            tasks: dict[str, asyncio.Task[Any]] = {}

            async def one(name: str) -> Any:
                if name in keeping[1:]:
                    await asyncio.wait([tasks[keeping[0]]])
                    pass_on(places[keeping[0]], places[name])
                async with free:
                    return await clients[name].async_execute()

            tasks |= {name: asyncio.create_task(one(name)) for name in clients}
            return await asyncio.gather(*tasks.values(), return_exceptions=True)

        return dict(zip(clients, asyncio.run(run()), strict=True))


def pass_on(place: Path, other: Path) -> None:
    """Copy the trained net of one folder, if there is one, to another."""
    if (place / CHECKPOINT).exists():
        (other / CHECKPOINT).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(place / CHECKPOINT, other / CHECKPOINT)


def pictures(notebook: Any) -> int:
    """Number of pictures that a notebook shows."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def errors_of(notebook: Any) -> str:
    """What a notebook has written to standard error."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return "".join(output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr")


def check_stored(notebook: Any, path: Path) -> None:
    """A notebook is stored as it was after a run from top to bottom, and tells nothing of where that was."""
    nbformat.validate(notebook)
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    stored = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|Users|work|root|tmp)/", stored)
    assert not errors_of(notebook)
    assert len(stored) < 700_000


def store_outputs(path: Path) -> None:
    """Run a notebook and write its outputs into it: pictures in few colours, and no progress bars."""
    with tempfile.TemporaryDirectory() as place:
        make_folder = partial(tempfile.mkdtemp, dir=place)
        notebook = execute(path.parent, {path.stem: ""}, lambda name: Path(make_folder(name)))[path.stem]
    if isinstance(notebook, BaseException):
        raise notebook
    del notebook.cells[-1]
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.metadata.pop("execution", None)  # (times)
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _in_few_colours(output.data["image/png"])
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def _in_few_colours(png: str) -> str:
    """The same picture in a fraction of the bytes, base64 to base64."""
    written = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(64, dither=Image.Dither.NONE).save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        store_outputs(Path(name).resolve())
