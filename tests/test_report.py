"""The report: its statistics, its verdicts, that it repeats to the byte, and that the paper is transcribed right."""

import ast
import dataclasses
import hashlib
import itertools
import math
import pathlib
import re
import typing

import numpy as np
import pytest
from scipy import stats

from examples.reproduction import (
    answer,
    configs,
    evidence,
    overhead,
    pictures,
    report,
    sections,
    store,
    studies,
    toy,
)

PAPER = sections.paper()
PRINTED = [name for name, section in PAPER.items() if not section.of]  # without what we run in other settings
VIEWS = [name for name in PRINTED if not PAPER[name].same_as]
ABOUT = {"date": "2026-03-0{}T10:00:00+00:00", "device": "a device", "data": "cifar10 (a copy)"}
VANILLA = {"optimizer": "sgd", "learning_rate": 0.01, "strategy": "vanilla"}
EXCITED = VANILLA | {"strategy": "zero_sum"}
CLAIM = {"measure": "accuracy", "contrast": [[1.0, EXCITED], [-1.0, VANILLA]], "sign": 1}


def short(name, seeds=3):
    return dataclasses.replace(PAPER[name], seeds=seeds, settings={"epochs": 5}, remark="")


@pytest.fixture
def use(monkeypatch):
    """Replaces all sections by those of the paper, short, with as many seeds as given; returns those named."""

    def replace(*names, seeds=3):
        table = {name: short(name, seeds) for name in PAPER}
        monkeypatch.setattr(studies, "SECTIONS", table)
        monkeypatch.setattr(answer, "ANSWER", {})
        return {name: table[name] for name in names}

    return replace


def noise(run):
    """A number in [0, 1) that depends on the run alone."""
    return int(hashlib.sha256(run.key.encode()).hexdigest()[:8], 16) / 2**32


def made_up(run, accuracy=None, seconds=60.0, **about):
    """A result with everything that the report reads."""
    accuracy = 0.4 + 0.1 * noise(run) if accuracy is None else accuracy
    layers = np.linspace(0.1, 0.2 + 0.2 * noise(run), getattr(run, "depth", 2)).tolist()
    curve = {"epoch": [1, 2, 3, 4, 5], "accuracy": [accuracy * x for x in (0.2, 0.4, 0.6, 0.8, 1.0)]}
    curve["entropy"] = [2.5, 2.4, 2.3, 2.2, 2.1]
    measures = {"accuracy": accuracy, "specialization": layers, "entropy": layers, "perplexity": 30 + noise(run)}
    about = {name: text.format(1 + run.seed) for name, text in ABOUT.items()} | about
    return store.Result(run, measures, curve, seconds, about)


def fill(folder, table, accuracy=lambda run: None):
    """Results for all runs of the sections."""
    results = store.Results(folder)
    results.check_writable()
    runs = [run for section in table.values() for run in section.runs()]
    results.append([made_up(run, accuracy(run)) for run in dict.fromkeys(runs)])
    return results


def paired(tmp_path, vanilla, excited):
    """Results of the claim, one accuracy for each seed; None is a run that is missing."""
    experiment, results = short("table1", seeds=len(vanilla)), store.Results(tmp_path)
    for where, values in ((VANILLA, vanilla), (EXCITED, excited)):
        runs = [(experiment.make_run(where, seed), value) for seed, value in enumerate(values)]
        results.append([made_up(run, value) for run, value in runs if value is not None])
    return results, experiment


# Statistics.


def test_the_interval_is_that_of_a_paired_t_test(tmp_path):
    vanilla, excited = [0.41, 0.40, 0.43, 0.39], [0.47, 0.45, 0.46, 0.46]
    got = evidence.contrast(*paired(tmp_path, vanilla, excited), CLAIM)
    expected = stats.ttest_rel(excited, vanilla)
    interval = expected.confidence_interval(0.95)
    assert (got.n, got.diverged) == (4, 0)
    assert got.mean == pytest.approx(100 * (np.mean(excited) - np.mean(vanilla)))
    ends = 100 * interval.low, 100 * interval.high
    assert (got.mean - got.half, got.mean + got.half) == pytest.approx(ends)
    assert got.p_value == pytest.approx(expected.pvalue)


