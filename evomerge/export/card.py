"""The model card of an export: README.md with front matter for the hub, and with words for people.

Names, licences and configs are strangers' text: escaped for markdown, quoted for YAML, cut to one line.
The card has no dates, machine names or paths, so the same export has the same bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.history import Entry, History
from evomerge.licences import Licence, common_licence, licence_of, remarks
from evomerge.proposal import Scores
from evomerge.recipe import Recipe
from evomerge.report.results import (
    MEAN,
    comparable,
    difference,
    interval,
    mean_over_tasks,
    results,
    spread,
    warnings_on,
)
from evomerge.report.routes import path_text

CARD = "README.md"
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.-]+))?", re.ASCII)
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)
STRETCHES = 20
"""Stretches of a route that the card writes out; the recipe below them has all."""
SNAPSHOT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Parent:
    """One parent: `model` is its hub id (`hub`), else its folder's name; `hint` what its config.json calls it."""

    name: str
    model: str
    hub: bool
    revision: str
    sha256: str
    licence: Licence
    hint: str = ""


def parent_of(name: str, folder: Path, sha256: str, config: Mapping[str, Any], given: str = "") -> Parent:
    """A parent from its folder. `given` is how the experiment names the model, which may be a hub id.

    A hub id is what the user gave or what the hub's own cache calls the folder; nothing else makes one.
    """
    licence = licence_of(folder)
    if (found := HUB_ID.fullmatch(given)) and not Path(given).exists():
        return Parent(name, found[1], True, found[2] or "", sha256, licence)
    folder = Path(os.path.abspath(folder))
    cache = CACHED.fullmatch(folder.parent.parent.name)
    if cache and folder.parent.name == "snapshots" and SNAPSHOT.fullmatch(folder.name):
        return Parent(name, f"{cache[1]}/{cache[2]}", True, folder.name, sha256, licence)
    claimed = str(config.get("_name_or_path", ""))
    hint = claimed if HUB_ID.fullmatch(claimed) else ""
    return Parent(name, folder.name or name, False, "", sha256, licence, hint)


def model_card(
    recipe: Recipe, parents: Sequence[Parent], history: History | None = None, candidate: int | None = None
) -> str:
    """README.md of an export of a canonical recipe; base first among `parents`.

    With a run (`history` and the number of the candidate in it) the card says how the recipe was found and what it
    scored; without one it says that it was not scored.
    """
    parts = ["---", _front_matter(parents, history, candidate), "---", "", f"# {_title(parents, history)}", ""]
    experts = ", ".join(md(p.name) for p in parents[1:]) or "nothing else"
    parts += [
        f"The base {md(parents[0].name)} merged with {experts} by evomerge: a recipe over weights, no training."
        if recipe.route is None
        else f"Layers of {md(parents[0].name)}, {experts} in a new order, by evomerge: a layer route, no training.",
        "",
    ]
    parts += ["## Parents", "", *_parents(parents), ""]
    if history is None or candidate is None:
        parts += [
            "## Scores",
            "",
            "The recipe was written by hand, or its run is not part of this export: no scores.",
            "",
        ]
    else:
        entry = history.entry(candidate)
        parts += ["## How the recipe was found", "", *_search(history, entry), ""]
        parts += ["## Scores", "", *_scores(history, entry), ""]
    parts += ["## Recipe", "", *_recipe(recipe), "", "## Use", "", *_use(), ""]
    parts += ["## Rebuild and verify", "", *_rebuild(), ""]
    return "\n".join(parts)


