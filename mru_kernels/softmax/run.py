"""From the arguments of a public function to the backend that runs them."""

from __future__ import annotations

from torch import Tensor

from .. import backends
from . import plain


def run(arguments: tuple, chunk_size: int | None, backend: str | None) -> tuple[Tensor, Tensor]:
    """Return y and the final state. `arguments` are those of the op up to `reverse`."""
    backends.resolve(backend, arguments[0].device)
    return plain.scan(*arguments, chunk_size or backends.CHUNK)
