"""`twintune report`: what it reads, the plots it draws, and the page as a real Chromium shows it, offline.

The browser is the one that is installed (chromium, Chrome or Edge), driven by playwright; none is ever downloaded.
"""

import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tiny_run import Run, examples

from common.batches import BatchPlan
from common.config.resume import flat
from common.data.tokenise import DataReport
from common.errors import MachineError, UserError
from common.inputs import TrainingData
from common.report import plots as plotting
from common.report.page import answer_cards, changed_rows, render_page, score_rows, shown, table_rows
from common.report.plots import DASHES, LINES, MARKERS, draw_plots, smooth_of, spread
from common.report.runs import RunData, names_of, read_runs
from common.report.write import write_report
from common.runs.facts import gather_facts
from common.runs.record import RunRecord

NASTY = '<script>alert("x")</script> & "quoted"'
SCORES = {"base": {"num_examples": 4, "exact_match": 0.0}, "adapter": {"num_examples": 4, "exact_match": 0.75}}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
MAC_CHROME = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"


def trained(folder: Path, answer: str = "it is 33", **settings) -> Path:
    """Train in NumPy, as `twintune train` does; returns the run's folder."""
    run = Run(folder, eval_strategy="steps", eval_steps=4, save_steps=4, **settings)
    record = RunRecord(folder)
    with record.until_the_end():
        run.folder.claim()
        read = TrainingData(run.data, run.validation, DataReport())
        record.begin(gather_facts(run.engine, BatchPlan.of(run.data, run.config), 0, read, None, "twintune train"))
        run.train()
        run.ending().ship()
        said = {"prompt": NASTY, "expected": "it is 33", "base": "\x06", "adapter": answer}
        record.add({"scores": SCORES, "answers": [said]})
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def other(one: Path) -> Path:
    return trained(one.parent / "other", "it is 3", learning_rate=0.01, data=examples(15), num_train_epochs=12.0)


