"""Comparison with the reference, and timing: `python -m bench compare | speed | ...`."""
