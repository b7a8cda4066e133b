"""tqdm, or a stand-in without a bar if tqdm is not installed."""

from __future__ import annotations

from collections.abc import Iterable

try:
    from tqdm import tqdm
except ImportError:

    def tqdm(iterable: Iterable, *_: object, **__: object) -> Iterable:
        """Return the iterable itself."""
        return iterable


__all__ = ["tqdm"]
