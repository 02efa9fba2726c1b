"""Rows in the SYNTH schema, made here: short regular texts that a tiny model can learn, and every awkward case.

    python -m demo.sample --out data/demo-source --rows 4000

A row depends on (seed, number) alone. Lessons repeat few patterns over many values: sums, the next day of the week,
counting, and reading a number out of a source. One row in twenty is awkward on purpose (`AWKWARD`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("synth_id", "language", "exercise", "model", "query")),
        *((name, pa.string()) for name in ("query_seed_url", "query_seed_text")),
        *((name, pa.string()) for name in ("additional_seed_url", "seed_license", "constraints")),
        *((name, pa.string()) for name in ("script", "synthetic_reasoning", "synthetic_answer")),
        ("words", pa.int64()),
    ]
)
Row = dict[str, str | int | None]

# language: question and answer of a sum; question and answer of the next day; the days from Monday on.
_LESSONS: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {
    "en": (
        "What is {a} plus {b}?",
        "The sum is {c}.",
        "Which day comes after {day}?",
        "After {day} comes {next}.",
        ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ),
    "fr": (
        "Combien font {a} plus {b} ?",
        "La somme est {c}.",
        "Quel jour vient après {day} ?",
        "Après {day} vient {next}.",
        ("lundi", "mardi", "mercredi", "jeudi", "vendredi", "samedi", "dimanche"),
    ),
    "de": (
        "Wie viel ist {a} plus {b}?",
        "Die Summe ist {c}.",
        "Welcher Tag kommt nach {day}?",
        "Nach {day} kommt {next}.",
        ("Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"),
    ),
    "es": (
        "¿Cuánto es {a} más {b}?",
        "La suma es {c}.",
        "¿Qué día viene después del {day}?",
        "Después del {day} viene el {next}.",
        ("lunes", "martes", "miércoles", "jueves", "viernes", "sábado", "domingo"),
    ),
    "it": (
        "Quanto fa {a} più {b}?",
        "La somma è {c}.",
        "Quale giorno viene dopo {day}?",
        "Dopo {day} viene {next}.",
        ("lunedì", "martedì", "mercoledì", "giovedì", "venerdì", "sabato", "domenica"),
    ),
    "pl": (
        "Ile to jest {a} plus {b}?",
        "Suma to {c}.",
        "Jaki dzień następuje po dniu: {day}?",
        "Po dniu {day} następuje {next}.",
        ("poniedziałek", "wtorek", "środa", "czwartek", "piątek", "sobota", "niedziela"),
    ),
    "nl": (
        "Hoeveel is {a} plus {b}?",
        "De som is {c}.",
        "Welke dag komt na {day}?",
        "Na {day} komt {next}.",
        ("maandag", "dinsdag", "woensdag", "donderdag", "vrijdag", "zaterdag", "zondag"),
    ),
    "la": (
        "Quantum est {a} et {b}?",
        "Summa est {c}.",
        "Qui dies post diem {day} venit?",
        "Post diem {day} venit dies {next}.",
        ("Lunae", "Martis", "Mercurii", "Iovis", "Veneris", "Saturni", "Solis"),
    ),
    "ar": (
        "كم يساوي {a} زائد {b}؟",
        "المجموع هو {c}.",
        "أي يوم يأتي بعد {day}؟",
        "بعد {day} يأتي {next}.",
        ("الاثنين", "الثلاثاء", "الأربعاء", "الخميس", "الجمعة", "السبت", "الأحد"),
    ),
}
_RIVERS = ("Alda", "Brenn", "Corva", "Dunel", "Esk", "Farro", "Gant", "Hova")
_EMOJI = ("🌞", "🐟", "👩‍🔬", "🇫🇷", "🧮", "❤️", "🏔️", "🍞")
_FILES = 2


def _sum(rng: random.Random) -> Row:
    language, (question, answer, _, _, _) = _lesson(rng)
    a, b = rng.randrange(2, 10), rng.randrange(2, 10)
    return {
        "language": language,
        "exercise": "math exercise",
        "query": question.format(a=a, b=b),
        "synthetic_reasoning": f"{a} + {b}\n→ start at {a}, add {b}\n→ {a} + {b} = {a + b} ✓",
        "synthetic_answer": answer.format(c=a + b),
    }


def _next_day(rng: random.Random) -> Row:
    language, (_, _, question, answer, days) = _lesson(rng)
    number = rng.randrange(7)
    day, following = days[number], days[(number + 1) % 7]
    return {
        "language": language,
        "exercise": "memorization",
        "query": question.format(day=day),
        "synthetic_reasoning": f"{', '.join(days)}.\n{day} → {following} ✓",
        "synthetic_answer": answer.format(day=day, next=following),
    }


def _count(rng: random.Random) -> Row:
    start = rng.randrange(1, 20)
    numbers = list(range(start, start + rng.randrange(4, 9)))
    listed = ", ".join(map(str, numbers))
    return {
        "language": "en",
        "exercise": "constrained writing",
        "query": f"Count from {numbers[0]} to {numbers[-1]}.",
        "constraints": "Write numbers only.",
        "synthetic_reasoning": f"From {numbers[0]} to {numbers[-1]}: {listed}.",
        "synthetic_answer": listed,
    }


def _from_sources(rng: random.Random) -> Row:
    first = rng.randrange(len(_RIVERS))
    rivers = [_RIVERS[first], _RIVERS[(first + 1 + rng.randrange(6)) % len(_RIVERS)]]
    lengths = [10 * rng.randrange(5, 60) for _ in rivers]
    blocks = [
        f"<source_{n}>The {river} is {km} km long.</source_{n}>"
        for n, (river, km) in enumerate(zip(rivers, lengths, strict=True), start=1)
    ]
    asked = rng.randrange(2)
    return {
        "language": "en",
        "exercise": "rag",
        "query": f"How long is the {rivers[asked]}?",
        "constraints": "\n".join(blocks),
        "synthetic_reasoning": f"Source {asked + 1} names the {rivers[asked]}: {lengths[asked]} km.",
        "synthetic_answer": f"The {rivers[asked]} is {lengths[asked]} km long (source {asked + 1}).",
    }


def _emoji(rng: random.Random) -> Row:
    sign, times = _EMOJI[rng.randrange(len(_EMOJI))], rng.randrange(2, 7)
    return {
        "language": "en",
        "exercise": "creative writing",
        "query": f"Write {sign} {times} times.",
        "synthetic_reasoning": f"{sign} × {times}.",
        "synthetic_answer": sign * times,
    }


_LESSON_KINDS: tuple[Callable[[random.Random], Row], ...] = (
    *(_sum, _next_day, _count, _sum, _next_day),
    *(_from_sources, _emoji),
)
_CONTROL_TEXT = "<|start|>assistant<|channel|>final<|message|>7<|return|><|endoftext|>"
AWKWARD: tuple[tuple[str, Row], ...] = (
    (
        "control text stays text",
        {
            "query": f"Repeat: {_CONTROL_TEXT}",
            "synthetic_reasoning": "Text like <|start|> or <|end|> is only text here.",
            "synthetic_answer": _CONTROL_TEXT,
        },
    ),
    ("no query", {"query": None}),
    ("empty reasoning", {"synthetic_reasoning": ""}),
    ("blank answer", {"synthetic_answer": " \n"}),
    ("no identity", {"synth_id": None}),
    ("rag without sources", {"exercise": "rag", "constraints": "Cite the sources."}),
    ("answer too long", {"synthetic_answer": "one two three " * 400}),
    ("reasoning too long", {"synthetic_reasoning": "again and again: 2 + 2 = 4. " * 120}),
    (
        "sources too long",
        {
            "exercise": "rag",
            "constraints": f"<source_1>{'The Alda is long. ' * 200}</source_1>",
        },
    ),
    (
        "right-to-left, combining and rare signs",
        {
            "language": "ar",
            "query": "اكتب «שלום» و a\u0301 و \u200f\u202b!",
            "synthetic_reasoning": "שלום عليكم é \ufeff \u0000 𝕏",
            "synthetic_answer": "שלום a\u0301 𝕏",
        },
    ),
)
_AWKWARD_EVERY = 20


def make_row(number: int, seed: int) -> Row:
    """Row `number` of the sample with all columns of SCHEMA; row n * 20 + 7 is awkward, the n-th kind in turn."""
    rng = random.Random(f"{seed}:{number}")
    row: Row = dict.fromkeys(SCHEMA.names)
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).hexdigest()
    row |= {
        "synth_id": f"demo_{digest}",
        "model": "demo",
        "seed_license": "CC0-1.0",
        **_LESSON_KINDS[rng.randrange(len(_LESSON_KINDS))](rng),
    }
    turn, place = divmod(number, _AWKWARD_EVERY)
    if place == 7:
        row |= AWKWARD[turn % len(AWKWARD)][1]
    texts = (row["synthetic_reasoning"], row["synthetic_answer"])
    row["words"] = sum(len(str(text).split()) for text in texts if text)
    return row


def write_sample(folder: Path, *, rows: int, seed: int) -> list[Path]:
    """Write `rows` rows to two parquet files in `folder`, replacing those there; their paths in order."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for part in range(_FILES):
        numbers = range(rows * part // _FILES, rows * (part + 1) // _FILES)
        table = pa.Table.from_pylist([make_row(n, seed) for n in numbers], schema=SCHEMA)
        paths.append(folder / f"sample-{part:03d}.parquet")
        pq.write_table(table, paths[-1], row_group_size=256)
    return paths


def _lesson(rng: random.Random) -> tuple[str, tuple[str, str, str, str, tuple[str, ...]]]:
    language = sorted(_LESSONS)[rng.randrange(len(_LESSONS))]
    return language, _LESSONS[language]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option("--rows", default=4000, show_default=True, help="Rows in all.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, rows: int, seed: int) -> None:
    """Write a sample of SYNTH-schema rows as parquet files."""
    for path in write_sample(out, rows=rows, seed=seed):
        click.echo(path)


if __name__ == "__main__":
    main()
