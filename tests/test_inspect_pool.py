"""`evomerge inspect`: figures against a plain computation, findings against pools made wrong on purpose."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge import inspect_pool as module
from evomerge.errors import UserError
from evomerge.inspect_pool import Inspection, chat_templates, inspect_pool, sums_of

from .conftest import fine_tuned


def found(i: Inspection, kind: str, model: str | None = None) -> list[tuple[str, str]]:
    return [(f.severity, f.text) for f in i.findings if f.kind == kind and model in (None, f.model)]


@pytest.fixture
def trio(tiny_model: Any, tmp_path: Path) -> dict[str, Path]:
    """A base and two experts trained from it, apart from each other."""
    base = tiny_model("llama", name="base")
    return {"base": base, "x": fine_tuned(base, tmp_path / "x", 1), "y": fine_tuned(base, tmp_path / "y", 2)}


def inspect(folders: dict[str, Path]) -> Inspection:
    base, *experts = folders
    return inspect_pool((base, folders[base]), {n: folders[n] for n in experts})


def edit_json(file: Path, **values: Any) -> None:
    data = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**data, **values}))


def edit_tensors(folder: Path, **values: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, **values}, folder / "model.safetensors", {"format": "pt"})


# -- figures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1 << 20, 20_011])
def test_figures_agree_with_a_plain_computation(quickstart: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Norms, cosines, distances and conflicts of real models, overall and by layer, are those of whole vectors."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    names = ("skills-base", "skills-add", "skills-attr", "skills-count")
    i = inspect({n: quickstart / "models" / n for n in names})
    models = [load_file(quickstart / "models" / n / "model.safetensors") for n in names]

    for sums, part in [(i.total, ""), *((s, f"model.layers.{n}.") for n, s in i.by_layer.items())]:
        tensors = [n for n in models[0] if n.startswith(part)]
        whole = [torch.cat([m[n].double().flatten() for n in tensors]) for m in models]
        deltas = [w - whole[0] for w in whole[1:]]
        top, signs = [], []
        for m in models[1:]:
            marks = []
            for n in tensors:
                d = (m[n] - models[0][n]).flatten()
                k = math.ceil(0.2 * d.numel())
                mark = torch.zeros(d.numel(), dtype=torch.bool)
                mark[d.abs().topk(k).indices] = True
                marks.append(mark)
            top.append(torch.cat(marks))
        signs = [d.sign() for d in deltas]
        for a in range(3):
            assert sums.relative[a] == pytest.approx(float(deltas[a].norm() / whole[0].norm()), rel=1e-6)
            assert sums.changed[a] == int((deltas[a] != 0).sum())
            for b in range(3):
                cosine = torch.nn.functional.cosine_similarity(deltas[a], deltas[b], dim=0)
                assert sums.cosines[a, b] == pytest.approx(float(cosine), abs=1e-6)
                assert sums.distances[a, b] == pytest.approx(float((whole[a + 1] - whole[b + 1]).norm()), abs=1e-5)
                both = top[a] & top[b]
                opposed = both & (signs[a] != signs[b])
                assert sums.both[a, b] == int(both.sum())
                assert sums.conflicts[a, b] == pytest.approx(float(opposed.sum() / both.sum()))
                dice = 2 * both.sum() / (top[a].sum() + top[b].sum())
                assert sums.overlaps[a, b] == pytest.approx(float(dice))


def test_conflicts_by_hand() -> None:
    """Ten entries, the top two of each: one in common, and it opposes; an equal delta at the cut counts too."""
    base = torch.zeros(10)
    x = torch.tensor([5.0, -4, 1, 1, 1, 1, 1, 1, 1, 1])
    y = torch.tensor([-5.0, 1, 4, 4, 1, 1, 1, 1, 1, 1])
    sums = sums_of(base, [x, y])

    assert sums.both.tolist() == [[2, 1], [1, 3]]
    assert sums.opposed.tolist() == [[0, 1], [1, 0]]
    assert sums.conflicts[0, 1] == 1.0
    assert sums.overlaps[0, 1] == pytest.approx(2 / 5)


def test_zero_deltas_have_no_top() -> None:
    """Entries without a change never count as large, so a frozen tensor gives no conflict and no cosine."""
    sums = sums_of(torch.ones(20), [torch.ones(20), torch.zeros(20)])

    assert sums.both.tolist() == [[0, 0], [0, 20]]
    assert sums.changed.tolist() == [0, 20]
    assert math.isnan(sums.cosines[0, 1])
    assert math.isnan(sums.conflicts[0, 1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_compared_in_full(tiny_model: Any, dtype: str) -> None:
    """Deltas of 16-bit weights are formed in fp32 and summed in fp64."""
    folders = {n: tiny_model("llama", s, dtype=dtype) for n, s in (("base", 0), ("x", 1))}
    a, b = (load_file(f / "model.safetensors") for f in folders.values())
    expected = math.sqrt(sum(float((b[n].double() - a[n].double()).square().sum()) for n in a))

    assert inspect(folders).total.norms[0] == pytest.approx(expected, rel=1e-7)


def test_sums_add_up(trio: dict[str, Path]) -> None:
    """Blocks partition the model: modules and blocks sum to the whole; JSON holds no NaN that JSON cannot say."""
    i = inspect(trio)

    assert i.total.size == i.parameters
    assert np.allclose(sum(s.gram for s in i.by_module.values()), i.total.gram)
    assert list(i.blocks)[:4] == ["embed", "layers.0.attention", "layers.0.mlp", "layers.0.norm"]
    data = i.to_json()
    assert data["overall"]["relative_norm"] == i.total.relative.tolist()
    assert set(data["by_module"]) == {"embed", "attention", "mlp", "norm", "final_norm", "head"}


# -- findings ---------------------------------------------------------------------------------------------------


def test_a_good_pool_has_no_warnings(trio: dict[str, Path]) -> None:
    """Experts trained apart from one base: nothing but unknown licences."""
    assert {f.kind for f in inspect(trio).findings} == {"licence"}


def test_a_base_of_another_training(tiny_model: Any, trio: dict[str, Path]) -> None:
    """Another seed's model as base: far from every expert, and every expert nearer to the other."""
    i = inspect({**trio, "base": tiny_model("llama", 9)})

    assert 1.2 < i.total.relative.min() < i.total.relative.max() < 1.6
    for expert, other in (("x", "y"), ("y", "x")):
        far, near = found(i, "base", expert)
        assert far[0] == near[0] == "warning"
        assert "times as long as the base" in far[1]
        assert f"lies nearer to '{other}'" in near[1]


