"""The script that trains the models of layer routes: its growth, its left-out layers, its determinism, its refusals."""

import importlib.util
import random
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from evomerge.pool import ModelPool

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
BASE = EXPERIMENTS / "quickstart/models/skills-base"
NAMES = ("base", "add", "attr")


def load_script():
    """The script as a module; it stands in no package, and imports train_experts from beside it."""
    spec = importlib.util.spec_from_file_location("train_pair", EXPERIMENTS / "routes/train_pair.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


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
    """skills-base, its logits of a few tokens, and both after growing."""
    model, _ = script.load(BASE)
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    with torch.no_grad():
        before = model(ids).logits
        script.grow(model, script.COPIES)
    return model, ids, before


def test_the_grown_model_has_twelve_layers_and_computes_the_same(grown):
    model, ids, before = grown

    assert len(model.model.layers) == model.config.num_hidden_layers == 12
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids, use_cache=False).logits, before)


def test_layers_are_left_out_where_gradients_are_asked_for_only(grown):
    model, ids, before = grown
    ran = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    script.drop_layers(model, 0.25, random.Random(0))

    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert ran == list(range(12))
    ran.clear()
    for _ in range(25):
        model(ids)

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
