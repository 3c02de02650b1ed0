"""The code that runs inside the containers: the stages, and the libraries in `lib`. Imports nothing of `pipeline`."""
