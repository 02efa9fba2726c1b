"""The audit against plain loops over the targets of a made-up teacher that likes some documents and hates others."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from common.errors import AlignmentError
from common.tokenizer import encoding
from datastore.audit import LOW_LOGPROB, POSITION_STARTS, WINDOW, audit_targets
from datastore.audit_report import AuditReport, verdict
from datastore.cli import main
from datastore.reader import Dataset
from datastore.types import SPLITS, DocTarget, PackedRow

DocumentsOf = Callable[[PackedRow], list[DocTarget | None]]
SEQ_LEN, DOCUMENTS = 768, 60
WORST = 7
LANGUAGES, EXERCISES = ("en", "fr", ""), ("memorization", "mcq")


@pytest.fixture(scope="module")
def documents_of(handmade) -> DocumentsOf:
    """Every seventh document is left unscored."""

    def documents(row: PackedRow) -> list[DocTarget | None]:
        return [
            handmade.varied_target(row.tokens_T[where], row.spans_T[where])
            if doc_id[0] % 7
            else None
            for doc_id, where in zip(row.doc_ids, row.documents(), strict=True)
        ]

    return documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, handmade, documents_of: DocumentsOf) -> Path:
    folder = tmp_path_factory.mktemp("audit") / "dataset"
    rng = np.random.default_rng(0)
    documents = []
    for number in range(DOCUMENTS):
        answer = " ".join(str(n) for n in rng.integers(0, 1000, rng.integers(2, 60)))
        labels = {
            "language": LANGUAGES[number % 3],
            "exercise": EXERCISES[number % 5 == 0],
        }
        documents.append(dataclasses.replace(handmade.document(number, answer), **labels))
    rows = [handmade.pack(documents[i : i + 3], SEQ_LEN) for i in range(0, DOCUMENTS, 3)]
    shards = {"train": [rows[:6], rows[6:13], rows[13:17]], "valid": [rows[17:]]}
    handmade.write_dataset(folder, shards, seq_len=SEQ_LEN)
    handmade.write_targets(
        folder, unscored=(4, 9), documents_of=documents_of, budget_of=documents_of
    )
    return folder


def audit(folder: Path, **changes) -> AuditReport:
    arguments = {"splits": SPLITS, "max_rows": None, "worst": WORST, "workers": 1}
    return audit_targets(folder, "tiny", **{**arguments, **changes})


@pytest.fixture(scope="module")
def report(folder: Path) -> AuditReport:
    return audit(folder)


@pytest.fixture(scope="module")
def truth(folder: Path, documents_of: DocumentsOf) -> list[dict]:
    """One record a scored document, one entry a target, by plain loops over what the teacher said."""
    dataset, found = Dataset.open(folder), []
    for split in SPLITS:
        for index in range(dataset.num_rows(split)):
            if index in (4, 9):
                continue
            row = dataset.row(split, index)
            for number, document in enumerate(documents_of(row)):
                if document is not None:
                    place = {"split": split, "row": index, "document": number}
                    found.append(place | record(row, number, document))
    return found


def record(row: PackedRow, number: int, document: DocTarget) -> dict:
    where, target = row.documents()[number], document.target
    targets = []
    for entry, position in enumerate(target.positions_P.tolist()):
        token = int(row.tokens_T[where][position + 1])
        start = int(target.offsets_P1[entry])
        head = target.ids_E[start : start + int(target.num_head_P[entry])].tolist()
        targets.append(
            {
                "token": token,
                "position": position,
                "span": int(row.spans_T[where][position + 1]),
                "logprob": float(target.realised_logprob_P[entry]),
                "entropy": float(target.entropy_P[entry]),
                "outside": token not in head,
            }
        )
    labels = {"language": row.languages[number], "exercise": row.exercises[number]}
    return {**labels, "doc_id": row.doc_ids[number].hex(), "targets": targets}


def chosen(truth: list[dict], keep) -> list[list[dict]]:
    """The targets of each document that `keep(document, target)` takes; documents with none fall out."""
    kept = [[t for t in document["targets"] if keep(document, t)] for document in truth]
    return [targets for targets in kept if targets]


def assert_group(group, kept: list[list[dict]], entropy: bool = True) -> None:
    flat = [target for targets in kept for target in targets]
    logprobs = [target["logprob"] for target in flat]
    assert (group.documents, group.targets) == (len(kept), len(flat))
    assert group.logprob == pytest.approx(np.mean(logprobs), rel=1e-3)
    assert group.perplexity == pytest.approx(math.exp(-np.mean(logprobs)), rel=3e-3)
    assert group.outside_head == pytest.approx(np.mean([t["outside"] for t in flat]))
    # A logprob within fp16's rounding of ln 0.01 may count on either side.
    slack = 5 / len(flat)
    below = [np.mean([lp < math.log(level) for lp in logprobs]) for level in (0.01, 0.001)]
    assert group.below_1_percent == pytest.approx(below[0], abs=slack)
    assert group.below_01_percent == pytest.approx(below[1], abs=slack)
    if entropy:
        entropies = [target["entropy"] for target in flat]
        assert group.entropy == pytest.approx(np.mean(entropies), rel=1e-4)
        excess = -np.mean(logprobs) - np.mean(entropies)
        assert group.excess == pytest.approx(excess, abs=3e-3)
    else:
        assert group.entropy is group.excess is group.excess_error is None


def test_classes_and_labels_are_those_of_plain_loops(
    report: AuditReport, truth: list[dict]
) -> None:
    assert report.documents == len(truth)
    assert report.rows == len({(d["split"], d["row"]) for d in truth})
    keeps = {
        "all": lambda d, t: True,
        "reasoning": lambda d, t: t["span"] == 1,
        "final": lambda d, t: t["span"] == 2,
        "control": lambda d, t: t["token"] >= 199_998,
    }
    assert list(report.classes) == list(keeps)
    for name, keep in keeps.items():
        assert_group(report.classes[name], chosen(truth, keep))
    assert set(report.languages) == set(LANGUAGES)
    for name, group in report.languages.items():
        assert_group(group, chosen(truth, lambda d, t, name=name: d["language"] == name))
    assert set(report.exercises) == set(EXERCISES)
    for name, group in report.exercises.items():
        assert_group(group, chosen(truth, lambda d, t, name=name: d["exercise"] == name))
    sizes = [group.targets for group in report.languages.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_positions_are_those_of_plain_loops(report: AuditReport, truth: list[dict]) -> None:
    ends = [*POSITION_STARTS[1:], 1 << 30]
    titles = [
        f"{s}..{e - 1}" if e < 1 << 30 else f"{s}.."
        for s, e in zip(POSITION_STARTS, ends, strict=True)
    ]
    for title, start, end in zip(titles, POSITION_STARTS, ends, strict=True):
        kept = chosen(truth, lambda d, t, a=start, b=end: a <= t["position"] + 1 < b)
        assert (title in report.positions) == bool(kept)
        if kept:
            assert_group(report.positions[title], kept, entropy=False)
    assert len(report.positions) >= 2
    for tenth, group in enumerate(report.tenths.values()):
        kept = [
            [t for n, t in enumerate(d["targets"]) if int(10 * n / len(d["targets"])) == tenth]
            for d in truth
        ]
        assert_group(group, [targets for targets in kept if targets], entropy=False)


def test_standard_errors_are_those_of_a_jackknife(report: AuditReport, truth: list[dict]) -> None:
    """Leaving out one document at a time, which shares nothing with the linearised formula."""
    sums = np.array(
        [
            [len(d["targets"]), *(sum(t[k] for t in d["targets"]) for k in ("logprob", "entropy"))]
            for d in truth
        ]
    )
    n = len(sums)
    without = sums.sum(axis=0) - sums
    for values, error in (
        (without[:, 1] / without[:, 0], report.classes["all"].logprob_error),
        (-(without[:, 1] + without[:, 2]) / without[:, 0], report.classes["all"].excess_error),
    ):
        jackknife = math.sqrt((n - 1) / n * ((values - values.mean()) ** 2).sum())
        assert error == pytest.approx(jackknife, rel=0.1)


def test_low_windows_and_worst_documents(report: AuditReport, truth: list[dict]) -> None:
    windows, low, judged = 0, 0, []
    for document in truth:
        logprobs = [t["logprob"] for t in document["targets"]]
        whole = [logprobs[i : i + WINDOW] for i in range(0, len(logprobs) - WINDOW + 1, WINDOW)]
        means = [sum(window) / WINDOW for window in whole]
        windows += len(means)
        low += sum(mean < LOW_LOGPROB for mean in means)
        if means:
            judged.append((sum(logprobs) / len(logprobs), means.index(min(means)), document))
    assert (report.windows.windows, report.windows.low) == (windows, low)
    assert 0 < low < windows
    worst = sorted(judged, key=lambda item: item[0])[:WORST]
    assert [w.doc_id for w in report.worst] == [document["doc_id"] for _, _, document in worst]
    for found, (mean, window, document) in zip(report.worst, worst, strict=True):
        assert found.logprob == pytest.approx(mean, rel=1e-3)
        assert (found.row, found.document) == (document["row"], document["document"])
        tokens = [t["token"] for t in document["targets"]][window * WINDOW : (window + 1) * WINDOW]
        assert found.text == encoding().decode(tokens)


def test_workers_give_the_same_report(folder: Path, report: AuditReport) -> None:
    assert audit(folder, workers=2) == report


def test_some_rows_stand_for_all(folder: Path, report: AuditReport) -> None:
    part = audit(folder, max_rows=9)
    assert part.rows == 9
    assert part.documents < report.documents
    distance = abs(part.classes["all"].logprob - report.classes["all"].logprob)
    assert distance < 4 * part.classes["all"].logprob_error
    valid = audit(folder, splits=("valid",))
    assert {document.split for document in valid.worst} == {"valid"}


def test_nothing_scored_is_an_error(folder: Path, handmade) -> None:
    handmade.write_targets(folder, slug="empty", documents_of=lambda row: [None] * len(row.doc_ids))
    with pytest.raises(AlignmentError, match="score no row"):
        audit_targets(folder, "empty", splits=SPLITS, max_rows=None, worst=3, workers=1)


@pytest.mark.parametrize(
    ("excess", "words"),
    [
        (1.3, "pulls away from the teacher"),
        (0.3, "agree on most tokens"),
        (-0.05, "reads as the teacher's own"),
        (-0.4, "more predictable than the teacher's own words"),
    ],
)
def test_the_verdict_follows_the_excess(report: AuditReport, excess: float, words: str) -> None:
    every = report.classes["all"].model_copy(update={"excess": excess, "excess_error": 0.01})
    assert words in verdict(every)
    assert f"excess {excess:+.2f}" in verdict(every)
    assert "too little" in verdict(every.model_copy(update={"excess_error": None}))


def test_the_command_prints_tables_and_writes_json(
    folder: Path, report: AuditReport, tmp_path: Path
) -> None:
    file = tmp_path / "audit.json"
    arguments = ["audit", str(folder), "--teacher", "tiny", "--worst", str(WORST)]
    result = CliRunner().invoke(main, [*arguments, "--json", str(file), "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert AuditReport.model_validate(json.loads(file.read_bytes())) == report
    for text in ("fr", "mcq", "(none)", report.worst[0].doc_id[:12], f"{report.documents:,}"):
        assert text in result.output
    missing = CliRunner().invoke(main, ["audit", str(folder), "--teacher", "nobody"])
    assert missing.exit_code == 1
