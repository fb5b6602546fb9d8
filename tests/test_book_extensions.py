"""The pieces of Sphinx configuration that are code: what they decide, without a build."""

from __future__ import annotations

import importlib
import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sphinx", reason="no Sphinx: pip install -e .[book]")
from docutils import nodes
from sphinx.application import Sphinx

from lipbook.lab.exercises import check

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "book" / "_ext"))

    def load(name: str) -> Any:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def checkout(folder: Path, remote: str | None) -> str:
    subprocess.run(["git", "init", "-q", "-b", "trunk", str(folder)], check=True)
    if remote is not None:
        subprocess.run(["git", "-C", str(folder), "remote", "add", "origin", remote], check=True)
    return str(folder)


@pytest.mark.parametrize(
    "remote",
    [
        "git@github.com:someone/lipbook.git",
        "ssh://git@github.com/someone/lipbook.git",
        "https://github.com/someone/lipbook",
        "https://github.com/someone/lipbook.git/",
        "https://user:secret@github.com/someone/lipbook.git",
    ],
)
def test_repository_is_read_from_the_remote(remote: str, tmp_path: Path, extension: Any) -> None:
    found = extension("address").repository({}, checkout(tmp_path, remote))
    assert found == ("https://github.com/someone/lipbook", "github", "trunk")


@pytest.mark.parametrize(
    "remote",
    [
        None,
        "/srv/git/lipbook.git",
        "file:///srv/git/lipbook.git",
        "https://git.example.org/someone/lipbook.git",
        "https://github.com.example.org/someone/lipbook.git",
        "http://localhost:3000/someone/lipbook",
        "https://github.com/lipbook",
    ],
)
def test_an_address_is_not_guessed(remote: str | None, tmp_path: Path, extension: Any) -> None:
    assert extension("address").repository({}, checkout(tmp_path, remote)) is None


def test_no_repository_without_git(tmp_path: Path, extension: Any) -> None:
    assert extension("address").repository({"GITHUB_SERVER_URL": "x"}, str(tmp_path)) is None


@pytest.mark.parametrize(
    ("reference", "branch"),
    [
        ("refs/heads/feature/x", "feature/x"),
        ("refs/tags/v0.1.0", "v0.1.0"),
        ("refs/pull/3/merge", "main"),
    ],
)
def test_repository_of_a_job(reference: str, branch: str, tmp_path: Path, extension: Any) -> None:
    environment = {
        "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_REPOSITORY": "someone/lipbook",
        "GITHUB_REF": reference,
    }
    found = extension("address").repository(environment, str(tmp_path))
    assert found == ("https://github.com/someone/lipbook", "github", branch)


@pytest.mark.parametrize("site", ["", "https://example.org/lipbook/"])
def test_pages_are_announced_where_their_address_is_known(
    site: str, tmp_path: Path, extension: Any
) -> None:
    builder = SimpleNamespace(name="html", get_target_uri="{}.html".format)
    app = SimpleNamespace(
        builder=builder,
        config=SimpleNamespace(html_baseurl=site),
        env=SimpleNamespace(found_docs={"book/index"}),
        outdir=tmp_path,
    )
    extension("address").announce(app, None)
    if not site:
        assert list(tmp_path.iterdir()) == []
        return
    assert f"<loc>{site}book/index.html</loc>" in (tmp_path / "sitemap.xml").read_text()
    assert (tmp_path / "robots.txt").read_text() == f"Sitemap: {site}sitemap.xml\n"


@pytest.mark.parametrize("library", ["numpy", "python", "scipy", "torch"])
def test_inventories_are_sorted_and_name_what_exists(library: str) -> None:
    text = (ROOT / "book/inventories" / f"{library}.txt").read_text("utf-8")
    header, entries = text.splitlines()[:3], text.splitlines()[3:]
    assert header[0] == "# Sphinx inventory version 1"
    assert entries == sorted(entries)
    assert len({entry.split()[0] for entry in entries}) == len(entries)
    for entry in entries:
        name, kind, _ = entry.split()
        module, _, attribute = name.rpartition(".")
        target = getattr(importlib.import_module(module or "builtins"), attribute)
        assert isinstance(target, type) == (kind in ("class", "exception")), name


