"""The report as files and as markup; runs side by side. tests/test_report_browser.py opens it."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from agatool import charts, compare_runs, html_report, page, report, run_files
from agatool.compare_runs import compare
from agatool.config import build_config, to_toml
from agatool.data.prepare import Prepared, prepare_sample, sample_spec
from agatool.errors import DataError, UsageError
from agatool.files import write_json, write_text
from agatool.html_report import shown, write_report
from agatool.metrics import paired_test, rank_metrics, summarise
from agatool.page import STYLE, Markup, tag
from agatool.report import chosen_step, curve_panels, curves_png, evaluation_record, metric_table, series, write_csv
from agatool.run_files import read_run

HOSTILE = '</h3><script>document.title="owned"</script><img src=x onerror="document.title=1"> "None" & naïve'


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The sample data set of a few identities."""
    return prepare_sample(tmp_path_factory.mktemp("report") / "d", sample_spec(30))


def evaluated(
    folder: Path, data: Prepared, skill: float = 1.0, seed: int = 0, stages: tuple[str, ...] = ("cosine", "reranked")
) -> Path:
    """A run folder as training and evaluation leave it; the higher `skill`, the better the made-up scores."""
    rng = np.random.default_rng(seed)
    images, captions = data.split("test")
    persons = images["person_id"].to_numpy()
    wanted = images.set_index("image_id").loc[captions["image_id"], "person_id"].to_numpy()
    scores = rng.normal(size=(len(captions), len(images))) + skill * (persons == wanted[:, None])
    order = (-scores).argsort(1)
    found = rank_metrics(order, wanted, persons)
    top = order[:, :10]
    lists = {
        "top_ids": images["image_id"].to_numpy()[top], "top_paths": images["path"].to_numpy()[top],
        "top_hits": (persons[top] == wanted[:, None]).astype(int), "top_cosine": np.take_along_axis(scores, top, 1),
        "top_itm": np.take_along_axis(scores, top, 1) if "reranked" in stages else np.empty((len(top), 0)),
    }  # fmt: skip
    columns = {
        "direction": "t2i", "stage": stages[-1], "query_id": captions["caption_id"], "query": captions["caption"],
        "person_id": wanted, "relevant": found.relevant, "first_hit": found.first_hit, "ap": found.ap,
        "inp": found.inp, **{name: [json.dumps(row) for row in rows.tolist()] for name, rows in lists.items()},
    }  # fmt: skip
    figures = summarise(found, 200)
    write_csv(folder / "metrics.csv", metric_table([("t2i", stage, *figure) for stage in stages for figure in figures]))
    write_csv(folder / "queries.csv", pd.DataFrame(columns), decimals=6)
    settings = {"rerank": 16 if "reranked" in stages else 0, "bootstrap": 200}
    config = build_config({"train": {"seed": seed}, "data": {"dir": str(data.folder)}, "eval": settings})
    write_text(folder / "config.toml", to_toml(config))
    used = config.model_dump(mode="json", exclude_none=True)
    record = evaluation_record(folder, data.folder, data.info, "test", "best", "cpu, fp32", used)
    write_json(folder / "evaluation.json", record)
    write_csv(folder / "train_log.csv", training_log())
    write_csv(folder / "validation.csv", validation_log())
    return folder


def training_log(steps: int = 900) -> pd.DataFrame:
    """A loss that falls, noisily; ITM begins late, as in training."""
    step = np.arange(1, steps + 1)
    noise = np.random.default_rng(0).normal(0, 0.2, steps)
    itm = np.where(step > 400, 0.7, np.nan)
    columns = {"step": step, "lr": 1e-3 / step, "loss": 5 / np.sqrt(step) + noise, "itc": 3 / step, "itm": itm}
    empty = ("mlm", "itm_accuracy", "mlm_accuracy", "masked_ratio", "tem_replaced")
    return pd.DataFrame({**columns, "gradient_norm": 1 + noise, **dict.fromkeys(empty, np.nan)})


def validation_log() -> pd.DataFrame:
    """The second epoch is the best by mAP of the final stage, the third by everything else."""
    rows = [(300, "cosine", 20, 30), (300, "reranked", 30, 40), (600, "cosine", 21, 31), (600, "reranked", 50, 45),
            (900, "cosine", 60, 70), (900, "reranked", 50, 44)]  # fmt: skip
    return pd.DataFrame(rows, columns=["step", "stage", "R@1", "mAP"])


