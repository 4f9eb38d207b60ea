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


_PRODUCT_POOLS = {
    "title": ITEMS,
    "color": COLORS,
    "brand": BRANDS,
    "price": [str(price) for price in range(10, 100)],
}


def _product(rng: random.Random) -> dict[str, str]:
    return {column: rng.choice(pool) for column, pool in _PRODUCT_POOLS.items()}


def _changed(rng: random.Random, product: dict[str, str], columns: int) -> dict[str, str]:
    """A copy with other values in ``columns`` of the columns."""
    other = dict(product)
    for column in rng.sample(list(product), columns):
        other[column] = rng.choice([value for value in _PRODUCT_POOLS[column] if value != product[column]])
    return other


def product_matching(rng: random.Random, difficulty: float = 1.0) -> Example:
    """Two product rows that are equal, or differ in one or more columns: are they the same product?"""
    product = _product(rng)
    same = rng.random() < 0.5
    other = product if same else _changed(rng, product, 1 if rng.random() < difficulty else rng.randint(2, 4))
    context = f"Product A is {_row(product)} Product B is {_row(other)}"
    return Example(context, " Are A and B the same?", "Yes" if same else "No", YES_NO)


def product_ranking(rng: random.Random, difficulty: float = 1.0) -> Example:
    """A product row, and three candidate rows with their columns in another order; one is the same."""
    product = _product(rng)
    order = rng.sample(list(product), len(product))
    candidates = [product]
    while len(candidates) < 3:
        other = _changed(rng, product, 1 if rng.random() < difficulty else rng.randint(2, 4))
        if other not in candidates:
            candidates.append(other)
    written = [_row({column: candidate[column] for column in order}) for candidate in candidates]
    return Example(_row(product), "", written[0], tuple(rng.sample(written, len(written))))


DATA_IMPUTATION = Task(
    "data_imputation", PromptLayout("What is the missing value?", shots=4, max_tokens=5), data_imputation
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

PRODUCT_RANKING = Task(
    "product_ranking",
    PromptLayout("Are Product A and Product B the same? Yes or No?", shots=1, max_tokens=5),
    product_ranking,
)
"""Prompted candidate by candidate in HELM's ranking layout; the demo model is not trained on it."""
