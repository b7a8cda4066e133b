"""The softmax recurrence: a weighted mean of the values seen so far, for Aaren and RWKV-4."""

from .op import scan_gates, softmax_recurrence, softmax_recurrence_step, wkv, wkv_step
from .state import empty_state, join_state, split_state

__all__ = [
    "empty_state",
    "join_state",
    "scan_gates",
    "softmax_recurrence",
    "softmax_recurrence_step",
    "split_state",
    "wkv",
    "wkv_step",
]