def edited(folder: Path, **cells: object) -> None:
    """Put values into the first row of queries.csv."""
    table = pd.read_csv(folder / "queries.csv", dtype=str, keep_default_na=False)
    for column, value in cells.items():
        table.loc[0, column] = value
    table.to_csv(folder / "queries.csv", index=False)


class Reader(HTMLParser):
    """Collects what a page holds: tags with attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attributes)))

    def handle_data(self, text: str) -> None:
        self.text += text.replace("\xa0", " ")

    def all(self, name: str, class_: str = "") -> list[dict[str, str | None]]:
        """The attributes of every tag of a name and class."""
        return [found for tag_, found in self.tags if tag_ == name and class_ in (found.get("class") or "")]


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


# -- markup -------------------------------------------------------------------------------------------------------


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "<b>&", tag("i", '"'), title='"><x', class_=None) == (
        '<p title="&quot;&gt;&lt;x">&lt;b&gt;&amp;<i>&quot;</i></p>'
    )
    assert tag("img", alt_text=1) == '<img alt-text="1">'
    assert isinstance(tag("p"), Markup)


def test_absolute_paths_are_not_shown() -> None:
    assert shown("/home/jane/RSTPReid") == "…/RSTPReid"
    assert shown("~/data/x") == "…/x"
    assert shown(r"C:\Users\jane\x") == "…/x"
    assert shown([128, 64]) == "128, 64"
    assert shown(["/a/b"]) == "…/b"
    assert (shown(True), shown("data/sample"), shown(0.5)) == ("yes", "data/sample", "0.5")


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_both_modes() -> None:
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")
    for part in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part))
        for paper in ("page", "card", "soft"):
            for ink, least in (("text", 7), ("muted", 4.5), ("link", 4.5), ("hit", 3), ("miss", 3)):
                low, high = sorted((luminance(colours[paper]), luminance(colours[ink])))
                assert (high + 0.05) / (low + 0.05) >= least, (paper, ink)
        for place in range(charts.COLOURS):
            low, high = sorted((luminance(colours["card"]), luminance(colours[f"c{place}"])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, place


# -- one run ------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_the_files_say(tmp_path: Path, data: Prepared) -> None:
    folder = evaluated(tmp_path / "run", data)
    edited(folder, query=HOSTILE, ap="0.0001", first_hit="30")
    path = write_report(folder)
    text, queries = path.read_text(), pd.read_csv(folder / "queries.csv")
    shown_page = Reader(text)
    figures = pd.read_csv(folder / "metrics.csv").set_index(["stage", "metric"])
    best = figures.loc[("reranked", "R@1")]
    assert f"{best.value:.1f} %95 % CI {best.low:.1f} to {best.high:.1f}" in shown_page.text
    failed = int((queries["first_hit"] != 1).sum())
    assert f"{failed} of {len(queries)} queries" in shown_page.text
    assert "selected on val" in shown_page.text
    assert "(step 600)" in shown_page.text
    assert "tail: itc" in shown_page.text
    # the worst query leads, its caption as text
    assert HOSTILE in shown_page.text
    assert shown_page.text.index(HOSTILE) < shown_page.text.rindex("Random queries")
    assert not shown_page.all("script")
    assert not any("onerror" in found for _, found in shown_page.tags)
    # nothing from outside, nothing about the machine, alternatives for every picture
    sources = [found["src"] or "" for found in shown_page.all("img")]
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert all(found["alt"] for found in shown_page.all("img"))
    assert all(found["aria-label"] for found in shown_page.all("svg"))
    assert not re.search(r"(?:https?:)?//", re.sub(r"base64,[^\"]*", "", text))
    assert str(tmp_path) not in text
    assert str(data.folder) not in text
    assert "width=device-width" in text
    # headings go down one level at a time
    levels = [int(name[1]) for name, _ in shown_page.tags if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    # links lead to files that are there, and to sections of the page
    ids = {found.get("id") for _, found in shown_page.tags}
    for link in shown_page.all("a"):
        target = link["href"] or ""
        assert target[1:] in ids if target.startswith("#") else (folder / target).is_file(), target
    assert {"./metrics.csv", "./queries.csv"} <= {link["href"] for link in shown_page.all("a")}


def test_hits_are_framed_where_the_table_has_them(tmp_path: Path, data: Prepared) -> None:
    folder = evaluated(tmp_path / "run", data)
    shown_page = read(write_report(folder))
    queries = pd.read_csv(folder / "queries.csv").set_index("query")
    sheets = shown_page.text.count("right person at rank")
    assert sheets == len(shown_page.all("article"))
    assert sheets > 6
    # Each sheet's tiles, in order, against its row.
    found: list[list[int]] = []
    for name, attributes in shown_page.tags:
        if name == "article":
            found.append([])
        elif name == "li" and "wanted" not in (attributes["class"] or ""):
            found[-1].append(int("hit" in (attributes["class"] or "")))
    texts = re.findall(r"“(.*?)”", shown_page.text)
    for query, framed in zip(texts, found, strict=True):
        assert framed == json.loads(queries.loc[query, "top_hits"])
    assert any(sum(row) for row in found)


def test_same_files_same_bytes(tmp_path: Path, data: Prepared) -> None:
    folder = evaluated(tmp_path / "run", data)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert len(first) < 5_000_000


def moved(data: Prepared, to: Path) -> Prepared:
    """A copy whose images a test may spoil."""
    shutil.copytree(data.folder, to)
    return Prepared(data.name, to, data.images, data.captions, to / "raw/imgs", to / "tokenizer.json", data.info)


def test_page_stays_small_with_large_noisy_images(tmp_path: Path, data: Prepared) -> None:
    noisy = moved(data, tmp_path / "d")
    for path in noisy.split("test")[0]["path"]:
        noise = np.random.default_rng(0).integers(0, 255, (400, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(noisy.image_root / path, quality=95)
    assert write_report(evaluated(tmp_path / "run", noisy)).stat().st_size < 5_000_000


def test_without_images_the_page_still_comes(tmp_path: Path, data: Prepared) -> None:
    copy = moved(data, tmp_path / "d")
    folder = evaluated(tmp_path / "run", copy)
    worst = pd.read_csv(folder / "queries.csv").sort_values("ap").iloc[0]
    name = json.loads(worst["top_paths"])[0]
    (copy.image_root / name).write_bytes(b"no image")
    broken = read(write_report(folder))
    assert name in broken.text  # one image: its name stands in for it
    assert len(broken.all("img")) > 20
    shutil.rmtree(copy.image_root)
    without = read(write_report(folder))
    assert not without.all("img")
    assert "images are not where they were" in without.text
    assert name in without.text
    assert without.all("li", "hit")


def test_paths_out_of_the_image_folder_are_not_opened(tmp_path: Path, data: Prepared) -> None:
    folder = evaluated(tmp_path / "run", data)
    secret = data.image_root.parent / "secret.jpg"
    Image.new("RGB", (8, 16), "red").save(secret)
    edited(folder, ap="0", first_hit="30", top_paths=json.dumps(["../secret.jpg", str(secret)]), top_hits="[0, 0]")
    sheet = write_report(folder).read_text().split("<article")[1]
    assert sheet.count("<img") == 1  # only the image that the text describes
    assert "<span>secret.jpg</span>" in sheet


def test_val_figures_carry_a_caution(tmp_path: Path, data: Prepared) -> None:
    folder = evaluated(tmp_path / "run", data)
    record = json.loads((folder / "evaluation.json").read_text())
    write_json(folder / "evaluation.json", {**record, "split": "val"})
    assert "They flatter: the model was selected on it" in read(write_report(folder)).text
    record["config"]["eval"] |= {"tail": "reference"}
    write_json(folder / "evaluation.json", record)
    assert "depend on that order" in read(write_report(folder)).text


def test_unfinished_run_has_curves_and_configuration(tmp_path: Path, data: Prepared) -> None:
    folder = evaluated(tmp_path / "run", data)
    (folder / "evaluation.json").unlink()
    shown_page = read(write_report(folder))
    assert "has not been evaluated yet" in shown_page.text
    assert shown_page.all("svg")
    (folder / "train_log.csv").write_text(pd.read_csv(folder / "train_log.csv").head(0).to_csv(index=False))
    (folder / "validation.csv").unlink()
    assert not read(write_report(folder)).all("svg")


def test_cosine_alone(tmp_path: Path, data: Prepared) -> None:
    shown_page = read(write_report(evaluated(tmp_path / "run", data, stages=("cosine",))))
    assert "nothing was re-ranked" in shown_page.text
    assert not any("ITM" in (picture["alt"] or "") for picture in shown_page.all("img"))
    assert len(shown_page.all("figure", "chart")) == 1 + 4  # cosine; four panels with values


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("evaluation.json", "[]"),
        ("evaluation.json", '{"format": 1}'),
        ("evaluation.json", "{" * 99),
        ("evaluation.json", "[" * 100_000),
        ("metrics.csv", ""),
        ("metrics.csv", "direction,stage,metric,value,low,high\n"),
        ("queries.csv", "a,b\n1,2\n"),
        ("validation.csv", "step,stage,R@1,mAP\n1,cosine,high,2\n"),
        ("train_log.csv", b"step,loss\n1,\xff\n"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, data: Prepared, name: str, content: str | bytes) -> None:
    folder = evaluated(tmp_path / "run", data)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        write_report(folder)


@pytest.mark.parametrize("cell", ["[1, 2", "{}", '["<b>"]', "[" * 50_000, "[1" + "0" * 400 + "]", "[NaN, 1e999]"])
def test_hostile_cells(tmp_path: Path, data: Prepared, cell: str) -> None:
    folder = evaluated(tmp_path / "run", data)
    edited(folder, top_cosine=cell)
    if cell == "[NaN, 1e999]":  # numbers, if odd ones
        write_report(folder)
    else:
        with pytest.raises(DataError, match=r"queries\.csv is broken"):
            write_report(folder)


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a run nor an evaluation"):
        read_run(tmp_path)


# -- curves -------------------------------------------------------------------------------------------------------


def test_chosen_step_is_what_training_chooses() -> None:
    assert chosen_step(validation_log()) == 600
    equal = validation_log().assign(**{"R@1": 1, "mAP": 1})
    assert chosen_step(equal) == 300
    assert chosen_step(validation_log().head(0)) is None


def test_panels_leave_out_what_was_not_logged(tmp_path: Path) -> None:
    panels = {panel.title: panel for panel in curve_panels(training_log(), validation_log())}
    assert list(panels) == ["Validation, text to image, percent", "Training loss", "Gradient norm", "Learning rate"]
    assert [line.label for line in panels["Training loss"].series] == ["total", "ITC", "ITM"]
    assert panels["Training loss"].series[2].steps[0] == 401
    curves_png(tmp_path / "none.png", training_log().head(0), validation_log().head(0))
    assert not (tmp_path / "none.png").exists()
    short = training_log(50)[["step", "loss"]]  # columns may be missing altogether
    curves_png(tmp_path / "a.png", short, validation_log())
    curves_png(tmp_path / "b.png", short, validation_log())
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_charts_survive_odd_values() -> None:
    table = pd.DataFrame({"step": [1, 2, 3, np.inf], "x": [np.nan, 2.0, np.inf, 1.0]})
    line = series(table, "x", "<x>")
    assert (line.steps, line.values) == ([2.0], [2.0])
    drawn = charts.line_chart(report.Panel("one point", [line]))
    assert "nan" not in drawn
    assert "&lt;x&gt; 2" in drawn
    long = charts.line_chart(curve_panels(training_log(100_000), validation_log())[1])
    assert len(long) < 60_000
    same = charts.histogram("s", {"match": np.array([0.5, 1e300, np.nan]), "other person": np.array([])})
    assert "match: 1, median 0.5" in same
    assert "nan" not in same
    for value in (0.0, 1e-8, 33.3, -1e29):
        flat = charts.line_chart(report.Panel("flat", [report.Series("x", [1.0, 2.0], [value, value], True)]))
        assert "nan" not in flat
        assert len(set(re.findall(r'text-anchor="end">([^<]+)<', flat))) > 2  # ticks that differ


# -- runs side by side --------------------------------------------------------------------------------------------


def test_paired_tests_match_queries_by_id(tmp_path: Path, data: Prepared) -> None:
    first, second = evaluated(tmp_path / "a", data), evaluated(tmp_path / "b", data, skill=3.0, seed=1)
    table = pd.read_csv(second / "queries.csv")
    table.sample(frac=1, random_state=0).to_csv(second / "queries.csv", index=False)  # other order, same ids
    written = compare_runs.report([first, second], tmp_path / "both.html")
    before = pd.read_csv(first / "queries.csv")
    expected = paired_test(100.0 * (before["first_hit"] == 1).to_numpy(), 100.0 * (table["first_hit"] == 1).to_numpy())
    recall, precision = written.comparisons
    assert (recall.metric, recall.queries) == ("R@1", len(before))
    assert recall[5:9] == pytest.approx(expected)
    assert precision.difference == pytest.approx(100 * (table["ap"].mean() - before["ap"].mean()))
    assert precision.better == int((table["ap"].to_numpy() > before["ap"].to_numpy()).sum())
    shown_page = read(written.path)
    assert f"{precision.difference:+.2f}" in shown_page.text
    assert shown_page.all("span", "better")
    assert [row[-1] for row in compare_runs.comparison_rows(written.comparisons)[1]] == ["better", "better"]
    assert "train.seed01" in shown_page.text
    assert "train.epochs" not in shown_page.text  # the same in both
    hrefs = [link["href"] or "" for link in shown_page.all("a")]
    assert {"a/metrics.csv", "b/queries.csv"} <= set(hrefs)
    assert all((tmp_path / href).is_file() for href in hrefs if not href.startswith("#"))


def test_other_data_is_not_paired(tmp_path: Path, data: Prepared) -> None:
    first, second = evaluated(tmp_path / "a", data), evaluated(tmp_path / "b", data)
    record = json.loads((second / "evaluation.json").read_text())
    for change, why in (
        ({"split": "val"}, "different data (sample test, sample val)"),
        ({"dataset": "rstpreid"}, "different data"),
        ({"files": {"images.csv": "0", "captions.csv": "0"}}, "differently prepared"),
    ):
        write_json(second / "evaluation.json", {**record, **change})
        written = compare_runs.report([first, second], tmp_path / "both.html")
        assert not written.comparisons
        assert why in written.unpaired
        assert why in read(written.path).text
    (second / "evaluation.json").unlink()
    assert "Not evaluated yet: b" in compare_runs.report([first, second], tmp_path / "both.html").unpaired


def test_runs_that_share_no_query(tmp_path: Path, data: Prepared) -> None:
    first, second = evaluated(tmp_path / "a", data), evaluated(tmp_path / "b", data)
    table = pd.read_csv(second / "queries.csv")
    table.assign(query_id=table["query_id"] + 10_000).to_csv(second / "queries.csv", index=False)
    assert compare(read_run(first), read_run(second)) == []
    assert "share no query" in read(compare_runs.report([first, second], tmp_path / "c.html").path).text


def test_arguments_of_report(tmp_path: Path, data: Prepared) -> None:
    folder = evaluated(tmp_path / "x" / "run", data)
    with pytest.raises(UsageError, match="twice"):
        compare_runs.report([folder, folder / ".." / "run"])
    with pytest.raises(UsageError, match="is a folder"):
        compare_runs.report([folder], tmp_path)
    assert compare_runs.report([folder]).path == folder / "report.html"
    twin = evaluated(tmp_path / "y" / "run", data)
    assert "x/run" in read(compare_runs.report([folder, twin], tmp_path / "c.html").path).text


# -- rooms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [report, page, charts, run_files, html_report, compare_runs])
def test_the_report_needs_no_torch(module: Any) -> None:
    imports = [node for node in ast.walk(ast.parse(Path(module.__file__).read_text())) if isinstance(node, ast.Import)]
    froms = [n for n in ast.walk(ast.parse(Path(module.__file__).read_text())) if isinstance(n, ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names} | {node.module or "" for node in froms}
    assert not any(name.split(".")[0] in ("torch", "timm", "transformers") for name in names)
    assert not names & {"agatool.model", "agatool.retrieval", "agatool.train", "agatool.checkpoint"}


def test_evaluation_writes_its_report(tmp_path: Path, data: Prepared) -> None:
    from agatool.retrieval import Evaluation, MetricRow
    from agatool.train import write_evaluation

    folder = evaluated(tmp_path / "run", data)
    run = read_run(folder)
    outcome = Evaluation([MetricRow(*row) for row in run.metrics.to_numpy().tolist()], run.queries, {})
    config = {"eval": {"rerank": 16, "tail": "itc", "bootstrap": 200}}
    out = tmp_path / "new"
    write_evaluation(out, outcome, data, "test", "tiny", "cpu, fp32", config)
    assert (out / "metrics.csv").read_bytes() == (folder / "metrics.csv").read_bytes()
    shown_page = read(out / "report.html")
    assert "how it was selected is not recorded here" in shown_page.text
    assert shown_page.all("img")
    assert {"python", "torch", "timm", "transformers"} <= set(read_run(out).record["environment"])
