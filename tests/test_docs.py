"""The pages of the site: links, navigation, words, generated parts. `make docs` builds it."""

import importlib.util
import os
import re
from pathlib import Path

import fpn_ext
import pytest
from fpn_ext.__main__ import VERBS
from fpn_ext.keys import Key

DOCS = sorted(Path("docs").rglob("*.md"))
PAGES = [*DOCS, Path("configs/README.md"), Path("datasets/README.md")]
LINKED = [*PAGES, Path("README.md"), *sorted(Path("results").rglob("*.md"))]
INDEX = Path("docs/index.md")

spec = importlib.util.spec_from_file_location("generate", "docs/generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)

# What reads as translated, and what to write instead; code is not looked at.
WORDS = {
    r"data sets?\b": "dataset",
    r"\bserves?\b(?! as)": "supports, works",
    r"\bby hand\b": "explicitly set, manually, on paper",
    r"\b(equal )?to the bit\b": "bit-identical, bit-exact with",
    r"\b(goes?|gone|went) on (where|with|from)\b": "continues, resumes",
    r"\bpictures?\b": "image",
    r"\bin the place of\b": "instead of",
    r"\bnobody\b": "nothing, no one",
    r"\bon end\b": "in a row",
    r"\ball else\b": "everything else",
    r"\bto rounding\b": "within rounding error",
    r"\bat the most\b": "at most",
    r"\bnot at hand\b": "not available",
    r"\b(un)?refused\b": "rejected",
    r"\bhas (it|them) by (it|them)sel(f|ves)\b": "always has",
}


def without_code(text):
    """Prose alone: no code blocks, code spans, quoted messages or generated parts."""
    text = re.sub(r"<!-- generated: .*?<!-- end -->", "", text, flags=re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    text = re.sub(r"^( {4}|\t|>).*$", "", text, flags=re.M)
    return re.sub(r'`[^`\n]+`|"[^"\n]*"', "", text)


def slug(heading):
    """The anchor of a heading, as a forge and MyST make it."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")


def anchors(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, flags=re.M)}


@pytest.mark.parametrize("page", LINKED, ids=str)
def test_links_and_anchors_resolve(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        exact = file.exists() and (not anchor or anchor in anchors(file))
        if not exact:
            broken.append(target)
    assert broken == []


def test_anchors_are_those_of_headings(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# The paper's Eq. 1\n\n```\n# code\n```\n\n## `LEVELS`: p2-p6\n")
    assert anchors(page) == {"the-papers-eq-1", "levels-p2-p6"}


def test_the_navigation_has_every_page_once_and_the_index_links_to_it():
    index = INDEX.read_text()
    listed = [
        line
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", index, flags=re.S | re.M)
        for line in block.splitlines()
        if line and not line.startswith(":")
    ]
    files = [Path(os.path.normpath(INDEX.parent / f"{entry}.md")) for entry in listed]
    assert len(set(files)) == len(files)
    assert all(file.exists() for file in files)
    assert set(PAGES) - {INDEX} <= set(files)
    linked = {
        Path(os.path.normpath(INDEX.parent / target))
        for target in re.findall(r"\]\(([^)\s]+\.md)\)", index)
    }
    assert linked == {file for file in files if file.parts[0] != "results"}


def test_the_generated_parts_are_current():
    stale = [str(page) for page, text in generate.generated().items() if page.read_text() != text]
    assert stale == [], "python docs/generate.py"


def test_every_key_is_in_the_reference():
    text = Path("docs/reference/keys.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.M))
    cfg = fpn_ext.get_cfg()
    for node in (cfg.MODEL, cfg.INPUT, cfg.SOLVER, cfg.TEST):
        assert node.FPN_EXT
        assert set(node.FPN_EXT) <= documented


def test_keys_are_written_with_type_default_and_reader():
    keys = [
        Key("MODEL.FPN_EXT.LEVELS", [], "a | b\n c", ("PyramidRPN", "training")),
        Key("SOLVER.FPN_EXT.EMA_DECAY", 0.5, "of the weights", ("training",)),
    ]
    header = "| key | type | default | meaning | read by | declared in |\n" + "| --- " * 6 + "|\n"
    assert generate.key_tables(keys) == (
        f"## MODEL.FPN_EXT\n\n{header}"
        "| `LEVELS` | list | `[]` | a \\| b c | `PyramidRPN`, training "
        "| `fpn_ext/bottom_up/configured_levels.py` |\n\n"
        f"## SOLVER.FPN_EXT\n\n{header}"
        "| `EMA_DECAY` | float | `0.5` | of the weights | training | `fpn_ext/engine/ema.py` |"
    )


def verbs_in(text):
    return set(re.findall(r"fpn-ext ([a-z][a-z-]*)", text))


def test_the_commands_that_pages_name_are_in_the_reference():
    reference = Path("docs/reference/commands.md").read_text()
    table = set(re.findall(r"^\| `([a-z-]+)` \|", reference, flags=re.M))
    assert "train" in table
    for page in PAGES:
        text = page.read_text()
        assert verbs_in(text) <= table, page
        assert not re.search(r"python -m fpn_ext\.|train_net\.py", without_generated(text)), page
    assert {name.split()[0] for name in VERBS} == table


def without_generated(text):
    return re.sub(r"<!-- generated: .*?<!-- end -->", "", text, flags=re.S)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_words(page):
    prose = without_code(page.read_text())
    found = [
        f"{match.group()!r}: {instead}"
        for pattern, instead in WORDS.items()
        for match in re.finditer(pattern, prose, flags=re.I)
    ]
    assert found == []


def test_words_in_code_are_left_alone():
    text = 'By hand.\n\n    by hand\n\n`by hand`, "by hand"\n\n> by hand\n\n```\nby hand\n```\n'
    assert len(re.findall("by hand", without_code(text), flags=re.I)) == 1


def test_the_python_about_your_own_data_runs():
    page = Path("docs/start/your_data.md")
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    exec(compile(code, str(page), "exec"), {})


@pytest.mark.parametrize("page", DOCS, ids=str)
def test_the_yaml_in_a_page_is_a_config(page, tmp_path):
    """Each block loads, on top of Base-FPN.yaml unless it names its own base."""
    for text in re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.S):
        if text.startswith(" "):  # an excerpt
            text = f"MODEL:\n  FPN_EXT:\n{text}"
        if "_BASE_" not in text:
            text = f'_BASE_: "configs/Base-FPN.yaml"\n{text}'
        file = tmp_path / "page.yaml"
        file.write_text(text.replace('"configs/', f'"{Path("configs").resolve()}/'))
        fpn_ext.load_config(str(file))
