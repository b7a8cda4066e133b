"""The torch ops: schemas, fakes, autograd and vmap, the same for every cell and backend.

For each cell there are five ops with one overload per backend, such as `mru::bmru.cpu`:

    mru::<cell>             the scan: h `[B, T, D]`, the final state `[N, D]`, and what a backward pass needs
    mru::<cell>_backward    its gradients
    mru::<cell>_step        one step without gradients, on streams `[B, D]`
    mru::<cell>_step_slots  the same on states in slots `[slots, D]`: it updates row `state_indices[b]` in place
    mru::<cell>_map         the steps of each sequence as one map of the state, s -> factor s + offset

Arguments that they share:

    inputs      the inputs that are given, in the cell's order: streams `[B, T, D]`, inputs per channel `[D]`, then
                scalars that a schedule may change, 0-dim float64 on the CPU
    given       mask; bit i: input i is given
    packed      mask; bit i: input i is one of the k streams that lie side by side in `inputs[0] [B, T, k D]`; 0: none
    numbers     the other scalars
    resets      bool `[B, T]`, true where the state becomes `reset_state` before the step, in scan order
    reset_state `[N, D]`; None: zeros
    chunk       steps between two checkpoints, the states that are saved for the backward pass
    segment     steps of a segment that is scanned in parallel with others, rounded up to a multiple of `chunk`; 0
                scans each sequence as a whole (the CPU may cut those whose writes overwrite the state); -1 lets the
                backend choose at run time, so that a recorded graph serves all sizes. Results differ from those of a
                whole scan by rounding only (csrc/maps/cut.h)
    save        whether to return also the checkpoints and codes that the backward op needs
    wanted      mask over `inputs`; bit i: the gradient of `inputs[i]` is needed. A gradient `[D]` that is not
                needed may be zeros

If the backward op gets neither checkpoints nor codes, it scans again. Without `grad_final` it takes zeros.
`grad_checkpoints` is the gradient of the checkpoints, for callers that use them as results. The gradients come in the
order of `inputs`, without the scalars, then those of `initial_state` and `reset_state`, where these are given. The map
of a sequence with a reset has the factor 0. A cell whose steps do not compose has no map, and `segment` does not cut
its time.

With `save` the results of the scan include the checkpoints `[B floor((T - 1) / chunk), D]` and `codes`, the write
codes `[B (floor(T / 16) + (N or 1)), D]`: int32, 16 steps of 2 bits; `(N or 1)` is N with `cu_seqlens`, else 1.
`codes` has no rows if `segment` is 0 or the cell packs no codes. If `segment` is -1, both have two more rows, and
codes that a backend does not pack are zeros.

h and the gradient of a stream have the layout that `dense_like` gives the stream. States have the state dtype: float64
for float64 streams, float32 for other real ones, and that of complex streams. N is B, or the number of packed
sequences.
"""

from ..checks import state_dtype
from . import slots
from .batching import ALL_WANTED
from .entry import as_maps, chunk_of, scan, step, step_slots
from .layout import (
    CODES_PER_WORD,
    allocate,
    allocate_backward,
    allocate_codes,
    arrays,
    as_streams,
    check,
    check_numbers,
    checkpoint_rows,
    code_rows,
    dense_like,
    first_stream,
    is_time_major,
    places,
    scalars,
    sequences_of,
    spare_rows,
    split_gates,
)
from .registration import add_backend, add_cell
from .spec import CELLS, Cell, Input, Plain, affine, affine_step

__all__ = [
    "ALL_WANTED",
    "CELLS",
    "CODES_PER_WORD",
    "Cell",
    "Input",
    "Plain",
    "add_backend",
    "add_cell",
    "affine",
    "affine_step",
    "allocate",
    "allocate_backward",
    "allocate_codes",
    "arrays",
    "as_maps",
    "as_streams",
    "check",
    "check_numbers",
    "checkpoint_rows",
    "chunk_of",
    "code_rows",
    "dense_like",
    "first_stream",
    "is_time_major",
    "places",
    "scalars",
    "scan",
    "sequences_of",
    "slots",
    "spare_rows",
    "split_gates",
    "state_dtype",
    "step",
    "step_slots",
]
