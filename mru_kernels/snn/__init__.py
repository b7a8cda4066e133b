"""The neurons of snnTorch (arXiv 2211.10725) on whole sequences: one call instead of a loop over time.

A neuron takes a current `[T, B, ...]` and returns what a loop over `x[t]` collects, the spikes and membranes of all
steps. Its arguments, its `state_dict` and its results are those of snnTorch 1.0, bit for bit in float32 and float64.
A module keeps no state: a call takes it as an argument, or starts from zeros.

Example::

    >>> lif = mk.snn.Leaky(beta=0.9)
    >>> spk, mem = lif(torch.randn(100, 8, 64))
    >>> spk, mem = lif(torch.randn(20, 8, 64), mem[-1])  # continues
    >>> spk.shape, mem.shape
    (torch.Size([20, 8, 64]), torch.Size([20, 8, 64]))
"""

from .conversion import from_snntorch
from .currents import Alpha, Synaptic
from .leaky import Lapicque, Leaky

__all__ = ["Alpha", "Lapicque", "Leaky", "Synaptic", "from_snntorch"]
