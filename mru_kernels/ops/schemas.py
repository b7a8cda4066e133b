"""The schemas of the ops of a cell, stated once: setup.py writes them into a header for C++ too.

It imports nothing, so that setup.py can run it by its path.
"""

_INPUTS = "Tensor[] inputs, int given, int packed, float[] numbers"
_CALL = f"{_INPUTS}, Tensor? initial_state, Tensor? cu_seqlens, bool reverse, int chunk, int segment"

#: What follows the cell's name in the name of an op, and the schema of that op.
SCHEMAS = {
    "": f"({_CALL}, bool save) -> Tensor[]",
    "_backward": f"(Tensor grad_h, Tensor grad_final, {_CALL}, Tensor? checkpoints, Tensor? events) -> Tensor[]",
    "_step": "(Tensor[] inputs, int given, float[] numbers, Tensor state) -> (Tensor, Tensor)",
    "_map": f"({_INPUTS}, Tensor? cu_seqlens, bool reverse, int segment) -> (Tensor, Tensor)",
}
