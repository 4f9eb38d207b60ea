"""Data wrangling on table rows: imputation, error detection, matching.

The three tasks that the FlexGen paper takes from Narayan et al., "Can Foundation Models Wrangle Your
Data?" (2022), here over made-up restaurants and products; rows are written as HELM writes them
(``column: value.``).
"""

from __future__ import annotations

import random

from scenarios.tasks.example import Example, PromptLayout, Task
from scenarios.tasks.words import (
    AREA_CODES,
    BRANDS,
    CITIES,
    COLORS,
    CUISINES,
    ITEMS,
    KITCHENS,
    PLACES,
    STREETS,
)

YES_NO = ("Yes", "No")


def _row(values: dict[str, str]) -> str:
    return " ".join(f"{column}: {value}." for column, value in values.items())


def _restaurant(rng: random.Random, city: str) -> dict[str, str]:
    return {
        "name": f"{rng.choice(KITCHENS)} {rng.choice(PLACES)}",
        "address": f"{rng.randint(10, 99)} {rng.choice(STREETS)} street",
        "phone": f"{AREA_CODES[city]} {rng.randint(100, 999)}",
        "type": rng.choice(CUISINES),
    }


def data_imputation(rng: random.Random, difficulty: float = 1.0) -> Example:
    """A restaurant without its city, which the telephone's area code gives away (closed book)."""
    city = rng.choice(CITIES)
    row = _restaurant(rng, city)
    if rng.random() > difficulty:
        row.pop("type")
    others = rng.sample([name for name in CITIES if name != city], 3)
    choices = [city, *others]
    rng.shuffle(choices)
    return Example(_row(row), " city?", city, tuple(choices))


def misspell(rng: random.Random, word: str) -> str:
    """Replace one letter by ``x``, as the errors of the Hospital benchmark are made."""
    at = rng.choice([i for i, letter in enumerate(word) if letter.isalpha() and letter != "x"])
    return word[:at] + "x" + word[at + 1 :]


def error_detection(rng: random.Random, difficulty: float = 1.0) -> Example:
    """A row and the name of one column: is that column's value misspelt?

    Where the answer is No, another column is misspelt in half of the rows at full difficulty.
    """
    row = _restaurant(rng, rng.choice(CITIES)) | {"city": rng.choice(CITIES)}
    row.pop("phone")
    columns = ["name", "address", "type", "city"]
    asked = rng.choice(columns)
    wrong = rng.random() < 0.5
    spoilt = asked
    if not wrong:
        spoilt = rng.choice([c for c in columns if c != asked]) if rng.random() < difficulty / 2 else ""
    if spoilt:
        row[spoilt] = misspell(rng, row[spoilt])
    return Example(_row(row), f" Is there an error in {asked}?", "Yes" if wrong else "No", YES_NO)


def product_matching(rng: random.Random, difficulty: float = 1.0) -> Example:
    """Two product rows that are equal, or differ in one or more columns: are they the same product?"""
    product = {
        "title": rng.choice(ITEMS),
        "color": rng.choice(COLORS),
        "brand": rng.choice(BRANDS),
        "price": str(rng.randint(10, 99)),
    }
    same = rng.random() < 0.5
    other = dict(product)
    if not same:
        differing = 1 if rng.random() < difficulty else rng.randint(2, 4)
        pools = {"title": ITEMS, "color": COLORS, "brand": BRANDS, "price": [str(n) for n in range(10, 100)]}
        for column in rng.sample(list(product), differing):
            other[column] = rng.choice([value for value in pools[column] if value != product[column]])
    context = f"Product A is {_row(product)} Product B is {_row(other)}"
    return Example(context, " Are A and B the same?", "Yes" if same else "No", YES_NO)


DATA_IMPUTATION = Task(
    "data_imputation",
    PromptLayout("What is the missing value?", shots=4, max_tokens=5),
    data_imputation,
)

ERROR_DETECTION = Task(
    "error_detection",
    PromptLayout("Is there a spelling error in the named field? Yes or No?", shots=4, max_tokens=5),
    error_detection,
)

PRODUCT_MATCHING = Task(
    "product_matching",
    PromptLayout("Are Product A and Product B the same? Yes or No?", shots=4, max_tokens=5),
    product_matching,
)
