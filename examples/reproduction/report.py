"""The report: the paper's numbers and ours side by side, our own studies, pictures, and the tables of other pages.

It depends only on the results on file and on the sections: the same results give the same bytes.
"""

import pathlib
from collections.abc import Iterable
from typing import Any

from examples.reproduction import answer, configs, evidence, inside, overhead, pictures, store, studies, tables, toy
from examples.reproduction.sections import Section, read

IMAGES = pathlib.PurePosixPath("images/reproduction")  # in the folder of the page
INTRODUCTION = pathlib.Path(__file__).with_name("introduction.md").read_text(encoding="utf-8").strip()


def write(results: store.Results, docs_folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the two pages, their pictures and the table of `does-it-help.md`; returns the pages and pictures."""
    (docs_folder / IMAGES).mkdir(parents=True, exist_ok=True)
    pages = {"reproduction.md": markdown(results), "studies.md": studies_markdown(results)}
    for name, text in pages.items():
        (docs_folder / name).write_text(text, encoding="utf-8")
    if (docs_folder / "does-it-help.md").is_file():
        update(docs_folder / "does-it-help.md", "answer", answer.markdown(results))
    tasks: dict[str, tuple[Any, ...]] = {}
    for s in studies.SECTIONS.values():
        if s.is_drawn and evidence.found(results, s):
            tasks[s.name] = (pictures.draw, s, results)
    if any(evidence.found(results, studies.SECTIONS[name]) for name, *_ in answer.ANSWER.values()):
        tasks["answer"] = (answer.draw, results)
    for name, module in (("inside", inside), ("fig1", toy)):
        if outcome := module.load(results.folder):
            tasks[name] = (module.draw, outcome)
    drawings = [pictures.save(docs_folder / _image(name), *task) for name, task in tasks.items()]
    return [*(docs_folder / name for name in pages), *drawings]


def markdown(results: store.Results) -> str:
    """The page of the paper's tables and figures."""
    papers = [s for s in studies.SECTIONS.values() if s.where_in_paper]
    found = list(dict.fromkeys(run for s in papers for run in evidence.found(results, s)))
    total = ("all, without variants", "", "", *totals(results))
    parts = [_summary([*(summary_line(results, s) for s in papers), total]), "[Our own studies](studies.md) follow."]
    if found:
        data = "\n".join(f"* {state}" for state in sorted({results[run].about["data"] for run in found}))
        parts = ["## The data", "What the results say of the data that they come from:", data, *parts]
        parts.append(f"The paper's runs: {len(found)}, {_total_time(found, results)}.")
    return "\n\n".join([INTRODUCTION, *parts, *(section(results, s) for s in papers)]) + "\n"


def studies_markdown(results: store.Results) -> str:
    """The page of our own studies; looks that chose settings come last."""
    ours = sorted((s for s in studies.SECTIONS.values() if not s.where_in_paper), key=lambda s: not s.in_study)
    introduction = read("ours.toml")["page"]["introduction"]
    summary = _summary(summary_line(results, s) for s in ours if s.in_study)
    return "\n\n".join([introduction, summary, *(section(results, s) for s in ours)]) + "\n"


def _summary(lines: Iterable[tuple]) -> str:
    return "## Summary\n\n" + tables.table(("", "", "runs", *evidence.VERDICTS), lines, numbers=5)


def totals(results: store.Results) -> list[int]:
    """How many claims of the paper there are of each of `evidence.VERDICTS`."""
    return evidence.count(results, *_judged())


def _judged() -> list[Section]:
    """The paper's own tables and figures with claims that runs can decide."""
    return [s for s in studies.SECTIONS.values() if s.where_in_paper and s.trains and not s.same_as and not s.of]


def summary_line(results: store.Results, s: Section) -> tuple:
    """A line of the summary: a link, the title, the runs, and the verdicts."""
    found, counts = len(evidence.found(results, s)), [""] * len(evidence.VERDICTS)
    if s.same_as:
        runs = f"see {studies.SECTIONS[s.same_as].label}"
    elif s.trains:
        runs, counts = f"{found} of {len(s.runs())}" if found else "", evidence.count(results, s)
    else:
        runs, _ = made_elsewhere(results, s)
    return f"[{s.label if s.where_in_paper else s.name}](#{_anchor(s.heading)})", s.title, runs or "not run", *counts


def made_elsewhere(results: store.Results, s: Section) -> tuple[str, str]:
    """How far a section without runs is, and what it shows; empty if it was not made."""
    if s.kind == "toy":
        outcome = toy.load(results.folder)
        return ("done", f"{_picture(s.name, s.heading)}\n\n{toy.markdown(outcome).strip()}") if outcome else ("", "")
    entries = overhead.load(results.folder)
    made = {entry["row"] for entry in entries}
    return (f"{len(made)} of {len(s.rows)} rows", overhead.table(entries)) if made else ("", "")


def section(results: store.Results, s: Section) -> str:
    """A section of the page: what it is about, its picture, tables and claims, how it was made, and a remark."""
    where, found = s.where_in_paper or "Not in the paper", evidence.found(results, s)
    drawn = _picture(s.name, s.heading) if s.is_drawn and found else ""
    if s.same_as:
        other = studies.SECTIONS[s.same_as]
        text = f"{where}. A picture of [{other.label}](#{_anchor(other.heading)}).{'' if found else ' Not run.'}"
        parts = [text, drawn]
    elif not s.trains:
        _, body = made_elsewhere(results, s)
        parts = [f"{where}. {'Made by' if body else 'Not run:'} {s.command}", s.note, body, s.remark if body else ""]
    elif not found:
        parts = [f"{where}. Not run: {_how(s)}"]
    else:
        here = f"{where}. Here: {_settings(s)}"
        here += f".\n\n{s.note}" if s.where_in_paper else f"{s.note}."
        looked = _picture("inside", "Inside the networks") if s.inside and inside.load(results.folder) else ""
        tell_claims = tables.claims_beside_the_paper if s.where_in_paper else tables.claims_corrected
        claims = tell_claims(results, s) if s.claims else ""
        table = getattr(tables, s.table)(results, s)
        parts = [here, drawn, table, looked, claims, _provenance(results, s, found), s.remark]
    return "\n\n".join([f"## {s.heading}", *(part.strip() for part in parts if part)])


def _how(s: Section) -> str:
    """How to make the runs of a section, and what transformers would take."""
    runs = [run for run in s.runs() if isinstance(run, configs.ViTRun | configs.GPTRun)]
    if not runs:
        return s.command
    hours = tables.about(sum(map(configs.hours, runs)))
    return f"{s.command}, {tables.plural(len(runs), 'run')}, by estimate {hours} hours of an H100."


def _provenance(results: store.Results, s: Section, found: list[configs.Run]) -> str:
    """How many runs, how long, on what, when, and how to make them."""
    about = [results[run].about for run in found]
    devices, dates = "; ".join(sorted({a["device"] for a in about})), sorted({a["date"][:10] for a in about})
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    runs = f"{len(found)} of {tables.plural(len(s.runs()), 'run')}"
    return f"{runs}, {_total_time(found, results)}, on {devices}, {when}. Made by {s.command}."


def _total_time(found: Iterable[configs.Run], results: store.Results) -> str:
    seconds = sum(results[run].seconds for run in found)
    amount, unit = (seconds / 3600, "hours") if seconds >= 7200 else (seconds / 60, "minutes")
    return f"{amount:.1f} device {unit}"


def _anchor(title: str) -> str:
    """The anchor of a title, as GitHub makes it."""
    return "".join(c for c in title.lower() if c.isalnum() or c in " -_").replace(" ", "-")


def _settings(s: Section) -> str:
    """What we chose for the runs of a section."""
    settings = [f"{key.replace('_', ' ')} {value}" for key, value in s.settings.items()]
    return ", ".join([*settings, tables.plural(s.seeds, "seed")])


def _picture(name: str, title: str) -> str:
    return f"![{title}]({_image(name)})"


def _image(name: str) -> pathlib.PurePosixPath:
    """The picture of a section; `docs/results.md` shows Table 1's."""
    return IMAGES / ("summary.svg" if name == "table1" else f"{name}.svg")


# The table of docs/results.md.


def summary_markdown(results: store.Results) -> str:
    """Table 1's differences, those at full length first where it was run, and all verdicts in a sentence."""
    chosen = [s for name in ("table1_long", "table1") if evidence.found(results, s := studies.SECTIONS[name])]
    if not chosen:
        return f"Not run: {studies.SECTIONS['table1'].command}"
    cells: dict[str, list[str]] = {}
    for s in chosen:
        for claim in evidence.printed_deltas(s):
            label = f"{claim['text'].partition(':')[0]}, {s.settings['epochs']} epochs"
            ours = tables.our_delta(claim, evidence.contrast(results, s, claim))
            cells.setdefault(label, []).extend([tables.papers_delta(s, claim), ours])
    head = ("Δ accuracy, points", "`zero_sum`, paper", "ours", "`positive_sum`, paper", "ours")
    verdicts = [f"{number} {name}" for number, name in zip(totals(results), evidence.VERDICTS, strict=True)]
    missing = [s.label for s in _judged() if not evidence.found(results, s)]
    return (
        f"{tables.table(head, [(label, *row) for label, row in cells.items()], text=1, numbers=4)}\n\n"
        f"Ours: {'; and '.join(map(_settings, chosen))}; in brackets, the 95 % interval.\n"
        f"Of {sum(totals(results))} claims of the paper, {', '.join(verdicts[:-1])} and {verdicts[-1]}"
        + (f". Not run: {', '.join(missing)}." if missing else ".")
    )


def update(path: pathlib.Path, name: str, part: str) -> None:
    """Puts a part between the markers of this name in a text.

    Raises:
      ValueError: if the text does not have each marker once, in order.
    """
    text, begin, end = path.read_text(encoding="utf-8"), f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path.name} must have the markers {begin} and {end} once each, in this order.")
    before, after = text[: text.index(begin)], text[text.index(end) :]
    path.write_text(f"{before}{begin}\n{part}\n{after}", encoding="utf-8")
