"""Back-office text to fields: information extraction and form processing.

Each function draws one example from a `random.Random`; difficulty adds sentences and noise.
"""

from __future__ import annotations

import random

from scenarios.tasks.example import Example, PromptLayout, Task
from scenarios.tasks.words import BRANDS, CITIES, DEPARTMENTS, FIRST_NAMES, ITEMS, LAST_NAMES, MONTHS, STREETS


def _person(rng: random.Random) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"


def information_extraction(rng: random.Random, difficulty: float = 1.0) -> Example:
    """A short notice about an order and the name of one field: the answer is its value."""
    fields = {
        "customer": _person(rng),
        "item": rng.choice(ITEMS),
        "amount": str(rng.randint(2, 99)),
        "date": _date(rng),
        "city": rng.choice(CITIES),
        "street": rng.choice(STREETS),
        "supplier": rng.choice(BRANDS),
    }
    first = rng.choice(
        [
            "{customer} ordered {amount} pieces of the {item} on {date}.",
            "On {date} we sold {amount} pieces of the {item} to {customer}.",
            "An order of {amount} pieces of the {item} came in from {customer} on {date}.",
        ]
    )
    second = rng.choice(
        [
            "Send it to {street} street in {city}.",
            "The goods go to {city}, {street} street.",
            "It is to be shipped to {street} street, {city}.",
        ]
    )
    third = rng.choice(["The supplier is {supplier}.", "{supplier} will supply it."])
    sentences = [first]
    if rng.random() < 0.4 + 0.6 * difficulty:
        sentences.append(second)
    if rng.random() < difficulty:
        sentences.append(third)
    rng.shuffle(sentences)
    template = " ".join(sentences)
    asked = [name for name in fields if "{" + name + "}" in template]
    rng.shuffle(asked)
    pairs = [(f"\nField: {name}", fields[name]) for name in asked]
    return Example(template.format(**fields), *pairs[0], more=tuple(pairs[1:]))


def form_processing(rng: random.Random, difficulty: float = 1.0) -> Example:
    """A request in free words: the answer is the record ``name | date | item | amount``."""
    fields = {
        "name": _person(rng),
        "date": _date(rng),
        "item": rng.choice(ITEMS),
        "amount": str(rng.randint(2, 99)),
        "department": rng.choice(DEPARTMENTS),
    }
    templates = [
        "Please send {amount} of the {item} to {name} by {date}.",
        "{name} needs {amount} of the {item} on {date}.",
        "By {date} we want {amount} of the {item} for {name}.",
        "The {item} is for {name}, {amount} pieces, due on {date}.",
    ]
    text = rng.choice(templates)
    if rng.random() < difficulty:
        text = rng.choice(["The {department} desk writes: " + text, text + " Charge it to {department}."])
    record = "{name} | {date} | {item} | {amount}"
    return Example(text.format(**fields), "", record.format(**fields))


INFORMATION_EXTRACTION = Task(
    "information_extraction",
    PromptLayout(
        "Extract the value of the field from the passage.",
        input_prefix="Passage: ", output_prefix="Value: ", shots=3, max_tokens=12,
    ),
    information_extraction,
)  # fmt: skip

FORM_PROCESSING = Task(
    "form_processing",
    PromptLayout(
        "Fill in the form from the request: name, date, item, amount.",
        input_prefix="Request: ", output_prefix="Form: ", shots=3, max_tokens=24,
    ),
    form_processing,
)  # fmt: skip