def test_four_runs_in_a_contrast(tmp_path):
    """(0.5 - 0.4) - (0.3 - 0.25) = 5 points for both seeds: an interval without width."""
    experiment, results = short("table1", seeds=2), store.Results(tmp_path)
    terms = [[1.0, 0.9, "zero_sum", 0.5], [-1.0, 0.9, "vanilla", 0.4], [-1.0, 0.1, "zero_sum", 0.3]]
    terms += [[1.0, 0.1, "vanilla", 0.25]]
    claim = CLAIM | {"contrast": [[c, {"sparsity": s, "strategy": name}] for c, s, name, _ in terms]}
    for (_, where), (*_, value) in zip(claim["contrast"], terms, strict=True):
        results.append([made_up(experiment.make_run(where, seed), value) for seed in (0, 1)])
    got = evidence.contrast(results, experiment, claim)
    np.testing.assert_allclose((got.mean, got.half, got.n), [5, 0, 2], atol=1e-12)


@pytest.mark.parametrize(
    ("vanilla", "excited", "expected"),
    [
        ([0.40, 0.41, 0.42], [0.45, 0.46, 0.48], "confirmed"),
        ([0.45, 0.46, 0.48], [0.40, 0.41, 0.42], "contradicted"),
        ([0.40, 0.41, 0.42], [0.41, 0.40, 0.43], "inconclusive"),
        ([0.40, 0.41, 0.42], [0.40, 0.41, 0.42], "inconclusive"),  # no difference at all
        ([0.40], [0.45], "not tested (smoke test)"),
        ([0.40, 0.41], [0.45, 0.46], "not tested (smoke test)"),
        ([0.40, 0.41, None], [0.45, 0.46, 0.48], "not tested (smoke test)"),  # seeds without a partner do not count
        ([0.40, 0.41, 0.42, math.nan], [0.45, 0.46, 0.48, 0.10], "confirmed"),
        ([0.40, 0.41, math.nan], [0.45, 0.46, 0.10], "inconclusive (diverged)"),
        ([None, 0.4], [0.45, None], "not tested"),
    ],
)
def test_verdicts(tmp_path, vanilla, excited, expected):
    got = evidence.contrast(*paired(tmp_path, vanilla, excited), CLAIM)
    assert evidence.verdict(got, 1) == expected
    mirrored = {"confirmed": "contradicted", "contradicted": "confirmed"}
    assert evidence.verdict(got, -1) == mirrored.get(expected, expected)


@pytest.mark.parametrize(
    ("excited", "size"),  # the paper has +5.57
    [
        ([0.455, 0.465, 0.475], ", smaller"),
        ([0.45, 0.46, 0.48], ""),
        ([0.47, 0.48, 0.49], ", larger"),
        ([0.47, None, None], ""),
    ],
)
def test_the_size_is_compared_with_the_papers(tmp_path, use, excited, size):
    use("table1")
    results, _ = paired(tmp_path, [0.40, 0.41, 0.42], excited)
    line = next(row for row in report.markdown(results).splitlines() if "Table 1, SGD, zs" in row)
    assert line.endswith(f"{'confirmed' if None not in excited else 'not tested (smoke test)'}{size} |")


def test_diverged_seeds_are_counted_and_left_out(tmp_path):
    got = evidence.contrast(*paired(tmp_path, [0.40, math.nan, 0.42], [0.45, 0.46, 0.49]), CLAIM)
    assert (got.n, got.diverged) == (2, 1)
    np.testing.assert_allclose(got.mean, 6)


def test_what_is_measured():
    curve = {"epoch": [2, 4, 6, 8, 10], "entropy": [2.5, 2.4, 2.3, 2.2, 2.1]}
    layers = [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8]
    result = store.Result(configs.MLPRun(), {"accuracy": 0.5, "specialization": layers}, curve, 1.0, {})
    assert evidence.measured(result, {"measure": "accuracy"}) == 0.5
    assert evidence.measured(result, {"measure": "specialization"}) == pytest.approx(3.8 / 8)
    assert evidence.measured(result, {"measure": "specialization", "layers": "middle"}) == pytest.approx(1.4 / 4)
    assert evidence.measured(result, {"measure": "entropy", "at": 0.2}) == 2.5
    assert evidence.measured(result, {"measure": "entropy", "at": 0.6}) == 2.3


# The page.


def section(page, title):
    return re.search(rf"## {title}.*?(?=\n## |\Z)", page, re.DOTALL)[0]


