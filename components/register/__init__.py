"""The register stage: the verdict, the report, and the registered version."""
