"""Every table and figure of the paper, from runs that anyone can repeat.

python -m examples.reproduce list                        # what there is, and what is done
python -m examples.reproduce run table1 --data-dir DIR   # train what is missing; what is there is never repeated
python -m examples.reproduce report                      # docs/reproduction.md, from results/ alone
python -m examples.reproduce prepare cifar100            # download a data set, with a network and TensorFlow
"""

import dataclasses
import difflib
import os
import pathlib
import subprocess
import sys
from typing import Annotated

import jax
import tqdm
import tyro

from examples import datasets, training
from examples.reproduction import (
    configs,
    engine,
    evidence,
    experiments,
    minis,
    overhead,
    report,
    store,
    toy,
    transformers,
)

ROOT = pathlib.Path(__file__).parents[1]
DATASETS = ("cifar10", "cifar100", "svhn_cropped")
NOT_TRAINED = ("fig1", "table8")  # a toy problem, and a measurement of time
Folder = Annotated[pathlib.Path, tyro.conf.arg(help="Where results are, and go.")]


@dataclasses.dataclass(frozen=True)
class List:
    """Print every table and figure: its runs, those that are done, the hours of a device they took, and verdicts."""

    results: Folder = store.FOLDER

    def main(self) -> None:
        """Prints the list."""
        results = read(self.results)
        listed = set()
        print(f"{'name':<14}{'runs':>6}{'done':>6}{'hours':>7}   {' / '.join(evidence.VERDICTS[:3])}   title")
        for name in names():
            view = experiments.paper().get(name, {})
            if name not in experiments.EXPERIMENTS:  # a picture of another's runs, or measured and not trained
                done = {"fig1": toy.load(self.results / "fig1"), "table8": overhead.load(self.results)}.get(name)
                title = f"{view['title']} (the runs of {view['same_as']})" if "same_as" in view else view["title"]
                print(f"{name:<14}{'-':>6}{'done' if done else '-':>6}{'-':>7}{'':>41}   {title}")
                continue
            experiment = experiments.EXPERIMENTS[name]
            runs, found = experiments.runs(experiment), evidence.found(results, experiment)
            listed |= {run.key for run in found}
            hours = sum(results[run].seconds for run in found) / 3600
            view = view or {"claims": experiment.claims}
            counts = evidence.count(evidence.verdicts(results, experiment, view)) if view["claims"] else []
            verdicts = " / ".join(map(str, counts[:3]))
            print(f"{name:<14}{len(runs):>6}{len(found):>6}{hours:>7.1f}{verdicts:>41}   {experiment.title}")
        if len(results) > len(listed):
            print(f"On file too: {len(results) - len(listed)} runs with other settings, which are in none of these.")


