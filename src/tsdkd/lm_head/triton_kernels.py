"""Triton kernels over rows of logits. One program reads a row from left to right: without atomics, in a fixed order.

Logits are read in their own precision. The computation is in float32, or in float64 if the logits are. `FACTOR` and
`CAP` turn the output `x` of the matrix product into a logit: `FACTOR x`, or `CAP tanh(FACTOR x)` if `CAP` is not 0.
They and the weights of the divergence are compile-time constants, because each has only one value in a run.
"""

import triton
import triton.language as tl

BLOCK = 2048  # columns that a program reads at a time: with 8 warps, 16 bytes of bfloat16 per thread
WARPS = 8
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _load_logits(row, columns, inside, FACTOR: tl.constexpr, CAP: tl.constexpr):
    """Return logits of a row, and the derivative of their soft cap."""
    x = tl.load(row + columns, mask=inside, other=0.0)
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    if FACTOR != 1.0:
        x = x * FACTOR
    slope = 1.0
    if CAP != 0.0:
        e = tl.exp(-2.0 * tl.abs(x))  # can't overflow
        x = tl.where(x < 0.0, e - 1.0, 1.0 - e) / (1.0 + e)
        slope = 1.0 - x * x
        x = x * CAP
    return x, slope


@triton.jit
def _mixture(q, p, logq, logp, SHARE: tl.constexpr):
    """Return the mixture `m = SHARE p + (1 - SHARE) q`, kept above zero so that it can be a divisor, and `log m`."""
    if SHARE == 0.0:
        m, logm = q, logq
    elif SHARE == 1.0:
        m, logm = p, logp
    else:
        m = SHARE * p + (1.0 - SHARE) * q
        if m.dtype == tl.float64:
            m = tl.maximum(m, 2.2250738585072014e-308)
        else:
            m = tl.maximum(m, 1.1754943508222875e-38)
        logm = tl.log(m)
    return m, logm


