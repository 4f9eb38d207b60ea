"""The generators are deterministic, split without overlap, and follow HELM's own distributions."""

import itertools
import random

import pytest

from scenarios.tasks import HELM_TASKS, OWN_TASKS, Task, examples, is_held_out
from scenarios.tasks.memos import memo
from scenarios.tasks.words import AREA_CODES, all_words

ALL = [*OWN_TASKS.values(), *HELM_TASKS.values()]


def first(task: Task, count: int, **arguments) -> list:
    return list(itertools.islice(examples(task, **arguments), count))


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_the_same_seed_gives_the_same_examples(task: Task) -> None:
    assert first(task, 20, seed=3, held_out=True) == first(task, 20, seed=3, held_out=True)
    assert first(task, 20, seed=3, held_out=True) != first(task, 20, seed=4, held_out=True)


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_the_two_sides_never_meet_whatever_the_seed(task: Task) -> None:
    held_out = {e.context for seed in range(3) for e in first(task, 100, seed=seed, held_out=True)}
    kept = {e.context for seed in range(3) for e in first(task, 100, seed=seed, held_out=False)}
    assert all(map(is_held_out, held_out))
    assert not any(map(is_held_out, kept))
    assert not held_out & kept


@pytest.mark.parametrize("task", OWN_TASKS.values(), ids=lambda task: task.name)
def test_there_are_enough_distinct_held_out_examples(task: Task) -> None:
    found = first(task, 500, seed=0, held_out=True)
    assert len({e.context for e in found}) == 500


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_examples_are_well_formed(task: Task) -> None:
    for example in first(task, 100, seed=0, held_out=False):
        assert example.output.strip()
        assert "\n" not in example.output, "a newline would end the answer"
        assert not example.choices or example.output in example.choices
        assert len(set(example.choices)) == len(example.choices)
        assert all(question.startswith("\n") for question, _ in example.more)


def test_extracted_values_are_in_the_passage() -> None:
    for example in first(OWN_TASKS["information_extraction"], 100, seed=1, held_out=True):
        pairs = [(example.question, example.output), *example.more]
        assert all(value in example.context for _, value in pairs)
        assert len({question for question, _ in pairs}) == len(pairs)


def test_recalled_values_stand_behind_their_keys() -> None:
    for example in first(OWN_TASKS["key_value_recall"], 50, seed=1, held_out=True):
        key = example.question.removeprefix("\nKey: ")
        assert f"{key}: {example.output}" in example.context


def test_area_codes_name_one_city_each() -> None:
    assert len(set(AREA_CODES.values())) == len(AREA_CODES)


def test_a_field_is_called_misspelt_exactly_when_it_is() -> None:
    for example in first(OWN_TASKS["error_detection"], 200, seed=1, held_out=True):
        asked = example.question.split()[-1].rstrip("?")
        value = example.context.split(f"{asked}: ")[1].split(".")[0]
        known = all(word in all_words() or word == "street" for word in value.split() if word.isalpha())
        assert (example.output == "No") == known, example


def test_matching_products_are_equal_and_others_are_not() -> None:
    for example in first(OWN_TASKS["product_matching"], 200, seed=1, held_out=True):
        left, right = example.context.removeprefix("Product A is ").split(" Product B is ")
        assert (example.output == "Yes") == (left == right)


def test_patterns_give_their_results() -> None:
    for example in first(HELM_TASKS["pattern_match"], 100, seed=1, held_out=False):
        rules, result = example.context.removeprefix("Rules: ").split(" | Result: ")
        patterns = rules.split(" | ")
        assert len(patterns) == 4 and example.output in patterns
        kept = [symbol for symbol in example.output.split() if symbol in "+-*="]
        assert [symbol for symbol in result.split() if symbol in "+-*="] == kept


def test_dyck_answers_close_what_is_open() -> None:
    pairs = {"(": ")", "[": "]", "{": "}"}
    for example in first(HELM_TASKS["dyck_language"], 100, seed=1, held_out=False):
        stack: list[str] = []
        for symbol in example.context.split() + example.output.split():
            if symbol in pairs:
                stack.append(pairs[symbol])
            else:
                assert stack.pop() == symbol
        assert not stack


def test_memos_vary_with_the_generator_only() -> None:
    assert memo(random.Random(1)) == memo(random.Random(1)) != memo(random.Random(2))
