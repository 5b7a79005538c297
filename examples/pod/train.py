"""Trains a GPT-MoE on many devices and many hosts, and goes on after whatever stopped it.

    python -m examples.pod.train --strategy positive_sum                 # all devices of this machine, data-parallel
    python -m examples.pod.train --strategy positive_sum --expert 4 --fsdp 2     # experts and parameters split
    python -m examples.pod.train --strategy positive_sum --checkpoints DIR       # saved as it goes; run again to go on
    python -m examples.pod.train --strategy positive_sum --coordinator HOST:PORT --processes 2 --process 0   # of two

Without --strategy it trains vanilla, to compare with.
README.md beside this file has what to type on GPU nodes and TPU slices.
"""

import contextlib
import dataclasses
import functools
import pathlib
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

import excitation_optax
from examples import texts, train_gpt_moe, training
from examples.pod import checkpoints, data, parallel
from models import gpt_moe

NOT_IN_CHECKPOINTS = {"log", "log_every", "eval_every", "remat", "tensorboard", "wandb"}  # flags that change nothing
MAY_CHANGE = {"learning_rate", "clip", "parallel"}  # the first two must, to go on with a run that diverged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(train_gpt_moe.RunConfig):
    """Train a GPT-MoE on all devices, with checkpoints."""

    parallel: Literal["jit", "pmap"] = "jit"
    """pmap repeats the model on every device, for comparison; auxiliary losses are then means of those of parts of the
    batch, and so other losses."""
    data: int | None = None
    """Devices that repeat the parameters; by default those that the other two leave."""
    fsdp: int = 1
    """Devices that parameters and optimizer state are split over."""
    expert: int = 1
    """Devices that experts are split over."""
    micro_batches: int = 1
    """Parts of a batch that follow each other, to save memory."""
    checkpoints: str | None = None
    """A folder, or gs://BUCKET/PATH, that all processes see. A run goes on from the newest one in it."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 3
    """How many checkpoints are kept, the newest."""
    max_skips: int = 10
    """Steps in a row that may be skipped, as their loss, gradients or utilization were not finite; looked at when
    something is logged."""
    max_dead: float = 0.5
    """The share of a layer's experts without a token that is warned of."""
    coordinator: str | None = None
    """HOST:PORT of process 0, which all processes can reach."""
    processes: int | None = None
    """How many there are; with a coordinator."""
    process: int | None = None
    """Which one this is, from 0; with a coordinator."""
    cluster: bool = False
    """Find the other processes by what TPU slices, Slurm and Open MPI say of them."""
    timeout: int = 100
    """Seconds without a sign of life after which a process is taken for dead."""
    preemption_exit_code: int = 0
    """The exit status after SIGTERM. Kubernetes starts only those again that fail: give it another one, such as 143."""
    files_by_process: bool = False
    """--text is a folder of which each process reads its own files, for hosts with disks of their own."""

    def __post_init__(self):
        """Errors before anything is loaded or trained."""
        super().__post_init__()
        training.check_positive(self, "fsdp", "expert", "micro_batches", "save_every", "keep", "max_skips", "timeout")
        meeting = (self.coordinator, self.processes, self.process)
        if None in meeting and meeting != (None, None, None):
            raise ValueError("--coordinator, --processes and --process go together, the last of every process its own.")
        if self.processes is not None and self.process not in range(self.processes):
            raise ValueError(f"--process is a number from 0 to {self.processes - 1}; got {self.process}.")
        if self.cluster and self.coordinator is not None:
            raise ValueError("--cluster finds the coordinator by itself: leave --coordinator out, or --cluster.")
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            raise ValueError(f"--coordinator is HOST:PORT; got {self.coordinator!r}.")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"--batch-size {self.batch_size} is not a multiple of --micro-batches {self.micro_batches}."
            )

    def model(self, vocab_size: int) -> gpt_moe.GPTMoEConfig:
        """That of the model, whose MoE layers send tokens to experts along the mesh's axis."""
        axis = "expert" if self.parallel == "jit" else None
        model = super().model(vocab_size)
        return dataclasses.replace(model, moe=dataclasses.replace(model.moe, expert_parallel_axis=axis))

    def identity(self) -> dict[str, Any]:
        """What a checkpoint and a run that goes on from it must have in common."""
        of_the_run = {field.name for field in dataclasses.fields(train_gpt_moe.RunConfig)} - NOT_IN_CHECKPOINTS
        of_the_run |= {"micro_batches", "files_by_process", "parallel"}
        identity = {name: getattr(self, name) for name in sorted(of_the_run)}
        return identity | {"text": list(map(str, self.text))}


