"""What the person holds: the command line, the DAGs, and where they run."""
