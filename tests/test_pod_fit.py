"""The step compiled for TPUs that are not there: what it sends, with Excitation and without.

Needs the TPU compiler, and runs in an environment of its own: make test-tpu.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import pod_fit as fit

ROOT = pathlib.Path(__file__).parents[1]
COUNTS = 4 * (4 * 16 + 4)  # bytes of the routing counts of 4 layers with 16 experts, and their tokens
PROGRAM = """
import json, sys, tyro
from benchmarks import pod_fit as fit
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
    """At most one collective of a kind comes on top, and no more bytes than the routing counts have; nor memory."""
    sizes = "--batch-size 64 --d-model 512 --num-heads 4 --d-ff 512"
    chips, baseline, excited = compare("--topology", "v5e:4x4", "--strategy", strategy, *sizes.split(), *flags.split())
    assert chips == 16
    assert sum(map(len, baseline["collectives"].values())) >= 3
    for kind in fit.COLLECTIVES:
        before, after = (p["collectives"].get(kind, []) for p in (baseline, excited))
        assert len(after) <= len(before) + 1, kind
        assert sum(after) <= sum(before) + COUNTS, kind
    assert excited["temporary"] <= 1.01 * baseline["temporary"]


@pytest.mark.tpu
def test_a_model_that_does_not_fit():
    flags = (
        "--topology v5e:2x2 --num-experts 64 --d-model 2048 --num-heads 16 --d-ff 8192 --num-layers 24 --batch-size 64"
    )
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.pod_fit", *flags.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "benchmarks.pod_fit: The step does not fit TPU v5" in run.stderr
    assert "Traceback" not in run.stderr


HLO = """
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %ag = (s32[4]{0}, s32[16]{0}) all-gather-start(%x), channel_id=2
  %agd = s32[16]{0} all-gather-done(%ag)
  %fused.1 = f32[9]{0} fusion(%agd), calls=%part.1
  %fused.2 = f32[9]{0} fusion(%agd), calls=%part.2
}

%part.1 (q: f32[3]) -> f32[9] {
  %s.1 = f32[9]{0} reduce-scatter(%q), channel_id=7
}

%part.2 (q: f32[3]) -> f32[9] {
  %s.2 = f32[9]{0} reduce-scatter(%q), channel_id=7
}

%bound (p: (s32[], f32[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%depends.on-data (p: (s32[], f32[4])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %m), direction=LT
}

ENTRY %main (a: f32[16]) -> pred[7] {
  %all-reduce.98 = (f32[16]{0:T(128)S(1)}, f32[]{:T(128)}, /*index=5*/bf16[2,3]{1,0}) all-reduce(%a, %b, %c), channel_id=1
  %w = (s32[], f32[4]) while(%t), condition=%bound, body=%body, metadata={op_name="while"}
  %not = f32[99]{0} fusion(%all-reduce.98), metadata={op_name="all-to-all(x)"}
  ROOT %p = pred[7]{0} collective-permute(%y), channel_id=3
}
"""  # noqa: E501


def test_collectives_are_read_from_hlo():
    """Those in a loop as often as it runs, and the parts of one as one."""
    assert fit.collectives(HLO) == {
        "all-reduce": [4 * 16 + 4 + 2 * 6],
        "all-gather": [12 * 4 * 16],
        "reduce-scatter": [12 * 4 * 9],
        "collective-permute": [7],
    }
    unknown = HLO.replace("condition=%bound", "condition=%depends.on-data")
    assert fit.collectives(unknown)["all-gather"] == [4 * 16]


def test_no_tpu_compiler_or_no_such_slice():
    with pytest.raises(ValueError, match=r"(There is no TPU compiler here: uv sync|'v5e:3x3' is no TPU slice)"):
        fit.devices("v5e:3x3")


def test_both_programs_as_a_table():
    programs = fit.Program(2**20, 2**21, 3e9, {"all-reduce": [1024, 1024]}), fit.Program(2**20, 0, 0.0, {})
    assert "| arguments, MiB a chip | 1.0 | 1.0 |" in fit.table(*programs)
    assert "| all-reduce: number, KiB in all | 2, 2.0 | 0, 0.0 |" in fit.table(*programs)
    assert "all-to-all" not in fit.table(*programs)
