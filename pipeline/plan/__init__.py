"""What a run will need, before it runs: the memory of each stage, the disk, and the bytes that are moved."""
