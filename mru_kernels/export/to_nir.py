"""`export.nir`: first-quadrant units as graphs of NIR, the exchange format of neuromorphic hardware."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import nn
from ..nn.wrappers import unwrapped
from .stages import check_direction, check_kind, check_parameters, kind, stage_sizes

if TYPE_CHECKING:
    from nir import NIRGraph

_LACKS = {
    nn.BMRU: "threshold that depends on the input",
    nn.CMRU: "threshold that depends on the input",
    nn.AlphaCMRU: "threshold that depends on the input",
    nn.MinGRU: "decay that depends on the input",
    nn.MinLSTM: "decay that depends on the input",
    nn.LRU: "complex states",
    nn.MRUNetwork: "RMSNorm and no products of signals",
    torch.nn.ReLU: "ReLU",
}
"""What NIR lacks, by the module that needs it."""


@torch.no_grad()
def nir(module: torch.nn.Module) -> NIRGraph:
    """A module as a graph of the Neuromorphic Intermediate Representation (NIR, doi 10.1038/s41467-024-52259-9).

    A layer of a first-quadrant unit with epsilon 0 becomes these nodes, each with D channels; the state is a majority
    of three bits::

        affine   W x + b                    upper, lower    1 above high, and above low
        latch    1 where upper + lower + delay > 1.5        delay   the latch one step before
        scale    alpha latch

    A Threshold of NIR is 1 above its value, and the gates of this package are also 1 at a tie. So the thresholds are
    the next smaller float32 of low and high, and the graph has the bits of `module.step` for the same W x + b.

    Args:
        module: FirstQuadrantBMRU with epsilon 0 and any number of layers, `torch.nn.Linear`, or a
            `torch.nn.Sequential` of these, where the stage after a unit reads its output without `h_n`. In float32,
            with one direction. Every `initial_state` is 0, because states of NIR begin at 0, and every `low` is
            positive, because NIR has no ReLU.

    Returns:
        A `nir.NIRGraph`. Its delays are 1, so 1 is the time of a step.

    Raises:
        ImportError: the package nir is not installed; the extra `mru_kernels[nir]` contains it.
        TypeError, ValueError: NIR cannot express the module; the message names what is missing.

    Example::

        >>> unit = mk.FirstQuadrantBMRU(3, 8, learn_initial_state=False)
        >>> graph = mk.export.nir(unit)
        >>> list(graph.nodes)
        ['input', 'l0_affine', 'l0_upper', 'l0_lower', 'l0_latch', 'l0_delay', 'l0_scale', 'output']
    """
    try:
        ir: Any = importlib.import_module("nir")
    except ImportError as error:
        raise ImportError('nir: the package nir is not installed; pip install "mru_kernels[nir]"') from error
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a module, got {type(module).__name__}")
    inner: Any = unwrapped(module)
    stages = list(inner) if kind(inner) is torch.nn.Sequential else [inner]
    for stage in stages:
        _check(stage)
    check_parameters(inner)
    sizes = stage_sizes(stages)
    graph = _Graph(ir, sizes[0][0])
    for i, stage in enumerate(stages):
        label = f"stage{i}_" if len(stages) > 1 else ""
        if isinstance(stage, torch.nn.Linear):
            graph.linear(label + "linear", stage.weight, stage.bias)
        else:
            for k, p in enumerate(stage._parameters_by_scan()):
                _layer(graph, stage, p, f"{label}l{k}_")
    return graph.finished(sizes[-1][1])


def _check(stage: Any) -> None:
    lacks = f"; NIR has no {_LACKS[kind(stage)]}" if kind(stage) in _LACKS else ""
    check_kind("a module or stages", stage, (nn.FirstQuadrantBMRU, torch.nn.Linear), lacks)
    if isinstance(stage, torch.nn.Linear):
        return
    check_direction(stage)
    if stage.epsilon != 0.0:
        raise ValueError(f"epsilon: expected 0, as NIR has no state that a write keeps in part, got {stage.epsilon}")
    for k, p in enumerate(stage._parameters_by_scan()):
        if stage.learn_initial_state and (p["initial_state"] != 0.0).any():
            raise ValueError(f"initial_state_l{k}: expected zeros, as states of NIR begin at 0, got other values")
        if not (p["low"] > 0.0).all():
            raise ValueError(f"low_l{k}: expected positive values, as NIR has no ReLU, got {p['low'].min().item():g}")


class _Graph:
    """Nodes in a chain, each reading the one before, with further edges."""

    def __init__(self, ir: Any, inputs: int) -> None:
        self.ir = ir
        self.nodes = {"input": ir.Input(input_type={"input": np.array([inputs])})}
        self.edges: list[tuple[str, str]] = []
        self.last = "input"

    def add(self, name: str, node: Any, *sources: str) -> str:
        """Add a node that reads the sum of the sources, or the last node if there are none."""
        self.nodes[name] = node
        self.edges += [(source, name) for source in sources or (self.last,)]
        self.last = name
        return name

    def linear(self, name: str, weight: Tensor, bias: Tensor | None) -> str:
        if bias is None:
            return self.add(name, self.ir.Linear(_array(weight)))
        return self.add(name, self.ir.Affine(_array(weight), _array(bias)))

    def finished(self, outputs: int) -> NIRGraph:
        self.add("output", self.ir.Output(output_type={"output": np.array([outputs])}))
        return self.ir.NIRGraph(self.nodes, self.edges)


def _layer(graph: _Graph, unit: Any, p: dict[str, Tensor], label: str) -> None:
    ir, low = graph.ir, p["low"]
    affine = graph.linear(label + "affine", *unit._gate_weights(p))
    upper = graph.add(label + "upper", ir.Threshold(_just_below(low + p["width"].abs())), affine)
    lower = graph.add(label + "lower", ir.Threshold(_just_below(low)), affine)
    majority = _array(torch.full_like(low, 1.5))
    latch = graph.add(label + "latch", ir.Threshold(majority), upper, lower)
    delay = graph.add(label + "delay", ir.Delay(_array(torch.ones_like(low))), latch)
    graph.edges.append((delay, latch))
    graph.add(label + "scale", ir.Scale(_array(p["alpha"])), latch)


def _just_below(threshold: Tensor) -> np.ndarray:
    return _array(torch.nextafter(threshold, threshold.new_tensor(-torch.inf)))


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy().copy()
