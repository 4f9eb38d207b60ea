"""The shipped checkpoint agrees with its card, and the recipe that made it still runs."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scenarios.demo.documents import ANSWER, DocumentSource
from scenarios.demo.evaluate import MODEL, accuracy, answers, load
from scenarios.demo.muon import orthogonalised
from scenarios.demo.tokenizer import SPECIAL_TOKENS, save_tokenizer, train_tokenizer
from scenarios.demo.train import Recipe, Trainer, run
from scenarios.tasks import HELM_TASKS, OWN_TASKS, is_held_out
from scenarios.tasks.words import all_words

# Large enough that 20 steps lower the loss, small enough that they take a second.
SMALL = Recipe(steps=20, batch_tokens=512, hidden=32, heads=1, layers=2, feed_forward=64)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def demo():
    torch.set_num_threads(1)
    return load(MODEL)


def test_the_card_names_the_shipped_weights() -> None:
    weights = MODEL / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in (MODEL / "README.md").read_text()
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8_000_000


def test_the_card_holds_the_measured_figures() -> None:
    card = (MODEL / "README.md").read_text()
    figures = json.loads((MODEL / "accuracy.json").read_text())
    for name in (*OWN_TASKS, *HELM_TASKS):
        assert f"| {name} | {figures[name]['exact_match']:.3f} | {figures[name]['instances']} |" in card


def test_the_shipped_model_is_half_precision_opt(demo) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["OPTForCausalLM"] and config["dtype"] == "float16"
    model, tokenizer = demo
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer("Answer: Reno")["input_ids"][0] == tokenizer.convert_tokens_to_ids("</s>") == 2


@pytest.mark.parametrize("name", ["data_imputation", "information_extraction"])
def test_the_shipped_model_answers_held_out_instances(demo, name: str) -> None:
    exact, count = accuracy(*demo, OWN_TASKS[name], 40)
    measured = json.loads((MODEL / "accuracy.json").read_text())[name]["exact_match"]
    assert count == 40
    assert exact >= measured - 0.25  # three standard errors of 40 instances


def test_batching_does_not_change_answers(demo) -> None:
    task = OWN_TASKS["form_processing"]
    rng = random.Random(5)
    prompts = [
        task.layout.prompt([task.generate(rng, 1.0) for _ in range(shots)], task.generate(rng, 1.0))
        for shots in (0, 1, 3)
    ]
    assert answers(*demo, prompts, 24) == [answers(*demo, [prompt], 24)[0] for prompt in prompts]


def test_the_tokenizer_cuts_prompt_and_answer_alike_apart_and_together(tokenizer) -> None:
    rng = random.Random(1)
    for task in (*OWN_TASKS.values(), *HELM_TASKS.values()):
        example = task.generate(rng, 1.0)
        prompt = task.layout.prompt([task.generate(rng, 1.0)], example)
        answer = task.layout.answer(example.output)
        together = tokenizer.encode(prompt + answer).ids
        assert (
            together == tokenizer.encode(prompt).ids + tokenizer.encode(answer, add_special_tokens=False).ids
        )
        assert tokenizer.decode(together) == prompt + answer


def test_the_tokenizer_gives_every_word_and_newline_one_piece(tokenizer) -> None:
    for text in ["\n", *(" " + word for word in all_words())]:
        assert len(tokenizer.encode(text, add_special_tokens=False).ids) == 1, text
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]


def test_the_shipped_tokenizer_is_the_recipes(tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path, Recipe.positions)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((MODEL / name).read_text())


def test_training_never_sees_an_evaluation_instance(tokenizer) -> None:
    excluded = {HELM_TASKS["pattern_match"].generate(random.Random(0), 1.0).input}
    source = DocumentSource(tokenizer, excluded)
    for task in (*OWN_TASKS.values(), *HELM_TASKS.values()):
        rng = random.Random(0)
        for _ in range(300):
            example = source.example(task, rng, 1.0)
            assert not is_held_out(example.context)
            assert example.input not in excluded


def test_helm_instances_are_kept_out_of_training() -> None:
    pytest.importorskip("helm")
    from scenarios.demo.helm_instances import helm_examples, helm_inputs

    shots, evaluation = helm_examples("dyck_language")
    assert len(shots) == 3 and len(evaluation) == 500
    excluded = helm_inputs(["dyck_language"])
    assert excluded == {example.input for example in (*shots, *evaluation)}


def test_a_batch_depends_on_its_step_alone(tokenizer) -> None:
    source = DocumentSource(tokenizer, ())
    first, again, other = (source.batch(step, 0, 1024, 256, 0.8) for step in (3, 3, 4))
    assert torch.equal(first.input_ids, again.input_ids) and torch.equal(first.weights, again.weights)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert first.input_ids.shape == first.weights.shape == (4, 256)
    answers_share = (first.weights == ANSWER).float().mean()
    assert 0.03 < answers_share < 0.5


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    for shape in ((3, 16, 64), (2, 64, 16)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalised(matrices))
        assert values.min() > 0.5 and values.max() < 1.5


def test_twenty_steps_lower_the_loss_and_a_resumed_run_ends_the_same(tokenizer, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    source = DocumentSource(tokenizer, ())
    whole = Trainer(SMALL, source)
    run(whole, tmp_path / "whole", tmp_path / "model", checkpoint_every=20, log_every=5)
    log = [json.loads(line) for line in (tmp_path / "whole" / "training_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [5, 10, 15, 20]
    assert log[-1]["loss"] < log[0]["loss"]

    interrupted = Trainer(SMALL, source)
    for _ in range(8):
        interrupted.train_step()
    (tmp_path / "resumed").mkdir()
    interrupted.save(tmp_path / "resumed" / "checkpoint.pt")
    resumed = Trainer(SMALL, source)
    run(resumed, tmp_path / "resumed", None, checkpoint_every=20)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name

    model, loaded_tokenizer = load(tmp_path / "model")
    assert len(answers(model, loaded_tokenizer, ["one", "two"], 2)) == 2


def test_a_checkpoint_of_another_recipe_is_refused(tokenizer, tmp_path: Path) -> None:
    source = DocumentSource(tokenizer, ())
    Trainer(SMALL, source).save(tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit, match="another recipe"):
        Trainer(Recipe(steps=30, batch_tokens=512, hidden=32, heads=1), source).load(
            tmp_path / "checkpoint.pt"
        )


def test_generators_need_neither_torch_nor_helm() -> None:
    code = "import sys, scenarios.tasks; print(sorted({'torch', 'helm', 'transformers'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
