# SPDX-License-Identifier: Apache-2.0
"""The chat share of the calibration text: dialogues, written for it by hand or by a template with a computed answer."""

import csv
import datetime
import io
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from random import Random

Message = dict[str, str]

WRITTEN = Path(__file__).with_name("calibration_dialogues.jsonl")
"""A question and its answer a line."""
NAMES, CITIES, THINGS, FRUIT = (
    text.split()
    for text in (
        "Ada Ben Chloé Dmitri Elif Farah Goran Hana Ivan Jun Kofi Lucía Mei Nils Olga Priya Quentin Rosa Samir Tove",
        "Lisbon Osaka Nairobi Quito Tallinn Hanoi Montréal Cairo Porto Busan Kraków Lima Bergen Pune Izmir",
        "apples notebooks tickets bolts candles lamps teacups stamps bicycles maps brushes seeds bottles chairs",
        "apple banana cherry date elderberry fig grape honeydew kiwi lemon mango nectarine orange papaya quince",
    )
)

OPENINGS = ("", "Hi! ", "Quick question: ", "Please help me. ", "Hello, ", "One more: ")
THANKS = ("Thanks!", "Great, thank you.", "Perfect.", "That helps, thanks.")
WELCOME = ("You are welcome!", "Glad to help.", "Any time. Is there anything else?", "My pleasure.")


def _shopping(r: Random) -> tuple[str, str]:
    name, thing, n, price, paid = (
        r.choice(NAMES),
        r.choice(THINGS),
        r.randint(3, 19),
        r.randint(2, 25),
        r.randint(500, 900),
    )
    return (
        f"{name} buys {n} {thing} at {price} euros each and pays with {paid} euros. How much change does {name} get?",
        f"The {thing} cost {n} × {price} = {n * price} euros. "
        f"The change is {paid} − {n * price} = **{paid - n * price} euros**.",
    )


def _journey(r: Random) -> tuple[str, str]:
    a, b = r.sample(CITIES, 2)
    speed, hours, rest = r.choice((60, 72, 80, 96, 120)), r.randint(2, 9), r.choice((15, 20, 30, 45))
    minutes = hours * 60 + rest
    return (
        f"A train from {a} to {b} runs {speed * hours} km at {speed} km/h and stops for {rest} minutes on the way. "
        "How long does it take?",
        f"Moving time: {speed * hours} / {speed} = {hours} h. "
        f"With the stop it is {minutes // 60} h {minutes % 60} min, or {minutes} minutes.",
    )


def _sorting(r: Random) -> tuple[str, str]:
    words = r.sample(FRUIT, r.randint(5, 9))
    return (
        f"Sort these words by the alphabet: {', '.join(words)}",
        "\n".join(f"{i}. {w}" for i, w in enumerate(sorted(words), 1)),
    )


def _statistics(r: Random) -> tuple[str, str]:
    values = [r.randint(1, 99) for _ in range(r.choice((5, 7, 9)))]
    return (
        f"Give me the minimum, the median and the mean of {values}.",
        f"Sorted: {sorted(values)}\n\n- minimum: {min(values)}\n- median: {statistics.median(values)}\n"
        f"- mean: {statistics.mean(values):.2f}",
    )


def _people(r: Random) -> list[dict[str, object]]:
    names = r.sample(NAMES, r.randint(3, 6))
    return [{"name": n, "city": r.choice(CITIES), "age": r.randint(18, 80), "active": r.random() < 0.5} for n in names]


