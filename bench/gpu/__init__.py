"""Everything that needs a GPU, in at most nine minutes: `python -m bench gpu-check`, or `make gpu-check`."""
