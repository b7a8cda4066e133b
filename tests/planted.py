"""Many faults planted into one copy of C++ sources, each behind a switch, so that one build serves all of them.

The switch is the environment variable MRU_FAULT, the number of a fault. A module reads it when it is loaded. Without
it the copy does what the sources do.
"""

from __future__ import annotations

import signal

#: Signals that end a process from outside, and so do not show that a fault was noticed.
KILLED = (signal.SIGKILL, signal.SIGTERM)

#: Reads the switch. It is the first text of each planted file.
HEADER = """\
#ifndef MRU_FAULT
#define MRU_FAULT(number) (mru_fault == (number))
#include <cstdlib>
inline const int mru_fault = std::getenv("MRU_FAULT") ? std::atoi(std::getenv("MRU_FAULT")) : 0;
#endif
"""


def switched(source: str, faults: list[tuple[int, str, str]]) -> str:
    """The text of a source file with faults behind their switches, below `HEADER`.

    Args:
        source: the text.
        faults: for each fault its number, its old text, which occurs once, and its new text. If the old text ends in a
            semicolon or a brace, both are whole statements, which declare nothing that later ones use; the new text may
            be empty. Otherwise both are expressions. Faults may have the same old text. Different ones do not overlap.
    """
    places: dict[tuple[int, int], str] = {}
    for number, old, new in faults:
        assert source.count(old) == 1, f"fault {number}: expected once, found {source.count(old)} times: {old}"
        place = source.index(old), source.index(old) + len(old)
        is_statement = old.rstrip().endswith((";", "}"))
        form = "if (MRU_FAULT({})) {{ {} }} else {{ {} }}" if is_statement else "(MRU_FAULT({}) ? ({}) : ({}))"
        places[place] = form.format(number, new.strip(), places.get(place, old).strip())
    parts, done = [HEADER], 0
    for (begin, end), text in sorted(places.items()):
        assert done <= begin, f"old texts overlap: {source[begin:done]}"
        parts += source[done:begin], text
        done = end
    return "".join([*parts, source[done:]])
