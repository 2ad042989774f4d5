"""The README: its figures are those of assets/results/, its links lead somewhere, it stays short.

A comment in the README names where the figures of the block under it are from: a file, and which of
its values, in their order (without names: all of them).

    <!-- demo.json: knn -->

Links to functions name their lines. When these have moved, this mends the README:

    python tests/test_figures.py
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "assets" / "results"
RECORD = ("what", "machine", "torch", "python", "commit", "command", "seeds", "values")

MARK = re.compile(r"<!-- (\w[\w-]*\.json.*?) -->\n", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?!\w)")
NAME = re.compile(r"[A-Za-z]+-?\d+")  # knn20, base-16

LINK = re.compile(r"\[`(\w+)`\]\((\w+\.py)(?:#L\d+)?\)")  # [`function`](file.py#L12)

# Numbers with a decimal point that no one measured: settings, versions, and what a paper says.
SETTINGS = {"0.0025", "0.02", "0.04", "0.05", "0.01", "0.1", "0.3", "0.4", "0.8", "0.9", "0.996"}
SETTINGS |= {"1.0", "1.25", "3.0", "0.2"}
VERSIONS = {"2204.07141", "2210.07277"}  # of papers
VERSIONS |= {"3.10", "3.11", "3.12", "3.13", "3.14"}  # of Python
VERSIONS |= {"2.6", "2.2", "2.13", "2.14", "1.26", "2.4", "2.5"}  # of torch and numpy

MOST_LINES = 250  # outside of what is folded away
LONGEST_LINE = 120


class Shown(NamedTuple):
    """A block of the README and where its figures are from."""

    source: str  # the comment: files and names of values
    block: str


def shown_figures(readme: str) -> list[Shown]:
    """Every block that a comment stands over: a table, a paragraph, or a fence to its end."""
    found = []
    for mark in MARK.finditer(readme):
        rest = readme[mark.end() :]
        last = "\n```\n" if rest.startswith("```") else "\n\n"
        end = rest.index(last) + len(last)
        found.append(Shown(mark[1], rest[:end]))
    return found


def numbers_shown(block: str) -> list[float]:
    """The numbers of a block in their order; those in `code` are settings, not figures."""
    if not block.startswith("```"):
        block = re.sub(r"`[^`]*`|\]\([^)]*\)", "", block)
    return [float(number.replace(",", "")) for number in NUMBER.findall(block)]


def names_of(source: str) -> list[tuple[str, str | None]]:
    """What a comment names: pairs of a file and a value, None for all values of the file."""
    pairs = []
    file = ""
    for part in source.split(";"):
        part = " ".join(part.split())
        if ".json" in part:
            file, _, part = part.partition(":")
        pairs.append((file, part.strip() or None))
    return pairs


def numbers_in(value) -> list[float]:
    """The numbers of a value of a record, in their order: in lists, dicts, and not in text."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        numbers = []
        for item in value:
            numbers += numbers_in(item)
        return numbers
    return [value] if isinstance(value, (int, float)) else []


def read_values(file: str) -> dict:
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))["values"]


def numbers_measured(source: str) -> list[float]:
    """The numbers that a comment of the README names."""
    numbers = []
    for file, name in names_of(source):
        values = read_values(file)
        numbers += numbers_in(values if name is None else values[name])
    return numbers


def names_shown(block: str) -> set[str]:
    """Names with digits in a block, but for those in `code`."""
    if not block.startswith("```"):
        block = re.sub(r"`[^`]*`|\]\([^)]*\)", "", block)
    return set(NAME.findall(block))


def names_measured(source: str) -> set[str]:
    """Names with digits in the records that a comment of the README names."""
    found = set()
    for file, _ in names_of(source):
        found |= set(NAME.findall((RESULTS / file).read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("shown", shown_figures(README), ids=lambda shown: shown.source)
def test_figures_of_the_readme_are_those_of_the_results(shown):
    """Each number of a block is the one that was measured: no digit more, less or different. Names
    with digits, as of recipes, are names of the record."""
    assert numbers_shown(shown.block) == numbers_measured(shown.source)
    assert names_shown(shown.block) <= names_measured(shown.source)


@pytest.mark.parametrize("file", sorted(path.name for path in RESULTS.glob("*.json")))
def test_every_result_says_how_it_was_measured_and_is_shown(file):
    """A record names machine, commit, command and seeds, and the README shows all its values."""
    record = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    assert set(RECORD) <= set(record)

    named = set()
    for shown in shown_figures(README):
        for named_file, name in names_of(shown.source):
            if named_file == file:
                named |= {name} if name else set(record["values"])
    assert named == set(record["values"])


def test_no_figure_stands_without_its_source():
    """A number with a decimal point is in a block with a source, in code, or a known setting."""
    rest = README
    for shown in shown_figures(README):
        rest = rest.replace(shown.block, "")
    rest = re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)", "", rest, flags=re.DOTALL)
    assert set(re.findall(r"\d[\d,]*\.\d+", rest)) <= SETTINGS | VERSIONS


def line_of(function: str, file: str) -> int:
    """The line on which a function or class is defined, from 1."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [
        number
        for number, line in enumerate(lines, 1)
        if re.match(rf"\s*(def|class) {function}\b", line)
    ]
    assert found, f"{file} has no {function}"
    return found[0]


def with_lines(readme: str) -> str:
    """The README, its links to functions leading to the lines where these are now."""
    return LINK.sub(lambda link: f"[`{link[1]}`]({link[2]}#L{line_of(link[1], link[2])})", readme)


def test_links_to_functions_name_functions_that_exist():
    """Each linked function is defined in the file that the link leads to."""
    links = LINK.findall(README)
    assert len(links) > 10
    for function, file in links:
        line_of(function, file)


def test_links_to_functions_lead_to_their_lines():
    """Each link opens the file at the line where the function is defined."""
    assert with_lines(README) == README


def test_the_readme_is_short():
    """At most 250 lines outside of folds, none of the page above 120 characters."""
    unfolded = re.sub(r"<details>.*?</details>\n*", "", README, flags=re.DOTALL)
    assert len(unfolded.splitlines()) <= MOST_LINES
    too_long = [line for line in README.splitlines() if len(line) > LONGEST_LINE]
    assert not too_long


def test_links_within_the_readme_lead_somewhere():
    """Each link to a file or a heading of this folder has its target."""
    headings = set()
    for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE):
        headings.add("#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-"))
    for target in re.findall(r"\]\(([^)]*)\)", README):
        if target.startswith("#"):
            assert target in headings
        elif not target.startswith("http"):
            assert (ROOT / target.partition("#")[0]).exists(), target


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_lines(README), encoding="utf-8")