def _to_json(r: Random) -> tuple[str, str]:
    people, text = _people(r), io.StringIO()
    writer = csv.DictWriter(text, people[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(people)
    return (
        f"Turn this CSV into JSON:\n\n{text.getvalue()}",
        "```json\n" + json.dumps(people, indent=2, ensure_ascii=False) + "\n```",
    )


def _to_table(r: Random) -> tuple[str, str]:
    people = _people(r)
    lines = ["| name | city | age |", "|---|---|---:|"] + [
        f"| {p['name']} | {p['city']} | {p['age']} |" for p in people
    ]
    oldest = max(people, key=lambda p: int(str(p["age"])))
    return (
        f"Make a Markdown table of this, and say who is the oldest: {json.dumps(people, ensure_ascii=False)}",
        "\n".join(lines) + f"\n\nThe oldest is {oldest['name']}, at {oldest['age']}.",
    )


def _dates(r: Random) -> tuple[str, str]:
    begin, days = datetime.date(2001, 1, 1) + datetime.timedelta(r.randint(0, 12000)), r.randint(10, 400)
    end = begin + datetime.timedelta(days)
    return (
        f"Which weekday is it {days} days after {begin:%d %B %Y}?",
        f"{begin:%d %B %Y} is a {begin:%A}. {days} days are {days // 7} weeks and {days % 7} days, "
        f"so it is **{end:%A}**, {end:%d %B %Y}.",
    )


def _units(r: Random) -> tuple[str, str]:
    celsius, km, kg = r.randint(-20, 45), r.randint(2, 400), r.randint(2, 120)
    return (
        f"Convert: {celsius} °C to °F, {km} km to miles, {kg} kg to pounds.",
        f"| from | to |\n|---|---|\n| {celsius} °C | {celsius * 9 / 5 + 32:.1f} °F |\n"
        f"| {km} km | {km * 0.621371:.1f} miles |\n"
        f"| {kg} kg | {kg * 2.204623:.1f} lb |",
    )


def _equation(r: Random) -> tuple[str, str]:
    a, x, b = r.randint(2, 12), r.randint(-15, 15), r.randint(1, 40)
    return (
        f"Solve {a}x + {b} = {a * x + b} step by step.",
        f"Subtract {b} on both sides: {a}x = {a * x}.\nDivide by {a}: **x = {x}**.\n\n"
        f"Check: {a}·({x}) + {b} = {a * x + b}.",
    )


FUNCTIONS = [
    (
        "is_palindrome",
        "says whether a string reads the same backwards, ignoring case and spaces",
        "letters = [c.lower() for c in X if not c.isspace()]\n    return letters == letters[::-1]",
        '"Never odd or even"',
        True,
    ),
    (
        "gcd",
        "returns the greatest common divisor by Euclid's algorithm",
        "while X[1]:\n        X = X[1], X[0] % X[1]\n    return X[0]",
        "(84, 36)",
        12,
    ),
    (
        "count_words",
        "counts how often each word occurs",
        "counts = {}\n    for word in X.split():\n        counts[word] = counts.get(word, 0) + 1\n    return counts",
        '"a b a"',
        {"a": 2, "b": 1},
    ),
    ("flatten", "flattens a list of lists", "return [item for row in X for item in row]", "[[1, 2], [3]]", [1, 2, 3]),
    (
        "fibonacci",
        "returns the first n Fibonacci numbers",
        "found = [0, 1]\n    while len(found) < X:\n        found.append(found[-1] + found[-2])\n    return found[:X]",
        "8",
        [0, 1, 1, 2, 3, 5, 8, 13],
    ),
    (
        "chunks",
        "cuts a list into pieces of three",
        "return [X[i : i + 3] for i in range(0, len(X), 3)]",
        "[1, 2, 3, 4]",
        [[1, 2, 3], [4]],
    ),
]
"""Name, what it does, body with X for the argument, a call's argument and its result."""


def _code(r: Random) -> tuple[str, str]:
    name, what, body, call, value = r.choice(FUNCTIONS)
    argument = r.choice(("value", "data", "x", "given"))
    return (
        f"Write a Python function `{name}` that {what}.",
        f"```python\ndef {name}({argument}):\n    {body.replace('X', argument)}\n```\n\n"
        f"For example, `{name}({call})` gives `{value}`.",
    )


def _roman(r: Random) -> tuple[str, str]:
    number = rest = r.randint(40, 3000)
    signs = {
        1000: "M",
        900: "CM",
        500: "D",
        400: "CD",
        100: "C",
        90: "XC",
        50: "L",
        40: "XL",
        10: "X",
        9: "IX",
        5: "V",
        4: "IV",
        1: "I",
    }
    parts = []
    for value, sign in signs.items():
        while rest >= value:
            parts.append((value, sign))
            rest -= value
    return (
        f"How is {number} written in Roman numerals?",
        f"{number} = {' + '.join(str(v) for v, _ in parts)}, hence **{''.join(s for _, s in parts)}**.",
    )


def _binary(r: Random) -> tuple[str, str]:
    n = r.randint(20, 4000)
    return (
        f"Write {n} in binary, octal and hexadecimal.",
        f"- binary: `{n:b}`\n- octal: `{n:o}`\n- hexadecimal: `{n:X}`",
    )


def _extract(r: Random) -> tuple[str, str]:
    name, city, n, thing, day = r.choice(NAMES), r.choice(CITIES), r.randint(2, 40), r.choice(THINGS), r.randint(1, 28)
    fields = {"customer": name, "city": city, "item": thing, "quantity": n, "date": f"2024-03-{day:02d}"}
    return (
        "Extract customer, city, item, quantity and date as JSON, nothing else: "
        f'"Hello, this is {name} from {city}. I ordered {n} {thing} on {day} March 2024 and they have not arrived."',
        json.dumps(fields, ensure_ascii=False),
    )


def _schedule(r: Random) -> tuple[str, str]:
    tasks, clock, lines = (
        r.sample(("mail", "lunch", "design review", "running", "reading", "groceries", "tests", "piano"), 5),
        540,
        [],
    )
    lengths = {task: r.choice((30, 45, 60, 90)) for task in tasks}
    for task, length in lengths.items():
        begin, end = (f"{minutes // 60:02d}:{minutes % 60:02d}" for minutes in (clock, clock + length))
        lines.append(f"| {begin} | {end} | {task} |")
        clock += length
    asked = ", ".join(f"{task} ({length} min)" for task, length in lengths.items())
    return (
        f"Plan my day from 9:00 in this order: {asked}.",
        "\n".join(["| from | to | what |", "|---|---|---|", *lines]),
    )


def _percent(r: Random) -> tuple[str, str]:
    price, off = r.randint(20, 900), r.choice((5, 10, 12, 15, 20, 25, 30, 40))
    return (
        f"A coat costs {price} dollars and is reduced by {off} %. What is the new price, and what was saved?",
        f"Saved: {price} × {off / 100:g} = {price * off / 100:.2f} dollars. "
        f"New price: {price * (100 - off) / 100:.2f} dollars.",
    )


def _divisors(r: Random) -> tuple[str, str]:
    n = r.randint(30, 700)
    found = [d for d in range(1, n + 1) if n % d == 0]
    return (
        f"List all divisors of {n}. Is it prime?",
        f"{', '.join(map(str, found))}. "
        + ("Yes, it is prime." if len(found) == 2 else f"It has {len(found)} divisors, so it is not prime."),
    )


TEMPLATES: list[Callable[[Random], tuple[str, str]]] = [
    _shopping, _journey, _sorting, _statistics, _to_json, _to_table, _dates, _units, _equation, _code, _roman, _binary,
    _extract, _schedule, _percent, _divisors,
]  # fmt: skip


def dialogues(random: Random, size: int) -> list[list[Message]]:
    """Dialogues of three to eight questions, each with its answer, of about `size` bytes of UTF-8 in all."""
    written = [json.loads(line) for line in WRITTEN.read_text(encoding="utf-8").splitlines()]
    random.shuffle(written)
    found: list[list[Message]] = []
    left = size
    while left > 0:
        turns = [tuple(written.pop())] if written else []
        turns += [template(random) for template in random.sample(TEMPLATES, random.randint(3, 7))]
        random.shuffle(turns)
        texts = [text for turn in turns for text in turn]
        texts[0] = random.choice(OPENINGS) + texts[0]
        if random.random() < 0.3:
            texts += [random.choice(THANKS), random.choice(WELCOME)]
        found.append([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)])
        left -= sum(len(text.encode()) for text in texts)
    return found
