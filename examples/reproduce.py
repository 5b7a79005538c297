"""Every table and figure of the paper, from runs that anyone can repeat.

python -m examples.reproduce list                        # all tables and figures, and how many runs are done
python -m examples.reproduce run table1 --data-dir DIR   # train the missing runs; finished ones are not repeated
python -m examples.reproduce report                      # write docs/reproduction.md and docs/studies.md
python -m examples.reproduce prepare cifar100            # download a data set; requires TensorFlow
"""

import dataclasses
import difflib
import os
import pathlib
import sys
from typing import Annotated

import jax
import tqdm
import tyro

from examples import datasets, logs, training
from examples.reproduction import (
    configs,
    engine,
    evidence,
    inputs,
    report,
    stacks,
    store,
    studies,
    toy,
    transformers,
)

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS: dict[str, type[stacks.Program]] = {
    "mlp": engine.Program,
    "mini_gpt": transformers.MiniGPTProgram,
    "mini_vit": transformers.MiniViTProgram,
    "vit": transformers.ViTProgram,
    "gpt": transformers.GPTProgram,
}
BAR = "{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"  # parts of epochs count too
DATASETS = tuple(datasets.NUM_CLASSES)
Folder = Annotated[pathlib.Path, tyro.conf.arg(help="The folder of the results.")]


@dataclasses.dataclass(frozen=True)
class List:
    """Print every table and figure: its runs, how many are done, the device hours they took, and verdicts."""

    results: Folder = store.FOLDER

    def main(self) -> None:
        """Prints the list."""
        results, listed = read(self.results), set()
        line = "{:<14}{:>6}{:>6}{:>7}{:>41}   {}"
        print(line.format("name", "runs", "done", "hours", f"   {' / '.join(evidence.VERDICTS[:3])}", "title"))
        for name, section in studies.SECTIONS.items():
            title = section.title + (f" (the runs of {section.same_as})" if section.same_as else "")
            cells = ("-", "-", "-", "")
            if section.trains and not section.same_as:
                found = evidence.found(results, section)
                listed |= {run.key for run in found}
                hours = sum(results[run].seconds for run in found) / 3600
                verdicts = " / ".join(map(str, evidence.count(results, section)[:3])) if section.claims else ""
                cells = (len(section.runs()), len(found), f"{hours:.1f}", verdicts)
            elif not section.trains and report.made_elsewhere(results, section)[0]:
                cells = ("-", "done", "-", "")
            print(line.format(name, *cells, title))
        if len(results) > len(listed):
            print(f"On file too: {len(results) - len(listed)} runs with other settings, which are in none of these.")


@dataclasses.dataclass(frozen=True)
class Run:
    """Train the runs of tables and figures that are not on file yet."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """Tables and figures, such as table1. They are trained in this order, and share runs."""
    dataset: str | None = None
    """Another data set than the report's: cifar10, cifar100, svhn_cropped; for table2 wikitext-103 or wikitext-valid;
    for GPT-MoEs in miniature tinyshakespeare or python-reference."""
    data_dir: pathlib.Path | None = None
    """The folder of the images (prepared by TensorFlow Datasets, or as their makers publish them) or of the text files;
    by default $TFDS_DATA_DIR, otherwise ~/tensorflow_datasets."""
    seeds: int | None = None
    """The number of seeds, instead of the report's. More seeds are on file, but in no table."""
    epochs: int | None = None
    """The number of epochs, instead of the report's. Such runs are on file and printed at the end, but in no table."""
    subset: int | None = None
    """The number of first examples to train on. Such runs are in no table either."""
    resume: bool = True
    """--no-resume is an error if any of these runs is on file."""
    results: Folder = store.FOLDER

    def main(self) -> None:
        """Trains, and appends finished runs to the results."""
        if not self.names:
            raise ValueError("Name at least one table or figure; `list` shows them.")
        training.check(self)
        runs = list(dict.fromkeys(run for name in self.names for run in self.runs(name)))
        results = read(self.results, exists=False)
        results.check_writable()
        done = sum(run in results for run in runs)
        if done and not self.resume:
            raise ValueError(f"{done} of these {len(runs)} runs are in {self.results} already; leave --no-resume out.")
        if runs:
            print(f"{len(runs)} runs, of which {done} are on file in {self.results}")
        if runs and done == len(runs):
            again = self.results.with_name("results-again")
            print(f"Nothing is left to train. To run them again, give an empty folder: --results {again}")
        if "fig1" in self.names:
            if toy.load(self.results) is None:
                with logs.naming(self.results / "fig1"):
                    store.save_json(self.results / toy.FILE, toy.run())
            print(f"fig1 is on file in {self.results / 'fig1'}")
        for kind, program in PROGRAMS.items():
            of_kind = [run for run in runs if run.kind == kind]
            if any(run not in results for run in of_kind):
                total = sum(run.epochs for run in of_kind)
                options = {"unit": "epoch", "mininterval": 1, "smoothing": 0.05, "delay": 1, "bar_format": BAR}
                with tqdm.tqdm(total=total, **options) as bar:
                    program.train(of_kind, lambda run: inputs.load(run, self.data_dir), results, bar)
        if "table8" in self.names:
            print(f"table8 is measured by: python -m benchmarks.overhead --results {self.results}")
        in_tables = {run for name in self.names for run in studies.SECTIONS[name].runs()}
        for run in (run for run in runs if run not in in_tables):
            print(describe(run, results[run]))

    def runs(self, name: str) -> list[configs.Run]:
        """The runs of a table or figure, changed by the flags."""
        check_name(name)
        flags = {"dataset": self.dataset, "epochs": self.epochs, "subset": self.subset}
        flags = {flag: value for flag, value in flags.items() if value is not None}
        section = studies.SECTIONS[name]
        if not section.trains and (flags or self.seeds is not None):
            raise ValueError(f"{name} trains no model: --dataset, --seeds, --epochs and --subset do not apply.")
        known = tuple(inputs.TEXTS.get(section.kind, DATASETS))
        if self.dataset is not None and self.dataset not in known:
            raise ValueError(f"{name} can be run with --dataset {', '.join(known)}; got {self.dataset!r}.")
        return dataclasses.replace(section, seeds=self.seeds or section.seeds).runs(**flags)


