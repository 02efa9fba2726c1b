"""A checkpoint read by PyTorch alone, without Megatron and without our code."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp


def newest(checkpoints: Path) -> Path:
    """The checkpoint that `latest` names."""
    return checkpoints / (checkpoints / "latest").read_text().strip()


def stored_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, buffers, optimizer."""
    saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(of.size, dtype=of.properties.dtype)
        for name, of in saved.items()
        if hasattr(of, "size")
    }
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


def assert_same_tensors(one: Path, other: Path) -> None:
    """Two checkpoints hold the same names and, bit by bit, the same numbers."""
    expected, got = stored_tensors(one), stored_tensors(other)
    assert expected.keys() == got.keys() and len(expected) > 100
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