def test_figures_to_touch(tmp_path: Path, extension: Any) -> None:
    """The directive wraps the still; its page, and no other, loads the script; faults are told."""
    extension("figures")
    source, still = tmp_path / "source", "assets/figures/ellipse.svg"
    (source / still).parent.mkdir(parents=True)
    (source / still).write_bytes((ROOT / "book" / still).read_bytes())
    (source / "plain.md").write_text("---\norphan: true\n---\n\n# No figure\n")
    settings = {"extensions": ["myst_parser", "figures"], "myst_enable_extensions": ["colon_fence"]}

    def build(name: str, alt: str) -> str:
        figure = f":::{{touch}} {name}\n![{alt}]({still})\n\nThe *caption*.\n:::\n"
        (source / "index.md").write_text(f"# Title\n\n{figure}")
        log, folders = tmp_path / "log", (source, None, tmp_path / "html", tmp_path / "trees")
        with log.open("w") as warnings:
            Sphinx(*folders, "html", settings, None, warnings, freshenv=True).build()
        return log.read_text()

    assert build("ellipse", "A disc") == ""
    text = (tmp_path / "html/index.html").read_text("utf-8")
    assert text.count('<figure class="lip-touch touch-ellipse') == 1
    assert text.count(' id="fig-touch-ellipse">') == 1
    assert text.count('<img alt="A disc" src="_images/ellipse.svg"') == 1
    assert 0 < text.index('src="_static/figures/touch.js') < text.index("figures/ellipse.js")
    assert "figures/" not in (tmp_path / "html/plain.html").read_text("utf-8")
    assert "no figure 'elipse'" in build("elipse", "A disc")
    assert "no figure 'touch'" in build("touch", "A disc")
    assert "figure 'ellipse' has no alternative text" in build("ellipse", "")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("in ", ", so", "in |<x,>| so"),
        ("in (", ") we", "in |<(x)>| we"),
        ("", "-Lipschitz. And", "<x-Lipschitz.>| And"),
        ("in ", " we", "in |x| we"),
    ],
)
def test_punctuation_stays_with_its_formula(
    before: str, after: str, expected: str, extension: Any
) -> None:
    paragraph = nodes.paragraph("", "", nodes.Text(before), nodes.math("", "x"), nodes.Text(after))
    document = nodes.document(None, None)
    document.append(paragraph)
    extension("boxes").tie_punctuation(None, document, "page")
    tied = {id(part) for part in paragraph.findall(nodes.inline) if "nowrap" in part["classes"]}
    words = [part.astext() for part in paragraph.children]
    parts = [
        f"<{word}>" if id(part) in tied else word
        for part, word in zip(paragraph.children, words, strict=True)
    ]
    assert "|".join(part for part in parts if part) == expected


def test_a_page_does_not_say_that_a_cell_is_unanswered(extension: Any) -> None:
    """The words are those that the notebook prints; any other output stays."""
    said = str(check("1.1", ...))
    document = nodes.document(None, None)
    for text in (said, f"{said} Or not."):
        box = nodes.container("", nodes.literal_block(text, text), nb_element="cell_code_output")
        document.append(nodes.container("", box, nb_element="cell_code"))
    extension("boxes").drop_unanswered(None, document)
    assert document.astext().strip() == f"{said} Or not."


# -------------------------------------------------------------------------------------- routes


@pytest.fixture
def routes(extension: Any) -> Any:
    return extension("routes").read(ROOT / "book" / "routes.yml")


def reading_times() -> dict[str, int]:
    """Minutes that each chapter says it takes."""
    found = {}
    for path in (ROOT / "book").glob("*.ipynb"):
        minutes = re.search(r"(\d+) minutes to read", path.read_text("utf-8"))
        if minutes:
            found[path.stem] = int(minutes[1])
    return found


def test_routes_take_the_time_that_the_chapters_say(routes: Any) -> None:
    times = reading_times()
    assert len(times) == 12
    for route in routes:
        for step in route.steps:
            known = [times[page] for page in step.pages if page in times]
            if len(known) == len(step.pages) and not step.part:
                assert step.minutes == sum(known), (route.name, step.pages)
            elif step.part:
                assert step.minutes < sum(known), (route.name, step.pages)


