"""The report page: its structure, its numbers, and what a browser makes of it."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import report_results

from metacanary import report_data, report_page, report_table, tables

SECTIONS = ["glance", "audits", "canaries", "scores", "roc", "accounted", "cost"]
VOID = {"meta", "link", "img", "br", "input"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# What a test wants to know of the page once it is drawn, for the title of the page around it.
PROBE = """<script>(function wait() {
  if (document.documentElement.dataset.drawn !== "yes") return setTimeout(wait, 50);
  const body = document.querySelector("#table tbody");
  const texts = (line) => [...line.children].map((cell) => cell.textContent.trim());
  const found = { width: innerWidth, content: document.documentElement.scrollWidth };
  found.drawn = [...document.querySelectorAll(".chart")].map((each) => each.querySelectorAll("svg path").length);
  found.rows = [...body.rows].map(texts);
  found.count = document.getElementById("count").textContent;
  found.sorted = [...document.querySelectorAll("th[aria-sort]")].map((each) => each.getAttribute("aria-sort"));
  const button = document.querySelector(".runs");
  button.click();
  found.single = body.rows[1].textContent;
  button.click();
  document.querySelector("th[aria-sort] button").click();
  found.ascending = [...body.rows].map((line) => line.cells[0].textContent.trim());
  found.hash = location.hash;
  parent.postMessage(JSON.stringify(found), "*");
})();</script>"""
# A frame may be narrower than any window of a browser.
FRAME = """<!DOCTYPE html><title></title><script>
addEventListener("message", (event) => (document.title = event.data));
</script><iframe src="{address}" width="{width}" height="900" style="border: 0"></iframe>"""


class Element:
    """An element of a parsed page."""

    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children, self.text = tag, attributes, parent, [], ""

    def all(self, tag=None, **attributes):
        """Lists the elements below this one, in order."""
        for child in self.children:
            has = all(child.attributes.get(name) == value for name, value in attributes.items())
            if (tag is None or child.tag == tag) and has:
                yield child
            yield from child.all(tag, **attributes)

    def words(self):
        """The text of this element and of all below it."""
        return " ".join([self.text, *(child.words() for child in self.children)]).strip()


class Tree(html.parser.HTMLParser):
    """Parses a page and refuses elements that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.root = self.here = Element("", {}, None)
        self.feed(text)
        self.close()
        assert self.here is self.root

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs), self.here)
        self.here.children.append(element)
        if tag not in VOID:
            self.here = element

    def handle_startendtag(self, tag, attrs):
        self.here.children.append(Element(tag, dict(attrs), self.here))

    def handle_endtag(self, tag):
        assert self.here.tag == tag, f"</{tag}> closes <{self.here.tag}>"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.text += data


@pytest.fixture(scope="module")
def tree():
    return Tree(report_results.page()).root


def test_page_has_every_section_with_a_title_and_a_link(tree):
    sections = list(tree.all("section"))
    assert [each.attributes["id"] for each in sections] == SECTIONS
    (nav,) = tree.all("nav")
    assert [each.attributes["href"] for each in nav.all("a")] == [f"#{name}" for name in SECTIONS]
    for section in sections:
        (title,) = tree.all(id=section.attributes["aria-labelledby"])
        assert title.tag == "h2"
        assert title.words()
    assert len(list(tree.all("h1"))) == len(list(tree.all("main"))) == 1


def test_page_names_everything_for_a_screen_reader(tree):
    ids = [each.attributes["id"] for each in tree.all() if "id" in each.attributes]
    assert len(set(ids)) == len(ids)
    for control in tree.all("select"):
        (label,) = [each for each in tree.all("label") if each.attributes["for"] == control.attributes["id"]]
        assert label.text.strip()
    for button in tree.all("button"):
        assert button.words() or list(button.all("img"))
    for image in tree.all("img"):
        assert image.attributes["alt"]
    for table in tree.all("table"):
        (head,) = table.all("thead")
        assert {cell.attributes.get("scope") for cell in head.all("th")} == {"col"}
        (body,) = table.all("tbody")
        assert all(line.children[0].attributes.get("scope") == "row" for line in body.all("tr"))
    for each in tree.all():
        for name in ("aria-describedby", "aria-labelledby"):
            assert each.attributes.get(name, ids[0]) in ids
    for link in tree.all("a"):
        assert not link.attributes["href"].startswith("#") or link.attributes["href"][1:] in ids


