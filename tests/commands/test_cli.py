"""The command line: quick, and clear about what went wrong and how to go on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import crp
from crp.__main__ import cli

FEW = ["--epochs", "1", "--quiet"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def python(*arguments: str, **keywords: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **keywords)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["demo", "--help"]], ids=" ".join)
def test_help_and_version_import_nothing_heavy(arguments):
    code = f"""
import sys
from crp.commands.cli import cli
cli({arguments!r}, prog_name="crp", standalone_mode=False)
heavy = {{"torch", "torchvision", "zennit", "numpy", "sklearn", "PIL", "matplotlib", "jinja2"}} & set(sys.modules)
assert not heavy, heavy
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr


def test_module_is_the_command():
    result = python("-m", "crp", "--version")
    assert result.stdout == f"crp, version {crp.__version__}\n"
    assert result.returncode == 0


def test_words_are_completed():
    asked = {"_CRP_COMPLETE": "bash_complete", "COMP_WORDS": "crp rep", "COMP_CWORD": "1"}
    found = subprocess.run([sys.executable, "-m", "crp"], env=os.environ | asked, capture_output=True, text=True)
    assert found.stdout == "plain,report\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_page_of_commands_says_how_a_shell_learns_to_complete(shell):
    page = (Path(crp.__file__).parents[1] / "docs/commands.md").read_text(encoding="utf-8")
    assert f"_CRP_COMPLETE={shell}_source crp" in page
    asked = os.environ | {"_CRP_COMPLETE": f"{shell}_source"}
    found = subprocess.run([sys.executable, "-m", "crp"], env=asked, capture_output=True, text=True)
    assert found.returncode == 0 and f"_CRP_COMPLETE={shell}_complete" in found.stdout


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--help"], "Usage: crp"),
        (["status", "absent"], "Error: Invalid value"),
        (["--debug", "status", "absent"], "Traceback"),
    ],
    ids=["help", "error", "traceback"],
)
def test_nothing_is_coloured_in_a_terminal_that_has_no_color(tmp_path, arguments, told):
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1"}
    for forced in ("FORCE_COLOR", "PYTHON_COLORS"):
        environment.pop(forced, None)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "crp", *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # (a terminal whose other end is closed)
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert process.wait(timeout=60) in (0, 1, 2) and told in shown.decode(), shown
    assert re.findall(rb"\x1b\[[0-9;]*m", shown) == []


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    """As in ``crp methods | head -1``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "crp", "methods"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=60) == 1


def test_help_tells_of_the_demo():
    assert "demo" in run("--help").output
    assert "..." not in run("--help").output.partition("Commands:")[2], "what commands do is said in whole sentences"
    told = run("demo", "--help").output
    for option in ("--out", "--epochs", "--seed", "--batch-size", "--overwrite"):
        assert option in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--epochs", "0"], "0 is not in the range x>=1"), (["--seed", "-1"], "-1 is not in the range")],
    ids=["epochs", "seed"],
)
def test_wrong_options(tmp_path, arguments, message):
    result = run("demo", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(tmp_path):
    (tmp_path / "file").write_text("kept")
    result = run("demo", "--out", tmp_path / "file", *FEW)
    assert result.exit_code == 2
    assert "is a file" in result.output
    assert (tmp_path / "file").read_text() == "kept"


def test_out_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("demo", "--out", tmp_path / "file" / "out", *FEW)
    assert result.exit_code == 1
    place = tmp_path / "file" / "out"
    assert result.output == f"Error: cannot write to {place}: Not a directory. Give another --out.\n"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_out_is_read_only(tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    result = run("demo", "--out", tmp_path / "out", *FEW)
    assert result.exit_code == 1
    assert "Permission denied" in result.output


def test_out_holds_foreign_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("words")
    result = run("demo", "--out", tmp_path, *FEW)
    assert result.exit_code == 1
    assert "is not a folder of the demo" in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_scikit_learn_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = run("demo", "--out", tmp_path / "out", *FEW)
    assert result.exit_code == 1
    assert 'python -m pip install "concept-relevance[demo]"' in result.output


#: `python -m crp` that hears of Ctrl-C also where the tests run in the background, which ignores it.
LISTENING = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("crp", run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_says_how_to_go_on(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", LISTENING, "demo", "--out", str(out), "--epochs", "1000", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(out / "net.safetensors", process)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert f"Interrupted. What is done is kept in {out}; the same command goes on from there." in stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    assert (out / "net.safetensors").stat().st_size > 0


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.05)


def test_warnings_of_all_commands_are_in_a_line(monkeypatch):
    told = []

    def methods():
        told.append(warnings.formatwarning("it is odd", UserWarning, "crp", 8, "sys.exit(main())"))
        return []

    monkeypatch.setattr("crp.attributors.explaining.methods", methods)
    assert run("methods").exit_code == 0 and {*told} == {"Warning: it is odd\n"}