def bare(folder: Path) -> Path:
    """Make what an unfinished run of an older version leaves."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n')
    return folder


# ---- what is read


def test_a_run_is_read_with_its_series_and_gaps(one, tmp_path):
    (run,) = read_runs([one])
    assert run.name == "one" and run.state == "finished" and run.has_final
    steps, losses = run.series("loss")
    assert steps == list(range(1, 13)) and losses == [row["loss"] for row in run.rows]
    assert run.series("eval_loss")[0] == [4, 8, 12]
    (old,) = read_runs([bare(tmp_path / "old")])
    assert old.series("loss") == ([1], [2.5]) and old.last("eval_loss") is None and old.scores == {}


def test_an_older_run_takes_engine_and_versions_from_its_checkpoint(one, tmp_path):
    folder = Path(shutil.copytree(one, tmp_path / "old"))
    (folder / "run.json").unlink()
    (run,) = read_runs([folder])
    assert run.record == {"engine": "fake", "versions": {"numpy": np.__version__}, "total_steps": 12}


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    paths = [tmp_path / "a" / "out", tmp_path / "b" / "out"]
    assert names_of(paths) == ["a/out", "b/out"] and names_of(paths[:1]) == ["out"]
    with pytest.raises(UserError, match="given twice"):
        names_of([paths[0], paths[0]])


def test_what_is_no_run_or_has_no_row_yet_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no such folder; expected the output_dir of a `twintune train`"):
        read_runs([tmp_path / "gone"])
    bare(tmp_path / "new")
    (tmp_path / "new" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"nothing to plot yet: metrics.jsonl has no row"):
        read_runs([tmp_path / "new"])


# ---- what is drawn


@pytest.mark.parametrize(
    ("wanted", "gap", "lowest", "expected"),
    [
        ([1.0, 5.0], 1.0, 0.0, [1.0, 5.0]),
        ([5.0, 1.0], 1.0, 0.0, [5.0, 1.0]),
        ([3.0, 3.0], 1.0, 0.0, [2.5, 3.5]),  # around their own place
        ([3.0, 3.2, 3.1], 1.0, 0.0, [2.1, 4.1, 3.1]),
        ([0.0, 0.1], 1.0, 0.0, [0.0, 1.0]),  # none below the axis
    ],
)
def test_labels_are_spread_as_little_as_it_takes(wanted, gap, lowest, expected):
    assert spread(wanted, gap, lowest) == pytest.approx(expected)


def test_labels_never_overlap():
    random = np.random.default_rng(0)
    for _ in range(100):
        wanted = random.normal(size=6).tolist()
        places = spread(wanted, 0.5, -9.0)
        assert min(np.diff(sorted(places))) > 0.5 - 1e-9
        assert np.argsort(wanted).tolist() == np.argsort(places).tolist()


def test_few_points_are_not_smoothed():
    assert smooth_of([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]
    noisy = np.random.default_rng(0).normal(size=600)
    assert np.std(smooth_of(noisy.tolist())[100:]) < np.std(noisy) / 3  # over 20: 1 / sqrt(39) of it


def test_plots_are_svg_in_the_pages_colours_and_png(one, other):
    drawn = {plot.name: plot for plot in draw_plots(read_runs([one, other]))}
    assert list(drawn) == ["loss", "validation-loss", "learning-rate", "gradient-norm", "speed", "memory"]
    for plot in drawn.values():
        assert plot.png.startswith(b"\x89PNG") and plot.svg.startswith("<svg") and "var(--ink)" in plot.svg
        assert not re.search(r"#[0-9a-f]{6}\b", plot.svg)  # every colour follows the page's
        assert "font-family" not in plot.svg and ">one</text>" in plot.svg and ">other</text>" in plot.svg
    assert drawn["loss"].note.startswith("Training loss, nats a token; one: from ")
    single = {plot.name: plot for plot in draw_plots(read_runs([one]))}
    assert "validation-loss" not in single and ">validation</text>" in single["loss"].svg


def test_the_lines_of_runs_differ_without_colour():
    looks = list(zip(DASHES, MARKERS, strict=True))
    assert len(set(looks)) == len(looks) == len(LINES)


def test_a_run_without_some_figures_has_the_plots_of_the_others(tmp_path):
    assert [plot.name for plot in draw_plots(read_runs([bare(tmp_path / "old")]))] == ["loss"]


def test_too_many_runs_and_a_missing_matplotlib_are_told(one, tmp_path, monkeypatch):
    (run,) = read_runs([one])
    with pytest.raises(UserError, match="7 runs: expected up to 6"):
        draw_plots([run] * 7)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # which an import takes for missing
    with pytest.raises(MachineError, match=r"install it with: pip install 'twintune\[report\]'"):
        draw_plots([run])


def test_pictures_have_the_size_that_they_say(one):
    from PIL import Image

    (plot, *_) = draw_plots(read_runs([one]))
    image = Image.open(io.BytesIO(plot.png))
    assert image.size == tuple(round(inches * plotting.PIXELS_PER_INCH) for inches in plotting.INCHES)


# ---- what is written


def run_with(name: str, **record) -> RunData:
    return RunData(Path(name), name, "finished", [{"step": 1}], {"model_name_or_path": "base"}, record, True)


def test_values_that_a_run_lacks_are_dashes():
    runs = [run_with("a", versions={"mlx": "1"}), run_with("b", versions={"torch": "2"})]
    rows = table_rows(runs, lambda run: run.record["versions"].items())
    assert rows == [("mlx", ["1", "–"]), ("torch", ["–", "2"])]


def test_scores_stand_beside_one_base_and_answers_under_one_prompt():
    said = {"prompt": "p", "expected": "yes", "base": "?", "adapter": "yes"}
    runs = [
        run_with("a", scores=SCORES, answers=[said]),
        run_with("b", scores=SCORES, answers=[said | {"adapter": ""}]),
    ]
    assert score_rows(runs) == (
        ["base", "a", "b"],
        [("num_examples", ["4", "4", "4"]), ("exact_match", ["0.0%", "75.0%", "75.0%"])],
        [],
    )
    given = [("base", "?", ""), ("a", "yes", ": as expected"), ("b", "(nothing)", "")]
    assert answer_cards(runs) == [{"prompt": "p", "expected": "yes", "given": given}]
    assert shown("a\x06\n") == "a\ufffd\n"


def test_scores_of_fields_have_a_table_of_their_own():
    scores = {
        "base": {"json_fields:f1": 0.25, "json_fields:precision:room": 0.5, "json_fields:recall:room": 1.0},
        "adapter": {"json_fields:f1": 1.0, "json_fields:f1:lamp.on": 1.0},
    }
    _, whole, fields = score_rows([run_with("a", scores=scores)])
    assert whole == [("json_fields:f1", ["25.0%", "100.0%"])]
    assert [(name, [cell.split() for cell in cells]) for name, cells in fields] == [
        ("room", [["50.0%", "100.0%", "–"], ["–", "–", "–"]]),
        ("lamp.on", [["–", "–", "–"], ["–", "–", "100.0%"]]),
    ]


def test_only_the_keys_that_differ_are_listed(one, other):
    runs = read_runs([one, other])
    rows = dict(changed_rows(runs))
    assert rows["learning_rate"] == ["0.05", "0.01"] and "lora.r" not in rows
    assert set(rows) == {key for key, value in flat(runs[0].config).items() if value != flat(runs[1].config)[key]}


class Parts(HTMLParser):
    """Collect the texts of a page and what it would load; refuse tags that don't match."""

    VOID = ("meta", "path", "use", "rect", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.open += [] if tag in self.VOID else [tag]
        self.loads += [f"{tag} {name}" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag):
        assert tag in self.VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.texts += [data.strip()] if data.strip() else []


def test_the_page_escapes_texts_loads_nothing_and_closes_its_tags(one, other):
    runs = read_runs([one, other])
    page = render_page(runs, draw_plots(runs))
    parts = Parts()
    parts.feed(page)
    assert parts.open == [] and parts.loads == [] and "<script" not in page and "@import" not in page
    assert NASTY in parts.texts
    assert "2 runs compared" in parts.texts and "tuned" not in parts.texts
    assert {"exact_match", "75.0%", "numpy", np.__version__, "finished", "learning_rate"} <= set(parts.texts)


def test_the_page_of_a_bare_run_leaves_out_what_is_not_known(tmp_path):
    runs = read_runs([bare(tmp_path / "old")])
    parts = Parts()
    parts.feed(render_page(runs, draw_plots(runs)))
    assert "Curves" in parts.texts
    assert not {"Scores on held-out examples", "Data", "Load the adapter", "Versions"} & set(parts.texts)


def test_the_command_writes_the_page_and_pictures_beside_it(one, tmp_path, cli):
    done = cli("report", one, "--output", tmp_path / "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'page.html'} is ready\n"
    pictures = {path.name for path in (tmp_path / "page-plots").iterdir()}
    assert pictures == {f"{name}.png" for name in ("loss", "learning-rate", "gradient-norm", "speed", "memory")}
    done = cli("report", tmp_path / "gone", cwd=tmp_path)
    assert done.returncode == 2 and "no such folder" in done.stderr


def test_the_page_of_one_run_goes_into_its_folder_and_of_several_here(one, other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(one, tmp_path / "copy"))
    assert write_report([copy], None) == copy / "report.html" and (copy / "report-plots" / "loss.png").is_file()
    assert write_report([copy, other], None) == Path("report.html") and Path("report-plots").is_dir()


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    playwright = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, (*map(shutil.which, BROWSERS), MAC_CHROME if Path(MAC_CHROME).exists() else None)), None)
    if found is None:
        pytest.skip(f"no browser is installed; looked for {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


def opened(browser, page: Path, width: int, **options):
    """Open a page in a window without a network; fails on any error, and on any request but that for the page."""
    context = browser.new_context(viewport={"width": width, "height": 800}, offline=True, **options)
    tab = context.new_page()
    asked: list[str] = []
    tab.on("console", lambda message: asked.append(message.text))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    assert asked == [page.as_uri()]
    return tab


@pytest.fixture(scope="module")
def pages(one: Path, other: Path) -> list[Path]:
    return [write_report([one], one.parent / "one.html"), write_report([one, other], one.parent / "both.html")]


def test_nothing_is_wider_than_the_window_on_a_phone_or_a_desk(browser, pages):
    for page in pages:
        for width in (320, 390, 800, 1280):
            tab = opened(browser, page, width)
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            columns = tab.evaluate("new Set([...document.querySelectorAll('figure')].map(f => f.offsetLeft)).size")
            assert columns == {320: 1, 390: 1, 800: 2, 1280: 3}[width]


def test_letters_in_plots_can_be_read_and_do_not_overlap_on_a_phone(browser, pages):
    for page in pages:
        tab = opened(browser, page, 390)
        boxes = tab.evaluate(
            "[...document.querySelectorAll('figure')].map(f => [...f.querySelectorAll('text')].map(t => {"
            "const b = t.getBoundingClientRect(), o = f.getBoundingClientRect();"
            "return [b.left - o.left, b.top, b.right - o.left, b.bottom, o.width]}))"
        )
        for plot in boxes:
            for left, top, right, bottom, width in plot:
                assert bottom - top >= 9 and left >= -1 and right <= width + 12  # the page's margin is 16
            for at, (left, top, right, bottom, _) in enumerate(plot):
                for other_left, other_top, other_right, other_bottom, _ in plot[:at]:
                    across = min(right, other_right) - max(left, other_left)
                    down = min(bottom, other_bottom) - max(top, other_top)
                    assert across <= 2 or down <= 4, "two texts lie over each other"  # boxes have some air


def test_the_page_is_dark_in_the_dark_and_light_on_paper(browser, pages):
    color = "getComputedStyle(document.body).backgroundColor"
    line = "getComputedStyle(document.querySelector('figure path[style*=line0]')).stroke"
    dark = opened(browser, pages[0], 800, color_scheme="dark")
    assert dark.evaluate(color) == "rgb(22, 22, 24)" and dark.evaluate(line) == "rgb(116, 182, 238)"
    dark.emulate_media(media="print")
    assert dark.evaluate(color) == "rgb(255, 255, 255)" and dark.evaluate(line) == "rgb(11, 98, 168)"


def test_on_paper_the_whole_config_is_open_and_nothing_is_cut(browser, pages):
    tab = opened(browser, pages[1], 720)
    is_open = "[...document.querySelectorAll('details pre')].map(each => each.checkVisibility())"
    assert tab.evaluate(is_open) == [False, False]
    tab.emulate_media(media="print")
    assert tab.evaluate(is_open) == [True, True] and tab.evaluate("document.documentElement.scrollWidth") == 720
    assert tab.pdf(format="A4").startswith(b"%PDF")


def test_the_browser_reads_the_texts_as_they_were_written(browser, pages):
    tab = opened(browser, pages[0], 800)
    assert tab.locator("dd").filter(has_text="alert").inner_text() == NASTY
    run = json.loads(tab.locator("details pre").text_content())
    assert run["learning_rate"] == 0.05 and tab.title() == "one"