def step_fn(config: Config, graphdef: Any, tx: Any, state: parallel.TrainState, tokens: jax.Array, axis_name=None):
    """A step on tokens `[B, S + 1]`. Returns the state, and what is to be logged."""

    def loss_fn(params, tokens):
        value, (loss, utilization, losses) = train_gpt_moe.loss_fn(config, graphdef, params, tokens)
        return value, ({"loss": loss, "auxiliary": losses}, utilization)

    new_state, logged, utilization = parallel.train_step(
        loss_fn, tx, state, tokens, axis_name=axis_name, micro_batches=config.micro_batches
    )
    losses = logged.pop("auxiliary")
    taken = state.step - state.opt_state.total_notfinite  # the count that makes the key of a random strategy
    logged |= training.routing_metrics(config, utilization, losses, taken)
    guard = new_state.opt_state
    return new_state, logged | {"skipped": guard.total_notfinite, "skipped_in_a_row": guard.notfinite_count}


def make_trainer(
    config: Config, mesh: jax.sharding.Mesh, step_fn: Callable[..., Any] = step_fn
) -> tuple[Any, parallel.Jit]:
    """The model's graph definition, and what makes and changes the state."""
    model_config = config.model(texts.VOCAB_SIZE[config.tokenizer])
    make_model = lambda: gpt_moe.GPTMoE(model_config, rngs=nnx.Rngs(config.seed))
    with jax.set_mesh(mesh):
        graphdef = nnx.graphdef(nnx.eval_shape(make_model))
    tx = training.make_optimizer(config, config.steps, gpt_moe.GPTMoE.expert_axis)
    tx = excitation_optax.apply_if_all_finite(tx)

    def init():
        params = nnx.state(make_model())
        return parallel.TrainState(params, tx.init(params), jnp.zeros([], jnp.int32))

    kind = parallel.Pmap if config.parallel == "pmap" else parallel.Jit
    return graphdef, kind(functools.partial(step_fn, config, graphdef, tx), init, mesh)


def load_text(config: Config) -> tuple[data.Windows, texts.Text | None]:
    """The windows that this process reads from; and the whole text, unless processes have files of their own."""
    text = None
    if config.files_by_process:
        if len(config.text) != 1 or not config.text[0].is_dir():
            raise ValueError(f"--files-by-process needs one folder as --text; got {list(map(str, config.text))}.")
        tokens = data.read_tokens(data.files_of_process(config.text[0]), config.tokenizer)
    else:
        text = texts.load(config.text, config.tokenizer)
        tokens = text.train
    windows = data.Windows(tokens, config.context + 1)
    if not len(windows):
        raise ValueError(f"The text has {len(tokens)} tokens, and must have more than --context {config.context}.")
    return windows, text


