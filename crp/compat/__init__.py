"""What zennit-crp has and ours does in another way: accumulators, folders of results, hooks."""
