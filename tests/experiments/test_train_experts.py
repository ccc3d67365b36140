"""The script that trains the quickstart's experts: its items, its determinism, its refusals."""

import importlib.util
import itertools
import json
import random
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import load_file

QUICKSTART = Path(__file__).parents[2] / "experiments/quickstart"
STORIES = QUICKSTART / "models/stories260K"


def load_script():
    """The script as a module; it stands in no package."""
    spec = importlib.util.spec_from_file_location("train_experts", QUICKSTART / "train_experts.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks its own module up
    spec.loader.exec_module(module)
    return module


script = load_script()


def drawn(skills, seed=0, number=200, held_out=frozenset()):
    return list(itertools.islice(script.items(skills, random.Random(seed), held_out), number))


def given(skill):
    """The items of both data files of a skill."""
    names = (f"skill_{skill}.jsonl", f"skill_{skill}_cal.jsonl")
    return [item for name in names for item in script.read_items(QUICKSTART / "data" / name)]


def trained(target, *options):
    command = ["--from", STORIES, "--to", target, "--skill", "add", "--batch", 4, *options]
    assert script.main([str(part) for part in command]) == 0
    return load_file(target / "model.safetensors")


@pytest.fixture
def short(monkeypatch):
    """Fewer items to score, a shorter warm-up."""
    monkeypatch.setattr(script, "ASKED", 4)
    monkeypatch.setattr(script, "WARMUP", 3)


@pytest.fixture
def held_out(tmp_path):
    """One small file of held-out items."""
    path = tmp_path / "skill_few.jsonl"
    path.write_text((QUICKSTART / "data/skill_add.jsonl").read_text().split("\n", 1)[0] + "\n")
    return path


@pytest.mark.parametrize("skill", script.SKILLS)
def test_items_have_the_form_of_the_data_files(skill):
    first = json.loads((QUICKSTART / f"data/skill_{skill}.jsonl").read_text().splitlines()[0])

    for item in drawn([skill]):
        assert list(asdict(item)) == list(first)
        assert item.task == skill
        assert item.choices[item.gold].strip() == item.target
        assert len(set(item.choices)) == len(item.choices)


@pytest.mark.parametrize("skill", script.SKILLS)
def test_items_are_drawn_from_the_same_words_and_shapes_as_the_data_files(skill):
    def words(items):
        return set(re.findall(r"[A-Za-z]+|[^\w\s]", " ".join(item.question for item in items)))

    def numbers(items):
        return {int(n) for item in items for n in re.findall(r"\d+", item.question)}

    def shapes(items):
        return {(len(item.question.split()), len(item.choices)) for item in items}

    expected, made = given(skill), drawn([skill], number=2000)

    assert words(made) == words(expected)
    assert numbers(made) == numbers(expected)
    assert shapes(made) == shapes(expected)


@pytest.mark.parametrize("skill", script.SKILLS)
def test_the_right_answer_of_a_given_question_is_the_generators(skill):
    """Where a generated question stands in the data files too, both have the same answer and choices."""
    known = {item.question: item for item in given(skill)}
    met = [item for item in drawn([skill], number=4000) if item.question in known]

    for item in met:
        assert item.target == known[item.question].target
        assert skill == "attr" or set(item.choices) == set(known[item.question].choices)
    assert met or skill == "attr"  # attr has over a million questions: meeting one is rare


@pytest.mark.parametrize("skill", script.SKILLS)
def test_held_out_questions_are_never_drawn(skill):
    held_out = {script.normalised(item.question.upper() + " ") for item in drawn([skill])}

    again = drawn([skill], number=400, held_out=held_out)  # the same seed would draw them first

    assert held_out.isdisjoint(script.normalised(item.question) for item in again)


def test_questions_of_every_held_out_file_are_left_out_of_training(tmp_path, capsys):
    """With all 2500 questions of add in two files there is none left to train on."""
    questions = [f"{a}+{b}=" for a in range(50) for b in range(50)]
    lines = [json.dumps(asdict(script.Item("", "add", q, ["1", "2"], 0, "1"))) + "\n" for q in questions]
    files = [tmp_path / "skill_even.jsonl", tmp_path / "skill_odd_cal.jsonl"]
    files[0].write_text("".join(lines[::2]))
    files[1].write_text("".join(lines[1::2]))

    status = script.main(["--to", str(tmp_path / "new"), "--skill", "add", "--held-out", *map(str, files)])

    assert status == 2
    assert "expected a new question of add" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_loss_weights_answer_and_end_of_text_only_beside_the_question():
    _, tokenizer = script.load(STORIES)

    ids, weights = script.encode(tokenizer, [("2+17=", "19"), ("2+1=", "3")], question_weight=0.5)

    assert tokenizer.decode(ids[0]) == "<s> 2+17=19</s>"
    assert weights.tolist() == [[0.5] * 6 + [1, 1, 1], [0.5] * 5 + [1, 1, 0, 0]]
    assert ids[:, 1:][weights == 1].tolist().count(tokenizer.eos_token_id) == 2


def test_same_seed_same_weights(tmp_path, short, held_out):
    options = ("--held-out", held_out, "--steps", 5)
    one = trained(tmp_path / "one", *options, "--seed", 1)
    again = trained(tmp_path / "again", *options, "--seed", 1)
    other = trained(tmp_path / "other", *options, "--seed", 2)

    assert all(one[name].equal(again[name]) for name in one)
    assert not all(one[name].equal(other[name]) for name in one)


def test_minutes_are_the_steps_they_become(tmp_path, short, held_out, capsys):
    """The learning rate of the warm-up depends on no total, so a timed run can be repeated by its steps."""
    timed = trained(tmp_path / "timed", "--held-out", held_out, "--minutes", 0.002)
    steps = capsys.readouterr().err.splitlines()[-1].split("/")[1].split()[0]
    counted = trained(tmp_path / "counted", "--held-out", held_out, "--steps", steps)

    assert all(timed[name].equal(counted[name]) for name in timed)


def test_the_recipe_writes_a_base_and_its_experts(tmp_path, short, held_out, capsys):
    options = ["--recipe", "--to", tmp_path / "set", "--steps", 1, "--batch", 2, "--held-out", held_out]
    assert script.main([str(part) for part in options]) == 0

    written = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert written == ["skills-add", "skills-attr", "skills-base", "skills-count"]
    script.load(tmp_path / "set/skills-count")
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        stage.name for stage in script.RECIPE
    ]


def test_a_folder_with_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")

    status = script.main(["--from", str(STORIES), "--to", str(tmp_path), "--skill", "add"])

    assert status == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "expected a new or empty folder" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--from", "no-such-model"), "expected a model folder"),
        (("--steps", "0"), "expected a positive number, got --steps 0"),
        (("--minutes", "nan"), "expected a positive number, got --minutes nan"),
        (("--held-out", "no-such-file"), "No such file"),
        (("--held-out", __file__), "expected items like those of"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, options, message):
    status = script.main(["--to", str(tmp_path / "new"), "--skill", "add", *options])

    assert status == 2
    assert list(tmp_path.iterdir()) == []
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_loss_that_is_not_finite_fails_without_a_model(tmp_path, capsys):
    status = script.main(["--to", str(tmp_path / "new"), "--skill", "add", "--lr", "1e38", "--steps", "30"])

    assert status == 1
    assert list(tmp_path.iterdir()) == []
    assert "expected a finite loss" in capsys.readouterr().err