def test_page_has_a_description_and_numbers_for_every_chart(tree):
    charts = list(tree.all("div", **{"class": "chart"}))
    assert len(charts) == 4 + 2 + 2 + 2  # histograms by cell, ROC by setting, accounted by auditor, cost
    for chart in charts:
        (script,) = tree.all("script", id=f"{chart.attributes['id']}-spec")
        assert len(json.loads(script.text)["description"]) > 10
    for name in SECTIONS[1:]:
        (section,) = tree.all("section", id=name)
        assert list(section.all("table")) or list(section.all("dl"))


def test_page_loads_nothing(tree):
    for each in tree.all():
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            address = each.attributes.get(name, "#")
            allowed = address.startswith(("#", "data:")) or re.fullmatch(r"(summary|tables|figures)/\w+\.\w+", address)
            assert allowed, f"{each.tag} {name}={address[:80]}"
    (style,) = tree.all("style")
    assert not re.search(r"url\(|@import", style.text)
    (policy,) = tree.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in policy.attributes["content"]
    assert "http" not in policy.attributes["content"]


def test_page_escapes_names(tree):
    text = report_results.page()
    assert report_results.HOSTILE not in text
    assert "<two>" not in text
    assert "<fast>" not in text
    assert "<1>" not in text
    assert "try <1> & 2" in next(tree.all("title")).text
    assert any(report_results.HOSTILE in each.text for each in tree.all("span"))


def test_page_is_small_and_the_same_twice():
    report_results.page.cache_clear()
    first = report_results.page()
    report_results.page.cache_clear()
    assert report_results.page() == first
    assert len(first.encode()) < 1_300_000


def test_page_shows_the_default_audits_without_a_program(tree):
    rows = report_table.text_rows(report_data.every_audit(report_results.frame()))
    (table,) = tree.all("table", id="table")
    shown = [[cell.words() for cell in line.children] for line in table.all("tr")]
    keys = [report_table.COLUMNS[place] for place in report_table.shown(rows)]
    assert [header.replace(" ", "") for header in shown[0]] == [column.title.replace(" ", "") for column in keys]
    wanted = tables.table1(report_results.frame(), protocol="fixed")
    place = [column.key for column in keys].index("pooled")
    assert [line[place] for line in shown[1:]] == [f"{value:.2f}" for value in wanted["epsilon_pooled"]]
    (script,) = tree.all("script", id="rows")
    data = json.loads(script.text)
    assert [[data["texts"][place] for place in row] for row in data["rows"]] == rows


def test_page_says_when_a_rate_is_below_one_canary(tree):
    rates = report_data.rates(report_results.shown_scores())
    (section,) = tree.all("section", id="roc")
    marks = [each for each in section.all("a") if each.attributes.get("class") == "mark"]
    few = sum((fpr * rates["num_out"] < 1).sum() for fpr in report_data.FPRS)
    assert len(marks) == few == 8  # 0.1% and 1% of some 45 canaries, in four cells
    text = section.words()
    for fewest in rates.groupby("training")["num_out"].min():
        assert f"0.1% of {fewest} canaries that were out is {0.001 * fewest:.2f}, less than one" in text
    for row in rates.to_dict("records"):
        for fpr in report_data.FPRS:
            assert f"{100 * row[f'tpr_at_{fpr}']:.1f}%" in text


def test_page_of_kinds_that_differ_between_trainings():
    """A kind that a training did not have makes counts floats with gaps; they are written as whole numbers."""
    frame, scores = report_results.frame(), report_results.shown_scores()
    kept = [table[(table["training"] == "sgd") | (table["canary"] == "random")] for table in (frame, scores)]
    text = report_page.render(*kept, report_results.pictures(), report_results.COSTS, report_results.FACTS)
    assert text.count("3 runs of 30 coins each") == 2
    assert text.count('class="chart"') == 3 + 2 + 2 + 2


