"""`define_cell`: an op from one function."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks, ops
from .. import torch_private as private
from ..cells.call import call, step
from ..ops.entry import resolve
from ..scalars import EPSILON, Scalar
from .arguments import ANY, MOST_SCALARS, check_function, check_names, checked_complex, checked_scalars
from .build import library, module
from .comparison import Comparison, compare
from .cpp import header
from .gates import Affine, Write
from .graph import Parts
from .plain import plain
from .trace import Functions, parameters, trace
from .triton_page import page


def define_cell(
    name: str,
    gate: Callable[..., Affine | Write],
    *,
    output: Callable[..., Tensor] | None = None,
    scalars: Mapping[str, float] | None = None,
    complex_inputs: Collection[str] = (),
    doc: str | None = None,
) -> DefinedCell:
    """Make a scan from one function, which states a step of the recurrence.

    The function is recorded once, with its gradient by torch's autograd. The kernels are the package's own. Those for
    the CPU are compiled at the first call, with g++ or CXX, and kept in $XDG_CACHE_HOME or ~/.cache, in the folder
    `mru_kernels`. So is the source of the Triton kernels, for CUDA and ROCm devices. These have been compiled for
    several devices and run under Triton's interpreter; they are not yet run on a GPU. There are no kernels for the
    backend "cuda". On other devices the cell runs with `backend="torch"`.

    Args:
        name: of the op, `mru::<name>`: a lower-case identifier that no other cell has.
        gate: what one step does: a function of tensors, its inputs by name, and of scalars that it names. It returns
            `Affine(factor, offset)` or `Write(write, value)`. Its operations are pointwise: torch's arithmetic,
            comparisons, `where`, exponentials and the like, `heaviside` and `sign`.
        output: h, a pointwise function of `state`, the state after the step, and of inputs and scalars that it names;
            the state if None.
        scalars: names and defaults of the arguments that are numbers. They have no gradient.
        complex_inputs: names of the inputs that are complex. If there are any, or if the gate returns a complex number
            for real inputs, the gate returns `Affine` and the state is complex. If the first input is complex, all
            streams are complex, and real inputs come as `[D]`. If it is real, all streams and the output are real, and
            complex inputs come as `[D]`.
        doc: the docstring of the result.

    Returns:
        The scan, a `DefinedCell`.

    Raises:
        TypeError, ValueError: a function does what a kernel cannot, or an argument is not as described. The message
            names the line of the function, or the argument. Nothing is compiled then.
        RuntimeError: the definition is inside a transform of torch.func.

    Example::

        >>> def leaky(input, decay):
        ...     return mk.Affine(decay, input)
        >>> scan = mk.define_cell("leaky_example", leaky)
        >>> h, state = scan(torch.randn(2, 100, 8), torch.full((8,), 0.9))
        >>> h.shape, state.shape
        (torch.Size([2, 100, 8]), torch.Size([2, 8]))
    """
    if private.transforms_active():
        raise RuntimeError("define_cell: expected a definition outside transforms of torch.func, got one inside")
    scalars = checked_scalars(scalars)
    check_function("gate", gate)
    inputs = [n for n in parameters(gate) if n not in scalars]
    if output is not None:
        check_function("output", output)
        if "state" not in parameters(output):
            raise ValueError(f"output: expected an argument `state`, got {list(parameters(output))}")
        inputs += [n for n in parameters(output) if n not in (*inputs, *scalars, "state")]
    check_names(name, inputs, parameters(gate), scalars)
    functions = Functions(gate, output, tuple(inputs), tuple(scalars), checked_complex(complex_inputs, inputs))
    made = DefinedCell(name, functions, scalars, doc)
    known = _defined.get(name)
    if known is not None and known._definition == made._definition:
        return known  # a notebook runs its cells again
    if known is not None or name in ops.CELLS:
        raise ValueError(f"name: expected a new name, got {name!r}, which another cell has")
    _defined[name] = made
    return made


class DefinedCell:
    """A scan that `define_cell` made. It is called like `mru_kernels.bmru`.

    Call:
        `h, state = scan(*inputs, initial_state=None, **options)`

        inputs: in the order of the gate's arguments, by position or name. The first is a stream `[B, T, D]`: float32,
            float64, bfloat16 or float16, or complex64 or complex128 if it is complex. The others are streams or `[D]`
            in the same dtype; with real streams, `[D]` may be float32 too. If streams are complex, real inputs are
            `[D]` only. If streams are real, complex inputs are `[D]` only, complex128 for float64 streams and complex64
            for others.
        options: `epsilon` where the gate writes, 0 by default; the scalars by name; `reverse`, `cu_seqlens`, `resets`,
            `reset_state`, `chunk_size`, `return_boundaries` and `backend`, as for `bmru`.

        The results are those of `bmru`. Complex states are complex128 for float64 and complex128 streams, and complex64
        for others.

    `step(*inputs, state=..., state_indices=None)` is one step without gradients, as `bmru_step`.

    Attributes:
        name: of the op.
        inputs, scalars: the names of the arguments.
        source: the C++ code of the cell where every input that may be a stream is one.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: the backend cannot run this call, or the C++ compiler is missing or fails.
        NotImplementedError: a second derivative is taken of a cell that writes, has a surrogate derivative, or computes
            with `detach` or `no_grad`. Other cells have derivatives of any order.

    Example::

        >>> scan = mk.define_cell("leaky_example", lambda input, decay: mk.Affine(decay, input))
        >>> scan
        <mru_kernels cell leaky_example(input, decay)>
        >>> state = torch.zeros(2, 8)
        >>> for x in torch.randn(10, 2, 8):
        ...     h, state = scan.step(x, torch.full((8,), 0.9), state=state)
    """

    def __init__(self, name: str, functions: Functions, scalars: Mapping[str, float], doc: str | None) -> None:
        self.name, self.inputs, self.scalars = name, functions.inputs, dict(scalars)
        self._functions = functions
        self._program = trace(functions)
        if self._program.writes and len(scalars) >= MOST_SCALARS:
            raise ValueError(f"scalars: expected at most {MOST_SCALARS - 1}, as epsilon is one too, got {len(scalars)}")
        self._numbers = ({"epsilon": 0.0} if self._program.writes else {}) | self.scalars
        self._cells: dict[tuple[str, ...], ops.Cell] = {}
        self.__name__ = self.__qualname__ = name
        self.__doc__ = doc or functions.gate.__doc__ or type(self).__doc__
        self.__signature__ = self._signature()
        self.source = self._header(name, tuple(self._kind(n, None) for n in self.inputs))
        self._definition = (
            self.source, self.inputs, self.scalars, functions.complex_inputs, self._program.surrogates
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        return _by_name, (self.name,)  # copies are the cell itself

    def __repr__(self) -> str:
        return f"<mru_kernels cell {self.name}({', '.join((*self.inputs, *self.scalars))})>"

    def __call__(
        self,
        *inputs: Tensor,
        initial_state: Tensor | None = None,
        reverse: bool = False,
        cu_seqlens: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
        chunk_size: int | None = backends.CHUNK,
        return_boundaries: bool = False,
        backend: str | None = None,
        **named: Any,
    ) -> tuple[Tensor, ...]:
        arrays, numbers = self._arguments(inputs, named)
        h, *others = call(
            self._cell(arrays, backend, 3), arrays, numbers, initial_state, reverse=reverse, cu_seqlens=cu_seqlens,
            resets=resets, reset_state=reset_state, chunk_size=chunk_size, return_boundaries=return_boundaries,
            backend=backend,
        )  # fmt: skip
        return self._h(h), *others

    def step(
        self, *inputs: Tensor, state: Tensor, state_indices: Tensor | None = None, **named: Any
    ) -> tuple[Tensor, Tensor]:
        """One step without gradients, for streaming inference.

        Args:
            inputs: as for a call, streams `[B, D]`.
            state, state_indices: `[B, D]`, or slots `[slots, D]` and int32 or int64 `[B]`, as for `bmru_step`.
            named: inputs by name, epsilon where the gate writes, and the scalars.

        Returns:
            h `[B, D]` and the state after the step, as `bmru_step`.

        Raises:
            TypeError, ValueError, RuntimeError: as a call, and as `bmru_step`.
        """
        arrays, numbers = self._arguments(inputs, named)
        h, after = step(self._cell(arrays, None, 2), arrays, numbers, state, state_indices)
        return self._h(h), after

    def compare(self, *inputs: Tensor, **options: Any) -> Comparison:
        """Compare the CPU kernels with the definition itself, run in float64 one step after the other.

        Args:
            inputs: the inputs to compare on, `[B, T, D]` or `[D]`, in float64 or complex128. If none are given, they
                are random normal ones: streams `[2, 100, 8]`, and `[8]` where an input cannot be a stream.
            options: as for a call.

        Returns:
            A table as a text, whose attribute `passes` says whether every error is within its limit.

        Example::

            >>> scan = mk.define_cell("leaky_compared", lambda input, decay: mk.Affine(decay.sigmoid(), input))
            >>> scan.compare().passes
            True
        """
        if not inputs:
            inputs = tuple(map(self._drawn, self.inputs))
        return compare(self, list(inputs), options)

    def _drawn(self, name: str) -> Tensor:
        """Random normal numbers for an input, a stream if it may be one."""
        dtype = torch.complex128 if name in self._functions.complex_inputs else torch.float64
        sizes = (2, 100, 8) if self._kind(name, None) == "stream" else (8,)
        return torch.randn(sizes, dtype=dtype, device="cpu")

    # ------------------------------------------------------------------------------------------ arguments

    def _signature(self) -> inspect.Signature:
        """What `help` and editors show."""
        kinds, empty = inspect.Parameter, inspect.Parameter.empty
        own = inspect.signature(DefinedCell.__call__).parameters.values()
        options = [p for p in own if p.kind is kinds.KEYWORD_ONLY]
        listed = [kinds(name, kinds.POSITIONAL_OR_KEYWORD, default=empty) for name in self.inputs]
        listed += [kinds(name, kinds.KEYWORD_ONLY, default=value) for name, value in self._numbers.items()]
        return inspect.Signature([*listed, *options])

    def _arguments(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        """The tensors and the numbers of a call, in the cell's order."""
        if len(inputs) > len(self.inputs):
            expected = f"expected at most {len(self.inputs)} positional arguments ({', '.join(self.inputs)})"
            raise TypeError(f"{self.name}: {expected}, got {len(inputs)}")
        arrays = dict(zip(self.inputs, inputs, strict=False))
        numbers = dict(self._numbers)
        for name, value in named.items():
            if name in arrays or name not in (*self.inputs, *numbers):
                known = ", ".join((*self.inputs, *numbers))
                reason = "given twice" if name in arrays else f"unknown; it takes {known}"
                raise TypeError(f"{self.name}: expected each argument once, got {name!r}, which is {reason}")
            (numbers if name in numbers else arrays)[name] = value
        missing = [name for name in self.inputs if name not in arrays]
        if missing:
            raise TypeError(f"{self.name}: expected the argument {missing[0]!r}, got none")
        ordered = [(name, arrays[name]) for name in self.inputs]
        return [self._as_streams(name, t, arrays[self.inputs[0]]) for name, t in ordered], [*numbers.values()]

    def _as_streams(self, name: str, value: Any, first: Any) -> Any:
        """An input as the op takes it. With complex streams, a real input becomes complex with imaginary part 0."""
        is_real = self._functions.complex_streams and name not in self._functions.complex_inputs
        if not (is_real and isinstance(value, Tensor) and isinstance(first, Tensor)):
            return value
        if value.is_complex():
            raise TypeError(f"{name}: expected a real dtype, got {value.dtype}")
        return value.to(first.dtype) if value.is_floating_point() and first.is_complex() else value

    def _h(self, h: Tensor) -> Tensor:
        """The op's h as the cell returns it: the real part if the output is real and streams are complex."""
        output = self._program.output
        return h.real.clone() if h.is_complex() and output is not None and not isinstance(output, Parts) else h

    # ------------------------------------------------------------------------------------------ cells

    def _cell(self, arrays: list[Any], backend: str | None, rank: int) -> ops.Cell:
        """The op's cell for inputs of these kinds, with kernels if the call needs them."""
        kinds = tuple(map(self._kind, self.inputs, arrays))
        first = arrays[0]
        checks.tensor(self.inputs[0], first, rank, "[batch, time, channels]" if rank == 3 else "[batch, channels]")
        _add(self.name, kinds)
        cell = _defined[self.name]._cells[kinds]
        _load(self.name, kinds, resolve(cell, backend, first).name)
        return cell

    def _kind(self, name: str, value: Any) -> str:
        """The kind of an input: "stream", "channel" or, if it is complex and streams are real, "complex channel"."""
        of_complex, of_streams = name in self._functions.complex_inputs, self._functions.complex_streams
        if of_complex != of_streams:
            return "complex channel" if of_complex else "channel"
        is_vector = name != self.inputs[0] and isinstance(value, Tensor) and value.dim() == 1
        return "channel" if is_vector else "stream"

    def _load(self, kinds: tuple[str, ...], backend: str) -> None:
        """Load the kernels of a backend for inputs of these kinds, unless that is done."""
        cell = self._cells[kinds]
        if (cell.name, backend) in _loaded or backend not in _BACKENDS:
            return
        if backend == "cpu":
            torch.ops.load_library(str(library(cell.name, self._header(cell.name, kinds))))
        elif backends.load_error(backend) is None:  # meta tensors need none
            from ..backends.triton.ops import add

            add(cell, module(self.name, page(self.name, self._program)).CELL)
        _loaded.add((cell.name, backend))

    def _add(self, kinds: tuple[str, ...]) -> None:
        """Add the cell for inputs of these kinds, unless that is done."""
        if kinds in self._cells:
            return
        mask = sum(1 << i for i, kind in enumerate(kinds) if kind != "stream")
        cell = ops.Cell(
            name=f"{self.name}__{mask}" if mask else self.name,  # no user's name has two underscores
            inputs=tuple(
                ops.Input(name, kind.split()[-1], complex=kind == "complex channel")
                for name, kind in zip(self.inputs, kinds, strict=True)
            ),
            scalars=(*((EPSILON,) if self._program.writes else ()), *(Scalar(name, *ANY) for name in self.scalars)),
            dtypes=checks.COMPLEX_DTYPES if self._functions.complex_streams else checks.STREAM_DTYPES,
            complex_state=self._program.is_complex and self._program.real_streams,
            plain=plain(self._functions, self._program),
        )
        self._cells[kinds] = ops.add_cell(cell, only=_BACKENDS)

    def _header(self, name: str, kinds: tuple[str, ...]) -> str:
        return header(name, self._program, kinds, dict.fromkeys(self.scalars, ANY))


_BACKENDS = ("cpu", "triton")  # those with kernels of defined cells
_defined: dict[str, DefinedCell] = {}
_loaded: set[tuple[str, str]] = set()
_lock = threading.Lock()


@private.assume_constant_result
def _add(name: str, kinds: tuple[str, ...]) -> bool:
    with _lock:
        _defined[name]._add(kinds)
    return True


@private.assume_constant_result
def _load(name: str, kinds: tuple[str, ...], backend: str) -> bool:
    with _lock:
        _defined[name]._load(kinds, backend)
    return True


def _by_name(name: str) -> DefinedCell:
    """The cell of a pickle."""
    if name not in _defined:
        raise RuntimeError(f"pickle: expected the cell {name!r} to be defined first, and it is not")
    return _defined[name]
