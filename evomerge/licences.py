"""What licences the parents of a merge carry, and what that means for the merge. No legal advice.

A licence is what the model's own files say: `license` in the front matter of README.md, as the hub reads it, else
a LICENSE file with a well-known heading. Nothing is guessed from names; what cannot be read is "unknown".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import UserError
from evomerge.yamlio import parse_yaml

UNKNOWN = "unknown"
NO_ADVICE = "what these licences mean for you is for you, or a lawyer, to judge: this is no legal advice"
MAX_README = 1_000_000
"""Bytes of a README.md in which its front matter must end; model cards with long result lists stay below."""
MAX_LICENCE = 1_000
"""Bytes of a LICENSE file in which its heading must stand."""
FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md", "COPYING")

HEADINGS: tuple[tuple[str, str], ...] = (
    ("llama 4 community license agreement", "llama4"),
    ("llama 3.3 community license agreement", "llama3.3"),
    ("llama 3.2 community license agreement", "llama3.2"),
    ("llama 3.1 community license agreement", "llama3.1"),
    ("llama 3 community license agreement", "llama3"),
    ("llama 2 community license agreement", "llama2"),
    ("gemma terms of use", "gemma"),
    ("qwen research license agreement", "qwen-research"),
    ("qwen license agreement", "qwen"),
    ("mistral ai research license", "mrl"),
    ("attribution-noncommercial-noderivatives 4.0 international", "cc-by-nc-nd-4.0"),
    ("attribution-noncommercial-sharealike 4.0 international", "cc-by-nc-sa-4.0"),
    ("attribution-noncommercial 4.0 international", "cc-by-nc-4.0"),
    ("attribution-noderivatives 4.0 international", "cc-by-nd-4.0"),
    ("attribution-sharealike 4.0 international", "cc-by-sa-4.0"),
    ("attribution 4.0 international", "cc-by-4.0"),
    ("cc0 1.0 universal", "cc0-1.0"),
    ("gnu affero general public license version 3", "agpl-3.0"),
    ("gnu lesser general public license version 3", "lgpl-3.0"),
    ("gnu general public license version 3", "gpl-3.0"),
    ("gnu general public license version 2", "gpl-2.0"),
    ("apache license version 2.0", "apache-2.0"),
    ("mit license", "mit"),
    ("permission is hereby granted, free of charge, to any person obtaining a copy of this software", "mit"),
)
"""Heading in lower case, blanks collapsed -> the hub's identifier; the first that stands in the text counts."""

CUSTOM = frozenset({"qwen", "qwen-research", "mrl"})
"""Those of `HEADINGS` that are "other" to the hub, by name."""