def test_page_says_which_bounds_hold_at_no_level(tree):
    (lede,) = [each for each in tree.all("p") if each.attributes.get("class") == "lede"]
    words = " ".join(lede.words().split())
    assert "wrong with probability 0.05 at most, but for two that have no such level" in words
    assert {"paper", "credible"} <= {each.text for each in lede.all("em")}


def test_page_says_that_chance_alone_orders_canaries(tree):
    (section,) = tree.all("section", id="canaries")
    assert "of a kind that hardly leaks, the order is noise" in " ".join(section.words().split())


def test_page_says_that_costs_are_of_last_attempts(tree):
    (section,) = tree.all("section", id="cost")
    assert "only the last attempt is counted" in " ".join(section.words().split())


def test_page_without_costs_says_so():
    arguments = (report_results.frame(), report_results.shown_scores(), report_results.pictures())
    text = report_page.render(*arguments, report_results.COSTS.iloc[:0], report_results.FACTS)
    assert "there are no benchmark files of these results" in text
    assert 'id="cost-time"' not in text


def test_page_refuses_audits_that_were_not_made():
    facts = {**vars(report_results.FACTS), "auditor": "clopper_pearson"}
    arguments = (report_results.frame(), report_results.shown_scores(), report_results.pictures())
    with pytest.raises(ValueError, match="frame has no audit with score='negative_loss', auditor='clopper_pearson'"):
        report_page.render(*arguments, report_results.COSTS, report_page.Facts(**facts))


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [(1.005, 1, "1.0"), (-2.5, 2, "\N{MINUS SIGN}2.50"), (np.inf, 2, "∞"), (np.nan, 2, "—")],
)
def test_fixed_writes_numbers(value, digits, expected):
    assert report_page._fixed(value, digits) == expected


@pytest.mark.parametrize(("value", "expected"), [(1e-5, "10⁻⁵"), (1e-12, "10⁻¹²"), (2e-5, "2e-05"), (0.0, "0")])
def test_power_writes_powers_of_ten_alone_as_such(value, expected):
    assert report_page._power(value) == expected


def browse(folder, *, width, hash_=""):
    """Opens the page in a browser without a window; returns what PROBE found, and the console's messages."""
    page = folder / "audits.html"
    before, end, after = report_results.page().rpartition("</body>")  # the library has others, in strings
    page.write_text(f"{before}{PROBE}{end}{after}", encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --dump-dom"
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(address=f"{page.name}{hash_}", width=width), encoding="utf-8")
    options = [f"--user-data-dir={folder}/profile", "--window-size=1400,1000", "--virtual-time-budget=20000"]
    call = [BROWSER, *flags.split(), *options, frame.as_uri()]
    done = subprocess.run(call, capture_output=True, text=True, timeout=240, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(title)), console


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_browser_draws_every_chart_and_follows_a_shared_link(tmp_path):
    found, console = browse(tmp_path, width=1280, hash_="#canary=random&auditor=all&sort=ceiling&order=descending")
    assert console == []
    assert len(found["drawn"]) == 10
    assert min(found["drawn"]) > 3
    rows = report_table.text_rows(report_data.every_audit(report_results.frame()))
    keys = [column.key for column in report_table.COLUMNS]
    wanted = {"canary": "random", "protocol": "fixed", "score": "negative_loss"}
    kept = [row for row in rows if all(row[keys.index(key)] == value for key, value in wanted.items())]
    places = report_table.shown(rows)
    ceiling = keys.index("ceiling")
    kept.sort(key=lambda row: -float(row[ceiling].split()[0]))
    assert found["rows"] == [[row[place] for place in places] for row in kept]
    assert len(found["rows"]) == 4
    assert found["count"] == "4 of 32 audits"
    assert found["sorted"] == ["descending" if keys[place] == "ceiling" else "none" for place in places]
    assert found["single"] == f"ε of single runs: {kept[0][report_table.SINGLE_RUNS]}"
    assert found["hash"] == "#canary=random&auditor=all&sort=canary&order=ascending"


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_browser_shows_the_page_on_a_phone(tmp_path):
    found, console = browse(tmp_path, width=360)
    assert console == []
    assert found["content"] == found["width"] == 360
    assert found["count"] == "4 of 32 audits"
    assert found["ascending"] == sorted(found["ascending"], key=lambda name: name == "random")
