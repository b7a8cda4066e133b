"""tqdm, or nothing in its place where it is not installed."""

from __future__ import annotations

from collections.abc import Iterable

try:
    from tqdm import tqdm
except ImportError:

    def tqdm(iterable: Iterable, *_: object, **__: object) -> Iterable:
        """The iterable itself: no bar."""
        return iterable


__all__ = ["tqdm"]