@dataclasses.dataclass(frozen=True)
class Run:
    """Train the runs of tables and figures that are not on file yet."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """Such as table1; several are trained in this order, and share runs."""
    dataset: str | None = None
    """Instead of ours: cifar10, cifar100, svhn_cropped; for table2 wikitext-103 or wikitext-valid; for transformers in
    miniature tinyshakespeare or python-reference."""
    data_dir: pathlib.Path | None = None
    """Where TensorFlow Datasets has its prepared data, or the folder of text files; by default as TFDS has it."""
    seeds: int | None = None
    """Instead of ours, which the report states. Runs of more seeds are on file, but in no table."""
    epochs: int | None = None
    """Instead of ours. Runs of other lengths are other runs: on file, and printed at the end, but in no table."""
    subset: int | None = None
    """Train on the first so many examples only: other runs as well."""
    resume: bool = True
    """--no-resume refuses to go on from results that are there."""
    results: Folder = store.FOLDER

    def main(self) -> None:
        """Trains, and appends what is finished to the results."""
        for name in self.names:
            check_name(name)
        if not self.names:
            raise ValueError("Name at least one table or figure; `list` shows them.")
        if self.seeds is not None:
            training.check_positive(self, "seeds")
        results = store.Results(self.results)
        tell_damaged(results)
        results.check_writable()
        runs = list(dict.fromkeys(run for name in self.names for run in self.runs(name)))
        done = sum(run in results for run in runs)
        if done and not self.resume:
            raise ValueError(f"{done} of these {len(runs)} runs are in {self.results} already; leave --no-resume out.")
        if runs:
            print(f"{len(runs)} runs, of which {done} are on file in {self.results}")
        if "fig1" in self.names:
            if toy.load(self.results / "fig1") is None:
                toy.save(toy.run(), self.results / "fig1")
            print(f"fig1 is on file in {self.results / 'fig1'}")
        self.train_mlps([run for run in runs if isinstance(run, configs.MLPRun)], results)
        self.train_minis([run for run in runs if isinstance(run, configs.MiniGPTRun)], results)
        self.train_transformers([run for run in runs if isinstance(run, configs.ViTRun | configs.GPTRun)], results)
        if "table8" in self.names:  # benchmarks may import examples, but not the other way round
            command = [sys.executable, "-m", "benchmarks.overhead", "--results", str(self.results)]
            subprocess.run(command, cwd=ROOT, check=True)
        in_tables = {run for name in self.names for run in Run((name,)).runs(name)}  # those without flags
        for run in (run for run in runs if run not in in_tables):
            print(describe(run, results[run]))

    def runs(self, name: str) -> list[configs.Run]:
        """Of a table or figure, with what the flags change."""
        flags = {"dataset": self.dataset, "epochs": self.epochs, "subset": self.subset}
        flags = {flag: value for flag, value in flags.items() if value is not None}
        if name in NOT_TRAINED:
            if flags or self.seeds is not None:
                raise ValueError(f"{name} trains no model: --dataset, --seeds, --epochs and --subset do not apply.")
            return []
        experiment = experiments.EXPERIMENTS[experiments.paper().get(name, {}).get("same_as", name)]
        if self.seeds is not None:
            experiment = dataclasses.replace(experiment, seeds=self.seeds)
        known = {"gpt": tuple(transformers.TEXTS), "mini_gpt": tuple(minis.FILES)}.get(experiment.kind, DATASETS)
        if self.dataset is not None and self.dataset not in known:
            raise ValueError(f"{name} can be run with --dataset {', '.join(known)}; got {self.dataset!r}.")
        return experiments.runs(experiment, **flags)

    def train_mlps(self, runs: list[configs.MLPRun], results: store.Results) -> None:
        """By the engine, stacked."""
        if any(run not in results for run in runs):
            total = sum(run.epochs for run in runs)
            with tqdm.tqdm(total=total, unit="epoch", mininterval=1, smoothing=0.05, delay=1) as bar:
                engine.train(runs, self.load_images, results, bar)

    def load_images(self, name: str) -> datasets.ImageData:
        """Reads a data set of images; digits come with scikit-learn."""
        return datasets.load_digits() if name == "digits" else datasets.load_tfds(name, self.data_dir)

    def train_minis(self, runs: list[configs.MiniGPTRun], results: store.Results) -> None:
        """GPT-MoEs in miniature, in groups."""
        if any(run not in results for run in runs):
            with tqdm.tqdm(total=sum(run.epochs for run in runs), unit="epoch", mininterval=1, delay=1) as bar:
                minis.train(runs, lambda name: minis.load_text(name, self.data_dir), results, bar.update)

    def train_transformers(self, runs: list[configs.Run], results: store.Results) -> None:
        """One after the other."""
        runs = [run for run in runs if run not in results]
        folder = self.results / "checkpoints"
        images, text = {}, {}
        for run in runs:  # all of the data first: what is missing should not be found out after hours
            if isinstance(run, configs.GPTRun) and run.dataset not in text:
                text[run.dataset] = transformers.load_text(run.dataset, self.data_dir or pathlib.Path())
            if isinstance(run, configs.ViTRun) and run.dataset not in images:
                images[run.dataset] = datasets.load_tfds(run.dataset, self.data_dir)
        for number, run in enumerate(runs, 1):
            label = f"{number}/{len(runs)} {run.kind} {run.strategy} seed {run.seed}"
            with tqdm.tqdm(total=run.epochs, desc=label, unit="epoch", mininterval=1) as bar:

                def progress(epochs: float, seen: str, bar=bar):
                    bar.set_postfix_str(seen, refresh=False)
                    bar.update(round(epochs, 3) - bar.n)

                if isinstance(run, configs.GPTRun):
                    result = transformers.train_gpt(run, text[run.dataset], progress, folder)
                elif isinstance(run, configs.ViTRun):
                    result = transformers.train_vit(run, images[run.dataset], progress, folder)
                else:
                    raise ValueError(f"There is no program for runs of kind {run.kind!r}.")
            results.append([result])


@dataclasses.dataclass(frozen=True)
class Report:
    """Write docs/reproduction.md with its pictures, and the README's table, from the results."""

    results: Folder = store.FOLDER
    docs: pathlib.Path | None = None
    """The folder of the page; by default docs, and for other results than the repository's, the folder of these."""
    readme: pathlib.Path | None = None
    """A text with a place for the table; by default the README if the page is its neighbour's, else none."""

    def main(self) -> None:
        """Writes the files and names them."""
        results = read(self.results)
        own = self.results == store.FOLDER
        docs = self.docs or (ROOT / "docs" if own else self.results)
        readme = self.readme or (ROOT / "README.md" if own and self.docs is None else None)
        if readme is not None:
            report.update_readme(readme, results)
            print(readme)
        for path in report.write(results, docs):
            print(path)


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Download data sets and prepare them by TensorFlow Datasets, which needs TensorFlow for it, and a network."""

    names: tyro.conf.Positional[tuple[str, ...]] = DATASETS
    """Of cifar10, cifar100, svhn_cropped."""
    data_dir: pathlib.Path | None = None
    """Where to; by default as TFDS has it."""

    def main(self) -> None:
        """Prepares them one after the other."""
        for name in self.names:
            if name not in DATASETS:
                raise ValueError(f"The data sets are {', '.join(DATASETS)}; got {name!r}.")
        try:
            import tensorflow  # noqa: F401  # pyrefly: ignore[missing-import]
        except ImportError as error:
            raise OSError("Preparing data needs TensorFlow; reading it does not: pip install tensorflow") from error
        import tensorflow_datasets as tfds

        for name in self.names:
            tfds.builder(name, data_dir=self.data_dir, file_format="array_record").download_and_prepare()


def read(folder: pathlib.Path) -> store.Results:
    """The results in a folder, which must be there, with a message for every line that is damaged."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder of results {folder}; `run` makes one.")
    results = store.Results(folder)
    tell_damaged(results)
    return results


