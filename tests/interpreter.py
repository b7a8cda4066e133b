"""Triton's interpreter made fast and exact enough for the suite: `pytest -p tests.interpreter --backend triton`.

Three of its habits are changed. A device function called by a kernel patches the modules that it sees for the
interpreter, at every call, which takes more than half of the time: here a launch does so once a module. It truncates
where it converts float32 to bfloat16: here it rounds to nearest, as devices do. It copies a
launch's tensors to the CPU and back: here they are there already.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import numpy as np
import triton.language as tl
from hypothesis import settings
from triton.runtime import interpreter

settings.register_profile("interpreted", max_examples=2, derandomize=True, deadline=None)

_patched: set[int] = set()
_launch = interpreter.GridExecutor.__call__
_convert = interpreter._convert_float


def _launch_afresh(self, *arguments, **keywords):
    _patched.clear()
    return _launch(self, *arguments, **keywords)


def _call_device_function(self, *arguments, **keywords):
    module = id(self.fn.__globals__)
    if module not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(module)
    return self.rewrite()(*arguments, **keywords)


def _convert_float(data, source, target, rounding):
    if source == tl.bfloat16 and target == tl.float32:
        return data.astype(np.uint32) << 16
    if source == tl.float32 and target == tl.bfloat16:
        bits = data.view(np.uint32)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # ties to even
        return np.where(np.isnan(data), 0x7FC0, nearest).astype(np.uint16)
    return _convert(data, source, target, rounding)


interpreter.GridExecutor._init_args_hst = lambda self, arguments, keywords: (arguments, keywords)
interpreter.GridExecutor._restore_args_dev = lambda self, *arguments: None
interpreter.GridExecutor.__call__ = _launch_afresh
interpreter.InterpretedFunction.__call__ = _call_device_function
interpreter._convert_float = _convert_float
