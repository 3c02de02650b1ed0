"""The needs of a run, before it runs: the memory of each stage, the disk, and the bytes that are moved."""
