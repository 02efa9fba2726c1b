"""What the kernels of a step do, by their names, and a bar chart of where the time goes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# The first pattern that is found in a kernel's name names its class.
_CLASSES = (
    (
        "attention, queries, keys, values",
        r"attention|_(forward|backward|query|key|fold)_kernel|qkv",
    ),
    ("lm_head loss, but two products", r"_exp_|_slot|_mark|_settle|_scaled"),
    ("experts", r"_(up|down|inner|rows|outer|sum)_kernel"),
    ("routing", r"^(choose|gradient)_kernel|_(histogram|rank|tiles)_kernel|[Ss]can"),
    ("sums of gradients", r"^_add_kernel|CUDAFunctor_add"),
    ("optimizer", r"multi_tensor|adam|^(gram|polar|rows|apply)_kernel|foreach"),
    ("matrix products", r"nvjet|cutlass|gemm|cublas|splitK"),
    ("reductions", r"reduce_kernel"),
    ("between products", r"^triton_|_(norm|relu)_kernel"),
    ("copies and fills", r"[Mm]em(cpy|set)|copy_kernel|[Ff]ill"),
)


def kernel_class(name: str) -> str:
    """The class of a kernel."""
    return next((kind for kind, pattern in _CLASSES if re.search(pattern, name)), "other")


def by_class(kernels: dict[str, dict[str, float]]) -> dict[str, float]:
    """Milliseconds of each class, longest first, from names with `ms`."""
    sums: dict[str, float] = {}
    for name, of in kernels.items():
        kind = kernel_class(name)
        sums[kind] = sums.get(kind, 0.0) + of["ms"]
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def profile_of(work: Any) -> Any:
    """torch's profile of what runs on the device in `work`."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return profile


def profiled(work: Any) -> dict[str, dict[str, float]]:
    """Milliseconds and calls of every kernel that `work` runs, longest first."""
    rows = [
        (event.key, event.self_device_time_total / 1e3, event.count)
        for event in profile_of(work).key_averages()
        if event.self_device_time_total
    ]
    rows.sort(key=lambda row: -row[1])
    return {name: {"ms": round(ms, 3), "calls": calls} for name, ms, calls in rows}


def draw_bar(bars: dict[str, dict[str, float]], path: Path, title: str) -> None:
    """One horizontal bar of stacked parts (ms) for each name; written as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(bars), 1, figsize=(11, 1.9 * len(bars)), squeeze=False)
    for axis, (name, parts) in zip(axes[:, 0], bars.items(), strict=True):
        left, total = 0.0, sum(parts.values())
        for number, (part, ms) in enumerate(parts.items()):
            axis.barh(0, ms, left=left, color=pyplot.cm.tab20(number % 20), label=part)
            if ms > 0.09 * total:
                axis.text(
                    left + ms / 2, 0, f"{part}\n{ms:.3g}", ha="center", va="center", fontsize=7
                )
            left += ms
        axis.set_yticks([])
        axis.set_title(f"{name}: {total:.4g} ms", fontsize=9, loc="left")
        axis.legend(
            fontsize=6, ncol=5, loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False
        )
        axis.margins(x=0)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