def md(text: str) -> str:
    """A stranger's text as one line of markdown that is only text: no markup, table bars, links or HTML."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]
    plain = "".join(_ENTITIES.get(c) or (f"\\{c}" if c in _MARKUP else c) for c in line)
    return re.sub(r"(?i)(://|\bwww\.)", lambda m: m[0][:-1] + "\\" + m[0][-1], plain)  # bare addresses are links too


_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
_MARKUP = frozenset("\\`*_{}[]#|~$@!^")


def _fenced(text: str, language: str) -> list[str]:
    """A code block whose fence is longer than any row of backticks in it."""
    longest = max((len(m) for m in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", text.rstrip("\n"), fence]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(r)} |" for r in (header, ["---"] * len(header), *rows)]


def _title(parents: Sequence[Parent], history: History | None) -> str:
    if history is not None:
        return md(history.experiment.name)
    return "Merge of " + ", ".join(md(p.name) for p in parents[1:]) if parents[1:] else md(parents[0].name)


# -- for the hub ----------------------------------------------------------------------------------------------


def _front_matter(parents: Sequence[Parent], history: History | None, candidate: int | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    licence = common_licence({p.name: p.licence for p in parents})
    data: dict[str, Any] = {"license": "other", "license_name": "those-of-the-parents"}
    if licence is not None:
        name = re.sub(r"[^a-z0-9.+-]+", "-", licence.id)
        data = {"license": "other", "license_name": name} if licence.custom else {"license": licence.id}
        data["license_link"] = licence.link or None
    scored = []
    if history is not None and candidate is not None and (scores := history.entry(candidate).scores("report")):
        for t in history.experiment.benchmarks:
            score, low, high = interval(scores[t.name][t.report_metric])
            n = len(scores[t.name][t.report_metric])
            scored.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type="custom",
                    dataset_name=t.name,
                    dataset_config=t.name,
                    dataset_split="report",
                    metric_type=t.report_metric,
                    metric_name=f"{t.report_metric}, 95% interval {low:.4f} to {high:.4f}, n={n}",
                    metric_value=round(score, 4),
                )
            )
    on_hub = list(dict.fromkeys(p.model for p in parents if p.hub))
    card = ModelCardData(
        base_model=on_hub or None,  # the hub takes its own ids only
        base_model_relation="merge" if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merge", "evomerge"],
        model_name=history.experiment.name if history is not None else None,
        eval_results=scored or None,
        **data,
    )
    return str(card.to_yaml(line_break="\n"))


# -- for people -----------------------------------------------------------------------------------------------


def _parents(parents: Sequence[Parent]) -> list[str]:
    rows = []
    for i, p in enumerate(parents):
        model = md(p.model) + (f" at {md(p.revision[:12])}" if p.revision else "")
        if not p.hub:
            model += " (a local folder)"
        if p.hint:
            model += f"; its config.json names {md(p.hint)}, unchecked"
        rows.append(["base" if i == 0 else "expert", md(p.name), model, f"`{p.sha256[:12]}`", md(p.licence.id)])
    lines = _table(["role", "name", "model", "sha256 of the weights", "licence"], rows)
    if not all(p.hub for p in parents):
        lines += ["", "`base_model` above names those parents only whose id on the hub is known."]
    found = remarks({p.name: p.licence for p in parents})
    if found:
        return [*lines, "", "Licences, as the parents' own files state them:", "", *(f"- {md(r)}" for r in found)]
    if (common := common_licence({p.name: p.licence for p in parents})) is not None:
        return [*lines, "", f"All parents are under {md(common.id)}, as their own files state."]
    return [*lines, "", "The parents' licences differ; none asks for more than to be named and passed on."]


def _search(history: History, entry: Entry) -> list[str]:
    search = history.experiment.search
    asked = sum(e.role == "search" for e in history.entries.values())
    methods = sorted({history.experiment.algorithm_of(s)[0] for s in history.experiment.stages})
    lines = [
        f"Candidate {entry.id} of the experiment {md(history.experiment.name)} "
        f"(`{str(history.facts['experiment_id'])[:12]}`): {asked} candidates were searched by "
        f"{md(' and '.join(methods))} with seed {search.seed} and scored on the search split."
    ]
    if entry.id == history.winner_id:
        lines.append(
            "The winner was chosen among the best of them on the select split and reported on the report split, "
            "which no search saw."
        )
    if entry.role == "baseline":
        lines.append(f"It is the baseline {md(entry.name)}, which was there before the search.")
    return lines


def _scores(history: History, entry: Entry) -> list[str]:
    split = next((s for s in ("report", "select", "search") if entry.scores(s) is not None), None)
    if split is None:
        return ["This candidate has no scores."]
    own = entry.scores(split)
    assert own is not None
    others = {n: s for n, e in history.baselines.items() if e is not entry and (s := e.scores(split)) is not None}
    tasks = history.experiment.benchmarks
    mean = [MEAN] if comparable(history) else []
    columns = {t.name: own[t.name][t.report_metric] for t in tasks}
    header = ["model", *(f"{md(t.name)}, {md(t.report_metric)} (n={len(columns[t.name])})" for t in tasks), *mean]
    rows = [[f"**{n}**" if s is own else md(n), *_row(history, s)] for n, s in {"this merge": own, **others}.items()]
    lines = [f"On the {split} split, with 95% intervals.", "", *_table(header, rows)]
    if others:
        rows = [[md(n), *_differences(history, own, s)] for n, s in others.items()]
        lines += ["", "This merge minus each, paired by item, with 95% intervals and p-values.", ""]
        lines += _table(["minus", *(md(t.name) for t in tasks), *mean], rows)
    lines += ["", *(f"- {md(n)}" for n in _notes(history, entry, split))]
    return lines


def _row(history: History, scores: Scores) -> list[str]:
    columns = [scores[t.name][t.report_metric] for t in history.experiment.benchmarks]
    cells = list(map(interval, columns))
    if comparable(history):
        cells.append(mean_over_tasks(columns)[:3])
    return [f"{score:.3f}{_spread(low, high)}" for score, low, high in cells]


def _spread(low: float, high: float, form: str = ".2f") -> str:
    return spread(low, high, form).replace("[", "\\[").replace("]", "\\]")


def _differences(history: History, own: Scores, other: Scores) -> list[str]:
    pairs = [(own[t.name][t.report_metric], other[t.name][t.report_metric]) for t in history.experiment.benchmarks]
    cells = [difference(a, b) for a, b in pairs]
    if comparable(history):
        cells.append(mean_over_tasks([a.astype("float64") - b.astype("float64") for a, b in pairs]))
    return [
        f"{d:+.3f}{_spread(low, high, '+.2f')}, p {'< 0.001' if p < 0.001 else f'= {p:.2g}'}"
        for d, low, high, p in cells
    ]


def _notes(history: History, entry: Entry, split: str) -> list[str]:
    """What a reader should know before believing the numbers."""
    if split != "report":
        return [
            f"The numbers are of the {split} split, which the search or the choice of its winner saw: "
            "they are too good, by an unknown amount."
        ]
    out = []
    if entry.id == history.winner_id:
        r = results(history)
        if {"search", "report"} <= set(r.optimism):
            found, held = r.optimism["search"], r.optimism["report"]
            out.append(
                f"Mean on the search split {found:.3f}, on the report split {held:.3f}: optimism {found - held:+.3f}."
            )
        out += [w[0].upper() + w[1:] + "." for w in warnings_on(history, r)]
    times = "once" if history.looks == 1 else f"{history.looks} times, once for each budget"
    out.append(f"The report split was looked at {times}.")
    out.append("The items are the experiment's own; nothing here says how the model does on other tasks.")
    return out


def _recipe(recipe: Recipe) -> list[str]:
    form = "Blocks without a rule are the base's."
    if recipe.segments is not None:
        form = "Piecewise: from each cut to the next, counted in weights, a linear mix of the parents."
    if recipe.route is not None:
        form = f"A route of {len(recipe.route.hops)} hops: {md(path_text(recipe.route, STRETCHES))}. {form}"
    return [
        f"`{recipe.id}`, built in {recipe.dtype}. {form}",
        "",
        "<details>\n<summary>recipe</summary>\n",
        *_fenced(recipe.grouped().to_yaml(), "yaml"),
        "\n</details>",
    ]


def _use() -> list[str]:
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or the name of its repository\n'
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
    )
    return _fenced(code, "python")


def _rebuild() -> list[str]:
    commands = (
        "evomerge merge recipe.yaml --to rebuilt   # the parents' folders stand in recipe.yaml\n"
        "evomerge verify .                         # rebuilds, compares every tensor, repeats the scores\n"
    )
    return [
        *_fenced(commands, "sh"),
        "",
        "Both check the parents' weights by the hashes above. `evomerge.json` records a hash for every tensor.",
    ]
