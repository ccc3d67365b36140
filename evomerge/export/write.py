"""One candidate of a run, written: as a checkpoint folder or as a mergekit configuration."""

from __future__ import annotations

from pathlib import Path

from evomerge.errors import UserError
from evomerge.export.hf import mergekit_config, write_hf
from evomerge.export.mergekit import to_mergekit
from evomerge.export.record import scores_for_record
from evomerge.export.verify import open_recipe_pool
from evomerge.files import new_file
from evomerge.history import History
from evomerge.yamlio import dump_yaml

FORMATS = ("hf", "mergekit")


def write_export(history: History, number: int, form: str, target: Path) -> Path:
    """Write candidate `number` to `target`, which must not be there yet; returns it.

    `form` is `hf` (a folder that stock transformers loads, with a model card and a record for `verify`) or `mergekit`
    (a file that `mergekit-yaml` executes to the same weights). Raises UserError for unknown candidates and forms,
    sources that changed since the run, and recipes that mergekit cannot express.
    """
    if form not in FORMATS:
        raise UserError(f"unknown export format {form!r}; there are {' and '.join(FORMATS)}")
    recipe = history.recipe(number)
    if form == "mergekit" and recipe.route is None:
        new_file(target, dump_yaml(to_mergekit(recipe, history.manifest, history.source_paths())))
        return target
    pool, manifest = open_recipe_pool(recipe, history.source_paths())
    recipe.canonical(manifest)  # refuses sources that changed since the run
    if form == "mergekit":
        new_file(target, dump_yaml(mergekit_config(recipe, pool, manifest)))
        return target
    scores, fitness = scores_for_record(history, number)
    notes = {
        "experiment": history.experiment.name,
        "experiment_id": history.facts["experiment_id"],
        "candidate": number,
    }
    return write_hf(
        target,
        recipe,
        pool,
        manifest,
        scores=scores,
        fitness=fitness,
        notes=notes,
        history=history,
        candidate=number,
    )


def write_asked(history: History, form: str | None) -> None:
    """Write the winner as exports/FORM in the run directory, where an experiment asks for a form, and once."""
    if form is not None and history.winner_id is not None:
        target = history.path / "exports" / form
        if not target.exists():
            write_export(history, history.winner_id, form, target)
