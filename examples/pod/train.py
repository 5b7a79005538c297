"""Trains a GPT-MoE on many devices and many hosts, and resumes after whatever stopped it.

    python -m examples.pod.train --strategy positive_sum                 # all devices of this machine, data-parallel
    python -m examples.pod.train --strategy positive_sum --expert 4 --fsdp 2     # experts and parameters split
    python -m examples.pod.train --strategy positive_sum --checkpoints DIR       # run it again to resume
    python -m examples.pod.train --strategy positive_sum --coordinator HOST:PORT --processes 2 --process 0   # of two

README.md beside this file has the commands for GPU nodes and TPU slices.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import optax
from flax import nnx

from examples import logs, texts, train_gpt_moe, training
from examples.pod import checkpoints, data, parallel
from models import gpt_moe

# Flags that do not change what a run computes, and flags that may change when it is resumed: the learning rate and
# clipping must, where it diverged.
NOT_IN_CHECKPOINTS = {"log_every", "eval_every", "remat", "tensorboard", "wandb"}
MAY_CHANGE = {"learning_rate", "clip", "parallel"}
NEVER = np.iinfo(np.int32).max  # the skips after which optax.apply_if_finite would apply a step that is not finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(train_gpt_moe.RunConfig):
    """Train a GPT-MoE on all devices, with checkpoints."""

    strategy: training.Strategy = "baseline"
    """Excitation after the optimizer; baseline has none."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How a step is spread over devices. pmap repeats the model on every device and takes the auxiliary losses of each
    part of the batch by itself, so its losses differ slightly."""
    data: int | None = None
    """Devices that repeat the parameters; by default all that --fsdp and --expert leave."""
    fsdp: int = 1
    """Devices that parameters and optimizer state are split over."""
    expert: int = 1
    """Devices that experts are split over."""
    micro_batches: int = 1
    """Parts of a batch that are processed one after the other, to save memory."""
    log: pathlib.Path | None = None
    """The log, as JSON lines; by default log.jsonl beside the checkpoints, otherwise out/pod-STRATEGY.jsonl."""
    checkpoints: str | None = None
    """A folder, or gs://BUCKET/PATH, that all processes see. The run resumes from the newest checkpoint in it."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 3
    """How many of the newest checkpoints are kept."""
    max_skips: int = 10
    """End the run after this many steps in a row whose gradients are not finite. Such steps are skipped."""
    max_dead: float = 0.5
    """Warn if more than this fraction of a layer's experts gets no token."""
    coordinator: str | None = None
    """HOST:PORT of process 0, which all processes can reach."""
    processes: int | None = None
    """The number of processes; with --coordinator."""
    process: int | None = None
    """The number of this process, from 0; with --coordinator."""
    cluster: bool = False
    """Find the other processes as TPU slices, Slurm and Open MPI describe them."""
    timeout: int = 100
    """Seconds without a sign of life after which a process counts as dead."""
    preemption_exit_code: int = 0
    """The exit status after SIGTERM. Kubernetes restarts only failed jobs: give it another one, such as 143."""

    def __post_init__(self):
        super().__post_init__()
        meeting = (self.coordinator, self.processes, self.process)
        if None in meeting and meeting != (None, None, None):
            raise ValueError("--coordinator, --processes and --process go together, the last differs by process.")
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
        """The model's config, with MoE layers that send tokens to experts along the mesh's axis."""
        axis = "expert" if self.parallel == "jit" else None
        model = super().model(vocab_size)
        return dataclasses.replace(model, moe=dataclasses.replace(model.moe, expert_parallel_axis=axis))

    def identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes from it must have in common."""
        of_the_run = {field.name for field in dataclasses.fields(train_gpt_moe.RunConfig)} - NOT_IN_CHECKPOINTS
        of_the_run |= {"strategy", "micro_batches", "parallel"}
        # files_by_process was a flag of earlier versions, whose checkpoints hold it.
        special = {"text": list(map(str, self.text)), "files_by_process": False}
        return {name: getattr(self, name) for name in sorted(of_the_run)} | special

    @property
    def log_path(self) -> pathlib.Path:
        """Where the log goes: beside the checkpoints if these are on a disk."""
        if self.log is None and self.checkpoints and "://" not in self.checkpoints:
            return pathlib.Path(self.checkpoints) / "log.jsonl"
        return self.log or pathlib.Path("out") / f"pod-{self.strategy}.jsonl"


def step_fn(config: Config, graphdef: Any, tx: Any, state: training.TrainState, tokens: jax.Array, axis_name=None):
    """A step on tokens `[B, S + 1]`. Returns the state and the metrics."""
    losses = {"load_balancing": config.load_balancing, "router_z": config.router_z}
    loss_fn = functools.partial(train_gpt_moe.loss_fn, graphdef, **losses)
    gradient = parallel.gradient(loss_fn, axis_name=axis_name, micro_batches=config.micro_batches)
    new_state, logged, utilization = training.train_step(gradient, tx, state, tokens)
    excite: Any = {"strategy": config.strategy, "gamma": config.gamma, "seed": config.seed}
    updates, whole = state.step - state.opt_state.total_notfinite, bool(config.tensorboard or config.wandb)
    logged |= training.routing_metrics(utilization, step=updates, whole=whole, **excite)
    guard = new_state.opt_state
    return new_state, logged | {"skipped": guard.total_notfinite, "skipped_in_a_row": guard.notfinite_count}


def make_trainer(
    config: Config, mesh: jax.sharding.Mesh, step_fn: Callable[..., Any] = step_fn
) -> tuple[Any, parallel.Trainer]:
    """The model's graph definition, and what makes and changes the state."""
    model_config = config.model(texts.VOCAB_SIZE[config.tokenizer])
    make_model = lambda: gpt_moe.GPTMoE(model_config, rngs=nnx.Rngs(config.seed))
    graphdef = nnx.graphdef(nnx.eval_shape(make_model))
    excite: Any = {"strategy": config.strategy, "gamma": config.gamma, "seed": config.seed}
    base = training.base_optimizer(config, config.steps)
    tx = training.make_optimizer(base, expert_axis=gpt_moe.GPTMoE.expert_axis, **excite)
    tx = optax.apply_if_finite(tx, NEVER)
    init = lambda: training.TrainState.create(nnx.state(make_model()), tx)
    step = functools.partial(step_fn, config, graphdef, tx)
    return graphdef, parallel.Trainer(step, init, mesh, config.parallel)


