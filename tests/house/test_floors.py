"""The plan of the house: imports run downward, no circle, budgets of lines, one name for one idea, short functions.

`FLOORS` is the order that the rooms must keep; the other figures are counted from the files. Who adds features raises
the budget of its room in the same commit and says why; who finishes something lowers what it made smaller.
"""

from __future__ import annotations

import importlib

import pytest
from house_plan import FACES, IMPORTED, LINES, MODULES, ROOMS, arrows, circles, floors, functions, public_names, room

pytestmark = pytest.mark.untraced

#: The rooms from the ground up. A room imports from lower floors, and from its own where no circle closes.
FLOORS = [
    [
        "types",
        "outputs",
        "layers",
        "notices",
        "errors",
        "refusals",
        "checks",
        "flags",
        "kinds",
        "values",
        "wording",
        "trace",
        "concepts",
        "image",
    ],
    ["engine"],
    ["rules"],
    ["canonizers", "composites"],
    ["attribution", "concept_graph", "attributors", "metrics"],
    ["visualization.table", "visualization.mining", "compat"],
    ["visualization", "visualization.report", "audit"],
    ["helper", "cache", "graph", "hooks", "maximization", "statistics"],
    ["demo", "commands", "__main__"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
#: The modules that carry import names of zennit-crp.
IMPORT_NAMES = FLOORS[7]

#: Lines of each room, with docstrings, comments and blanks.
BUDGETS = {
    "attribution": 388,
    # (targets at positions of a text, maps of tokens; how relevance flows between concepts; what is no method)
    "attributors": 3314,
    # (interventions and contexts of texts; of one call, and of what a layer is called with)
    "audit": 2702,
    "canonizers": 866,
    "commands": 2462,
    "compat": 946,
    # (what a written-out activation was found to be is remembered, until something changes that it depends on;
    # errors of maps, settings and names)
    "composites": 3967,
    "concept_graph": 216,
    # (what is no relevance, and masks that return none)
    "concepts": 2045,
    "demo": 891,
    # (whether a model predicts each sample by itself; basic hooks of zennit for many rows)
    "engine": 6297,
    "image": 1528,
    # (names of layers that mean what they are called with; kernels of all rooms are looked up here; marks of tensors)
    "layers": 1608,
    "outputs": 393,
    "metrics": 1131,
    # (a product whose gate is held; outputs that the next layer keeps anyway; surrogates that are none)
    "rules": 8291,
    # (along which axis the channels of a layer are)
    "trace": 1294,
    "types": 158,
    # (maximized pictures are kept for the pages of their concepts; --output by words; maximized
    # pictures by the report, where they are missing; models made for the classes of their checkpoint; models of Hugging
    "visualization": 4820,
    "visualization.mining": 4209,
    # (rows of a sample share its forward pass, concepts of a layer are drawn together, and are kept meanwhile; how
    # active directions are; margins of pictures; which composite shares are by)
    "visualization.report": 4557,
    # (the manifest of version 2 with its checksum, what a shard must hold, files that are never followed, and columns
    # about samples; results such as prototypes that are kept beside it; the source of functions as a syntax tree)
    "visualization.table": 2683,
}
#: Public names that two files define.
DEFINED_TWICE = {"Gradient"}
PUBLIC_NAMES = 931
#: Functions of more than 60 lines of code, and those of more than 12 parameters, with the number that they may have.
LONG: dict[str, int] = {}
MANY_PARAMETERS = {
    "crp.attributors.perturbation.MeaningfulPerturbation.__init__": 22,
    "crp.commands.attribute.attribute": 17,
    "crp.composites.by_depth.LRPCMP.__init__": 16,
    "crp.metrics.flipping.pixel_flipping": 14,
    "crp.rules.triton_kernels._quotient": 13,
    "crp.rules.triton_kernels._gamma_scales": 13,
}


# --- floors ---------------------------------------------------------------------------------------------------------


def test_every_room_has_a_floor_and_a_budget():
    assert {room(module) for module in MODULES if module != "crp"} - set(FLOOR) == set(), "name each new room in FLOORS"
    assert set(ROOMS) - set(BUDGETS) == set(), "give each new room a budget in BUDGETS"


def test_imports_run_downward():
    upward = {
        (module, other)
        for module, others in IMPORTED.items()
        for other in others
        if module != "crp" and FLOOR[room(other)] > FLOOR[room(module)]
    }
    assert upward == set()


def test_no_circle_of_files_or_rooms():
    assert circles(IMPORTED) == []
    assert circles(arrows()) == []


def test_few_rooms_floors_and_arrows():
    assert len(ROOMS) <= 22
    assert max(floors().values()) <= 9
    assert sum(map(len, arrows().values())) <= 85


def test_the_package_itself_imports_nothing_of_its_own():
    assert IMPORTED["crp"] == set()


def test_the_engine_knows_no_rule_composite_or_canonizer():
    known, todo = set(), ["crp.attribution"]
    while todo:
        module = todo.pop()
        if module not in known:
            known.add(module)
            todo.extend(IMPORTED[module])
    assert {"crp.engine.conditions", "crp.concepts.channels"} <= known
    assert {room(module) for module in known} & {"rules", "composites", "canonizers"} == set()


# --- sizes and names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_keep_their_budgets(name):
    assert LINES[name] <= BUDGETS[name], "raise the budget in the commit that adds the feature, and say there why"


def test_a_public_name_is_defined_once():
    twice = {name: sorted(homes) for name, homes in public_names().items() if len(homes) > 1}
    assert {name: homes for name, homes in twice.items() if name not in DEFINED_TWICE} == {}


def test_few_names_are_public():
    number = sum(map(len, public_names().values()))
    assert number <= PUBLIC_NAMES, "what no face, test or other room needs gets an underscore"


def test_functions_are_short_and_take_few_parameters():
    known = list(functions())
    assert [one for one in known if one.lines > LONG.get(one.name, 60)] == []
    assert [one for one in known if one.parameters > MANY_PARAMETERS.get(one.name, 12)] == []


@pytest.mark.parametrize("name", IMPORT_NAMES)
def test_modules_under_the_names_of_zennit_crp_say_what_they_offer(name):
    module = importlib.import_module(f"crp.{name}")
    assert module.__all__ == sorted(module.__all__)
    assert [offered for offered in module.__all__ if not hasattr(module, offered)] == []


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_what_a_room_offers_is_there(module):
    loaded = importlib.import_module(module)
    offered = getattr(loaded, "__all__", [])
    assert len(set(offered)) == len(offered)
    assert [name for name in offered if not hasattr(loaded, name)] == []


def test_faces_are_no_rooms():
    assert {"cache", "graph", "hooks", "maximization", "statistics"} <= FACES
