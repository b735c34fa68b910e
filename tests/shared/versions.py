"""Tests of what older versions do not have, of those that are supported: they are skipped there, and say why."""

from __future__ import annotations

import importlib.metadata
import platform

import pytest
from packaging.version import Version

#: Beginnings of node ids, by what they need, the first version of it, and what the older ones lack.
NEWER = {
    ("python", "3.11", "a pathlib that looks functions of os up"): ["mining/test_full_disk.py::test_of_"],
    ("torch", "2.5", "derivatives, keywords and kernels of this test"): [
        "operations/test_affine_input.py::test_copies_of_the_input[channel_shuffle]",
        "operations/test_affine_input.py::test_account_closes_behind_copies[channel_shuffle]",
        "operations/test_affine_spellings.py::test_rare_spelling_does_not_matter_or_is_told[embedding_bag",
        "rules/test_attention.py::test_grouped_heads",
        "rules/test_attention.py::test_fused_kernels_stay_fused",
        "rules/test_fused.py::test_kernels_by_the_interpreter",
        "rules/test_written_out.py::test_branches_and_loops_are_what_they_run",
        *(
            f"rules/test_attention.py::{test}[{way}-{case}"
            for way in ("constant", "split")
            for test, case in [
                ("test_what_cannot_be_seen_is_right_or_refused", "flex_attention"),
                ("test_dot_product_attention", "hidden_row"),
            ]
        ),
    ],
    ("torch", "2.5", "a way to ask for hooks on saved tensors, so that calls cost more"): [
        "engine/test_cost.py::test_calls_of_kernels_in_gradients",
        "engine/test_cost.py::test_what_a_call_of_a_small_net_costs_beside_its_arithmetic",
    ],
    ("torch", "2.5", "a way to ask for hooks on saved tensors"): [
        "engine/test_replay.py::test_hooks_of_others_on_saved_tensors_see_every_call",
    ],
    ("torch", "2.6", "an export that keeps batch norm as one function"): [
        "canonizers/test_canonizers_kinds.py::test_batch_norm_that_is_called_as_a_function_is_left_with_a_warning["
        f"{known}-torch.export"
        for known in ("first", "after_a_plan")
    ],
    ("transformers", "5", "layers of these names, which return tensors"): [
        "attribution/test_token_ids.py::test_the_account_closes_and_conditions_add_up",
        "attributors/test_attributors_cam_tokens.py::test_tokens_of_a_text",
        "commands/test_texts_commands.py::test_heads_classes_and_figures",
        "composites/test_transformers.py::test_a_custom_function_is_named_with_its_remedy",
        *(
            f"composites/test_transformers.py::test_attention_of_hugging_face_is_the_same_written_out_and_fused[{kind}-{name}"
            for kind, name in (("AttnLRP", "deepseek_v3"), ("CPLRP", "deepseek_v3"))
        ),
        "composites/test_transformers.py::test_experts_are_the_same_in_all_ways_to_run_them",
        "composites/test_transformers.py::test_prediction_stays_and_the_account_closes",
        "composites/test_transformers.py::test_registered_attention_stands_in_the_registry_of_hugging_face",
        "concepts/test_axes.py::test_parts_add_up_to_the_whole",
        "concepts/test_heads.py::",
        "concepts/test_heads_of_windows.py::",
        "mining/test_mining_axes.py::test_what_made_a_tensor_tells_where_its_channels_are",
    ],
}


def skip_what_is_newer(items: list[pytest.Item]) -> None:
    """Mark tests that need a newer version than the installed one."""
    for (name, version, lacks), nodes in NEWER.items():
        try:
            installed = Version(platform.python_version() if name == "python" else importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
        if installed < Version(version):
            mark = pytest.mark.skip(reason=f"{name} {installed} lacks {lacks}")
            for item in items:
                if item.nodeid.removeprefix("tests/").startswith(tuple(nodes)):
                    item.add_marker(mark)
