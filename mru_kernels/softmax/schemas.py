"""The schemas of the ops of the softmax recurrence. The build also writes them into a header, schemas.h, for C++.

This module imports nothing, so that setup.py can run it by its path.

    score, value    `[B, T, H]` and `[B, T, D]`. Without `value`, `score [B, T, H + D]` has both, with `heads` = H
    decay           `[B, T, H]` or `[H]`
    bonus           `[H]`
    initial_state   `[N, D + 2 H]`: the mean, Z and z (see state.py)
    cu_seqlens      offsets `[N + 1]` of packed sequences; B is 1
    chunk           steps between two borders, the states that are saved for the backward pass
    segment         steps that are scanned in parallel with others, rounded up to a multiple of `chunk`; 0 scans each
                    sequence as a whole; -1 lets the backend choose from the sizes
    save            whether to return the borders that the backward op needs

The results of the forward op are y `[B, T, D]`, the final state `[N, D + 2 H]` and, with `save`, the borders
`[B, floor((T - 1) / chunk), D + 2 H]`: row k is the state that enters the chunk at scan position (k + 1) chunk. For
packed sequences that state is in the row floor(p / chunk) + k of a sequence whose first step has the scan position p.

The results of the backward op are the gradients of score, value, decay, bonus and initial_state, those that are given,
each in the dtype of its tensor. The gradient of a final z has no effect; that of an initial z is the gradient of Z.
"""

_CALL = (
    "Tensor score, Tensor? value, int heads, Tensor? decay, Tensor? bonus, Tensor? initial_state,"
    " Tensor? cu_seqlens, bool reverse, int chunk, int segment"
)

#: From the suffix after the op's name to its schema.
SCHEMAS = {
    "": f"({_CALL}, bool save) -> Tensor[]",
    "_backward": f"(Tensor grad_y, Tensor grad_final, {_CALL}, Tensor borders) -> Tensor[]",
}
