"""The scan over a cell in Triton: one source for every cell, dtype and split of time.

    B batch, T time, D channels     streams [B, T, D], unit stride on D, any strides on B and T
    sequence                        one run of the recurrence: a batch row, or a span of the packed time axis; N of them
    step                            0 is the first step scanned of a sequence, which in time is the last if reversed
    segment                         steps that one program scans while others scan the same sequence
    chunk                           steps between two checkpoints, the states saved for the backward pass
    word                            the write codes of 16 steps, 2 bits each from the low bits up
    tile                            steps whose rows are loaded before the first is used

A program is one warp, and scans a block of channels, 16 bytes of a stream in each lane, with the states in registers.
No lane needs the values of another. A complex channel counts as two, its real and its imaginary part, in one lane.

If sequences are scanned whole, that is all. If time is split, `summarize` reduces each segment to an affine map, `fold`
and `carry` compose these maps, and `forward` scans each segment from the state that enters it. Where steps fit write
codes, `summarize` packs them, and nothing reads the streams again. Then `check` decides whether the whole is scanned
again without a split (csrc/maps/cut.h). The backward pass does the same from the right. Where writes overwrite the
state, its summary of a segment ends once all channels have written.

Resets are one bit a step. A program loads the mask of a word, or of a chunk, before it needs it, and makes an integer
of it. Each step then selects between the state and the reset state. Calls without resets are compiled without them.

The summaries issue all loads of a tile before its first use. In half precision, whose rows take half the registers,
`summarize` and `backward` issue those of the next tile too. Offsets are 64-bit. Every sum and product is taken in a
fixed order.
"""

from .adjoint import summarize_adjoint
from .backward import backward
from .compose import carry, check, fold
from .forward import forward
from .summarize import summarize

__all__ = ["backward", "carry", "check", "fold", "forward", "summarize", "summarize_adjoint"]
