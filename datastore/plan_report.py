"""What a plan says, for people."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from datastore.plan import DevicePlan, Estimate, Plan

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def print_plan(plan: Plan, console: Console) -> None:
    """The plan as tables, then what its errors leave out."""
    console.print(
        f"plan from the pilot {plan.teacher}: {plan.pilot_documents:,} documents in {plan.pilot_rows:,} rows were read",
        style="bold",
        markup=False,
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("whole")
    for heading in ("predicted", "95 % error"):
        table.add_column(heading, justify="right")
    for name in ("documents", "tokens", "targets"):
        table.add_row(name, *_cells(getattr(plan, name)))
    table.add_row("token shards", *_cells(plan.token_bytes, bytes_=True))
    table.add_row("target shards", *_cells(plan.target_bytes, bytes_=True))
    console.print(table)
    console.print(_device_table(plan.devices, plan.gpus))
    for line in plan.not_covered:
        console.print(f"not covered by the errors: {line}", markup=False)


def _device_table(devices: tuple[DevicePlan, ...], gpus: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("device")
    headings = ("shards timed", "tokens/s a device", "device-hours", f"hours on {gpus}", "USD")
    for heading in headings:
        table.add_column(heading, justify="right")
    for device in devices:
        estimates = (device.tokens_per_second, device.device_hours, device.wall_hours)
        cells = [" ± ".join(_cells(estimate)) for estimate in estimates]
        cost = " ± ".join(_cells(device.cost)) if device.cost else "no price given"
        table.add_row(device.device, f"{device.shards:,}", *cells, cost)
    return table


def _cells(estimate: Estimate, *, bytes_: bool = False) -> tuple[str, str]:
    factor, unit = 1.0, ""
    if bytes_:
        factor, unit = next(((f, f" {u}") for f, u in _UNITS if estimate.value >= f), (1.0, " B"))
    value = estimate.value / factor
    shown = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    if estimate.error is None:
        return shown + unit, "unknown"
    error = estimate.error / factor
    return shown + unit, ("exact" if error == 0 else f"{error:,.3g}{unit}")
