"""The prune stage: cut, export, verify, and say in the model card what was done."""