def test_table_1_on_the_page(tmp_path, use):
    """SGD: vanilla 40.00, 41.00, 42.00 and zero_sum 45.00, 46.00, 48.00 percent, of which the last has diverged."""
    table = use("table1", "fig2")
    accuracies = {"vanilla": [0.40, 0.41, 0.42], "zero_sum": [0.45, 0.46, math.nan]}
    sgd = lambda run: accuracies.get(run.strategy, [None] * 3)[run.seed] if run.optimizer == "sgd" else None
    page = report.markdown(fill(tmp_path, table, sgd))
    table1 = section(page, "Table 1")
    assert "| SGD | baseline | 41.01 ± 0.33 | 41.00 ± 1.00 (3 seeds) | -0.01 |" in table1
    assert "| SGD | zero_sum | 46.58 ± 0.32 | 45.50 ± 0.71 (2 seeds, 1 diverged) | -1.08 |" in table1
    claim = "| SGD: zero_sum beats the baseline | Table 1, SGD, zs | +5.57 | +5.00 [+5.00, +5.00] (1 diverged) |"
    assert f"{claim} inconclusive (diverged) |" in table1
    assert "| SGD: positive_sum beats zero_sum | section 4.2 | (+0.01) |" in table1
    assert "Here: epochs 5, 3 seeds." in table1
    assert (
        "54 of 54 runs, 54.0 device minutes, on a device, 2026-03-01 to 2026-03-03. "
        "Made by `python -m examples.reproduce run table1`." in table1
    )
    assert "| zero_sum beats the baseline | Figure 2, section 4.1 | > 0 | +5.00" in section(page, "Figure 2")
    assert "* cifar10 (a copy)\n" in section(page, "The data")
    summary = section(page, "Summary")
    assert "| [Table 1](#table-1-six-optimizers-on-cifar-10) | Six optimizers on CIFAR-10 | 54 of 54 |" in summary
    assert "The paper's runs: 66, 66.0 device minutes" in summary  # 12 runs of Figure 2 are not in Table 1
    rows = [line.split(" | ") for line in summary.splitlines() if line.startswith("| [")]
    assert len(rows) == len(PAPER)
    total = next(line for line in summary.splitlines() if line.startswith("| all, without variants |"))
    counts = [int(cell) for cell in total.strip("| ").split(" | ")[-4:]]
    assert counts == report.totals(store.Results(tmp_path))
    assert sum(counts) == sum(len(PAPER[name].claims) for name in VIEWS if PAPER[name].trains)
    for name, row in zip(PAPER, rows, strict=True):
        if PAPER[name].trains and not PAPER[name].same_as:
            assert sum(int(cell.strip(" |")) for cell in row[3:]) == len(PAPER[name].claims)


def test_views_come_in_the_order_of_the_paper_and_those_without_runs_say_so(tmp_path, use):
    use("table1", "fig2")
    page = report.markdown(store.Results(tmp_path))
    titles = re.findall(r"^## (Figure|Table) (\d+):", page, re.MULTILINE)
    assert [f"{kind[:3].lower()}{number}" for kind, number in titles] == [n.replace("table", "tab") for n in PRINTED]
    assert "Not run: `python -m examples.reproduce run table1`" in section(page, "Table 1")
    assert "Not run: `python -m examples.reproduce run fig6`" in section(page, "Figure 6")
    assert "Not run: `python -m benchmarks.overhead`" in section(page, "Table 8")
    assert "The data" not in page
    assert "images" not in page


def test_partial_runs_remarks_and_notes(tmp_path, use, monkeypatch):
    table = use("fig3")
    for name, remark in {"fig3": "A remark.", "fig1": "Left out."}.items():
        monkeypatch.setitem(studies.SECTIONS, name, dataclasses.replace(studies.SECTIONS[name], remark=remark))
    results = store.Results(tmp_path)
    runs = [run for run in table["fig3"].runs() if run.depth == 9]
    results.append([made_up(run, data="cifar10, quality 75") for run in runs])
    page = report.markdown(results)
    fig3 = section(page, "Figure 3")
    assert "9 of 18 runs" in fig3
    assert fig3.count("not tested") == 2
    assert "| Adam, 20 layers | positive_sum | about 33 |  |  |" in fig3
    assert "which variant" in fig3
    assert fig3.strip().endswith("\n\nA remark.")
    assert "Left out." not in page  # as it was not run
    assert "* cifar10, quality 75\n" in page


