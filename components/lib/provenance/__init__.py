"""Provenance of a checkpoint: the OpenSSF signature over its files, and the bill of materials that names what it was made of."""
