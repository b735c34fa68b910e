"""One call: rows, forward pass, backward passes, and what is put on a model and taken off again."""
