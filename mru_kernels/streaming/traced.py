"""Streams with traces: the gradient of earlier chunks, in constant memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..nn import Aaren, MRUBase, MRUBlock
from ..nn.block import SEVERAL_STATES
from ..nn.traces import Recorder, Traces, check_all, restarted
from ..nn.wrappers import unwrapped
from . import Stream


class TracedStream(Stream):
    """A `Stream` that carries the traces of its module; `stream` describes `gradient="traces"`."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        _check_eager(module)
        _check_units(module)
        self._traces: Traces | None = None
        self._units = {name: m for name, m in unwrapped(module).named_modules() if isinstance(m, MRUBase)}

    @property
    def traces(self) -> dict[str, Tensor] | None:
        return self._traces

    @traces.setter
    def traces(self, value: dict[str, Tensor] | None) -> None:
        if value is not None:
            check_all(value, self._units)
        self._traces = value

    @torch.compiler.disable(reason="traces need gradients within the forward pass")
    def __call__(self, chunk: Tensor, resets: Tensor | None = None) -> Tensor:
        """As for `Stream`. The call also advances the traces, even under `no_grad`."""
        _check_eager(self.module)
        if isinstance(chunk, PackedSequence):
            raise TypeError('input: expected a tensor with gradient="traces", got a PackedSequence')
        if torch.is_inference_mode_enabled():
            raise RuntimeError('stream: gradient="traces" needs gradients, which inference mode excludes; use no_grad')
        if self.state is None and self._traces is not None:
            raise ValueError("traces: expected None without a state, got traces; set both, or call reset")
        state, before = self.state, self._traces
        resets, within = self._split(chunk, resets)
        if resets is not None:
            with torch.no_grad():  # the initial states get their gradients from the traces
                state = self._restarted(resets)
            before = None if before is None else restarted(before, resets)
        with Recorder(self._units, before, begins=state is None) as recorder:
            output, state = self.module(chunk, state, **within)
        self._traces = recorder.result()
        self._keep(state)
        return output

    def reset(self) -> None:
        super().reset()
        self._traces = None


def _check_eager(module: torch.nn.Module) -> None:
    """Raise if torch.compile compiles `module` or a part of it: traces need gradients within the forward pass."""
    for part in module.modules():
        if hasattr(part, "_orig_mod") or part._compiled_call_impl is not None:
            raise ValueError(
                'module: expected an eager one with gradient="traces", got one that torch.compile compiles'
            )


def _check_units(module: torch.nn.Module) -> None:
    """Raise unless every unit in the blocks of `module` can have traces."""
    for part in module.modules():
        if isinstance(part, (Aaren, *SEVERAL_STATES)):
            kind = type(part).__name__
            raise TypeError(f'module: expected no {kind} with gradient="traces", got one, which has no traces')
    for block in module.modules():
        for unit in block.units if isinstance(block, MRUBlock) else ():
            if not isinstance(unit, MRUBase):
                raise TypeError(
                    'module: expected units of this package with gradient="traces", got a'
                    f" {type(unit).__name__}, which has no traces"
                )
