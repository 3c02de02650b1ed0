"""The user's side: the command line, the pipelines, and the runners and services that run them."""
