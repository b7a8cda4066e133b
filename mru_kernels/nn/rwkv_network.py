"""The language model RWKV-4 (arXiv 2305.13048), and the names of its public checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import backends
from .arguments import check_sizes, check_state, constructor
from .rwkv import Mix, RWKV4ChannelMix, RWKV4TimeMix, orthogonal, stream_dtype
from .wrappers import fx_node


class RWKV4Block(torch.nn.Module):
    """Both mixings of a layer of `RWKV4`, each on a residual branch after a LayerNorm."""

    def __init__(
        self, width: int, layer: int, layers: int, hidden_size: int | None, chunk_size: Any, where: Any
    ) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = torch.nn.LayerNorm(width, **where)
        self.ln1 = torch.nn.LayerNorm(width, **where)
        self.ln2 = torch.nn.LayerNorm(width, **where)
        self.att = RWKV4TimeMix(width, layer, layers, chunk_size=chunk_size, **where)
        self.ffn = RWKV4ChannelMix(width, layer, layers, hidden_size=hidden_size, **where)

    def forward(
        self, x: Tensor, state: Sequence[Tensor] | None, _parallel: Any = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.att.layer == 0:
            x = self.ln0(x)
        y, after = self.att(self.ln1(x), None if state is None else state[:2], _parallel=_parallel)
        x = x + y
        y, last = self.ffn(self.ln2(x), None if state is None else state[2:], _parallel=_parallel)
        return x + y, (*after, *last)


class RWKV4(torch.nn.Module):
    """The language model RWKV-4 (arXiv 2305.13048): an embedding, layers of both mixings, a norm and a head.

    Its parameters have the names of the authors' code, with `time_mix_*` in shape `[width]`. `from_checkpoint` makes
    one from the parameters of a public checkpoint.

    Initially the embedding is uniform in +-1e-4 and the head orthogonal with the gain
    sqrt(max(1, tokens / width)) / 2. The mixings describe their own initial values.

    Args:
        tokens: number of tokens.
        width: number of channels.
        layers: number of layers.
        hidden_size: hidden channels of the channel mixing; 4 `width` if None.
        chunk_size: as for `mru_kernels.wkv`.
        device, dtype: of the parameters; float32, float64, bfloat16 or float16.

    Call:
        `output, state = model(input, state=None)`

        input: int64 `[B, T]`, T >= 1.
        output: scores `[B, T, tokens]`.
        state: three tensors for each layer: those of `RWKV4TimeMix`, then that of `RWKV4ChannelMix`. A call with the
            returned state continues the sequences. None begins new ones.

        `step(input, state=None)` runs one step, for streaming.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example::

        >>> model = mk.RWKV4(50, 8, layers=2)
        >>> output, state = model(torch.randint(50, (2, 10)))
        >>> output.shape, len(state)
        (torch.Size([2, 10, 50]), 6)
        >>> output, state = model.step(torch.randint(50, (2,)), state)
        >>> output.shape
        torch.Size([2, 50])
    """

    @constructor
    def __init__(
        self,
        tokens: int,
        width: int,
        layers: int,
        *,
        hidden_size: int | None = None,
        chunk_size: int | None = backends.CHUNK,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(tokens=tokens, width=width, layers=layers)
        where: dict[str, Any] = {"device": device, "dtype": stream_dtype(dtype)}
        self.emb = torch.nn.Embedding(tokens, width, **where)
        self.blocks = torch.nn.ModuleList(
            RWKV4Block(width, layer, layers, hidden_size, chunk_size, where) for layer in range(layers)
        )
        self.ln_out = torch.nn.LayerNorm(width, **where)
        self.head = torch.nn.Linear(width, tokens, bias=False, **where)
        with torch.no_grad():
            self.emb.weight.uniform_(-1e-4, 1e-4)
            orthogonal(self.head.weight, 0.5)

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Tensor], **options: Any) -> RWKV4:
        """The model of a public RWKV-4 checkpoint, with its sizes and parameters.

        Args:
            checkpoint: the parameters by name, as `torch.load(file, map_location="cpu", weights_only=True)` returns
                them. The names are those of BlinkDL's files (`blocks.0.att.time_decay`) or of Hugging Face's
                (`rwkv.blocks.0.attention.time_decay`).
            options: `chunk_size`, `device` or `dtype`; the dtype is that of the checkpoint's embedding by default.

        Raises:
            TypeError, ValueError: a parameter is missing, unknown or of another shape; the message names it.

        Example::

            >>> checkpoint = mk.RWKV4(50, 8, layers=2).state_dict()
            >>> mk.RWKV4.from_checkpoint(checkpoint).head
            Linear(in_features=8, out_features=50, bias=False)
        """
        parameters = rwkv4_parameters(checkpoint)
        tokens, width = parameters["emb.weight"].shape
        numbers = (re.match(r"blocks\.(\d+)\.", name) for name in parameters)
        layers = 1 + max(int(number[1]) for number in numbers if number)
        hidden = parameters["blocks.0.ffn.key.weight"].shape[0]
        options = {"dtype": parameters["emb.weight"].dtype} | options
        model = cls(tokens, width, layers, hidden_size=hidden, **options)
        expected = model.state_dict()
        for name in expected.keys() | parameters.keys():
            if name not in parameters:
                raise ValueError(f"checkpoint: expected a parameter {name}, got none")
            if name not in expected:
                raise ValueError(f"checkpoint: expected no parameter {name}, got one")
            if parameters[name].shape != expected[name].shape:
                shapes = f"{list(expected[name].shape)} for {name}, got {list(parameters[name].shape)}"
                raise ValueError(f"checkpoint: expected shape {shapes}")
        model.load_state_dict(parameters)
        return model

    def extra_repr(self) -> str:
        return f"{self.emb.num_embeddings}, {self.emb.embedding_dim}, layers={len(self.blocks)}"

    @property
    def num_states(self) -> int:
        """Number of tensors of the state."""
        return 3 * len(self.blocks)

    def _starts(self) -> list[Tensor | None]:
        mixings = [m for m in self.modules() if isinstance(m, Mix)]  # in the order of the state
        return [start for mixing in mixings for start in mixing._starts()]

    def forward(
        self, input: Tensor, state: Sequence[Tensor] | None = None, *, _parallel: Any = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the model; the class describes the arguments, results and errors."""
        if isinstance(input, Proxy):
            return fx_node(self, input, state, None)
        self._check(input, 2)
        if state is not None:
            check_state(state, self.num_states)
        x = self.emb(input)
        after: tuple[Tensor, ...] = ()
        for block in self.blocks:
            first = len(after)
            x, states = block(x, None if state is None else state[first : first + 3], _parallel)
            after += states
        return self.head(self.ln_out(x)), after

    @torch.no_grad()
    def step(self, input: Tensor, state: Sequence[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step of `forward`, for streaming inference, without gradients.

        Args:
            input: int64 `[B]`.
            state: as for `forward`.

        Returns:
            The scores `[B, tokens]` and the state after the step.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        self._check(input, 1)
        output, after = self(input.unsqueeze(1), state)
        return output.squeeze(1), after

    def _check(self, input: Tensor, rank: int) -> None:
        if not isinstance(input, Tensor) or input.dtype != torch.int64:
            came = f"a {input.dtype} tensor" if isinstance(input, Tensor) else type(input).__name__
            raise TypeError(f"input: expected token numbers, an int64 tensor, got {came}")
        if input.dim() != rank or 0 in input.shape[1:]:
            expected = "[batch, time >= 1]" if rank == 2 else "[batch]"
            raise ValueError(f"input: expected shape {expected}, got {list(input.shape)}")


# ---------------------------------------------------------------------------------------------------- checkpoints


_RENAMED: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^rwkv\.", ""),
    (r"^embeddings\.", "emb."),
    (r"\.pre_ln\.", ".ln0."),
    (r"\.attention\.", ".att."),
    (r"\.feed_forward\.", ".ffn."),
    (r"\.time_mix_(k|v|r)(ey|alue|eceptance)$", lambda m: f".time_mix_{m[1]}"),
)  # from Hugging Face's names to the authors'


def rwkv4_parameters(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a public RWKV-4 checkpoint by the names of `RWKV4`, with `time_*` in shape `[width]`."""
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"checkpoint: expected a mapping from names to tensors, got {type(checkpoint).__name__}")
    parameters = {}
    for name, value in checkpoint.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"checkpoint: expected a tensor for {name}, got {type(value).__name__}")
        for pattern, new in _RENAMED:
            name = re.sub(pattern, new, name)
        parameters[name] = value.flatten() if ".time_" in name else value
    for name in ("emb.weight", "blocks.0.ffn.key.weight"):
        if name not in parameters:
            raise ValueError(f"checkpoint: expected a parameter {name}, got none")
        if parameters[name].dim() != 2:
            raise ValueError(f"checkpoint: expected a matrix for {name}, got shape {list(parameters[name].shape)}")
    return parameters
