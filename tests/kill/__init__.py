"""Commands killed at any moment and given again: `python -m tests.kill --help`."""
