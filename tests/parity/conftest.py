"""The live peer: zennit-crp 0.6.0, installed without its dependencies into a folder and run in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

PEER = "zennit-crp==0.6.0"
DRIVER = Path(__file__).parent / "peer_driver.py"


def install_peer(folder: Path) -> None:
    """Install the peer with pip; skip only where no index answers."""
    options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), PEER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    if done.returncode and "(from versions: none)" in done.stderr:
        pytest.skip(f"pip cannot reach a package index to install {PEER}: {done.stderr.strip().splitlines()[0]}")
    if done.returncode:
        pytest.fail(f"{' '.join(command)} failed:\n{done.stderr}")


def run_peer(installed: Path, results: Path) -> None:
    """Install the peer into a folder and keep its results in another."""
    install_peer(installed)
    command = [sys.executable, "-I", str(DRIVER), str(installed), str(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    if done.returncode:
        pytest.fail(f"the peer's process failed:\n{done.stderr[-4000:]}")


@pytest.fixture(scope="session")
def peer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """The peer's results by module of cases, case and name; it runs once for all processes of the tests."""
    base = tmp_path_factory.getbasetemp()
    results = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "peer_results"
    try:
        results.mkdir()
    except FileExistsError:
        while not (results / "ended").exists():
            time.sleep(0.1)
    else:
        try:
            run_peer(tmp_path_factory.mktemp("peer"), results)
        finally:
            (results / "ended").touch()
    if not list(results.glob("*.npz")):
        pytest.skip("the peer has no results; the process of the tests that ran it says why")
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for file in results.glob("*.npz"):
        cases = found.setdefault(file.stem, defaultdict(dict))
        with np.load(file) as arrays:
            for key, value in arrays.items():
                case, _, name = key.partition("/")
                cases[case][name] = value
    return found