def test_perplexity_saved_and_the_picture_of_table_2(tmp_path, use):
    table = use("table2", seeds=1)
    results = fill(tmp_path, table)
    experiment = table["table2"]
    where = {"num_experts": 8, "experts_per_token": 2, "d_ff": 256}
    perplexity = [
        results[experiment.make_run(where | {"strategy": s}, 0)].measures["perplexity"]
        for s in ("vanilla", "positive_sum")
    ]
    page = report.markdown(results)
    saved = perplexity[0] - perplexity[1]
    row = f"| N=8, k=2 | d_ff=256 (89M) | 0.72 | {saved:.2f} (1 seed) | {saved - 0.72:+.2f} |"
    assert row in section(page, "Table 2")
    assert f"| Table 2 | +0.72 | {saved:+.2f} | not tested (smoke test) |" in section(page, "Table 2")
    assert "120 of 120 runs" in section(page, "Table 2")
    assert "svg" not in section(page, "Figure 7")  # a smoke test
    # Larger at N=8 than at N=4 over the five widths: (0.72 + 0.83 + 0.64 + 0.92 + 1.15 - 2.51) / 5
    claim = next(c for c in experiment.claims if "N=8 than at N=4" in c["text"])
    assert evidence.printed(experiment, claim) == pytest.approx(0.35, abs=1e-4)
    page = report.markdown(fill(tmp_path / "three", use("table2")))
    assert "images/reproduction/fig7.svg" in section(page, "Figure 7")


def test_experiments_that_are_not_the_papers_have_a_page_of_their_own(tmp_path, use, monkeypatch):
    use()
    rows = tuple(map(sections.row, (VANILLA, EXCITED)))
    other = sections.Section("look", "A look", seeds=2, rows=rows, settings={"epochs": 2})
    monkeypatch.setitem(studies.SECTIONS, "look", other)
    page = report.studies_markdown(store.Results(tmp_path))
    assert page.endswith("## A look\n\nNot in the paper. Not run: `python -m examples.reproduce run look`\n")
    results = store.Results(tmp_path)
    results.append([made_up(run, 0.5) for run in other.runs()])
    row = "| test accuracy (%), sgd | 0.01 |\n| --- | --: |\n| baseline | 50.00 ± 0.00 (2 seeds) |"
    assert row in report.studies_markdown(results)
    assert row not in report.markdown(results)


def test_candidates_beside_the_paper(tmp_path, use, monkeypatch):
    """Table 4 prints 48.47 for Adam at 90 % and 51.47 for SGD at 10 %; those without a run count for nothing."""
    search = studies.SECTIONS["search_long"]
    use()
    monkeypatch.setitem(studies.SECTIONS, "search_long", search)
    adam = dataclasses.replace(search.runs()[0], initialization="he_normal")
    sgd = dataclasses.replace(adam, optimizer="sgd", learning_rate=0.01, sparsity=0.1)
    results = store.Results(tmp_path)
    results.append([made_up(adam, 0.5), made_up(sgd, 0.5047)])
    text = section(report.studies_markdown(results), "The open choices, third look")
    assert "| the paper | 48.47 | 56.08 | 41.01 | 51.47 | 50.85 | 44.94 |  |" in text
    name = "depth 3, augmentation flip, initialization he_normal, epochs 100"
    assert f"| {name} | 50.00 (+1.53) |  |  | 50.47 (-1.00) |  |  | 1.29 |" in text  # root of (1.53² + 1²) / 2
    assert "initialization lecun_normal" not in text
    assert "2 of 24 runs" in text


def test_table_8_is_measured_elsewhere(tmp_path, use, monkeypatch):
    use()
    monkeypatch.setattr(overhead, "load", lambda folder: [{"row": "a"}, {"row": "a"}] if folder == tmp_path else [])
    monkeypatch.setattr(overhead, "table", lambda entries: f"a table of {len(entries)}")
    page = report.markdown(store.Results(tmp_path))
    assert "a table of 2" in section(page, "Table 8")
    assert "| 1 of 6 rows |" in section(page, "Summary")


