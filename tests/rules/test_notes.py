"""What is known of the tensors of a forward pass."""

import torch

from crp.rules.notes import FIRST, Notes


def test_a_change_that_nobody_saw_is_told_where_a_tensor_has_the_id_of_one_that_is_gone():
    notes, told = Notes(), []
    gone, tensor = (torch.ones(3, requires_grad=True).clone() for _ in range(2))
    notes.add(gone.add_(1), FIRST)
    notes.add_written(gone, FIRST)
    notes._writes[id(tensor)] = notes._writes.pop(id(gone))  # (Python may give the id of one that is gone to another)
    del gone
    notes.add(tensor, FIRST)
    tensor.mul_(2)  # (as often as the other one)
    notes.read([tensor], [], lambda _, is_changed: told.append(is_changed))
    assert told == [True]


def test_a_change_that_was_seen_is_known():
    notes, inputs = Notes(), []
    tensor = torch.ones(3, requires_grad=True).clone()
    notes.add(tensor, FIRST)
    notes.add_written(tensor.mul_(2), FIRST)
    assert notes.read([tensor], inputs, None) & FIRST
    assert inputs == [tensor]
