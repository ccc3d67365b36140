"""The YAML libraries: by name from anywhere, by path beside the file that names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge import library
from evomerge.errors import UserError, nearest
from evomerge.library import KINDS, entries, find, located


@pytest.mark.parametrize("kind", KINDS)
def test_every_library_has_entries(kind: str) -> None:
    """Each library has named YAML files that are found by their name."""
    known = entries(kind)

    assert known
    for name, path in known.items():
        assert path.stem == name
        assert find(kind, name, Path("/")) == path
        assert path.is_file()


def test_packaged_copies_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the wheel brings an entry, it hides the checkout's of the same name; others are found in both."""
    for root, names in (("package", ("a", "b")), ("checkout", ("b", "c"))):
        (tmp_path / root / "fitness").mkdir(parents=True)
        for name in names:
            (tmp_path / root / "fitness" / f"{name}.yaml").write_text(root)
    monkeypatch.setattr(library, "roots", lambda: iter([tmp_path / "package", tmp_path / "checkout"]))

    assert {n: p.read_text() for n, p in entries("fitness").items()} == {
        "a": "package",
        "b": "package",
        "c": "checkout",
    }


def test_files_are_found_beside(tmp_path: Path) -> None:
    """A name that ends in .yaml or .yml is a file beside the one that names it, or an absolute path."""
    for name in ("a.yaml", "b.yml"):
        (tmp_path / name).write_text("")
        assert find("fitness", name, tmp_path) == tmp_path / name
    assert find("fitness", str(tmp_path / "a.yaml"), Path("/")) == tmp_path / "a.yaml"


@pytest.mark.parametrize(
    ("name", "words"),
    [("skils", "did you mean 'skills'?"), ("none.yaml", "no such file"), ("../fitness/skills", "unknown fitness")],
)
def test_unknown_entries_are_refused(name: str, words: str, tmp_path: Path) -> None:
    """An unknown name gets the nearest one, a missing file its path; names lead to no other folder."""
    with pytest.raises(UserError) as caught:
        find("fitness", name, tmp_path)

    assert words in str(caught.value)


def test_nearest_names() -> None:
    """A close name is suggested; without one the known names are listed, at most twelve."""
    assert nearest("wieght", ["weight", "density"]) == "; did you mean 'weight'?"
    assert nearest("zzz", ["weight", "density"]) == "; known: density, weight"
    assert nearest("zzz", [f"n{i:02}" for i in range(20)]).endswith("n11, ...")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_what_is_no_path_is_one_line(name: str, tmp_path: Path) -> None:
    """A name that no file can have is bad input, not a crash."""
    with pytest.raises(UserError, match="names no file"):
        located(tmp_path, name)
