"""The scoring server as a process: its command line, its end; and the real teacher behind it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from click.testing import CliRunner

from common.config import PROJECT_ROOT
from datastore.cli import main as vpmoe_data
from datastore.scoring_protocol import (
    CONTENT_TYPE,
    ScoreDocument,
    decode_response,
    encode_request,
)
from tests.datastore.line_engine import FATAL
from tests.datastore.waiting import wait_until

TOKEN = "a long secret"


def document(length: int, first: int = 1000) -> ScoreDocument:
    tokens_T = np.arange(first, first + length, dtype=np.int32)
    spans_T = (np.arange(length) >= length // 2).astype(np.uint8)
    return ScoreDocument(tokens_T=tokens_T, spans_T=spans_T)


class Process:
    """The line engine served by a process of its own, as `vpmoe-data serve` serves a teacher."""

    def __init__(self, folder: Path, seconds: float) -> None:
        (folder / "token").write_text(f"{TOKEN}\n")
        command = [sys.executable, "-m", "tests.datastore.line_engine", str(folder / "token")]
        self.popen = subprocess.Popen(
            [*command, str(seconds)],
            cwd=PROJECT_ROOT,
            env={**os.environ, "VPMOE_TOKEN": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{int(self.popen.stdout.readline())}",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=60,
        )
        wait_until(self.is_ready)

    def post(self, content: bytes) -> httpx.Response:
        return self.http.post("/v1/score", content=content, headers={"Content-Type": CONTENT_TYPE})

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/ready").status_code == 200
        return False


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    running = Process(tmp_path, seconds=0.5)
    yield running
    running.http.close()
    running.popen.kill()
    running.popen.communicate()


def in_background(work: Callable[[], httpx.Response]) -> tuple[threading.Thread, list]:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(work()))
    thread.start()
    return thread, answers


def test_sigterm_finishes_what_is_in_flight_and_exits_with_0(process: Process) -> None:
    content = encode_request([document(60), document(60, first=300)])
    thread, answers = in_background(lambda: process.post(content))
    wait_until(lambda: "vpmoe_serve_tokens_in_flight 120.0" in process.http.get("/metrics").text)
    process.popen.send_signal(signal.SIGTERM)
    wait_until(lambda: process.http.get("/ready").json() == {"state": "draining"})
    assert process.post(content).status_code == 503
    thread.join(30)
    assert [len(t.positions_P) for t in decode_response(answers[0].content).targets] == [30, 30]
    assert process.popen.wait(30) == 0


def test_a_dead_engine_answers_503_with_its_cause_and_exits_with_1(process: Process) -> None:
    content = encode_request([document(60), document(60, first=FATAL)])
    answer = process.post(content)
    assert answer.status_code == 503 and "device lost" in answer.json()["message"]
    _, errors = process.popen.communicate(timeout=30)
    assert process.popen.returncode == 1
    assert errors.splitlines()[-1] == "error: the engine failed: device lost."


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "reachable from other machines, and there is no token"),
        (["--host", "::"], "reachable from other machines"),
        (["--host", "example.org"], "reachable from other machines"),
        (["--token-file", "absent"], "cannot read the token file absent"),
        (["--token-file", os.devnull], "is empty"),
        (["serve.max_document=3"], "did you mean 'max_documents'"),
        (["engine.max_num_seq=3"], "did you mean"),
        (["model=absent"], "is no local model folder"),
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(
        vpmoe_data, ["serve", "--teacher", "tiny", *arguments], env={"VPMOE_TOKEN": ""}
    )
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--token-file", "token"], "two tokens"), (["--no-token"], "--no-token with a token")],
)
def test_tokens_that_contradict_each_other(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(
        vpmoe_data, ["serve", "--teacher", "tiny", *arguments], env={"VPMOE_TOKEN": TOKEN}
    )
    assert result.exit_code == 2 and said in result.output


def test_an_address_in_use_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ["--port", str(taken.getsockname()[1]), f"model={tmp_path}"]
        result = CliRunner().invoke(vpmoe_data, ["serve", "--teacher", "tiny", *arguments])
    assert result.exit_code == 2 and "Address already in use" in result.output
