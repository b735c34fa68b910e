"""The peers' process: another environment's interpreter, which obeys one request after the other.

Requests and answers are lines of JSON through pipes. zennit-crp's package has the name of ours, and so can only be
imported in a process of its own; while it runs, ours waits.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.harness import PeerError, Request

ROOT = Path(__file__).resolve().parents[1]
#: Isolated from the current folder and from PYTHONPATH; our repository comes last, so that ``crp`` is the peer's.
BOOT = "import sys; sys.path.append(sys.argv[1]); from benchmarks import peer; peer.serve()"


class Worker:
    """A running peers' process; a context that ends it.

    Parameters
    ----------
    python : str or Path
        Interpreter of an environment in which the peers are installed.
    boot : str
        Program that answers requests, for tests.
    """

    def __init__(self, python: str | Path, boot: str = BOOT) -> None:
        # (The folder of the repository must not come first, nor be the current one.)
        command = [str(Path(python).absolute()), "-I", "-c", boot, str(ROOT)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def ask(self, **request: Any) -> Any:
        """Send a request and wait for its answer.

        Raises
        ------
        PeerError
            If it fails, or the process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError("the peers' process has ended") from None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError("the peers' process has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["value"]

    def cost(self, request: Request, clock: str) -> float:
        """Cost of one run of a candidate, by one of `benchmarks.clocks.CLOCKS`."""
        return float(self.ask(do="run", candidate=dict(request), clock=clock))

    def forget(self) -> None:
        """Let go of all nets and candidates."""
        self.ask(do="forget")

    def versions(self) -> dict[str, str]:
        """Versions of what the peers' process has imported."""
        return dict(self.ask(do="versions"))