def main(config: Config) -> parallel.TrainState:
    """Trains from the newest checkpoint, or from the start, to the last step; returns the state.

    Raises:
      SystemExit: after SIGTERM, once the state is saved.
    """
    start_distributed(config)
    mesh = parallel.make_mesh(config.data, config.fsdp, config.expert)
    parallel.check_sizes(mesh, config.batch_size // config.micro_batches, config.num_experts)
    windows, text = load_text(config)
    graphdef, trainer = make_trainer(config, mesh)
    total_loss = train_gpt_moe.make_total_loss(graphdef)
    own = trainer.own_rows(config.batch_size) if config.files_by_process else None
    batches = data.Batches(windows, config.batch_size, config.seed, own)
    put = lambda step: trainer.put(batches.shape, functools.partial(batches.rows, step))
    with contextlib.ExitStack() as stack:
        preemption = stack.enter_context(checkpoints.Preemption())
        saved = stack.enter_context(open_checkpoints(config, config.checkpoints)) if config.checkpoints else None
        state, first = start(trainer, saved, config.steps)
        log = training.Log(with_log(config), "pod", config.steps, first, silent=jax.process_index() > 0)
        stack.callback(log.close)
        log.skip(first * config.batch_size * config.context)
        logged = None
        for number, batch in enumerate(data.prefetch(put, first, config.steps), first + 1):
            before, (state, logged) = logged, trainer.step(state, batch)
            jax.block_until_ready(before)  # two steps are under way at most: many, on CPU devices, wait for each other
            last = number == config.steps
            if last or number % config.log_every == 0:
                report(config, log, number, jax.device_get(logged))
            if text and (last or number % config.eval_every == 0):
                params = trainer.to_checkpoint(state.params)
                with jax.set_mesh(mesh):
                    loss = train_gpt_moe.evaluate(
                        total_loss, params, text.evaluation, config.context, config.batch_size
                    )
                log.write(number, train_gpt_moe.evaluation_metrics(loss, text), f"evaluation loss {loss:.3f}")
                log.skip(number * config.batch_size * config.context)
            log.advance()
            preempted = preemption.reached(number)
            # While steps are skipped, those that were saved before stay: the step before may be to blame.
            if saved and (preempted or last or (saved.due(number) and not int(logged["skipped_in_a_row"]))):
                saved.save(number, trainer.to_checkpoint(state))
            if preempted and not last:
                end(config, saved, number)
    return state


def start(trainer: parallel.Jit, saved: checkpoints.Checkpoints | None, steps: int) -> tuple[parallel.TrainState, int]:
    """The state to go on from, and the number of steps that it has seen."""
    restored = saved.restore(trainer.like, trainer.shardings) if saved else None
    if restored is None:
        return trainer.init(), 0
    state, step = restored
    print(f"going on from step {step}" + (", the last: nothing is left to do" if step == steps else ""), flush=True)
    return trainer.from_checkpoint(state), step


def end(config: Config, saved: checkpoints.Checkpoints | None, step: int) -> None:
    """Ends the program once everything is on disk."""
    if saved is None:
        print(f"preempted at step {step} of {config.steps}; without --checkpoints, nothing is saved", flush=True)
    else:
        saved.wait()
        print(f"preempted: saved step {step} of {config.steps}; run again to go on", flush=True)
    raise SystemExit(config.preemption_exit_code)


def with_log(config: Config) -> Config:
    """By default, the log lies beside the checkpoints that it is about, if these are on a disk."""
    if config.log is not None or config.checkpoints is None or "://" in config.checkpoints:
        return config
    return dataclasses.replace(config, log=pathlib.Path(config.checkpoints) / "log.jsonl")


def open_checkpoints(config: Config, folder: str) -> checkpoints.Checkpoints:
    """The checkpoints of this run."""
    identity = config.identity() | ({"processes": jax.process_count()} if config.files_by_process else {})
    return checkpoints.Checkpoints(folder, identity, config.save_every, config.keep, MAY_CHANGE)


def report(config: Config, log: training.Log, step: int, logged: dict[str, Any]) -> None:
    """Writes what is logged, warns of a collapse, and stops a run that is lost.

    Raises:
      ValueError: after too many skipped steps in a row, on every process.
    """
    speed = log.rate(step * config.batch_size * config.context)
    log.write(step, logged | {"tokens_per_second": speed}, f"loss {logged['loss']:.3f}")
    if logged["dead_experts_worst_layer"] > config.max_dead:
        log.warn(
            f"step {step}: in one layer {logged['dead_experts_worst_layer']:.0%} of the experts got no token; over all "
            f"layers, the busiest expert has {logged['max_over_mean_load']:.1f} times the mean. Try a larger "
            "--load-balancing or a smaller --gamma."
        )
    if logged["skipped_in_a_row"] >= config.max_skips:
        raise ValueError(
            f"{logged['skipped_in_a_row']} steps in a row, up to step {step}, were skipped, as their loss "
            f"({logged['loss']}), gradients or utilization were not finite. None of them was saved as a checkpoint: "
            "run again with a smaller --learning-rate or --clip to go on from the newest there is; if it is spoilt "
            "already, delete it, and the one before is used."
        )


def start_distributed(config: Config) -> None:
    """Meets the other processes, if there are any.

    Raises:
      ValueError: if the coordinator cannot be reached in time. (JAX itself would end the process.)
    """
    bounds = {"heartbeat_timeout_seconds": config.timeout, "shutdown_timeout_seconds": config.timeout}
    if config.coordinator is not None:
        if config.process != 0:
            _wait_for(config.coordinator, config.timeout)
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process,
            initialization_timeout=config.timeout,
            cluster_detection_method="deactivate",  # under Slurm, it would take one of the devices only
            **bounds,
        )
    elif config.cluster:
        try:
            jax.distributed.initialize(**bounds)
        except ValueError as error:
            raise ValueError(
                f"--cluster found no other processes ({error}). Start them by srun, by mpirun or on a TPU slice, or "
                "give --coordinator, --processes and --process."
            ) from error


def _wait_for(coordinator: str, timeout: float) -> None:
    """Until HOST:PORT accepts a connection."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=timeout).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"Nobody answers at --coordinator {coordinator} for {timeout} seconds ({error}). Is process 0 "
                    "running there, and its port open to this machine?"
                ) from error
        time.sleep(0.5)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=Config.__doc__))
    except (OSError, ValueError) as error:
        sys.exit(f"pod.train: {error}")
