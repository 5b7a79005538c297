"""Our studies: their claims are about their runs, learning rates are chosen on held-out data, each runs when tiny."""

import dataclasses
import math

import numpy as np
import pytest

from examples import datasets, reproduce
from examples.reproduction import (
    answer,
    engine,
    evidence,
    inputs,
    inside,
    pictures,
    report,
    sections,
    stacks,
    store,
    studies,
    transformers,
)

pytestmark = pytest.mark.usefixtures("as_users_have_it")

BASELINE, ZERO_SUM = {"strategy": "vanilla"}, {"strategy": "zero_sum"}
WHERES = sections.product([{"learning_rate": [0.1, 0.2, 0.3]}, {"strategy": ["vanilla", "zero_sum"]}])
CLAIM = sections.claim("zero_sum is better", {**ZERO_SUM, "learning_rate": "best"}, measure="accuracy")
STUDY = sections.Section(
    "look",
    "A look",
    seeds=4,
    settings={"subset": 100},
    rows=tuple(map(sections.row, WHERES)),
    claims=(CLAIM,),
    draw=("over", "learning_rate"),
)
STUDIES = {name: section for name, section in studies.SECTIONS.items() if section.in_study}


def fill(folder, values):
    """Results of a study; values are of (row, seed): accuracy and validation, or None if the run is missing."""
    results = store.Results(folder)
    for row in WHERES:
        for seed in range(STUDY.seeds):
            if (value := values(row, seed)) is not None:
                measures = dict(zip(("accuracy", "validation"), value, strict=True))
                about = {"device": "a device", "date": "2026-01-01"}
                results.append([store.Result(STUDY.make_run(row, seed), measures, {}, 1.0, about)])
    return results


@pytest.mark.parametrize("name", STUDIES)
def test_claims_are_about_runs_of_the_study(name):
    section, wheres = STUDIES[name], [row["where"] for row in STUDIES[name].rows]
    planned = {section.make_run(where, 0) for where in wheres}
    assert len(planned) == len(wheres)
    assert section.seeds >= evidence.MIN_SEEDS
    assert len({claim["text"] for claim in section.claims}) == len(section.claims)
    assert len({(sections.words(where), where["learning_rate"]) for where in wheres}) == len(wheres)
    for claim in section.claims:
        assert abs(sum(factor for factor, _ in claim["contrast"])) < 1e-9
        for _, where in claim["contrast"]:
            rates = {where["learning_rate"] for where in wheres}
            rates = rates if isinstance(where["learning_rate"], str) else {where["learning_rate"]}
            assert planned & {section.make_run({**where, "learning_rate": rate}, 0) for rate in rates}, claim["text"]


def test_the_best_rate_is_chosen_on_held_out_data(tmp_path):
    """The test accuracy of the chosen rate counts, though another rate has a better one."""
    best = {"vanilla": 0.2, "zero_sum": 0.1}

    def values(row, seed):
        chosen = row["learning_rate"] == best[row["strategy"]]
        test = 0.5 + 0.01 * seed + (0.1 if row["strategy"] == "zero_sum" else 0) + (0 if chosen else 0.2)
        return test, 0.9 if chosen else 0.8

    results = fill(tmp_path, values)
    rate = lambda where: evidence.resolve(results, STUDY, where)["learning_rate"]
    assert rate({**ZERO_SUM, "learning_rate": "best"}) == 0.1
    assert rate({**BASELINE, "learning_rate": "best"}) == 0.2
    assert rate({**ZERO_SUM, "learning_rate": "baseline's best"}) == 0.2
    assert rate({**ZERO_SUM, "learning_rate": 0.3}) == 0.3
    assert evidence.contrast(results, STUDY, CLAIM).mean == pytest.approx(10)
    of_losses = dataclasses.replace(STUDY, measure="loss")
    smallest = evidence.resolve(results, of_losses, {**BASELINE, "learning_rate": "best"})
    assert smallest["learning_rate"] in (0.1, 0.3)  # of a loss, the smallest is best


