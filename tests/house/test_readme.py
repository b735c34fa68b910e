"""README, the commands that it names and the pages beside it hold what they say."""

from __future__ import annotations

import re

import pytest
from house_plan import PACKAGE, ROOMS, ROOT

README = ROOT / "README.md"


def readme() -> str:
    return README.read_text(encoding="utf-8")


def test_readme_is_short():
    assert len(readme().splitlines()) <= 150


def test_readme_has_the_two_commands():
    assert 'python -m pip install ".[demo]" && crp demo' in readme()
    assert 'python -m pip install -e ".[test]" && python -m pytest' in readme()


def test_readme_shows_a_picture_and_links_to_what_exists():
    targets = re.findall(r"(!?)\[[^\]]*\]\(([^)#]+)[^)]*\)|(?:src|href)=\"([^\"#]+)", readme())
    local = [markdown or html for _, markdown, html in targets if not re.match(r"\w+:", markdown or html)]
    assert [target for target in local if not (ROOT / target).exists()] == []
    assert any(target.endswith((".png", ".jpg", ".svg", ".gif")) for target in local)


def test_readme_code_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [(match.start(1), match[1]) for match in re.finditer(r"^```python\n(.*?)^```", readme(), re.M | re.S)]
    assert blocks
    namespace: dict[str, object] = {"__name__": "readme"}
    for start, source in blocks:
        lines = "\n" * readme()[:start].count("\n")  # so that errors name the line of the README
        exec(compile(lines + source, str(README), "exec"), namespace)


@pytest.mark.skipif(not (ROOT / ".ci" / "run").exists(), reason="not a checkout of the repository")
def test_ci_runs_the_commands_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    text = script.read_text(encoding="utf-8")
    for command in ('python -m pip install -e ".[test]"', "python -m pytest", "ruff check", "mypy", "crp demo"):
        assert command in text
    assert "set -euo pipefail" in text


def test_the_page_of_methods_has_every_preset():
    from crp.composites.registry import classes

    rows = (ROOT / "tutorials" / "methods.md").read_text(encoding="utf-8").splitlines()
    found = {row.split("`")[1]: row.split("`")[3] for row in rows if row.startswith("| `")}
    assert found == {name: kind.__name__ for name, kind in classes().items()}


# --- pages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_a_page_names_files_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    names = set(re.findall(r"`([\w/.]+\.(?:py|md|toml)|[\w/]+/)`", text)) | set(re.findall(r"\]\(([^)#:]+)", text))
    assert names
    assert [name for name in names if not (ROOT / name).exists() and not (PACKAGE / name).exists()] == []


def test_the_page_of_the_architecture_has_every_room():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rooms = {name.split(".")[0] for name in ROOMS}
    assert [name for name in rooms if f"`{name}`" not in text and f"`{name}/`" not in text] == []


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 50


def test_the_citation_has_the_version():
    from crp import __version__

    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
