"""Triton kernels over rows of logits. A program reads its rows from left to right: without atomics, in a fixed order.

Logits are read in their own precision. The computation is in float32, or in float64 if the logits are. `FACTOR` and
`CAP` turn the output `x` of the matrix product into a logit: `FACTOR x`, or `CAP tanh(FACTOR x)` if `CAP` is not 0.
They and the weights of the divergence are compile-time constants, because each has only one value in a run.
"""

import triton
import triton.language as tl

ROWS = 1  # per program. Triton's interpreter is faster with more
BLOCK = 2048  # columns that a program reads at a time: with 8 warps, 16 bytes of bfloat16 per thread
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}  # Triton's default for the latter depends on its version
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _rows(count, ROWS: tl.constexpr):
    """Return the numbers of this program's rows, `[ROWS, 1]`, and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # offsets can exceed 2**31
    return row, row < count


@triton.jit
def _load_logits(pointers, inside, FACTOR: tl.constexpr, CAP: tl.constexpr):
    """Return logits, and the derivative of their soft cap."""
    x = tl.load(pointers, mask=inside, other=0.0)
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    if FACTOR != 1.0:
        x = x * FACTOR
    slope = 1.0
    if CAP != 0.0:
        e = tl.exp(-2.0 * tl.abs(x))  # tanh, which Triton lacks; can't overflow
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
        TINY: tl.constexpr = 2.2250738585072014e-308 if q.dtype == tl.float64 else 1.1754943508222875e-38
        m = tl.maximum(SHARE * p + (1.0 - SHARE) * q, TINY)
        logm = tl.log(m)
    return m, logm


@triton.jit(
    do_not_specialize=["count", "statistics_stride"],
    do_not_specialize_on_alignment=["statistics", "lane_maxima"],
)
def row_statistics(
    logits,
    statistics,
    lane_maxima,
    count,
    size,
    logits_stride,
    statistics_stride,
    FACTOR: tl.constexpr,
    CAP: tl.constexpr,
    LANE_MAXIMA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum, log of the sum of exp(logit - maximum), and entropy of each row, in one read.

    Each lane keeps the maximum of the columns that it has seen and sums relative to it. The lanes are combined at the
    end of the row.

    Args:
        logits: `[count, size]`.
        statistics: `[3, count]`.
        lane_maxima: `[count, min(size, BLOCK)]`: of columns i, i + BLOCK, i + 2 BLOCK, ...; only if LANE_MAXIMA.
    """
    row, exists = _rows(count, ROWS)
    lanes = tl.arange(0, BLOCK)[None, :]
    maximum = tl.full([ROWS, BLOCK], _LOWEST, statistics.dtype.element_ty)
    total = tl.zeros([ROWS, BLOCK], statistics.dtype.element_ty)  # sum of exp(x - maximum)
    weighted = tl.zeros([ROWS, BLOCK], statistics.dtype.element_ty)  # sum of exp(x - maximum) (x - maximum)
    for start in range(0, size, BLOCK):
        columns = start + lanes
        inside = exists & (columns < size)
        x, _ = _load_logits(logits + row * logits_stride + columns, inside, FACTOR, CAP)
        step = x - maximum
        e = tl.where(inside, tl.exp(-tl.abs(step)), 0.0)
        is_higher = inside & (step > 0.0)  # then the earlier terms are rescaled to the new maximum
        weighted = tl.where(is_higher, e * (weighted - total * step), weighted + e * step)
        total = tl.where(is_higher, total * e + 1.0, total + e)
        maximum = tl.where(inside, tl.maximum(maximum, x, propagate_nan=tl.PropagateNan.ALL), maximum)
    if LANE_MAXIMA:
        tl.store(lane_maxima + row * tl.minimum(size, BLOCK) + lanes, maximum, mask=exists & (lanes < size))
    of_row = tl.max(maximum, 1, keep_dims=True)
    shift = maximum - of_row
    scale = tl.exp(shift)
    row_total = tl.sum(total * scale, 1, keep_dims=True)
    row_weighted = tl.sum(scale * (weighted + total * shift), 1, keep_dims=True)
    log_normalizer = tl.log(row_total)
    tl.store(statistics + row, of_row, mask=exists)
    tl.store(statistics + statistics_stride + row, log_normalizer, mask=exists)
    tl.store(statistics + 2 * statistics_stride + row, log_normalizer - row_weighted / row_total, mask=exists)


