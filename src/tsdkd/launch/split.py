"""Estimates how to divide GPUs between the student, the teacher's servers and the servers that sample."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from .model_size import ModelSize
from .step_time import estimate_step_seconds
from .workload import GIB, VllmMemoryConfig, Workload

_SERVER_FRACTION = 0.9  # of a GPU, for a server's weights and cache: vLLM's default


@dataclass(frozen=True)
class Split:
    """GPUs of each part, and the estimated seconds of an optimizer step.

    Attributes:
        student: GPUs that train.
        teacher: GPUs of the teacher's servers.
        rollout: GPUs of the servers that sample, one step ahead; 0 if the rollouts are on the student's GPUs.
        parts: seconds that each part takes on its GPUs.
        step: seconds of a step.
    """

    student: int
    teacher: int
    rollout: int
    parts: dict[str, float]
    step: float


def fastest_split(
    student: ModelSize,
    teacher: ModelSize,
    workload: Workload,
    gpus: int,
    gpu_gib: float,
    fits: Callable[[Workload, int], bool],
) -> Split | None:
    """Return the fastest split that leaves room for the student, or None if nothing does.

    Args:
        student, teacher: their sizes.
        workload: of one GPU, if all of them train.
        gpus: number of GPUs.
        gpu_gib: memory of one GPU, GiB.
        fits: (workload of one of the student's GPUs, their number) -> whether they have enough memory, without the
            teacher's layers.
    """
    usable = gpu_gib * _SERVER_FRACTION * GIB
    # every server has as many GPUs as its weights need
    per_teacher = math.ceil(teacher.num_parameters * workload.teacher_bytes_per_parameter / usable)
    per_rollout = math.ceil(student.num_parameters * workload.compute_itemsize / usable)
    found = []
    for teachers in range(per_teacher, gpus, per_teacher):
        for rollouts in range(0, gpus - teachers, per_rollout):
            students = gpus - teachers - rollouts
            own = divide_workload(workload, gpus, students)
            if rollouts:  # the engine is elsewhere
                own = replace(own, engine=VllmMemoryConfig(memory_bytes=0.0))
            if fits(own, students):
                parts = estimate_parts(student, teacher, workload, gpus, (students, teachers, rollouts), usable)
                step = pipelined_step(parts, own.micro_batches_per_step, workload.steps_per_rollout, rollouts > 0)
                found.append(Split(students, teachers, rollouts, parts, step))
    return min(found, key=lambda split: split.step, default=None)


def hidden_state_bytes(teacher: ModelSize, workload: Workload) -> int:
    """Return the bytes that the teacher's servers send to one GPU in a step."""
    tokens = workload.samples_per_step * workload.sequence_length
    return tokens * teacher.hidden_size * workload.teacher_bytes_per_parameter


def divide_workload(workload: Workload, gpus: int, students: int) -> Workload:
    """Return the workload of each of `students` GPUs that take the steps of `gpus`, in as large micro-batches."""
    samples = math.ceil(workload.samples_per_step * gpus / students)
    return replace(
        workload,
        samples_per_step=samples,
        micro_batches_per_step=math.ceil(samples * workload.sequence_length / workload.micro_batch_tokens),
        rollout_size=math.ceil(workload.rollout_size * gpus / students),
    )


def estimate_parts(
    student: ModelSize,
    teacher: ModelSize,
    workload: Workload,
    gpus: int,
    split: tuple[int, int, int],
    server_bytes: float,
) -> dict[str, float]:
    """Estimate the seconds per step of student, teacher and rollouts on their GPUs.

    Args:
        workload: of one GPU, if all `gpus` train.
        split: GPUs of student, teacher and rollouts.
        server_bytes: memory of an engine on a GPU of its own.
    """
    students, teachers, rollouts = split
    whole = estimate_step_seconds(student, teacher, workload)
    samplers, engine = students, workload.engine
    if rollouts:
        slots = engine.max_num_seqs if engine else 256
        samplers, engine = rollouts, VllmMemoryConfig(memory_bytes=server_bytes, max_num_seqs=slots)
    sampling = replace(divide_workload(workload, gpus, samplers), engine=engine)
    return {
        "student": gpus * (whole["student"] + whole["head"]) / students,
        "teacher": gpus * whole["teacher"] / teachers,
        "rollout": estimate_step_seconds(student, teacher, sampling)["rollout"],
    }


def pipelined_step(parts: dict[str, float], micro_batches: int, steps_per_rollout: int, ahead: bool) -> float:
    """Estimate the seconds of a step in which the teacher scores a micro-batch while the student trains on another.

    Args:
        parts: seconds of student, teacher and rollouts per step.
        micro_batches: number of them in a step; the student waits for the first.
        steps_per_rollout: optimizer steps per rollout.
        ahead: whether rollouts are sampled during the last step on the one before.
    """
    student, teacher = parts["student"], parts["teacher"]
    train = max(student + teacher / micro_batches, teacher + student / micro_batches)
    if not ahead:
        return train + parts["rollout"]
    steps = max(1, steps_per_rollout)
    return train * (steps - 1) / steps + max(parts["rollout"], train / steps)
