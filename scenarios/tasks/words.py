"""The word pools that all generators draw from.

They are a few hundred common words, so that each is one piece of a vocabulary of 1536.
"""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = _words(
    "Anna Bruno Clara David Elena Felix Greta Hugo Irene Jonas "
    "Karin Lukas Maria Nils Olga Paul Rosa Simon Tina Viktor"
)
LAST_NAMES = _words(
    "Adler Berger Costa Diaz Ekman Fischer Garcia Holm Ivanov Jensen Keller Lopez Meyer Novak Olsen "
    "Petit Rossi Silva Tanaka Weber"
)
MONTHS = _words("January February March April May June July August September October November December")
CITIES = _words(
    "Austin Boston Chicago Dallas Denver Detroit Houston Miami Oakland Orlando Phoenix Portland "
    "Reno Seattle Tampa Tucson"
)
AREA_CODES = dict(
    zip(CITIES, _words("512 617 312 214 303 313 713 305 510 407 602 503 775 206 813 520"), strict=True)
)
"""City to telephone area code: the knowledge that data imputation asks for."""

STREETS = _words("oak elm maple cedar pine lake hill park mill church river garden")
KITCHENS = _words("golden silver royal little happy green lucky grand")
PLACES = _words("spoon table garden kettle corner kitchen harbor bakery")
CUISINES = _words("french italian mexican thai indian greek korean spanish")

ITEMS = _words(
    "chair desk lamp printer laptop monitor phone camera keyboard cable folder battery tablet scanner router"
)
BRANDS = _words("Acme Borel Corvo Delta Nimbus Orion Vertex Zenith")
COLORS = _words("black white red blue green yellow orange purple")
DEPARTMENTS = _words("sales finance legal support design research")

KEYS = _words(
    "amber basil birch canyon clover coral cotton crystal dawn desert ember fern forest frost ginger "
    "glacier harvest indigo island ivory jade jasmine lagoon lemon meadow mint moss nectar ocean olive "
    "opal orchid pebble pepper prairie quartz rain saffron sand shadow sierra spruce storm summit "
    "thunder tulip valley velvet willow winter"
)

ANIMALS = _words("zebra cobra stork penguin shark lion buffalo whale seal eagle horse rat")
FRUITS = _words("apple peach watermelon banana grape kiwi pear strawberry blueberry blackberry")
"""The tokens of HELM's synthetic_reasoning."""


def all_words() -> list[str]:
    """Every pool word once, in a fixed order."""
    pools = (
        FIRST_NAMES, LAST_NAMES, MONTHS, CITIES, STREETS, KITCHENS, PLACES, CUISINES, ITEMS, BRANDS,
        COLORS, DEPARTMENTS, KEYS, ANIMALS, FRUITS,
    )  # fmt: skip
    return list(dict.fromkeys(word for pool in pools for word in pool))
