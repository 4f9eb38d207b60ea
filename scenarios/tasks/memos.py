"""Running text for language modelling: short office memos over the shared word pools."""

from __future__ import annotations

import random

from scenarios.tasks.example import is_held_out
from scenarios.tasks.words import BRANDS, CITIES, COLORS, DEPARTMENTS, FIRST_NAMES, ITEMS, LAST_NAMES, MONTHS


def memo(rng: random.Random, sentences: int = 6) -> str:
    """One paragraph of up to nine sentences about one person, item and city."""
    words = {
        "first": rng.choice(FIRST_NAMES), "last": rng.choice(LAST_NAMES), "item": rng.choice(ITEMS),
        "city": rng.choice(CITIES), "brand": rng.choice(BRANDS), "color": rng.choice(COLORS),
        "department": rng.choice(DEPARTMENTS), "month": rng.choice(MONTHS),
        "n": rng.randint(2, 99), "price": rng.randint(10, 99),
    }  # fmt: skip
    body = [
        "The {item} from {brand} costs {price} dollars.",
        "{first} {last} works for the {department} department in {city}.",
        "In {month} the office in {city} bought {n} pieces of the {color} {item}.",
        "{first} {last} asked {brand} for a better price in {month}.",
        "The {department} department wants the {color} {item} and not another one.",
        "Every {item} is checked in {city} before it is paid.",
        "{brand} sent the bill to {first} {last} and to the {department} department.",
        "There are {n} pieces left and each costs {price} dollars.",
        "{first} {last} will answer the letter from {city} by {month}.",
    ]
    chosen = rng.sample(body, min(sentences, len(body)))
    return " ".join(chosen).format(**words)


def memo_of_side(rng: random.Random, sentences: int, *, held_out: bool) -> str:
    """The next memo on one side of the split."""
    while is_held_out(text := memo(rng, sentences)) != held_out:
        pass
    return text
