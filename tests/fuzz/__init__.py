"""Hostile files: small artefacts, mutated and loaded in a process of their own. `python -m tests.fuzz --help`."""