COMMUNITY: Mapping[str, str] = {
    "llama2": "pass on the agreement and its notice, and keep to its use policy",
    "llama3": "the name of the merge must begin with 'Llama 3', its page say 'Built with Meta Llama 3', "
    "and the agreement go with it",
    **dict.fromkeys(
        ("llama3.1", "llama3.2", "llama3.3", "llama4"),
        "the name of the merge must begin with 'Llama', its page say 'Built with Llama', and the agreement go with it",
    ),
    "gemma": "pass on the Gemma terms with their use restrictions, and the notice that they ask for",
    "qwen": "pass on the agreement and its notice, and name Qwen as it asks",
    "qwen-research": "pass on the agreement and its notice, and name Qwen as it asks",
    "mrl": "pass on the agreement with the weights",
    **dict.fromkeys(
        ("openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "bigcode-openrail-m"),
        "pass on its use restrictions with the weights",
    ),
    "bigscience-bloom-rail-1.0": "pass on its use restrictions with the weights",
}
"""Licences with terms of their own, beside the hub's `license_name`s -> what they ask of those who share a merge."""
NON_COMMERCIAL = re.compile(r"cc-by-nc(-.*)?|qwen-research|mrl|apple-amlr|.*non-?commercial.*")
NO_DERIVATIVES = re.compile(r"cc-by(-nc)?-nd(-.*)?")
SHARE_ALIKE = re.compile(r"cc-by(-nc)?-sa(-.*)?|a?gpl(-.*)?|lgpl(-.*)?|cdla-sharing-1\.0|odbl|osl-3\.0|eupl-1\.[12]")


@dataclass(frozen=True)
class Licence:
    """A parent's licence: the hub's identifier, where it was read, a link.

    A `custom` one is "other" to the hub, and `id` the name beside it (`license_name`). `problem` says what was odd
    about the files, in a few words.
    """

    id: str = UNKNOWN
    source: str = ""
    custom: bool = False
    link: str = ""
    problem: str = ""

    @property
    def known(self) -> bool:
        """False where nothing was said, or nothing that says which."""
        return self.id not in (UNKNOWN, "other")


def licence_of(folder: Path) -> Licence:
    """The licence that a model folder states. Reads README.md and LICENSE only; never raises for what they hold."""
    try:
        front, problem = front_matter(folder), ""
    except UserError as e:
        front, problem = {}, str(e)
    stated = _stated(front)
    text = _recognised(folder)
    if stated is None:
        return Licence(*text, custom=text[0] in CUSTOM, problem=problem) if text else Licence(problem=problem)
    if text and stated != text[0]:
        problem = f"README.md says {stated}, but {text[1]} reads as {text[0]}"
    link = front.get("license_link")
    web = isinstance(link, str) and re.fullmatch(r"https?://[!-~]{1,500}", link)
    custom = not isinstance(front["license"], str) or front["license"] == "other"
    return Licence(stated, "README.md", custom, str(link) if web else "", problem)


def front_matter(folder: Path) -> dict[str, Any]:
    """The YAML block at the top of README.md; {} where there is none. Raises UserError where it is not readable."""
    text = _start(folder / "README.md", MAX_README)
    found = re.match(r"\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if found is None:
        return {}
    data = parse_yaml(found[1], "README.md")
    return data if isinstance(data, dict) else {}


def _stated(front: Mapping[str, Any]) -> str | None:
    """`license` of a front matter as one identifier, or None."""
    value = front.get("license")
    if value == "other":
        value = front.get("license_name", "other")
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = " or ".join(value)  # the hub lets an owner name several to choose from
    if not isinstance(value, str) or not value.strip() or value.strip().lower() == UNKNOWN:
        return None
    return "".join(c for c in " ".join(value.lower().split())[:100] if c.isprintable()) or None


def _recognised(folder: Path) -> tuple[str, str] | None:
    """(identifier, file) of the first LICENSE file with a heading that is known."""
    for name in FILES:
        text = " ".join(_start(folder / name, MAX_LICENCE).lower().replace(",", "").split())
        for heading, licence in HEADINGS:
            if heading.replace(",", "") in text:
                return licence, name
    return None


def _start(path: Path, size: int) -> str:
    """The first bytes of a plain file as text; "" where there is none."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(size).decode("utf-8", "replace")
    except OSError:
        return ""


def common_licence(licences: Mapping[str, Licence]) -> Licence | None:
    """The licence that all parents share, or None where they differ or one is unknown."""
    first = next(iter(licences.values()))
    return first if first.known and all(li.id == first.id for li in licences.values()) else None


def remarks(licences: Mapping[str, Licence]) -> list[str]:
    """What to look at before a merge of these parents (name -> licence) is used or shared; [] where all is plain.

    The rules, by identifier (`NO_DERIVATIVES`, `NON_COMMERCIAL`, `SHARE_ALIKE`, `COMMUNITY`):
    a licence against derivatives forbids sharing the merge; one against commercial use binds the whole merge;
    share-alike asks for its own licence, which no second licence with conditions of its own leaves free;
    community agreements apply together, each with what it asks for.
    """
    out = [f"{name!r}: {li.problem}" for name, li in licences.items() if li.problem]
    if unknown := [n for n, li in licences.items() if not li.known]:
        out.append(f"licence of {_names(unknown)} unknown: ask the owner before you share a merge")
    by_id: dict[str, list[str]] = {}
    for name, li in licences.items():
        if li.known:
            by_id.setdefault(li.id, []).append(name)
    for i, names in by_id.items():
        if NO_DERIVATIVES.fullmatch(i):
            out.append(f"{_names(names)}: {i} allows no derivatives, and a merge is one; it may not be shared")
    closed = sorted(i for i in by_id if NON_COMMERCIAL.fullmatch(i))
    if closed:
        names = sorted(n for i in closed for n in by_id[i])
        out.append(f"{_names(names)}: {' and '.join(closed)}, so the whole merge is non-commercial")
    alike = [i for i in by_id if SHARE_ALIKE.fullmatch(i)]
    conditions = [i for i in by_id if i in alike or i in closed or i in COMMUNITY]
    for i in alike:
        others = [o for o in conditions if o != i and (o not in alike or o > i)]  # a pair is named once
        for other in others:
            out.append(
                f"{i} ({_names(by_id[i])}) wants the merge under itself, which conflicts with {other} "
                f"({_names(by_id[other])}) unless the two are compatible"
            )
        if len(by_id) > 1 and len(conditions) == 1:
            out.append(f"{_names(by_id[i])}: {i} is share-alike, so the merge must be under it too")
    for i, names in by_id.items():
        if i in COMMUNITY:
            out.append(f"{_names(names)}: {i}: {COMMUNITY[i]}")
    return [*out, NO_ADVICE] if out else []


def _names(names: list[str]) -> str:
    return ", ".join(repr(n) for n in names)
