"""The export that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.export.exported import Exported, exported


@pytest.fixture(scope="session")
def full_export(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A trained and exported student with every feature."""
    return exported(tmp_path_factory.mktemp("full_export"), small_dataset)
