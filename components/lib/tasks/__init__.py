"""Zero-shot tasks: task files that travel with their data, and tasks that lm-eval loads."""
