"""The models of layer routes: their growth, the left-out layers, determinism, refusals, and the probe of routes."""

import copy
import importlib.util
import random
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from evomerge.pool import ModelPool

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
BASE = EXPERIMENTS / "quickstart/models/skills-base"
IDS = torch.tensor([[1, 403, 407, 261, 378]])
NAMES = ("base", "add", "attr")


def load_script(name):
    """A script as a module; it stands in no package, and imports what stands beside it by its bare name."""
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"routes/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


script = load_script("train_pair")
probe = load_script("probe")


def weights(folder):
    """The tensors of each model by its name."""
    return {name: load_file(folder / name / "model.safetensors") for name in NAMES}


def trained(folder, *options):
    """The weights of all models after two steps each."""
    command = ["--to", folder, "--steps", 2, "--batch", 2, *options]
    assert script.main([str(part) for part in command]) == 0
    return weights(folder)


@pytest.fixture(scope="module", autouse=True)
def short():
    """Fewer items to score along the way and none at the end, a shorter warm-up."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ASKED", 2), ("WARMUP", 1), ("REPORTS", 1)):
            patch.setitem(script.train.__globals__, name, value)  # of train_experts
        patch.setattr(script, "accuracy", lambda model, tokenizer, asked: 0.0)
        yield


@pytest.fixture(scope="module")
def written(short, tmp_path_factory):
    """The folder of the models of seed 1."""
    folder = tmp_path_factory.mktemp("models")
    trained(folder, "--seed", 1)
    return folder


@pytest.fixture
def grown():
    """skills-base, grown, and its logits before that."""
    model, _ = script.load(BASE)
    with torch.no_grad():
        before = model(IDS).logits
        script.grow(model, script.COPIES)
    return model, before


def test_the_grown_model_has_twelve_layers_and_computes_the_same(grown):
    model, before = grown

    assert len(model.model.layers) == model.config.num_hidden_layers == 12
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)
        assert torch.equal(model(IDS, use_cache=False).logits, before)


def test_layers_are_left_out_where_gradients_are_asked_for_only(grown):
    model, before = grown
    ran = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    script.drop_layers(model, 0.25, random.Random(0))

    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)
    assert ran == list(range(12))
    ran.clear()
    for _ in range(25):
        model(IDS)

    assert set(ran) == set(range(12))
    assert 0.65 < len(ran) / 300 < 0.85


def test_same_seed_same_models(written, tmp_path):
    one, again, other = weights(written), trained(tmp_path / "1", "--seed", 1), trained(tmp_path / "2", "--seed", 2)

    for name in NAMES:
        assert all(one[name][tensor].equal(again[name][tensor]) for tensor in one[name])
        assert not all(one[name][tensor].equal(other[name][tensor]) for tensor in one[name])


def test_the_models_are_one_pool(written):
    pool = ModelPool.open(written / "base", {name: written / name for name in NAMES[1:]})

    assert pool.stored_dtype == "float32"
    assert transformers.AutoModelForCausalLM.from_pretrained(written / "attr").config.num_hidden_layers == 12


def test_experts_differ_from_the_base_in_their_layers_alone(written):
    models = weights(written)

    for name in NAMES[1:]:
        changed = {tensor for tensor, value in models[name].items() if not value.equal(models["base"][tensor])}
        assert changed
        assert all(tensor.startswith("model.layers.") for tensor in changed)


def test_a_folder_with_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "attr").mkdir()
    (tmp_path / "attr/notes.txt").write_text("mine")

    assert script.main(["--to", str(tmp_path)]) == 2

    assert [path.name for path in tmp_path.iterdir()] == ["attr"]
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "expected a new or empty folder" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "0"), "expected a positive number, got --steps 0"),
        (("--batch", "-1"), "expected a positive number, got --batch -1"),
        (("--dropped", "1"), "expected a chance from 0 to below 1, got --dropped 1.0"),
        (("--dropped", "nan"), "expected a chance from 0 to below 1, got --dropped nan"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, options, message):
    assert script.main(["--to", str(tmp_path / "new"), *options]) == 2

    assert list(tmp_path.iterdir()) == []
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_route_takes_the_layers_that_it_names(grown):
    base, other = grown[0], copy.deepcopy(grown[0])
    a, b = base.model.layers, other.model.layers

    taken = probe.layers_of("base 0-2 2, add 11 0-0", {"base": base, "add": other})

    expected = [a[0], a[1], a[2], a[2], b[11], b[0]]
    assert len(taken) == len(expected)
    assert all(one is two for one, two in zip(taken, expected, strict=True))


def test_the_probe_scores_each_route(written, monkeypatch, capsys):
    """A whole model scores as itself; its answer to an item depends on the route."""
    seen = []
    monkeypatch.setattr(probe, "accuracy", lambda model, tokenizer, asked: seen.append(model(IDS).logits) or 0.5)

    assert probe.main(["--models", str(written), "add 0-11", "add 0-9, attr 10-11"]) == 0

    assert capsys.readouterr().out.splitlines()[2:] == [
        "| add 0-11 | 0.500 | 0.500 | 0.500 |",
        "| add 0-9, attr 10-11 | 0.500 | 0.500 | 0.500 |",
    ]
    add, _ = script.load(written / "add")
    assert torch.equal(seen[0], add(IDS).logits)
    assert not torch.equal(seen[3], seen[0])


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("other 0-11", "expected one of base, add, attr, got 'other' in the route 'other 0-11'"),
        ("add 0-12", "expected layers within 0-11, got '0-12' in the route 'add 0-12'"),
        ("add 5-4", "expected layers within 0-11, got '5-4'"),
        ("add all", "expected layers as 4 or 0-11, got 'all'"),
        ("add", "expected a model and its layers, as in 'add 0-11', got 'add' in the route 'add'"),
    ],
)
def test_a_wrong_route_is_one_line(written, capsys, route, message):
    assert probe.main(["--models", str(written), route]) == 2

    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