def test_two_hours_and_a_week_are_what_they_are_called(routes: Any) -> None:
    hours, week, research = routes
    assert [route.name for route in routes] == ["Two hours", "A week", "Research"]
    assert hours.minutes == 120
    assert len(week.steps) == 7
    assert sorted(page for step in week.steps for page in step.pages) == sorted(reading_times())
    assert research.steps[-1].pages[-1] == "reading"


def test_routes_name_sections_that_are_there(routes: Any) -> None:
    for route in routes:
        for step in route.steps:
            for section in re.findall("“(.+?)”", step.part):
                (page,) = step.pages
                text = (ROOT / "book" / f"{page}.ipynb").read_text("utf-8")
                assert re.search(rf'"## {re.escape(section)}', text), (page, section)


def test_a_page_knows_where_its_routes_lead(extension: Any) -> None:
    module = extension("routes")
    week = module.Route("A week", "", [module.Step(["a", "b"], 60), module.Step(["c"], 90)])
    tour = module.Route("Tour", "", [module.Step(["c"], 30)])
    assert module.places([week, tour], "b") == [(week, 0)]
    assert module.places([week, tour], "c") == [(week, 1), (tour, 0)]
    assert module.following(week, 0, "a") == "b"
    assert module.following(week, 0, "b") == "c"
    assert module.following(week, 1, "c") is None


@pytest.mark.parametrize(
    ("minutes", "words"),
    [(45, "45 minutes"), (120, "2 hours"), (705, "12 hours"), (150, "2½ hours")],
)
def test_durations_in_words(minutes: int, words: str, extension: Any) -> None:
    assert extension("routes").duration(minutes) == words


def test_a_route_that_cannot_be_read_is_refused(tmp_path: Path, extension: Any) -> None:
    path = tmp_path / "routes.yml"
    path.write_text("- {name: Short, about: x, steps: [{pages: [index], hours: 3}]}")
    with pytest.raises(Exception, match=r"routes\.yml.*hours"):
        extension("routes").read(path)


# -------------------------------------------------------------------------------- what is searched

PAGE = """<article class="bd-article"><section id="top"><h1>8. Radii<a class="headerlink">#</a></h1>
<p>How far an answer holds.</p><section id="margins"><h2>8.1. Margins</h2>
<p>Divide by <span class="math">\\(L\\)</span> or <span class="math">\\(\\sqrt2 L\\)</span>.</p>
<div class="cell_input"><pre>import torch</pre></div>
<div class="proof theorem" id="thm-x"><p class="admonition-title">Theorem 8.1 (Radius)</p>
<section><p>It is the margin.</p></section></div></section></section></article>"""


def test_a_page_is_indexed_by_section(extension: Any) -> None:
    top, margins, theorem = extension("search").read(PAGE, "book/radii.html")
    assert top[:4] == ("book/radii.html", "8. Radii", "8. Radii", "How far an answer holds.")
    assert margins.url == "book/radii.html#margins"
    assert margins.text == "Divide by L or …. Theorem 8.1 (Radius)"
    assert margins.terms == "Theorem 8.1 (Radius)"
    assert theorem[:4] == (
        "book/radii.html#thm-x",
        "8. Radii",
        "Theorem 8.1 (Radius)",
        "It is the margin.",
    )
    assert theorem.above == margins.url


@pytest.mark.parametrize(
    ("reference", "title"),
    [
        ("Cem Anil, James Lucas, and Roger Grosse. Sorting out. 2019.", "Anil et al., 2019"),
        ("J. Zico Kolter and Eric Wong. Provable defenses. 2018.", "Kolter and Wong, 2018"),
        ("Cédric Villani. Optimal transport. Springer, 2009.", "Villani, 2009"),
    ],
)
def test_works_are_called_as_the_text_calls_them(
    reference: str, title: str, extension: Any
) -> None:
    assert extension("search").author_and_year(reference) == title


def test_scripts_that_no_page_needs_are_dropped(extension: Any) -> None:
    head = (
        '<script src="searchindex.js"></script><script defer src="../_static/fontawesome.js?x">'
        '</script><script src="../_static/search.js"></script>'
    )
    kept = extension("offline").without_unused(head)
    assert kept == '<script src="../_static/search.js"></script>'


