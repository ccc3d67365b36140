"""The model card: what the hub reads and what people read, and nothing that a stranger slipped in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from evomerge.cli import main
from evomerge.export.card import Parent, md, model_card, parent_of
from evomerge.export.hf import write_hf
from evomerge.history import History
from evomerge.licences import NO_ADVICE, Licence
from evomerge.pool import ModelPool
from evomerge.recipe import Recipe
from evomerge.report.results import results

RULES = [{"method": "task_arithmetic", "sources": {"x": {"weight": 0.5}, "y": {"weight": 0.0}}}]


def parent(name: str, licence: str = "mit", **more: Any) -> Parent:
    return Parent(name, more.pop("model", name), more.pop("hub", False), "", "ab" * 32, Licence(licence), **more)


@pytest.fixture
def recipe(manifest_of: Any) -> Recipe:
    return Recipe.model_validate(
        {"merge": [{"method": "linear", "sources": {"math": {}, "code": {}}}]}
    ).canonical(manifest_of())  # fmt: skip


@pytest.fixture(scope="session")
def export(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("card") / "winner"
    assert main(["export", str(finished_run), "--to", str(target)]) == 0
    return target


def test_what_the_hub_reads(export: Path, finished_run: Path) -> None:
    """The tags and the report split's scores, by huggingface_hub's own reader."""
    history = History.read(finished_run)
    data = ModelCard.load(export / "README.md").data

    assert not {"base_model", "base_model_relation"} & set(data.to_dict())  # the parents are folders, no ids
    assert set(data["tags"]) == {"merge", "evomerge"}
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert (data["license"], data["license_name"]) == ("other", "those-of-the-parents")
    table = {s.task: s for s in results(history).table if s.model == "winner"}
    assert {r.dataset_name: r.metric_value for r in data.eval_results} == {
        t: round(table[t].score, 4) for t in ("sums", "words")
    }
    assert {r.dataset_split for r in data.eval_results} == {"report"}


def test_what_people_read(export: Path, finished_run: Path) -> None:
    """The scores are the report's to the digit, with n, optimism, looks, hashes, recipe and how to rebuild."""
    history, text = History.read(finished_run), (export / "README.md").read_text()
    r = results(history)

    for name in ("base", "one", "two", "uniform"):
        cells = [s for s in r.table if s.model == name]
        row = " | ".join(f"{s.score:.3f} \\[{s.low:.2f}, {s.high:.2f}\\]" for s in cells)
        assert f"| {name} | {row} |" in text
        paired = [c for c in r.comparisons if c.model == name]
        assert f"| {name} | {paired[0].difference:+.3f} \\[{paired[0].low:+.2f}, {paired[0].high:+.2f}\\], p " in text
    winner = [s for s in r.table if s.model == "winner"]
    assert f"| **this merge** | {winner[0].score:.3f}" in text
    assert "sums, accuracy (n=8)" in text
    assert f"optimism {r.optimism['search'] - r.optimism['report']:+.3f}" in text
    assert "The report split was looked at once." in text
    assert f"Candidate {history.winner_id} of the experiment small" in text
    assert "12 candidates were searched by cma-es with seed 3" in text
    assert history.manifest.hashes["base"][:12] in text
    assert history.winner.id in text
    assert re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1] == history.winner.grouped().to_yaml()  # type: ignore[index]
    assert "evomerge merge recipe.yaml --to rebuilt" in text
    assert "evomerge verify ." in text
    assert "AutoModelForCausalLM.from_pretrained" in text
    assert "licence of 'base'" in text
    assert NO_ADVICE in text


def test_same_export_same_bytes(export: Path, finished_run: Path, tmp_path: Path) -> None:
    """No date, no target and no folder of this machine stands in the card."""
    assert main(["export", str(finished_run), "--to", str(tmp_path / "again")]) == 0
    text = (export / "README.md").read_text()

    assert (tmp_path / "again" / "README.md").read_text() == text
    for path in (*History.read(finished_run).source_paths().values(), finished_run, export):
        assert str(path.parent) not in text


def test_a_candidate_that_was_never_reported(finished_run: Path, tmp_path: Path) -> None:
    """Its numbers are the search split's, said to be too good, and none goes into the hub's results."""
    history = History.read(finished_run)
    number = next(e.id for e in history.entries.values() if set(e.results) == {"search"} and e.role == "search")
    assert main(["export", str(finished_run), str(number), "--to", str(tmp_path / "out")]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")

    assert "On the search split, with 95% intervals." in card.text
    assert "they are too good, by an unknown amount" in card.text
    assert card.data.eval_results is None


def test_a_merge_without_a_run(tiny_model: Any, tmp_path: Path) -> None:
    """No scores, and only parents whose weights are in the merge."""
    pool = ModelPool.open(tiny_model("llama"), {"x": tiny_model("llama", 1), "y": tiny_model("llama", 2)})
    manifest = pool.manifest()
    recipe = Recipe.model_validate({"merge": RULES}).canonical(manifest)
    card = ModelCard.load(write_hf(tmp_path / "out", recipe, pool, manifest) / "README.md")

    assert all(pool.checkpoints[n].path.name in card.text.partition("## Scores")[0] for n in ("base", "x"))
    assert pool.checkpoints["y"].path.name not in card.text
    assert "# Merge of x\n" in card.text
    assert "no scores" in card.text
    assert "## How the recipe was found" not in card.text


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["mit", "mit"], {"license": "mit"}),
        (["mit", "apache-2.0"], {"license": "other", "license_name": "those-of-the-parents"}),
        (["unknown", "unknown"], {"license": "other", "license_name": "those-of-the-parents"}),
    ],
)
def test_the_licence_of_the_merge(licences: list[str], expected: dict[str, str], recipe: Recipe) -> None:
    """A licence that all parents share is the merge's; else it is for people to read."""
    data = ModelCard(model_card(recipe, [parent(f"p{i}", li) for i, li in enumerate(licences)])).data.to_dict()

    assert {k: v for k, v in data.items() if k.startswith("license")} == expected