def test_a_rate_that_diverged_is_not_chosen_and_seeds_without_all_rates_do_not_count(tmp_path):
    def values(row, seed):
        if row["learning_rate"] == 0.3:
            return (0.9, math.nan) if seed == 1 else (0.9, 0.95)
        if seed == 3:  # other rates are missing: 0.2 looks better here
            return (0.5, 0.99) if row["learning_rate"] == 0.2 else None
        return 0.5, 0.8 - row["learning_rate"]

    results = fill(tmp_path, values)
    where = {**BASELINE, "learning_rate": "best"}
    assert evidence.resolve(results, STUDY, where)["learning_rate"] == 0.1
    assert evidence.resolve(store.Results(tmp_path / "none"), STUDY, where) is None
    assert evidence.contrast(store.Results(tmp_path / "none"), STUDY, CLAIM).n == 0


def test_holms_correction():
    """By hand: 4 times the smallest, 3 times the next, and so on, never falling; NaN is no test."""
    corrected = evidence.holm([0.04, math.nan, 0.01, 0.012, 0.5])
    np.testing.assert_allclose(corrected, [0.08, math.nan, 0.04, 0.04, 0.5])
    assert evidence.holm([]) == []


def test_the_p_value_goes_with_the_interval():
    """At an interval that ends at zero it is 0.05."""
    half = evidence.Contrast(0.0, 0.1, 5).half
    assert evidence.Contrast(half, 0.1, 5).p_value == pytest.approx(0.05)
    assert evidence.Contrast(-1.1 * half, 0.1, 5).p_value < 0.05 < evidence.Contrast(0.9 * half, 0.1, 5).p_value
    assert math.isnan(evidence.Contrast(0.1, math.nan, 1).p_value)
    assert [evidence.Contrast(mean, 0.0, 3).p_value for mean in (0.1, 0.0)] == [0, 1]


def test_the_section_of_a_study(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "SECTIONS", {"look": STUDY})
    monkeypatch.setattr(answer, "ANSWER", {})
    gain = lambda row, seed: (0.5 + (0.1 + 0.01 * seed) * (row["strategy"] == "zero_sum"), row["learning_rate"])
    results = fill(tmp_path, gain)
    page = report.section(results, STUDY)
    assert "| baseline | 50.00 ± 0.00 (4 seeds) | 50.00 ± 0.00 (4 seeds) | 50.00 ± 0.00 (4 seeds) |" in page
    assert (
        "| zero_sum is better, each at its best rate (0.3 and 0.3) | +11.50 [+9.45, +13.55] | confirmed | 0.00039 |"
        in page
    )
    assert (
        "Of 1 claim, 1 were tested: 1 confirmed and 0 contradicted; after the correction for 1 claims, 1 and 0." in page
    )
    assert report.summary_line(results, STUDY)[2:] == ("24 of 24", 1, 0, 0, 0)
    assert [path.name for path in report.write(results, tmp_path)] == ["reproduction.md", "studies.md", "look.svg"]