def test_rules_of_a_design_that_is_not_used_are_dropped(extension: Any) -> None:
    style = (
        ":root{--sd-red:red}.sd-card{a:b}.sd-tab,.sd-row{c:d}.sd-card .sd-tab{e:f}"
        "@media (width>9px){.sd-row>p{g:h}.sd-tab{i:j}}"
    )
    offline = extension("offline")
    kept = offline.with_used(style, {"sd-card", "sd-row"}, offline.DESIGN)
    assert kept == (
        ":root{--sd-red:red}.sd-card{a:b}.sd-tab,.sd-row{c:d}@media (width>9px){.sd-row>p{g:h}}"
    )


def test_rules_of_parts_that_no_page_has_are_dropped(extension: Any) -> None:
    style = ".form-control{a:b}.form-check,.toast{c:d}.former,.bd-row{e:f}.p:not(.toast){g:h}"
    offline = extension("offline")
    kept = offline.with_used(style, {"form-control"}, offline.PARTS)
    assert kept == ".form-control{a:b}.former,.bd-row{e:f}.p:not(.toast){g:h}"


def test_icons_that_no_page_shows_are_dropped(extension: Any) -> None:
    used = '.fa-bars:before,.fa-navicon:before{content:"\\f0c9"}'
    style = f'.fa-solid{{font-weight:900}}.fa-0:before{{content:"0"}}{used}'
    kept = extension("offline").with_icons(style, {"fa-solid", "fa-bars"})
    assert kept == f".fa-solid{{font-weight:900}}{used}"


def test_only_what_has_a_colour_of_its_own_is_marked(extension: Any) -> None:
    code = (
        '<div class="highlight"><pre><span></span><span class="k">for</span>'
        '<span class="w"> </span><a href="x"><span class="n">layer</span></a>'
        '<span class="p">(</span><span class="s">p&lt;1</span></pre></div>'
    )
    prose = '<p><span class="n">layer</span></p>'
    assert extension("offline").without_plain_marks(code + prose) == (
        '<div class="highlight"><pre><span></span><span class="k">for</span>'
        ' <a href="x">layer</a>(<span class="s">p&lt;1</span></pre></div>' + prose
    )


# ----------------------------------------------------------------------- what a screen reader needs


def test_folds_of_the_menu_have_names(extension: Any) -> None:
    menu = '<li><a class="x" href="#">The library</a><details><summary><i></i></summary></details>'
    named = extension("access").name_folds(menu)
    assert '<summary aria-label="Pages of: The library">' in named


def test_folds_of_code_are_called_what_they_say(extension: Any) -> None:
    fold = '<summary aria-label="Toggle hidden content">\n<p>Show the code</p></summary>'
    assert extension("access").speaking_folds(fold) == "<summary>\n<p>Show the code</p></summary>"


def test_long_signatures_are_lines(extension: Any) -> None:
    long = (
        '<dt><span class="sig-paren">(</span>\n\n<dl>\n<dd><em>x</em>,</dd>\n<dd><em>y</em>,</dd>\n'
        '</dl>\n\n<span class="sig-paren">)</span></dt><dl><dd>not a signature</dd></dl>'
    )
    lines = extension("access").lines_of_parameters(long)
    assert lines.count('<span class="sig-line">') == 2
    assert lines.count("<dl>") == 1


def test_the_list_of_modules_is_one_list(extension: Any) -> None:
    nested = "<h1>Modules</h1>\n<ul><li>a</li>\n<ul><li>a.b</li>\n</ul><li>c</li>\n</ul>\n"
    flat = extension("access").one_list(nested)
    assert flat == "<h1>Modules</h1>\n<ul><li>a</li>\n<li>a.b</li>\n<li>c</li>\n</ul>\n"


PREDICTION = """\
# Page

:::{predict} How steep?
Where is $x^2$ steepest?

- [ ] At *one*.

  The slope is 2.
- [x] At two.

  The slope is 4.
:::
"""


def built(source: str, folder: Path) -> tuple[str, str]:
    from sphinx.application import Sphinx  # noqa: PLC0415

    (folder / "index.md").write_text(source)
    settings = {
        "extensions": ["myst_parser", "questions"],
        "myst_enable_extensions": ["colon_fence", "dollarmath", "tasklist"],
    }
    warnings = io.StringIO()
    app = Sphinx(folder, None, folder / "out", folder / "tree", "html", settings, None, warnings)
    app.build()
    told = warnings.getvalue().splitlines()  # a second application of one process registers again
    new = [line for line in told if "while setting up extension" not in line]
    return (folder / "out" / "index.html").read_text(), "\n".join(new)


