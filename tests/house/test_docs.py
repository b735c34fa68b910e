"""The site of the documentation: it is built without a warning, and its reference has every public name."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from house_plan import MODULES, ROOT

for needed in ("sphinx", "myst_nb", "numpydoc", "sphinx_click", "furo"):
    pytest.importorskip(needed, reason="the site is built where the docs extra is installed", exc_type=ImportError)

pytestmark = pytest.mark.timeout(900)  # half a minute on two idle cores, much more where they are busy

#: Modules beside the rooms' faces whose names are for the package itself.
INSIDE = {"__main__", "checks", "commands", "compat", "engine", "flags", "kinds", "layers", "notices", "values"}
INSIDE |= {"wording"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as the command in CONTRIBUTING.md builds it, in a folder of its own."""
    command = re.search(r"^python (-m sphinx .*) (build/docs)$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    out = tmp_path_factory.mktemp("site") / "docs"
    done = subprocess.run([sys.executable, *command[1].split(), out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def offered(module: str) -> list[str]:
    """Public names of the package that a module offers."""
    loaded = importlib.import_module(module)
    own = [n for n, what in vars(loaded).items() if n[0] != "_" and getattr(what, "__module__", None) == module]
    names = getattr(loaded, "__all__", own)
    return [name for name in names if not is_foreign(getattr(loaded, name))]


def is_foreign(what: object) -> bool:
    """Whether a name that is offered for scripts of zennit-crp, such as ``np``, belongs to another library."""
    home = getattr(what, "__module__", None) or getattr(what, "__name__", "crp")
    return home.split(".")[0] in {"PIL", "matplotlib", "numpy", "torch", "torchvision", "typing", "zennit"}


@pytest.fixture(scope="module")
def documented(site: Path) -> set[str]:
    """Full names of all Python objects in the inventory of the site."""
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, page: page)
    return {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.count(".") == 1 and m[4:] not in INSIDE))
def test_the_reference_has_every_public_name(module: str, documented: set[str]) -> None:
    names = offered(module)
    assert names
    assert [name for name in names if f"{module}.{name}" not in documented] == []


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.count(".") == 1 and m[4:] not in INSIDE))
def test_docstrings_name_no_parameter_that_is_not_there(module: str) -> None:
    from numpydoc.validate import validate

    named = {f"{module}.{name}": getattr(importlib.import_module(module), name) for name in offered(module)}
    for name, what in list(named.items()):
        if inspect.isclass(what):
            named |= {f"{name}.{part}": how for part, how in vars(what).items() if part[0] != "_" and callable(how)}
    checked = [name for name, what in named.items() if callable(what) and inspect.getdoc(what)]
    wrong = [(name, text) for name in checked for code, text in validate(name)["errors"] if code == "PR02"]
    assert wrong == []


def test_the_reference_has_what_the_package_itself_offers(documented: set[str]) -> None:
    import crp

    assert [f"crp.{home}.{name}" for name, home in crp._HOMES.items() if f"crp.{home}.{name}" not in documented] == []


def test_every_page_is_in_the_site(site: Path) -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("tutorials/**/*.md"), *ROOT.glob("tutorials/**/*.ipynb")]
    pages = [page.relative_to(ROOT) for page in pages if not any(part[0] == "." for part in page.parts)]
    assert len(pages) >= 15
    assert [page for page in pages if not (site / page.with_suffix(".html")).exists()] == []
    assert (site / re.search(r"url=([\w/.]+)", (site / "index.html").read_text())[1]).exists()


def test_the_page_of_commands_has_every_command(site: Path) -> None:
    from crp.commands.cli import cli

    text = (site / "docs" / "commands.html").read_text(encoding="utf-8")
    assert [name for name in cli.commands if f'id="crp-{name}"' not in text] == []