@triton.jit(do_not_specialize=["statistics_stride"], do_not_specialize_on_alignment=["statistics", "lane_maxima"])
def row_statistics(
    logits,
    statistics,
    lane_maxima,
    size,
    logits_stride,
    statistics_stride,
    FACTOR: tl.constexpr,
    CAP: tl.constexpr,
    LANE_MAXIMA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum, log of the sum of exp(logit - maximum), and entropy of each row, in one read.

    Each lane keeps the maximum of the columns that it has seen and sums relative to it. The lanes are combined at the
    end of the row.

    Args:
        logits: `[C, size]`.
        statistics: `[3, C]`.
        lane_maxima: `[C, min(size, BLOCK)]`, maximum of columns i, i + BLOCK, i + 2 BLOCK, ...; only if LANE_MAXIMA.
    """
    row = tl.program_id(0).to(tl.int64)  # C size can exceed 2**31
    lanes = tl.arange(0, BLOCK)
    maximum = tl.full([BLOCK], _LOWEST, statistics.dtype.element_ty)
    total = tl.zeros([BLOCK], statistics.dtype.element_ty)  # sum of exp(x - maximum)
    weighted = tl.zeros([BLOCK], statistics.dtype.element_ty)  # sum of exp(x - maximum) (x - maximum)
    for start in range(0, size, BLOCK):
        columns = start + lanes
        inside = columns < size
        x, _ = _load_logits(logits + row * logits_stride, columns, inside, FACTOR, CAP)
        step = x - maximum
        e = tl.where(inside, tl.exp(-tl.abs(step)), 0.0)
        is_higher = inside & (step > 0.0)  # then the earlier terms are rescaled to the new maximum
        weighted = tl.where(is_higher, e * (weighted - total * step), weighted + e * step)
        total = tl.where(is_higher, total * e + 1.0, total + e)
        maximum = tl.where(inside, tl.maximum(maximum, x, propagate_nan=tl.PropagateNan.ALL), maximum)
    if LANE_MAXIMA:
        lane_count = tl.minimum(size, BLOCK)
        tl.store(lane_maxima + row * lane_count + lanes, maximum, mask=lanes < size)
    of_row = tl.max(maximum, 0)
    shift = maximum - of_row
    scale = tl.exp(shift)
    row_total = tl.sum(total * scale, 0)
    row_weighted = tl.sum(scale * (weighted + total * shift), 0)
    log_normalizer = tl.log(row_total)
    tl.store(statistics + row, of_row)
    tl.store(statistics + statistics_stride + row, log_normalizer)
    tl.store(statistics + 2 * statistics_stride + row, log_normalizer - row_weighted / row_total)


@triton.jit(
    do_not_specialize=["student_stride", "teacher_stride"],
    do_not_specialize_on_alignment=["student_statistics", "teacher_statistics", "results"],
)
def divergence(
    student,
    teacher,
    student_statistics,
    teacher_statistics,
    results,
    size,
    student_logits_stride,
    teacher_logits_stride,
    student_stride,
    teacher_stride,
    STUDENT_FACTOR: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_FACTOR: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    MIXTURE: tl.constexpr,
    OF_STUDENT: tl.constexpr,
    OF_TEACHER: tl.constexpr,
    OF_RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Divergence of each row, KL(Q||M) and sum q p / m, in one read of both models' logits.

    Args:
        student, teacher: logits, `[C, size]`.
        student_statistics, teacher_statistics: results of `row_statistics`, `[3, C]`.
        results: `[3, C]`.
        MIXTURE: weight of p in m.
        OF_STUDENT, OF_TEACHER: weights of KL(Q||M) and KL(P||M).
        OF_RATIO: weight of q p / m in the gradient; the sum is zero if this is zero.
    """
    row = tl.program_id(0).to(tl.int64)
    student_maximum = tl.load(student_statistics + row)
    student_normalizer = tl.load(student_statistics + student_stride + row)
    teacher_maximum = tl.load(teacher_statistics + row)
    teacher_normalizer = tl.load(teacher_statistics + teacher_stride + row)
    student_kl = tl.zeros([BLOCK], results.dtype.element_ty)
    teacher_kl = tl.zeros([BLOCK], results.dtype.element_ty)
    ratio = tl.zeros([BLOCK], results.dtype.element_ty)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < size
        x, _ = _load_logits(student + row * student_logits_stride, columns, inside, STUDENT_FACTOR, STUDENT_CAP)
        y, _ = _load_logits(teacher + row * teacher_logits_stride, columns, inside, TEACHER_FACTOR, TEACHER_CAP)
        logq = x - student_maximum - student_normalizer
        logp = y - teacher_maximum - teacher_normalizer
        q = tl.where(inside, tl.exp(logq), 0.0)
        p = tl.where(inside, tl.exp(logp), 0.0)
        m, logm = _mixture(q, p, logq, logp, MIXTURE)
        if OF_RATIO != 0.0:
            ratio += q * p / m
        if OF_TEACHER != 0.0 and MIXTURE != 1.0:
            teacher_kl += p * (logp - logm)
        if OF_STUDENT != 0.0 and MIXTURE != 0.0:
            student_kl += q * (logq - logm)
    of_student = tl.sum(student_kl, 0)
    count = tl.num_programs(0).to(tl.int64)
    tl.store(results + row, OF_TEACHER * tl.sum(teacher_kl, 0) + OF_STUDENT * of_student)
    tl.store(results + count + row, of_student)
    tl.store(results + 2 * count + row, tl.sum(ratio, 0))


@triton.jit(
    do_not_specialize=["student_stride", "teacher_stride", "id_count"],
    do_not_specialize_on_alignment=[
        *("student_statistics", "teacher_statistics", "student_kl", "ratio", "entropy_grad", "divergence_grad"),
        *("ids", "logps_grad"),
    ],
)
def logits_grad(
    student,
    teacher,
    student_statistics,
    teacher_statistics,
    student_kl,
    ratio,
    entropy_grad,
    divergence_grad,
    ids,
    logps_grad,
    size,
    student_logits_stride,
    teacher_logits_stride,
    student_stride,
    teacher_stride,
    id_count,
    STUDENT_FACTOR: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_FACTOR: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    MIXTURE: tl.constexpr,
    OF_STUDENT: tl.constexpr,
    OF_TEACHER: tl.constexpr,
    OF_RATIO: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_DIVERGENCE: tl.constexpr,
    HAS_LOGPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite the student's logits with the gradient that `SoftmaxRows.logits_grad_` defines, in one read and write.

    Args:
        student, teacher: logits, `[C, size]`; the teacher's only if HAS_DIVERGENCE.
        student_statistics, teacher_statistics: results of `row_statistics`, `[3, C]`.
        student_kl, ratio: results of `divergence`, `[C]`; only if HAS_DIVERGENCE.
        entropy_grad, divergence_grad: `[C]`; only if the flag is set.
        ids, logps_grad: `[C, id_count]`; only if HAS_LOGPS. If an id occurs more than once, its derivatives add up.
        MIXTURE, OF_STUDENT, OF_TEACHER, OF_RATIO: see `divergence`.
    """
    row = tl.program_id(0).to(tl.int64)
    maximum = tl.load(student_statistics + row)
    normalizer = tl.load(student_statistics + student_stride + row)
    constant = maximum * 0.0  # terms of dz / q that are the same for all columns
    if HAS_ENTROPY:
        of_entropy = tl.load(entropy_grad + row)
        constant -= of_entropy * tl.load(student_statistics + 2 * student_stride + row)
    if HAS_DIVERGENCE:
        of_divergence = tl.load(divergence_grad + row)
        teacher_maximum = tl.load(teacher_statistics + row)
        teacher_normalizer = tl.load(teacher_statistics + teacher_stride + row)
        kl = tl.load(student_kl + row)
        row_ratio = tl.load(ratio + row)
        if MIXTURE == 0.0:
            constant += of_divergence * OF_TEACHER
    if HAS_LOGPS:
        for k in range(id_count):
            constant -= tl.load(logps_grad + row * id_count + k)

    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < size
        x, slope = _load_logits(student + row * student_logits_stride, columns, inside, STUDENT_FACTOR, STUDENT_CAP)
        logq = x - maximum - normalizer
        q = tl.exp(logq)
        gradient = tl.zeros_like(q) + constant
        if HAS_ENTROPY:
            gradient -= of_entropy * logq
        if HAS_DIVERGENCE:
            y, _ = _load_logits(teacher + row * teacher_logits_stride, columns, inside, TEACHER_FACTOR, TEACHER_CAP)
            logp = y - teacher_maximum - teacher_normalizer
            p = tl.exp(logp)
            if MIXTURE != 0.0:
                m, logm = _mixture(q, p, logq, logp, MIXTURE)
                if OF_RATIO != 0.0:
                    gradient += of_divergence * OF_RATIO * (p / m - row_ratio)
                # subtract the KL before multiplying: if one token has all the mass, the two must cancel exactly
                gradient += of_divergence * OF_STUDENT * (logq - logm - kl)
        gradient *= q
        if HAS_DIVERGENCE and MIXTURE == 0.0:
            gradient -= of_divergence * OF_TEACHER * p
        if HAS_LOGPS:
            for k in range(id_count):
                at = tl.load(ids + row * id_count + k) - start
                if (at >= 0) & (at < BLOCK):  # seldom
                    value = tl.load(logps_grad + row * id_count + k)
                    gradient += tl.where(tl.arange(0, BLOCK) == at, value, 0.0)
        gradient *= slope
        tl.store(
            student + row * student_logits_stride + columns, gradient.to(student.dtype.element_ty), mask=inside
        )