@dataclasses.dataclass(frozen=True)
class Report:
    """Write docs/reproduction.md and docs/studies.md, pictures, and the table of docs/results.md, from the results."""

    results: Folder = store.FOLDER
    docs: pathlib.Path | None = None
    """The folder of the page; by default docs for the repository's results, otherwise the folder of the results."""
    readme: pathlib.Path | None = None
    """A text with markers for the table; by default docs/results.md if --results and --docs are not given."""

    def main(self) -> None:
        """Writes the files and names them."""
        results, own = read(self.results), self.results == store.FOLDER
        docs = self.docs or (ROOT / "docs" if own else self.results)
        readme = self.readme or (ROOT / "docs" / "results.md" if own and self.docs is None else None)
        if readme is not None:
            with logs.naming(readme):
                report.update(readme, "reproduction", report.summary_markdown(results))
            print(readme)
        with logs.naming(docs):
            print(*report.write(results, docs), sep="\n")


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Download data sets with TensorFlow Datasets. Requires TensorFlow and a network; reading the data does not."""

    names: tyro.conf.Positional[tuple[str, ...]] = DATASETS
    """Any of cifar10, cifar100, svhn_cropped."""
    data_dir: pathlib.Path | None = None
    """The folder to write to; by default $TFDS_DATA_DIR, otherwise ~/tensorflow_datasets."""

    def main(self) -> None:
        """Prepares them one after the other."""
        for name in self.names:
            if name not in DATASETS:
                raise ValueError(f"The data sets are {', '.join(DATASETS)}; got {name!r}.")
        try:
            import tensorflow  # noqa: F401  # pyrefly: ignore[missing-import]
        except ImportError as error:
            raise OSError("Preparing data requires TensorFlow: pip install tensorflow. Reading it does not.") from error
        import tensorflow_datasets as tfds

        for name in self.names:
            tfds.builder(name, data_dir=self.data_dir, file_format="array_record").download_and_prepare()


def read(folder: pathlib.Path, exists: bool = True) -> store.Results:
    """The results in a folder, with a message for every damaged line."""
    if exists and not folder.is_dir():
        raise FileNotFoundError(f"There is no folder of results {folder}; `run` makes one.")
    results = store.Results(folder)
    for message in results.damaged:
        print(message, file=sys.stderr)
    return results


def describe(run: configs.Run, result: store.Result) -> str:
    """What a run changes of its kind's defaults, and what it reached."""
    default = configs.KINDS[run.kind](dataset=run.dataset).to_json()
    apart = [f"{name} {value}" for name, value in run.to_json().items() if value != default.get(name)]
    measure = {"gpt": "perplexity", "mini_gpt": "loss"}.get(run.kind, "accuracy")
    value = evidence.FACTOR.get(measure, 1) * result.measures[measure]
    return f"{', '.join([run.dataset, *apart])}: {measure} {value:.2f}"


def check_name(name: str) -> None:
    """Raises ValueError, with the nearest name, if there is no table or figure of this name."""
    if name not in studies.SECTIONS:
        near = difflib.get_close_matches(name, studies.SECTIONS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(studies.SECTIONS)}."
        raise ValueError(f"There is no {name!r}; {hint}")


def use_all_cores() -> None:
    """Makes each CPU core a device, for a group of models, unless JAX is configured otherwise."""
    number = jax.config.jax_num_cpu_devices  # pyrefly: ignore[missing-attribute]
    if number <= 0 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", store.cores())


def main(command: List | Run | Report | Prepare) -> None:
    """Runs a command."""
    if isinstance(command, Run):
        use_all_cores()
    try:
        command.main()
    except KeyboardInterrupt:
        sys.exit("reproduce: interrupted; finished runs are on file, and the same command resumes.")


if __name__ == "__main__":
    training.run_program(main, List | Run | Report | Prepare, "examples.reproduce", __doc__)