def test_the_same_results_give_the_same_bytes(tmp_path, use):
    results = fill(tmp_path / "results", use("table1", "table4", "fig3"))
    first = report.write(results, tmp_path / "one")
    second = report.write(store.Results(tmp_path / "results"), tmp_path / "two")
    names = [str(path.relative_to(tmp_path / "one")) for path in first]
    images = [f"images/reproduction/{name}.svg" for name in ("summary", "fig3", "table4")]
    assert names[:2] == ["reproduction.md", "studies.md"]
    assert set(images) < set(names)  # others share runs
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
        assert str(tmp_path) not in a.read_text()


@pytest.mark.slow
def test_every_picture_is_drawn_and_shown(tmp_path, use):
    """In a sweep that is under way, in which a run diverged."""
    table = use(*(name for name in PAPER if PAPER[name].draw), "table2")
    results = store.Results(tmp_path / "results")
    results.check_writable()
    for experiment in table.values():
        runs = [run for run in experiment.runs() if run not in results][1:]
        results.append([made_up(run, math.nan if i == 0 else None) for i, run in enumerate(runs)])
    store.save_json(results.folder / toy.FILE, toy.run())
    written = report.write(results, tmp_path / "docs")
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", written[0].read_text())
    assert sorted(shown) == sorted(str(path.relative_to(tmp_path / "docs")) for path in written[2:])
    assert len(shown) == sum(bool(section.draw) for section in PAPER.values()) + 1  # and the toy problem's
    for path in written[2:]:
        assert path.read_text().startswith("<?xml")
        assert path.stat().st_size < 120_000, path  # to be reviewed
    assert "SGD (momentum 0.9): zero_sum" in (tmp_path / "docs" / "images" / "reproduction" / "summary.svg").read_text()


def test_matplotlib_is_imported_late():
    module = ast.parse(pathlib.Path(pictures.__file__).read_text())
    top = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(top) > 4
    assert not any("matplotlib" in ast.unparse(node) for node in top)


# The README.


def test_the_table_in_the_readme(tmp_path, use):
    """What was run at full length comes first."""
    table = use("table1_long", "table1")
    table["table1"] = dataclasses.replace(table["table1"], settings={"epochs": 2})
    studies.SECTIONS["table1"] = table["table1"]
    results = fill(tmp_path / "results", table, lambda run: 0.5 if run.strategy == "zero_sum" else 0.4)
    readme = tmp_path / "README.md"
    readme.write_text("Before.\n<!-- reproduction -->\nold\n<!-- /reproduction -->\nAfter.\n")
    for _ in range(2):
        report.update(readme, "reproduction", report.summary_markdown(results))
        text = readme.read_text()
        assert text.startswith("Before.\n<!-- reproduction -->\n| Δ accuracy, points |")
        assert "\n\nOurs: epochs 5, 3 seeds; and epochs 2, 3 seeds; in brackets, the 95 % interval.\n" in text
        (told,) = re.findall(r"\nOf (\d+) claims .*, (\d+) confirmed, (\d+) .*, (\d+) .* and (\d+) not", text)
        assert list(map(int, told)) == [sum(report.totals(results)), *report.totals(results)]
        assert text.endswith(", Figure 11.\n<!-- /reproduction -->\nAfter.\n")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[2] == "| SGD, 5 epochs | +5.57 | +10.00 [+10.00, +10.00] | +5.58 | +0.00 [+0.00, +0.00] |"
    assert [row.split(",")[0] for row in rows[2:10]][::6] == ["| SGD", "| SGD"]
    assert len(rows) == 2 + 6 + 6


def test_the_readme_without_runs_or_markers(tmp_path, use):
    use("table1")
    readme, results = tmp_path / "README.md", store.Results(tmp_path)
    assert report.summary_markdown(results) == "Not run: `python -m examples.reproduce run table1`"
    readme.write_text("<!-- /reproduction -->\n<!-- reproduction -->\n")
    with pytest.raises(ValueError, match=r"README.md must have the markers <!-- reproduction --> and"):
        report.update(readme, "reproduction", report.summary_markdown(results))


# The transcription.