def test_a_picture_without_data_is_an_error(tmp_path):
    def draw(figure):
        figure.subplots().plot([1.0], [0.5], label="one point, and nothing that marks it")

    with pytest.raises(ValueError, match=r"The picture empty.svg shows no data"):
        pictures.save(tmp_path / "empty.svg", draw)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_tiny_version(name, monkeypatch):
    """Two steps of one seed of every row, on digits or on the text that comes with Python; at most 3 hidden layers."""
    section = STUDIES[name]
    runs = [section.make_run(row["where"], 0) for row in section.rows]
    is_text = section.kind == "mini_gpt"
    if section.kind == "mlp":
        small = {"dataset": "digits", "subset": 64, "batch_size": 32, "epochs": 1, "augmentation": "none"}
        tiny = [dataclasses.replace(run, depth=min(3, run.depth), **small) for run in runs]
    else:
        monkeypatch.setattr(transformers, "STEPS", 2)
        monkeypatch.setattr(transformers, "WINDOWS", 64)
        small = {"d_model": 8, "num_heads": 2, "d_ff": 8, "epochs": 1}
        small |= {"dataset": "python-reference", "context": 8} if is_text else {"dataset": "digits"}
        tiny = [dataclasses.replace(run, num_experts=min(16, run.num_experts), **small) for run in runs]
    data = inputs.load(tiny[0], None)
    stacks.program_of.cache_clear()
    program = reproduce.PROGRAMS[section.kind]
    groups = program.plan(tiny)
    results = [r for group in groups for r in program.train_group(group, data, lambda *_: None, lambda: False)]
    stacks.program_of.cache_clear()
    assert results
    for result in results:
        assert set(result.measures) >= {section.measure, "validation", "max_load", "dead"}
        found = result.curve["train_loss"], result.measures[section.measure], result.measures["validation"]
        assert np.isfinite(np.concatenate([np.ravel(value) for value in found])).all()


def test_the_table_of_the_answer(tmp_path, monkeypatch):
    """It stands between its markers in docs/does-it-help.md, and says so where there is nothing to say."""
    monkeypatch.setitem(studies.SECTIONS, "look", dataclasses.replace(STUDY, draw=()))
    monkeypatch.setattr(answer, "ANSWER", {"Looks": ("look", {}, (0, 100))})
    gain = lambda row, seed: (0.5 + (0.1 + 0.01 * seed) * (row["strategy"] == "zero_sum"), row["learning_rate"])
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "does-it-help.md").write_text("Before.\n<!-- answer -->\nold\n<!-- /answer -->\nAfter.\n")
    results = fill(tmp_path, gain)
    written = report.write(results, docs)
    assert [path.name for path in written] == ["reproduction.md", "studies.md", "answer.svg"]
    text = (docs / "does-it-help.md").read_text()
    assert "| Looks | `zero_sum` | **+11.50 [+9.45, +13.55]** | not tested | not tested |" in text
    assert "| Looks | `positive_sum` | not tested | not tested | not tested |" in text
    assert text.startswith("Before.\n<!-- answer -->\n|")
    assert text.endswith("|\n<!-- /answer -->\nAfter.\n")


def test_inside_is_that_of_the_models(tmp_path):
    """Against NumPy, at the start and after ten epochs."""
    data = datasets.load_digits()
    small = {"width": 16, "depth": 2, "subset": 64, "batch_size": 32}
    outcome = inside.run(data, epochs=10, **small)
    assert outcome["epoch"] == [0, 10]
    assert len(outcome["rows"]) == len(inside.ROWS)
    row = outcome["rows"]["baseline, 0.001"]
    run = STUDIES["deep_digits"].make_run({**inside.ROWS[0], **small}, seed=1)
    program, _, seeds, on_device = engine.Program.prepare(engine.Group(((run,),)), data)
    model = program.make_model(seeds[0])
    model.eval()
    h = np.asarray(program.normalize(on_device.train_images, on_device)).reshape(64, -1)
    for number, hidden in enumerate(map(np.asarray, model.hidden(h))):
        active = hidden != 0
        pairs = [[np.sum(a & b) for b in active] for a in active]
        assert row["shared"][0][1][number] == pytest.approx(np.sum(pairs) / 64 / np.sum(active), rel=1e-2)
        assert row["dead"][0][1][number] == pytest.approx(np.mean(~active.any(0)), abs=1e-3)
        signal = np.mean(np.var(hidden, axis=0)) / np.mean(np.square(hidden))
        assert row["signal"][0][1][number] == pytest.approx(signal, rel=1e-2)
    assert np.shape(row["accuracy"]) == (2, 3)
    assert np.shape(row["step"]) == np.shape(row["gradient"]) == (2, 3, 2)
    assert not np.any(row["step"][0])
    assert np.all(np.array(row["step"][1]) > 0)