def test_a_shared_licence_with_its_own_name(recipe: Recipe) -> None:
    """What is "other" to the hub stays "other", with its name and link."""
    own = Licence("qwen-research", "README.md", True, "https://example.org/LICENSE")
    parents = [Parent(n, n, False, "", "00" * 32, own) for n in ("a", "b")]
    data = ModelCard(model_card(recipe, parents)).data

    assert (data["license"], data["license_name"]) == ("other", "qwen-research")
    assert data["license_link"] == "https://example.org/LICENSE"


def test_hub_ids_are_never_invented(tmp_path: Path) -> None:
    """An id is what the user gave, or what the hub's cache calls the folder; a config's word is a hint."""
    sha = "c" * 40
    cached = tmp_path / "models--org--some-model" / "snapshots" / sha
    cached.mkdir(parents=True)
    plain = tmp_path / "my model --x"
    plain.mkdir()

    given = parent_of("x", plain, "ab", {}, "org/name@abc123")
    assert (given.model, given.hub, given.revision) == ("org/name", True, "abc123")
    kept = parent_of("x", cached, "ab", {"_name_or_path": "someone/else"})
    assert (kept.model, kept.hub, kept.revision, kept.hint) == ("org/some-model", True, sha, "")
    local = parent_of("x", plain, "ab", {"_name_or_path": "org/claimed"}, str(plain))
    assert (local.model, local.hub, local.hint) == ("my model --x", False, "org/claimed")
    assert parent_of("x", plain, "ab", {"_name_or_path": "/home/me/secret"}).hint == ""


def test_hints_are_marked(recipe: Recipe) -> None:
    """A hint is told to be unchecked and stays out of the front matter."""
    card = ModelCard(model_card(recipe, [parent("a", model="org/a", hub=True), parent("b", hint="org/claimed")]))

    assert card.data["base_model"] == "org/a" or card.data["base_model"] == ["org/a"]
    assert "its config.json names org/claimed, unchecked" in card.text


HOSTILE = (
    "x|y\n---\nlicense: evil\n# `<script>alert(1)</script>` [a](javascript:b) ![i](http://evil/p.png) www.evil.com"
)


def test_strangers_text_is_only_text(recipe: Recipe) -> None:
    """Names and licences break out of no table, front matter, code block or HTML."""
    parents = [parent("base"), parent(HOSTILE, HOSTILE, model=HOSTILE, hint=HOSTILE)]
    evil = recipe.model_copy(update={"sources": {**recipe.sources, "```\n# out": next(iter(recipe.sources.values()))}})
    card = ModelCard(model_card(evil, parents))
    table = [line for line in card.text.splitlines() if line.startswith("| expert")]

    assert card.data["license"] == "other"
    assert "base_model" not in card.data.to_dict()
    assert len(table) == 1
    assert len(re.findall(r"(?<!\\)\|", table[0])) == 6
    words = card.text.partition("## Recipe")[0]
    assert "<script" not in words
    assert not re.search(r"(?<!\\)[\[`]", words.replace("`abababababab`", "").replace("`base_model`", ""))
    assert "http://" not in words
    fence = re.search(r"^(`{4,})yaml\n.*?^\1$", card.text, re.DOTALL | re.MULTILINE)
    assert fence is not None
    assert evil.grouped().to_yaml() in fence[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain name-1.5, (a)", "plain name-1.5, (a)"),
        ("a_b*c", "a\\_b\\*c"),
        ("a\nb\x1b[0m", "a b \\[0m"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("see https://x.y", "see https:/\\/x.y"),
        ("x" * 500, "x" * 200),
    ],
)
def test_md(text: str, expected: str) -> None:
    """One line, bounded, printable, without markup."""
    assert md(text) == expected


def test_a_route_is_told(manifest_of: Any) -> None:
    """The path in words, and that of a merge says nothing of routes."""
    hops = [{"from": "base", "layer": 1, "scale": 0.9}, *({"from": "math", "layer": n} for n in range(2))]
    routed = Recipe.model_validate({"base": "base", "route": {"hops": hops}}).canonical(manifest_of())

    assert "A route of 3 hops: base 1 (x0.9 in), math 0-1. Blocks" in model_card(routed, [parent("base")])