def tell(text: str) -> None:
    """Prints a line, by one process of all."""
    if jax.process_index() == 0:
        print(text, flush=True)


def main(config: Config) -> training.TrainState:
    """Trains from the newest checkpoint, or from the start, to the last step; returns the state.

    After SIGTERM, it ends the program once the state is saved.
    """
    parallel.start_distributed(config)
    mesh = parallel.make_mesh(config.data, config.fsdp, config.expert)
    parallel.check_sizes(mesh, config.batch_size // config.micro_batches, config.num_experts)
    text = texts.load(config.text, config.tokenizer)
    if len(text.train) <= config.context:
        raise ValueError(f"The text has {len(text.train)} tokens, and must have more than --context {config.context}.")
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        graphdef, trainer = make_trainer(config, mesh)
        tokens_per_step = config.batch_size * config.context
        tell(
            f"mesh {' x '.join(f'{name} {size}' for name, size in mesh.shape.items())} of {mesh.size} devices "
            f"({jax.devices()[0].device_kind}) in {jax.process_count()} processes; "
            f"{training.size_of(trainer.like.params):,} parameters; {tokens_per_step:,} tokens per step"
        )
        batches = data.Batches(data.windows(text.train, config.context + 1), config.batch_size, config.seed)
        put = lambda step: trainer.put(batches.shape, functools.partial(batches.rows, step))
        preempted = stack.enter_context(checkpoints.preemption())
        saved = None
        if config.checkpoints:
            flags = config.identity()
            saved = checkpoints.Checkpoints(config.checkpoints, flags, config.save_every, config.keep, MAY_CHANGE)
            stack.callback(saved.manager.close)
        state, first = start(trainer, saved, config.steps)
        silent = jax.process_index() > 0
        log = logs.Log(config.log_path, config.steps, config, label=config.strategy, done=first, silent=silent)
        stack.callback(log.close)
        logged = None
        for number, batch in enumerate(data.prefetch(put, first, config.steps), first + 1):
            if logged is None:
                tell("compiling")
            before, (state, logged) = logged, trainer.step(state, batch)
            if before is None:
                log.start(first * tokens_per_step)
            jax.block_until_ready(before)  # two steps at most are under way: CPU devices wait for each other
            last = number == config.steps
            if last or number % config.log_every == 0:
                report(config, log, number, jax.device_get(logged))
            if last or number % config.eval_every == 0:
                found = train_gpt_moe.measure(graphdef, state.params, text, config.context, config.batch_size)
                log.write(number, found, f"evaluation loss {found['evaluation_loss']:.3f}")
                log.skip(number * tokens_per_step)
            log.advance()
            ending = preempted(number)
            if saved and (written := saved.written()):
                log.tell(f"checkpoint of step {written} saved; run the same command to resume")
            # While steps are skipped, older checkpoints stay: the step before may be to blame.
            due = saved and saved.manager.should_save(number) and not int(logged["skipped_in_a_row"])
            if saved and (due or ending or last):
                saved.save(number, state)
            if ending and not last:
                end(config, saved, number)
        if saved and logged is not None:
            saved.manager.wait_until_finished()
            tell(f"checkpoint of step {config.steps} saved, the last")
    return state


def start(
    trainer: parallel.Trainer, saved: checkpoints.Checkpoints | None, steps: int
) -> tuple[training.TrainState, int]:
    """The state to start from, and the number of steps that it has seen."""
    restored = saved.restore(trainer.like) if saved else None
    if restored is None:
        return trainer.init(), 0
    state, step = restored
    print(f"resuming from step {step}" + (", the last: nothing is left to do" if step == steps else ""), flush=True)
    return state, step


def report(config: Config, log: logs.Log, step: int, logged: dict[str, Any]) -> None:
    """Logs a step, warns of a collapse, and ends a run that is lost, on every process, by a ValueError."""
    speed = log.rate(step * config.batch_size * config.context)
    log.write(step, logged | {"tokens_per_second": speed}, f"loss {logged['loss']:.3f}, {speed:,.0f} tokens/s")
    if logged["dead_experts_worst_layer"] > config.max_dead:
        log.tell(
            f"step {step}: in one layer {logged['dead_experts_worst_layer']:.0%} of the experts got no token; over all "
            f"layers, the busiest expert has {logged['max_over_mean_load']:.1f} times the mean. Try a larger "
            "--load-balancing or a smaller --gamma."
        )
    if logged["skipped_in_a_row"] >= config.max_skips:
        raise ValueError(
            f"{logged['skipped_in_a_row']} steps in a row, up to step {step}, were skipped: their gradients were not "
            f"finite (loss {logged['loss']}). None of them was saved as a checkpoint. Run again with a smaller "
            "--learning-rate or --clip to resume from the newest checkpoint; if that one is spoilt already, delete it, "
            "and the one before is used."
        )


def end(config: Config, saved: checkpoints.Checkpoints | None, step: int) -> None:
    """Ends the program once everything is on disk."""
    if saved is None:
        print(f"preempted at step {step} of {config.steps}; without --checkpoints, nothing is saved", flush=True)
    else:
        saved.manager.wait_until_finished()
        print(f"preempted: saved step {step} of {config.steps}; run the same command to resume", flush=True)
    raise SystemExit(config.preemption_exit_code)


if __name__ == "__main__":
    training.run_program(main, Config, "examples.pod.train")
