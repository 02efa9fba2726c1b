"""torch.compile as the layers use it: one graph or an error, compiled anew for other shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_LIMIT = 64  # kinds of layers times numbers of tokens; beyond it torch would run the plain function without a word


@functools.cache
def compiled(function: Callable[..., Any]) -> Any:
    """`function` compiled for each kind of its arguments, its tensors' sizes and its numbers included."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _LIMIT)
    return torch.compile(function, fullgraph=True, dynamic=False)