def test_every_table_and_figure_is_there():
    figures, tables = range(1, 12), range(1, 9)
    assert set(PRINTED) == {f"fig{n}" for n in figures} | {f"table{n}" for n in tables}
    assert PAPER["fig7"].same_as == "table2"
    rows = {name: len(PAPER[name].rows) for name in VIEWS}
    # Table 2: 5 widths for (N, k) = (4, 2), (8, 2 and 4), (16, 32 and 64; 2, 4 and 8). Table 7: vanilla is shared.
    assert rows["table1"] == 6 * 3
    assert rows["table2"] == 5 * (1 + 2 + 3 * 3)
    assert rows["table3"] == 2 * 7 * 3
    assert rows["table4"] == 2 * 5 * 2
    assert rows["table5"] == 2 * 6 * 2
    assert rows["table6"] == 2 * 2 * 2
    assert rows["table7"] == 2 * (1 + 3 * 2)
    assert rows["table8"] == 6
    assert (rows["fig2"], rows["fig8"], rows["fig9"]) == (7, 14, 15)
    assert rows["fig6"] == rows["fig10"] == rows["fig11"] == 2 * 2 * 3
    deltas = [sum(claim["printed"] is not None for claim in PAPER[f"table{n}"].claims) for n in (1, 2, 4, 5, 6, 7)]
    assert deltas == [12, 60, 10, 12, 4, 12]


def test_tables_are_complete_and_rows_differ():
    for name in VIEWS:
        rows = PAPER[name].rows
        assert len({(row["label"], row["column"]) for row in rows}) == len(rows), name
        assert len({frozenset(row["where"].items()) for row in rows}) == len(rows), name
        assert all(row["value"] is not None for row in rows) or name.startswith("fig"), name
    assert all(0 < row["value"] < 1.2 for row in PAPER["table2"].rows)  # "never underperformed"


@pytest.mark.parametrize("name", VIEWS)
def test_printed_deltas_are_the_differences_of_their_rows(name):
    view = PAPER[name]
    for claim in view.claims:
        value = evidence.printed(view, claim | {"printed": None})
        if claim["printed"] is not None:
            assert value == pytest.approx(claim["printed"], abs=0.011), claim["text"]
            assert claim["sign"] == math.copysign(1, claim["printed"]), claim["text"]
        assert abs(sum(factor for factor, _ in claim["contrast"])) < 1e-9, claim["text"]


@pytest.mark.parametrize("name", [name for name in VIEWS if PAPER[name].trains])
def test_rows_and_claims_are_runs(name):
    view, kind = PAPER[name], configs.KINDS[PAPER[name].kind]
    hints = typing.get_type_hints(kind)
    specs = [*view.rows, *view.claims]
    for where in itertools.chain.from_iterable((w for _, w in spec["contrast"]) for spec in specs):
        run = kind(**where)
        for field in where:
            if options := typing.get_args(hints[field]):
                assert getattr(run, field) in options, (field, where)
    runs = lambda spec: {kind(**where) for _, where in spec["contrast"]}
    rows = set().union(*map(runs, view.rows))
    assert set().union(*map(runs, view.claims)) <= rows  # what a claim is about is in the table
    assert set(dataclasses.replace(view, seeds=1, settings={}).runs()) == rows


def test_the_tables_agree_where_they_share_runs():
    printed = {}
    for view in (PAPER[name] for name in VIEWS if PAPER[name].kind == "mlp"):
        for row in view.rows:
            if row["value"] is not None:
                printed.setdefault(configs.MLPRun(**row["where"]), set()).add((row["value"], row["spread"]))
    assert all(len(values) == 1 for values in printed.values())
    assert len(printed) == 18 + 36 + 16 + 20 + 4 + 8 + 2  # Tables 1 and 3 to 7 without what came before; Figure 3


def test_table_8_agrees_with_the_measurements():
    printed = [(row["value"], row["spread"]) for row in PAPER["table8"].rows]
    assert printed == [(row.percent, row.spread) for row in overhead.PAPER.values()]


# What is on file.


def test_the_page_is_that_of_the_results_on_file():
    root = pathlib.Path(__file__).parents[1]
    results = store.Results()
    assert not results.damaged
    assert len(results) > 0
    assert (root / "docs" / "reproduction.md").read_text(encoding="utf-8") == report.markdown(results)
    assert (root / "docs" / "studies.md").read_text(encoding="utf-8") == report.studies_markdown(results)
    assert f"<!-- reproduction -->\n{report.summary_markdown(results)}\n<!-- /reproduction -->" in (
        root / "docs" / "results.md"
    ).read_text(encoding="utf-8")