def test_the_ancestor_of_the_base_is_told(quickstart: Path) -> None:
    """A base too early in the line is no stranger to the experts, but they share a direction away from it."""
    names = ("stories260K", "skills-add", "skills-attr", "skills-count")
    i = inspect({n: quickstart / "models" / n for n in names})

    assert i.total.relative.max() < 0.5
    assert [t for _, t in found(i, "base")]
    assert i.total.conflicts[0, 1] < 0.1


def test_the_quickstart_is_clean(quickstart: Path) -> None:
    """The true base raises nothing at all."""
    names = ("skills-base", "skills-add", "skills-attr", "skills-count")

    assert inspect({n: quickstart / "models" / n for n in names}).findings == ()


def test_a_short_task_vector_is_no_wrong_base(trio: dict[str, Path], tmp_path: Path) -> None:
    """An expert that went a little of the way that another went farther makes neither's base wrong."""
    a, b = (load_file(trio[n] / "model.safetensors") for n in ("base", "x"))
    shutil.copytree(trio["base"], tmp_path / "short")
    edit_tensors(tmp_path / "short", **{n: a[n] + 0.05 * (b[n] - a[n]) for n in a})
    i = inspect({**trio, "short": tmp_path / "short"})

    assert i.total.cosines[0, 2] > 0.99
    assert found(i, "base", "x") == []


def test_same_weights_and_frozen_blocks(trio: dict[str, Path], tmp_path: Path) -> None:
    """The base again, an expert twice, and blocks that training left alone."""
    frozen = fine_tuned(trio["base"], tmp_path / "frozen", 3)
    base = load_file(trio["base"] / "model.safetensors")
    edit_tensors(frozen, **{n: base[n] for n in ("model.embed_tokens.weight", "model.norm.weight")})
    i = inspect({**trio, "again": trio["base"], "twin": trio["x"], "frozen": frozen})

    assert found(i, "weights", "again") == [("error", "the same weights as the base 'base'; remove it")]
    assert found(i, "weights", "twin") == [("error", "the same weights as 'x'; remove one")]
    assert found(i, "weights", "frozen") == [("note", "2 blocks are the base's: embed, final_norm")]
    assert found(i, "base") == []


def test_sick_weights(trio: dict[str, Path]) -> None:
    """NaN in one expert is an error of that expert; the others keep their figures."""
    edit_tensors(trio["x"], **{"model.norm.weight": torch.full((32,), math.nan)})
    i = inspect(trio)

    assert found(i, "weights", "x") == [("error", "NaN or infinite weights in final_norm")]
    assert math.isfinite(i.total.relative[1])


