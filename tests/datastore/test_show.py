"""Inspect prints any row, whatever bytes are in it, and the numbers that were stored."""

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from common.tokenizer import VOCAB_SIZE, encoding
from datastore.cli import main
from datastore.reader import Dataset, TargetStore
from datastore.show import print_row, row_text, shown_positions, token_text
from datastore.target import row_target

SEQ_LEN = 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory, handmade) -> Path:
    folder = tmp_path_factory.mktemp("show")
    answers = ["", "literal <|start|>, \x1b[31mred, [bold]markup[/bold], 日本語 \x9b"]
    rows = [handmade.pack([handmade.document(n, answers[n])], SEQ_LEN) for n in range(2)]
    handmade.write_dataset(folder, {"train": rows_of(rows), "valid": []}, seq_len=SEQ_LEN)
    handmade.write_targets(folder, unscored=(1,))
    return folder


def rows_of(rows) -> list:
    return [[row] for row in rows]


def shown(folder: Path, *arguments: str) -> str:
    result = CliRunner().invoke(main, ["inspect", str(folder), *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_text_of_a_row_is_there_in_order(folder) -> None:
    text = shown(folder)
    parts = [
        "train row 0 of 2: train/shard-00000.arrow row 0",
        "document 0, prompt, positions 0:",
        "<|start|>user<|message|>What is 0 + 1? 🙂<|end|>",
        "document 0, reasoning",
        "<|start|>assistant<|channel|>analysis<|message|>0 + 1 is 1.<|end|>",
        "document 0, final",
        "It is 1. 日本語 שלום<|return|>",
        "<|endoftext|>",
        "targets of tiny",
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_ordinary_text_cannot_pose_as_control_or_command_the_terminal(folder) -> None:
    text = shown(folder, "--row", "1")
    assert "literal <\\|start|>, ␛[31mred, [bold]markup[/bold], 日本語 \ufffd<|return|>" in text
    assert "\x1b" not in text
    assert "Targets of tiny: not scored." in text


def test_colours_mark_spans_on_a_terminal(folder) -> None:
    plain = printed(folder)
    coloured = printed(folder, force_terminal=True, color_system="standard")
    assert "\x1b" not in plain
    assert "\x1b[36m0 + 1 is 1." in coloured


def printed(folder: Path, **terminal) -> str:
    console = Console(file=io.StringIO(), width=140, **terminal)
    where = {"split": "train", "index": 0, "teacher": None, "positions": None}
    print_row(folder, **where, console=console)
    return console.file.getvalue()


def test_the_table_holds_the_stored_numbers(folder) -> None:
    dataset = Dataset.open(folder)
    row = dataset.row("train", 0)
    target = row_target(TargetStore.open(dataset, "tiny").documents("train", 0, row), row)
    lines = shown(folder, "--positions", "0:320").splitlines()
    table = {int(line.split()[0]): line for line in lines if line.split()[:1] and is_entry(line)}
    assert list(table) == target.positions_P.tolist()
    for entry, position in enumerate(target.positions_P.tolist()):
        line = table[position]
        assert token_text(int(row.tokens_T[position + 1])) in line
        logprobs = [float(word) for word in line.split() if word[0] == "-"]
        assert logprobs[0] == pytest.approx(target.realised_logprob_P[entry], abs=2e-3)
        top = int(target.ids_E[target.offsets_P1[entry]])
        assert token_text(top) in line


def is_entry(line: str) -> bool:
    return line.split()[0].isdecimal() and (" reasoning " in line or " final " in line)


def test_documents_without_targets_are_named(tmp_path, handmade) -> None:
    row = handmade.pack([handmade.document(n) for n in (0, 1)], SEQ_LEN)
    handmade.write_dataset(tmp_path, {"train": [[row]], "valid": []}, seq_len=SEQ_LEN)

    def second(row) -> list:
        return [None, handmade.row_documents(row)[1]]

    handmade.write_targets(tmp_path, documents_of=second)
    text = shown(tmp_path, "--positions", "0:320")
    assert "Not scored: document 0 of 2." in text
    table = [int(line.split()[0]) for line in text.splitlines() if line.split() and is_entry(line)]
    expected = row_target(second(row), row).positions_P.tolist()
    assert table == expected and min(table) > row.doc_ends_D[0]


def test_positions_are_chosen_by_place_or_by_span(folder, handmade) -> None:
    row = Dataset.open(folder).row("train", 0)
    target = row_target(handmade.row_documents(row), row)
    first, last = int(target.positions_P[3]), int(target.positions_P[6])
    assert shown_positions(row, target, slice(first, last)).tolist() == [3, 4, 5]
    assert shown_positions(row, target, slice(None, None)).size == len(target.positions_P)
    assert shown_positions(row, target, slice(0, 1)).size == 0
    labels = row.spans_T[target.positions_P[shown_positions(row, target, None, limit=4)] + 1]
    assert labels.tolist() == [1] * 4 + [2] * 4


def test_every_token_has_a_text(folder) -> None:
    """Quoted text gives back the token's bytes, whole UTF-8 or not; a control id gives its name."""
    for token in [*range(0, VOCAB_SIZE, 97), 199_997, 199_998, 201_087]:
        text = token_text(token)
        assert text.isprintable()
        if token >= 199_998:
            assert encoding().encode_single_token(text) == token
        else:
            value = eval(text)
            content = value if isinstance(value, bytes) else value.encode()
            assert content == encoding().decode_single_token_bytes(token)


def test_half_a_character_prints(handmade) -> None:
    half = next(t for t in range(200_000) if encoding().decode_single_token_bytes(t) == b"\xe2\x96")
    row = handmade.pack([handmade.document(0)], SEQ_LEN)
    tokens = row.tokens_T.copy()
    tokens[row.doc_ends_D[0] - 3] = half
    text = "".join(str(part) for part in row_text(dataclasses.replace(row, tokens_T=tokens)))
    assert "\ufffd<|return|>" in text
    assert token_text(half) == r"b'\xe2\x96'"


def test_any_row_prints(handmade) -> None:
    """Random ids and spans, tags that do not exist among them."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        row = handmade.random_row(rng, 200)
        spans = rng.integers(0, 256, 200).astype(np.uint8)
        console = Console(file=io.StringIO(), width=100)
        for part in row_text(dataclasses.replace(row, spans_T=spans)):
            console.print(part)
        assert "unknown span" in console.file.getvalue()


@pytest.mark.parametrize("locale", ["C", "tr_TR.UTF-8"])
def test_a_pipe_under_any_locale_prints_everything(folder, locale) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from datastore.cli import main; main()", "inspect", str(folder)],
        capture_output=True,
        env={**os.environ, "LC_ALL": locale},
    )
    assert done.returncode == 0, done.stderr
    assert "日本語 שלום" in done.stdout.decode()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--row", "2"], "expected 0..1"),
        (["--split", "valid"], "row 0 of split valid"),
        (["--positions", "7"], "is not a:b"),
        (["--positions", "a:b"], "is not a:b"),
    ],
)
def test_what_is_not_there_is_a_usage_error(folder, arguments, message) -> None:
    result = CliRunner().invoke(main, ["inspect", str(folder), *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_an_absent_teacher_is_named(folder) -> None:
    result = CliRunner().invoke(main, ["inspect", str(folder), "--teacher", "other"])
    assert result.exit_code == 1
    assert "targets/other is no target store" in result.output
