"""Find the releases that are new, and claim each for one watcher."""