def test_what_stops_a_merge_is_a_finding(trio: dict[str, Path], tiny_model: Any, tmp_path: Path) -> None:
    """Another shape, architecture or a broken folder is told, and the rest of the pool is still compared."""
    pickled = tmp_path / "pickled"
    shutil.copytree(trio["x"], pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    wide, qwen = tiny_model("llama", 1, intermediate_size=64), tiny_model("qwen2", 1)
    i = inspect({**trio, "wide": wide, "qwen": qwen, "pickled": pickled, "gone": tmp_path / "gone"})

    assert i.experts == ("x", "y")
    errors = {f.model: f.text for f in i.findings if f.severity == "error"}
    assert set(errors) == {"wide", "qwen", "pickled", "gone"}
    assert "shape of" in errors["wide"]
    assert "pickled weights" in errors["pickled"]
    assert i.left_out == ()


def test_another_vocabulary_leaves_the_layers_comparable(trio: dict[str, Path], tiny_model: Any) -> None:
    """Embedding and head are left out by name; the layers keep their figures."""
    i = inspect({**trio, "big": tiny_model("llama", 3, vocab_size=520)})

    assert i.experts == ("x", "y", "big")
    assert i.left_out == ("lm_head.weight", "model.embed_tokens.weight")
    assert not found(i, "pool", "big"), "a merge aligns its rows by token id"
    assert next(t for s, t in found(i, "weights", "") if s == "note").startswith("in no figure")


def test_no_expert_that_can_be_compared(trio: dict[str, Path], tiny_model: Any) -> None:
    """With nobody to compare there are findings and empty figures; a base that cannot be read is bad input."""
    i = inspect({"base": trio["base"], "qwen": tiny_model("qwen2", 1)})

    assert i.experts == ()
    assert found(i, "pool", "qwen")
    with pytest.raises(UserError, match="no such model folder"):
        inspect({"gone": Path("/gone"), "x": trio["x"]})


def test_files_beside_the_weights(trio: dict[str, Path]) -> None:
    """Tokenizer, special tokens, chat template, generation settings, config and dtype, each in its own words."""
    base, x = trio["base"], trio["x"]
    edit_json(base / "generation_config.json", temperature=0.5)
    edit_json(x / "generation_config.json", temperature=0.7, transformers_version="9")
    edit_json(x / "config.json", rope_theta=5.0, _name_or_path="elsewhere")
    edit_json(base / "tokenizer_config.json", eos_token="</s>", chat_template="{{ a }}")
    edit_json(x / "tokenizer_config.json", eos_token={"content": "<|end|>"}, chat_template="{{ b }}")
    tokenizer = json.loads((x / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 600, "content": "<|im_start|>\x1b[31m"})
    tokenizer["normalizer"] = {"type": "NFKC"}
    (x / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit_tensors(x, **{n: t.bfloat16() for n, t in load_file(x / "model.safetensors").items()})
    i = inspect(trio)

    tokens = found(i, "tokenizer", "x")
    assert ("warning", '1 tokens that the base lacks, for example "<|im_start|>\\u001b[31m"') in tokens
    assert ("warning", "another normalizer") in tokens
    assert ("note", '"eos_token" is "<|end|>", the base\'s "</s>"') in tokens
    assert found(i, "chat_template", "x") == [
        ("warning", 'another chat template "default"; the merge takes the base\'s')
    ]
    assert ("note", '"temperature" is 0.7, the base\'s 0.5') in found(i, "generation_config", "x")
    assert ("note", '"rope_theta" is 5.0, the base\'s null') in found(i, "config", "x")
    assert found(i, "dtype", "x") == [("note", "stored as BF16, the base as F32")]
    assert all(f.text.isprintable() for f in i.findings)


def test_chat_templates_wherever_they_stand(tmp_path: Path) -> None:
    """A file of its own wins over tokenizer_config.json, where there may be one or several by name."""
    assert chat_templates(tmp_path) == {}
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}, "odd"]
    edit_json(tmp_path / "tokenizer_config.json", chat_template=several)
    assert chat_templates(tmp_path) == {"default": "a", "tool_use": "b"}
    (tmp_path / "chat_template.jinja").write_text("c")
    assert chat_templates(tmp_path) == {"default": "c"}


@pytest.mark.parametrize("content", ["[]", "{", '{"model": {"vocab": 7}}', '{"added_tokens": [{"id": 1}]}'])
def test_hostile_side_files_are_findings(content: str, trio: dict[str, Path]) -> None:
    """A tokenizer that is no tokenizer is told, not raised."""
    (trio["x"] / "tokenizer.json").write_text(content)

    assert [s for s, _ in found(inspect(trio), "tokenizer", "x")] == ["warning"]


def test_licences_are_findings(trio: dict[str, Path]) -> None:
    """The remarks of `licences` stand among the notes, and each model's licence in the data."""
    for name, licence in (("base", "mit"), ("x", "cc-by-nc-4.0"), ("y", "mit")):
        (trio[name] / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    i = inspect(trio)

    assert "so the whole merge is non-commercial" in found(i, "licence")[0][1]
    assert i.to_json()["licences"]["x"]["id"] == "cc-by-nc-4.0"
