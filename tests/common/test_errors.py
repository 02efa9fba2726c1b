"""A message says what, got, expected and what to do."""

from __future__ import annotations

from common import errors


def test_message_holds_every_part_in_order() -> None:
    error = errors.FormatError("shard 3.", got=7, expected="8 rows", remedy="build again.")
    assert str(error) == "shard 3; got 7; expected 8 rows; build again."


def test_message_without_parts_is_plain() -> None:
    assert str(errors.SourceError("no files")) == "no files."
    assert str(errors.SourceError("x", got=None)) == "x; got None."


def test_exit_codes() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.__name__: kind.exit_code for kind in kinds}
    assert codes.pop("ConfigError") == 2
    assert set(codes.values()) == {1}
