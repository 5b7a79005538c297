"""The step compiled for TPUs that are not there: what it sends, with Excitation and without.

Needs the TPU compiler, and runs in an environment of its own: make test-tpu.
"""

import collections
import json
import os
import pathlib
import subprocess
import sys

import pytest

from examples.pod import fit

ROOT = pathlib.Path(__file__).parents[1]
COUNTS = 4 * (4 * 16 + 4)  # bytes of the routing counts of 4 layers with 16 experts, and their tokens
PROGRAM = """
import json, sys, tyro
from examples.pod import fit
mesh, *programs = fit.compare(tyro.cli(fit.Config, args=sys.argv[1:]))
print(json.dumps([mesh.size, *[program._asdict() for program in programs]]))
"""


def compare(*flags):
    """The number of chips, and both programs."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    }
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.tpu
@pytest.mark.parametrize("flags", ["--expert 4", "--expert 16", "--fsdp 16", "--fsdp 4 --expert 4", ""])
@pytest.mark.parametrize("strategy", ["positive_sum", "random_boost"])
def test_no_extra_traffic(strategy, flags):
    """Nothing larger than the routing counts comes on top, and at most one collective of a kind."""
    chips, vanilla, excited = compare("--topology", "v5e:4x4", "--strategy", strategy, *flags.split())
    assert chips == 16
    assert sum(map(len, vanilla["collectives"].values())) >= 3
    for kind in fit.COLLECTIVES:
        before, after = (collections.Counter(p["collectives"].get(kind, [])) for p in (vanilla, excited))
        assert (after - before).total() - (before - after).total() <= 1, kind
        assert sum((after - before).elements()) - sum((before - after).elements()) <= COUNTS, kind


@pytest.mark.tpu
def test_a_model_that_does_not_fit():
    flags = (
        "--topology v5e:2x2 --num-experts 64 --d-model 2048 --num-heads 16 --d-ff 8192 --num-layers 24 --batch-size 64"
    )
    run = subprocess.run(
        [sys.executable, "-m", "examples.pod.fit", *flags.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "pod.fit: The step does not fit TPU v5" in run.stderr
    assert "Traceback" not in run.stderr


HLO = """
  %all-reduce.98 = (f32[16]{0:T(128)S(1)}, f32[]{:T(128)}, bf16[2,3]{1,0}) all-reduce(%a, %b, %c), channel_id=1
  %ag = (s32[4]{0}, s32[16]{0}) all-gather-start(%x), channel_id=2
  %agd = s32[16]{0} all-gather-done(%ag)
  ROOT %p = pred[7]{0} collective-permute(%y), channel_id=3
  %not = f32[99]{0} fusion(%all-reduce.98), calls=%all-to-all.3
"""


def test_collectives_are_read_from_hlo():
    got = fit.collectives(HLO)
    assert got == {"all-reduce": [4 * 16 + 4 + 2 * 6], "all-gather": [4 * 4 + 4 * 16], "collective-permute": [7]}


def test_both_programs_as_a_table():
    programs = fit.Program(2**20, 2**21, 3e9, {"all-reduce": [1024, 1024]}), fit.Program(2**20, 0, 0.0, {})
    assert "| arguments, MiB a chip | 1.0 | 1.0 |" in fit.table(*programs)
    assert "| all-reduce: number, KiB in all | 2, 2.0 | 0, 0.0 |" in fit.table(*programs)
    assert "all-to-all" not in fit.table(*programs)