@triton.jit(
    do_not_specialize=["count", "student_stride", "teacher_stride"],
    do_not_specialize_on_alignment=["student_statistics", "teacher_statistics", "results"],
)
def divergence(
    student,
    teacher,
    student_statistics,
    teacher_statistics,
    results,
    count,
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Divergence of each row, KL(Q||M) and sum q p / m, in one read of both models' logits.

    Args:
        student, teacher: logits, `[count, size]`.
        student_statistics, teacher_statistics: results of `row_statistics`, `[3, count]`.
        results: `[3, count]`.
        MIXTURE: weight of p in m.
        OF_STUDENT, OF_TEACHER: weights of KL(Q||M) and KL(P||M).
        OF_RATIO: weight of q p / m in the gradient; the sum is zero if this is zero.
    """
    row, exists = _rows(count, ROWS)
    student_maximum = tl.load(student_statistics + row, mask=exists)
    student_normalizer = tl.load(student_statistics + student_stride + row, mask=exists)
    teacher_maximum = tl.load(teacher_statistics + row, mask=exists)
    teacher_normalizer = tl.load(teacher_statistics + teacher_stride + row, mask=exists)
    student_kl = tl.zeros([ROWS, BLOCK], results.dtype.element_ty)
    teacher_kl = tl.zeros([ROWS, BLOCK], results.dtype.element_ty)
    ratio = tl.zeros([ROWS, BLOCK], results.dtype.element_ty)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        inside = exists & (columns < size)
        x, _ = _load_logits(student + row * student_logits_stride + columns, inside, STUDENT_FACTOR, STUDENT_CAP)
        y, _ = _load_logits(teacher + row * teacher_logits_stride + columns, inside, TEACHER_FACTOR, TEACHER_CAP)
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
    of_student = tl.sum(student_kl, 1, keep_dims=True)
    of_teacher = tl.sum(teacher_kl, 1, keep_dims=True)
    tl.store(results + row, OF_TEACHER * of_teacher + OF_STUDENT * of_student, mask=exists)
    tl.store(results + count + row, of_student, mask=exists)
    tl.store(results + 2 * count + row, tl.sum(ratio, 1, keep_dims=True), mask=exists)


@triton.jit(
    do_not_specialize=["count", "student_stride", "teacher_stride", "id_count"],
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
    count,
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite the student's logits with the gradient that `SoftmaxRows.logits_grad_` defines, in one read and write.

    Args:
        student, teacher: logits, `[count, size]`; the teacher's only if HAS_DIVERGENCE.
        student_statistics, teacher_statistics: results of `row_statistics`, `[3, count]`.
        student_kl, ratio: results of `divergence`, `[count]`; only if HAS_DIVERGENCE.
        entropy_grad, divergence_grad: `[count]`; only if the flag is set.
        ids, logps_grad: `[count, id_count]`, only if HAS_LOGPS. The derivatives of an id that occurs twice add up.
        MIXTURE, OF_STUDENT, OF_TEACHER, OF_RATIO: see `divergence`.
    """
    row, exists = _rows(count, ROWS)
    maximum = tl.load(student_statistics + row, mask=exists)
    normalizer = tl.load(student_statistics + student_stride + row, mask=exists)
    constant = tl.zeros_like(maximum)  # terms of dz / q that are the same for all columns
    if HAS_ENTROPY:
        of_entropy = tl.load(entropy_grad + row, mask=exists)
        constant -= of_entropy * tl.load(student_statistics + 2 * student_stride + row, mask=exists)
    if HAS_DIVERGENCE:
        of_divergence = tl.load(divergence_grad + row, mask=exists)
        teacher_maximum = tl.load(teacher_statistics + row, mask=exists)
        teacher_normalizer = tl.load(teacher_statistics + teacher_stride + row, mask=exists)
        kl = tl.load(student_kl + row, mask=exists)
        row_ratio = tl.load(ratio + row, mask=exists)
        if MIXTURE == 0.0:
            constant += of_divergence * OF_TEACHER
    if HAS_LOGPS:
        for k in range(id_count):
            constant -= tl.load(logps_grad + row * id_count + k, mask=exists)

    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        inside = exists & (columns < size)
        pointers = student + row * student_logits_stride + columns
        x, slope = _load_logits(pointers, inside, STUDENT_FACTOR, STUDENT_CAP)
        logq = x - maximum - normalizer
        q = tl.exp(logq)
        gradient = tl.zeros_like(q) + constant
        if HAS_ENTROPY:
            gradient -= of_entropy * logq
        if HAS_DIVERGENCE:
            y, _ = _load_logits(teacher + row * teacher_logits_stride + columns, inside, TEACHER_FACTOR, TEACHER_CAP)
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
                at = tl.load(ids + row * id_count + k, mask=exists, other=-1)
                is_here = (at >= start) & (at < start + BLOCK)
                if tl.sum(is_here.to(tl.int32)) > 0:  # seldom
                    value = tl.load(logps_grad + row * id_count + k, mask=exists, other=0.0)
                    gradient += tl.where(columns == at, value, 0.0)
        tl.store(pointers, (gradient * slope).to(student.dtype.element_ty), mask=inside)