def tell_damaged(results: store.Results) -> None:
    """Prints a message for every line that is damaged."""
    for message in results.damaged:
        print(message, file=sys.stderr)


def describe(run: configs.Run, result: store.Result) -> str:
    """What sets a run apart from its kind's defaults, and what it reached."""
    default = configs.KINDS[run.kind](dataset=run.dataset)
    fields = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
    apart = [f"{name} {value}" for name, value in fields.items() if value != getattr(default, name)]
    measure, factor = {"gpt": ("perplexity", 1), "mini_gpt": ("loss", 1)}.get(run.kind, ("accuracy", 100))
    return f"{', '.join([run.dataset, *apart])}: {measure} {factor * result.measures[measure]:.2f}"


def names() -> list[str]:
    """Of everything that can be run: the paper's, in its order, and ours."""
    return list(dict.fromkeys([*experiments.paper(), *experiments.EXPERIMENTS]))


def check_name(name: str) -> None:
    """Raises ValueError, with what was probably meant, if there is no table or figure of this name."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names())}."
        raise ValueError(f"There is no {name!r}; {hint}")


def use_all_cores() -> None:
    """Makes every CPU core a device of its own, for a group of models each, unless JAX was told otherwise."""
    number = jax.config.jax_num_cpu_devices  # pyrefly: ignore[missing-attribute]
    told = number > 0 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not told:
        jax.config.update("jax_num_cpu_devices", store.cores())


def main(command: List | Run | Report | Prepare) -> None:
    """Does what was asked for."""
    if isinstance(command, Run):
        use_all_cores()
    command.main()


if __name__ == "__main__":
    try:
        main(tyro.cli(List | Run | Report | Prepare, description=__doc__))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"reproduce: {error}")
    except KeyboardInterrupt:
        sys.exit("reproduce: interrupted; what was finished is kept, and the same command goes on from there.")