@pytest.mark.filterwarnings("ignore")
def test_a_prediction_answers_without_a_script(tmp_path: Path, extension: Any) -> None:
    extension("questions")
    page, warnings = built(PREDICTION, tmp_path)
    assert not warnings
    box = page[page.index("predict admonition") : page.index("</details>\n</div>")]
    assert "How steep?" in box
    assert box.count("<details") == 2
    wrong, right = (part.split("</details>")[0] for part in box.split("<details")[1:])
    assert 'class="choice wrong"' in wrong
    assert "<summary>At <em>one</em>.</summary>" in wrong
    assert "<strong>Not so.</strong> The slope is 2." in wrong
    assert 'class="choice right"' in right
    assert "<strong>Right.</strong> The slope is 4." in right
    assert "checkbox" not in box


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[x]", "[ ]", "one choice has to be ticked"),
        ("[ ]", "[x]", "one choice has to be ticked"),
        ("- [ ] At", "- At", "one choice has to be ticked"),
        ("\n  The slope is 4.\n", "", "each choice needs a reason"),
        ("- [x] At", "- [x] At <https://example.org>", "can hold no link"),
        (":::\n", "\nWhere?\n:::\n", "has to come last"),
    ],
)  # fmt: skip
def test_a_prediction_without_choices_is_refused(
    old: str, new: str, message: str, tmp_path: Path, extension: Any
) -> None:
    extension("questions")
    assert old in PREDICTION
    _, warnings = built(new.join(PREDICTION.rsplit(old, 1)), tmp_path)
    assert message in warnings


@pytest.mark.filterwarnings("ignore")
def test_a_recap_asks_several_questions_in_one_box(tmp_path: Path, extension: Any) -> None:
    extension("questions")
    asked = PREDICTION.split(":::{predict} How steep?\n")[1].removesuffix(":::\n")
    page, warnings = built(f"# Page\n\n:::{{recap}}\n{asked}\n{asked}:::\n", tmp_path)
    assert not warnings
    box = page[page.index("recap admonition") : page.rindex("</details>\n</div>")]
    assert ">Recap</p>" in box
    assert box.count("Where is ") == 2
    assert box.count("<details") == 4
    assert box.count('class="choice right"') == 2


@pytest.mark.filterwarnings("ignore")
def test_each_question_of_a_recap_has_one_right_choice(tmp_path: Path, extension: Any) -> None:
    extension("questions")
    asked = PREDICTION.split(":::{predict} How steep?\n")[1].removesuffix(":::\n")
    wrong = asked.replace("[x]", "[ ]")
    _, warnings = built(f"# Page\n\n:::{{recap}}\n{asked}\n{wrong}:::\n", tmp_path)
    assert "recap: one choice has to be ticked" in warnings


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("site", ["", "https://example.org/lipbook/"])
def test_a_link_to_a_page_shows_its_title_its_text_and_a_figure(
    site: str, tmp_path: Path, extension: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sphinxext.opengraph", reason="no Open Graph: pip install -e .[book]")
    monkeypatch.setenv("LIPBOOK_URL", site)
    extension("address")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "index.rst").write_text("A title\n=======\n\nIts first sentence.\n")
    settings = {
        "extensions": ["sphinxext.opengraph", "address"],
        "html_static_path": [str(ROOT / "book/assets")],
        "ogp_social_cards": {"enable": False},
        "notfound_urls_prefix": "",
    }
    Sphinx(source, None, out, tmp_path / "trees", "html", settings, None, io.StringIO()).build()
    page = (out / "index.html").read_text("utf-8")
    said = dict(re.findall(r'<meta (?:property|name)="([\w:]+)" content="([^"]*)"', page))
    assert said["og:title"] == "A title"
    assert said["og:description"] == "Its first sentence."
    if not site:
        assert "og:image" not in said
        return
    assert said["og:image"].startswith(site)
    assert said["og:image:alt"]
    assert said["twitter:card"] == "summary_large_image"
    image = (out / said["og:image"].removeprefix(site)).read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(image[start : start + 4], "big") for start in (16, 20))
    assert width >= 1200
    assert height >= 630
