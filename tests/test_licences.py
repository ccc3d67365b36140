"""Licences of parents: read from their own files, unknown where those say nothing, conflicts by a table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evomerge.licences import NO_ADVICE, Licence, common_licence, front_matter, licence_of, remarks

MIT = "MIT License\n\nCopyright (c) 2024 Somebody\n\nPermission is hereby granted, free of charge, ..."


def folder(tmp_path: Path, readme: str | None = None, **files: str) -> Path:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def of(**ids: str) -> dict[str, Licence]:
    return {name: Licence(i) for name, i in ids.items()}


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: mit", "mit"),
        ("license: Apache-2.0\ntags: [a]", "apache-2.0"),
        ("license: other\nlicense_name: qwen-research\nlicense_link: https://hf.co/x/LICENSE", "qwen-research"),
        ("license: [mit, apache-2.0]", "mit or apache-2.0"),
        ("license: unknown", "unknown"),
        ("license: 7", "unknown"),
        ("tags: [merge]", "unknown"),
        ("- a list", "unknown"),
    ],
)
def test_front_matter_states_the_licence(front: str, expected: str, tmp_path: Path) -> None:
    """`license`, or `license_name` where it is "other", in lower case; anything else is unknown."""
    licence = licence_of(folder(tmp_path, f"---\n{front}\n---\n\n# A model\n"))

    assert licence.id == expected
    assert licence.known == (expected != "unknown")


def test_other_without_a_name_is_not_known(tmp_path: Path) -> None:
    """`license: other` alone does not say which."""
    assert not licence_of(folder(tmp_path, "---\nlicense: other\n---\n")).known


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MIT, "mit"),
        ("                     Apache License\n               Version 2.0, January 2004", "apache-2.0"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT\nMeta Llama 3 Version Release Date: ...", "llama3"),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT", "llama3.1"),
        ("Gemma Terms of Use\n\nLast modified: ...", "gemma"),
        ("Creative Commons Attribution-NonCommercial 4.0 International Public License", "cc-by-nc-4.0"),
        ("Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International", "cc-by-nc-sa-4.0"),
        ("GNU GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007", "gpl-3.0"),
        ("All rights reserved.", "unknown"),
        ("Ours. " + "x" * 1000 + " Parts of it are under the " + MIT, "unknown"),
    ],
)
def test_licence_files_are_known_by_their_headings(text: str, expected: str, tmp_path: Path) -> None:
    """Without a front matter a LICENSE file counts, if its beginning holds a known heading."""
    assert licence_of(folder(tmp_path, "# Just words\n", LICENSE=text)).id == expected


def test_a_contradiction_is_a_problem(tmp_path: Path) -> None:
    """README.md wins, and the other reading is told."""
    licence = licence_of(folder(tmp_path, "---\nlicense: apache-2.0\n---\n", **{"LICENSE.txt": MIT}))

    assert licence.id == "apache-2.0"
    assert licence.problem == "README.md says apache-2.0, but LICENSE.txt reads as mit"
    assert remarks({"x": licence})[0] == f"'x': {licence.problem}"


@pytest.mark.parametrize(
    "front",
    ["a: &x [1]\nlicense: *x", "license: mit\nlicense: gpl", "license: [", "x: " + "[" * 60 + "]" * 60],
    ids=["alias", "twice", "broken", "deep"],
)
def test_hostile_front_matter(front: str, tmp_path: Path) -> None:
    """What bounded YAML refuses is an unknown licence with a problem, never an exception."""
    licence = licence_of(folder(tmp_path, f"---\n{front}\n---\n"))

    assert not licence.known
    assert "README.md" in licence.problem


def test_a_front_matter_without_an_end_is_none(tmp_path: Path) -> None:
    """No more than the bounded beginning is looked at."""
    assert front_matter(folder(tmp_path, "---\n" + "a: 1\n" * 300_000 + "---\n")) == {}


def test_special_files_are_left_alone(tmp_path: Path) -> None:
    """A pipe instead of a README does not block, a folder does not fail."""
    os.mkfifo(tmp_path / "README.md")
    (tmp_path / "LICENSE").mkdir()

    assert licence_of(tmp_path) == Licence()


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    """An identifier is one printable line of bounded length, a link is a plain web address."""
    front = 'license: "m\\e[31mit\\n' + "x" * 500 + '"\nlicense_link: "javascript:alert(1)"'
    licence = licence_of(folder(tmp_path, f"---\n{front}\n---\n"))

    assert licence.id.isprintable()
    assert len(licence.id) <= 100
    assert licence.link == ""


def test_parents_that_agree_need_no_remark() -> None:
    """Permissive licences, equal or not, raise nothing; only equal ones are the merge's."""
    assert remarks(of(base="mit", x="mit")) == remarks(of(base="mit", x="apache-2.0")) == []
    same = common_licence(of(base="mit", x="mit"))
    assert same is not None
    assert same.id == "mit"
    assert common_licence(of(base="mit", x="apache-2.0")) is None
    assert common_licence(of(base="unknown", x="unknown")) is None


@pytest.mark.parametrize(
    ("licences", "fragments"),
    [
        (of(base="mit", x="unknown"), ["licence of 'x' unknown"]),
        (of(base="apache-2.0", x="cc-by-nc-4.0"), ["'x': cc-by-nc-4.0, so the whole merge is non-commercial"]),
        (of(base="mit", x="gpl-3.0"), ["'x': gpl-3.0 is share-alike, so the merge must be under it too"]),
        (of(base="gpl-3.0", x="cc-by-sa-4.0"), ["cc-by-sa-4.0 ('x') wants the merge under itself"]),
        (of(base="llama3.1", x="gpl-3.0"), ["conflicts with llama3.1 ('base')", "must begin with 'Llama'"]),
        (of(base="llama3", x="gemma"), ["must begin with 'Llama 3'", "Gemma terms"]),
        (of(base="mit", x="cc-by-nd-4.0"), ["cc-by-nd-4.0 allows no derivatives"]),
        (of(base="cc-by-nc-sa-4.0", x="mit"), ["non-commercial", "must be under it too"]),
    ],
)  # fmt: skip
def test_conflicts(licences: dict[str, Licence], fragments: list[str]) -> None:
    """Each rule of the table, one remark a rule, and the sentence on advice at the end."""
    found = remarks(licences)

    assert found[-1] == NO_ADVICE
    assert len(found) - 1 == len(fragments)
    for fragment, remark in zip(fragments, found, strict=False):
        assert fragment in remark


def test_the_quickstart_is_mit(quickstart: Path) -> None:
    """The shipped models state their licence in their own folders."""
    models = sorted((quickstart / "models").iterdir())

    assert len(models) == 5
    assert {licence_of(m).id for m in models} == {"mit"}
