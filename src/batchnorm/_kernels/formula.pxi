# ---- Formula: each line of the mathematics, once --------------------------------------------------------------------
# The names are those of docs/derivation.md. A `number` is a vector of the data's type or, where that would lose digits,
# of float64; numbers per channel are float64. Nothing here knows a layout.

ctypedef fused number:
    vec
    wide


cdef inline number load(const real *p, Py_ssize_t count, number fill) noexcept nogil:
    """`count` values, and those of `fill` after them where they are less than a vector."""
    if number is vec:
        return load_vec(p) if count == VEC else load_first(p, count, fill)
    else:
        return widened(load_vec(p) if count == VEC else load_first(p, count, narrowed(fill)))


cdef inline number same(double value, number like) noexcept nogil:
    """The value in every lane."""
    if number is vec:
        return same_vec(value)
    else:
        return same_wide(value)


cdef inline number tree(number *row, Py_ssize_t rows) noexcept nogil:
    """Sum of 8, 4, 2 or 1 vectors by halving: few roundings after each other, and equal values add up without any."""
    if rows == 8:
        row[0] += row[4]
        row[1] += row[5]
        row[2] += row[6]
        row[3] += row[7]
    if rows >= 4:
        row[0] += row[2]
        row[1] += row[3]
    return row[0] + row[1] if rows >= 2 else row[0]


cdef inline void summands(const real *x, const real *dy, bint gradient, Py_ssize_t count, number pivot, number *a,
                          number *a_d) noexcept nogil:
    """What is summed, a and a·d with d = x − pivot: a is d itself for the moments, dy for the gradient."""
    cdef number d = load(x, count, pivot) - pivot
    a[0] = load(dy, count, same(0, pivot)) if gradient else d
    a_d[0] = a[0] * d


cdef inline number y_of(number x, number centre, number scale, number shift) noexcept nogil:
    """y = (x − centre)·scale + shift, with scale = gamma·rstd and shift = beta − (mean − centre)·scale."""
    return (x - centre) * scale + shift


cdef inline number dx_of(number dy, number x, number centre, number scale, number slope,
                         number shift) noexcept nogil:
    """dx = dy·scale + (x − centre)·slope + shift, with slope = 2·dvar/n and shift = dmean/n − (mean − centre)·slope."""
    return dy * scale + ((x - centre) * slope + shift)


cdef inline double two_sum(double a, double b, double *low) noexcept nogil:
    """a + b, and what rounding left over (Knuth, TAOCP 2, section 4.2.2)."""
    cdef double total = a + b, back = total - a
    low[0] = (a - (total - back)) + (b - back)
    return total


cdef inline double few_bits(double value, double coarse) noexcept nogil:
    """The value to a multiple of 2⁻⁵² coarse: a number with so few bits that x minus it is exact for nearly all x."""
    cdef double rounded = (value + coarse) - coarse
    return rounded if rounded - rounded == 0 else value


cdef inline double centre_of(double mean, double var) noexcept nogil:
    """The mean to about 1/64 of a standard deviation, as a value of the data's type."""
    return <real> few_bits(mean, 7e13 * sqrt(var))


cdef inline void chan(double *pivot, double *delta, double *m2, double n, double other_pivot, double other_delta,
                      double other_m2, double other_n) noexcept nogil:
    """Chan's rule: mean (pivot + delta) and m2 of two sets from those of each."""
    cdef double between = (other_pivot - pivot[0]) + (other_delta - delta[0])
    cdef double share = other_n / (n + other_n)
    delta[0] += between * share
    m2[0] += other_m2 + between * between * (n * share)


cdef inline double m2_of(double sum_d, double sum_d2, double n) noexcept nogil:
    """Σ(x − mean)² = Σd² − (Σd)²/n, not below 0."""
    cdef double m2 = sum_d2 - sum_d * (sum_d / n)
    return 0 if m2 < 0 else m2


cdef inline double rstd_of(double var_eps) noexcept nogil:
    """1/√(var + eps); 0 where that is 0, so that a channel without spread maps to beta."""
    return 1 / sqrt(var_eps) if var_eps != 0 else 0


cdef inline double scale_of(double gamma, double rstd) noexcept nogil:
    """What x − mean is multiplied by in y, and dy in dx."""
    return gamma * rstd


cdef inline double dgamma_of(double sum_dy_xmu, double rstd) noexcept nogil:
    """dgamma = Σdy·xhat"""
    return sum_dy_xmu * rstd


cdef inline double dmean_of(double scale, double sum_dy) noexcept nogil:
    """dmean = −Σdxhat·rstd; its second term, dvar·(−2/n)·Σ(x − mean), is 0"""
    return -scale * sum_dy


cdef inline double dvar_of(double scale, double rstd, double dgamma) noexcept nogil:
    """dvar = Σdxhat·(x − mean)·(−½)·rstd³"""
    return -0.5 * scale * (rstd * dgamma)


cdef inline double slope_of(double dvar, double n) noexcept nogil:
    """What x − mean is multiplied by in dx."""
    return 2 * dvar / n


cdef inline double followed(double running, double batch, double momentum) noexcept nogil:
    """r ← (1 − momentum)·r + momentum·batch"""
    return (1 - momentum) * running + momentum * batch
