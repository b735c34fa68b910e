"""The walks through the package: which files are met, and what ARCHITECTURE.md says of them."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from benchmarks.walks import ROOT, main, met_files, walks_of


@pytest.fixture(scope="module")
def walks():
    return walks_of(ROOT)


def test_files_are_met_by_their_functions_only():
    from crp.concepts import ChannelConcept
    from crp.rules.stabilizer import stabilizing

    with met_files() as files:
        concept = ChannelConcept()
        stabilizing(0.1)
    stabilizing(0.1)
    assert files == {"rules/stabilizer.py", "flags.py"}, concept


@pytest.mark.parametrize(
    ("walk", "start", "end"),
    [
        ("condition", "attribution.py", "concepts/channels.py"),
        ("sample", "visualization/feature.py", "visualization/references.py"),
        ("rule", "composites/lrp.py", "rules/redirect.py"),
    ],
    ids=["condition", "sample", "rule"],
)
def test_a_walk_meets_files_that_exist(walks, walk, start, end):
    assert {start, end} <= set(walks[walk])
    assert [name for name in walks[walk] if not (ROOT / "crp" / name).is_file()] == []


def test_a_walk_of_a_concept_or_sample_meets_no_rule(walks):
    rooms = {name.partition("/")[0] for walk in ("condition", "sample") for name in walks[walk]}
    assert rooms & {"rules", "composites", "canonizers", "commands", "demo"} == set()


def test_the_command_prints_every_walk(walks, monkeypatch):
    monkeypatch.setattr("benchmarks.walks.walks_of", lambda checkout: walks if checkout == ROOT else {})
    done = CliRunner().invoke(main, [str(ROOT)], catch_exceptions=False)
    assert re.findall(r"^  (\w+): \d+ files$", done.output, re.M) == ["condition", "sample", "rule"]
