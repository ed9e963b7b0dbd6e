"""The table of sites in docs/design.md is what the code says."""

import itertools
import re
from pathlib import Path

import tiny
from softprompts import injection
from softprompts.backbone import FAMILIES
from softprompts.errors import BackboneError

DESIGN = Path(__file__).parents[1] / "docs" / "design.md"
SITES = ("input", "decoder", "layers", "kv")


def cell(name: str, site: str) -> str:
    """The width of the site on a tiny model, or why it has none."""
    try:
        return str(injection.prompt_width(tiny.backbone(name), injection.Site(site)))
    except BackboneError:
        return "-"


def table() -> str:
    """Markdown: one line for each tested model, with its prompt width D at each site."""
    lines = [
        f"| family | model | prompt | {' | '.join(f'`{site}`' for site in SITES)} |",
        f"|---|---|---|{'---|' * len(SITES)}",
    ]
    for family, name in itertools.product(FAMILIES.values(), tiny.ALL):
        if tiny.family(name) is family:
            place = injection.resolve_placement(tiny.backbone(name), injection.Site()).replace("_", " the ")
            cells = " | ".join(cell(name, site) for site in SITES)
            lines.append(f"| {family.name} | {name} | {place.replace('the start', 'the first token')} | {cells} |")
    return "\n".join(lines)


def test_site_table() -> None:
    found = re.search(r"<!-- sites -->\n(.*?)\n<!-- /sites -->", DESIGN.read_text(), re.DOTALL)
    assert found, "docs/design.md has no block between <!-- sites --> and <!-- /sites -->"
    assert found[1].strip() == table(), f"put this between the marks in docs/design.md:\n{table()}"


def test_every_cell_is_a_family_s_site() -> None:
    """A family names no site that none of its models has, and no model has a site its family does not name."""
    for family in FAMILIES.values():
        names = [name for name in tiny.ALL if tiny.family(name) is family]
        for site in SITES:
            assert any(cell(name, site) != "-" for name in names) == (site in family.sites)
