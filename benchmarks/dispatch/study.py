"""What the published study measured, on one Mac, and its own arithmetic. Owns these figures: nothing else repeats them.

They stand beside a machine's own figures in the report. They are another machine's: compare ratios, not milliseconds.
"""

from __future__ import annotations

from benchmarks.dispatch.result import Published

WHAT = "the published study: one Mac, MoE of batch 128, hidden 4096, intermediate 14336, top-k 4"

# Experiments 1 to 4, on a Metal queue of its own.
SYNC_DISPATCH = Published(2.401, note="ms a kernel, waiting for each")
IN_FLIGHT = {2: Published(1.246), 4: Published(1.304), 8: Published(1.254)}  # ms a kernel, by command buffers in flight
HANDLER_LATENCY = Published(1.447, note="ms from commit to the completion handler")
COMMIT = Published(0.072, note="ms in commit")
ENCODERS = {
    2: Published(1.11),
    4: Published(2.33),
    8: Published(4.41),
}  # ms in total, by encoders in one command buffer

# Experiment 5, in ms for its whole sequence of ops.
PER_OP = Published(291.47, note="ms, waiting after every op")
BATCH = Published(270.64, note="ms, waiting once")

# Experiment 6, in ms.
ROUTER = Published(2.82, 9.37, "its spread is 3.3 times its mean")
EXPERT_GEMM = Published(9.45, 3.96)
TOP_K = 4

THRESHOLD = 0.15


def of_batch() -> float:
    """(291.47 - 270.64) / 270.64: the 7.7 % that the study prints."""
    return (PER_OP.value - BATCH.value) / BATCH.value


def of_per_op() -> float:
    """(291.47 - 270.64) / 291.47: the same difference as a part of the slower time, 7.1 %."""
    return (PER_OP.value - BATCH.value) / PER_OP.value


def overlap() -> float:
    """2.82 / (2.82 + 4 x 9.45): the "overlap potential" of 6.9 %."""
    return ROUTER.value / (ROUTER.value + TOP_K * EXPERT_GEMM.value)


def arithmetic() -> str:
    """How the study gets from its two times to its percentage, and what else the same times give."""
    difference = PER_OP.value - BATCH.value
    return (
        f"The study: {PER_OP.value} ms waiting after every op, {BATCH.value} ms waiting once. The difference,"
        f" {difference:.2f} ms, is {difference:.2f} / {BATCH.value} = {of_batch():.1%} of the batch time (what it"
        " prints)"
        f" and {difference:.2f} / {PER_OP.value} = {of_per_op():.1%} of the per-op time (what a user would save)."
        f" Both are under its threshold of {THRESHOLD:.0%}."
    )
