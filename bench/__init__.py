"""Comparison with the reference, and timing: `python -m bench compare | speed | ...`, from the repository."""
