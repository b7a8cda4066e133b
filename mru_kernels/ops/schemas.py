"""The schemas of the ops of a cell. setup.py also writes them into a header, schemas.h, for C++.

This module imports nothing, so that setup.py can run it by its path.
"""

_INPUTS = "Tensor[] inputs, int given, int packed, float[] numbers"
_RESETS = "Tensor? cu_seqlens, Tensor? resets, Tensor? reset_state"
_CALL = f"{_INPUTS}, Tensor? initial_state, {_RESETS}, bool reverse, int chunk, int segment"
_GRADS = "Tensor grad_h, Tensor? grad_final, Tensor? grad_checkpoints"

#: From the suffix after the cell's name in the name of an op to the op's schema; see `mru_kernels.ops`.
SCHEMAS = {
    "": f"({_CALL}, bool save) -> Tensor[]",
    "_backward": f"({_GRADS}, {_CALL}, Tensor? checkpoints, Tensor? codes, int wanted) -> Tensor[]",
    "_step": f"({_INPUTS}, Tensor state) -> (Tensor, Tensor)",
    "_step_slots": f"({_INPUTS}, Tensor(a!) state, Tensor state_indices) -> Tensor",
    "_map": f"({_INPUTS}, {_RESETS}, bool reverse, int segment) -> (Tensor, Tensor)",
}
