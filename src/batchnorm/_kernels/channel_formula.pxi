# ---- Formula, numbers per channel: each line of the mathematics, once ------------------------------------------------
# float64 for any data. The names are those of docs/derivation.md.

cdef inline double two_sum(double a, double b, double *low) noexcept nogil:
    """a + b, and its rounding error (Knuth, TAOCP 2, section 4.2.2)."""
    cdef double total = a + b, back = total - a
    low[0] = (a - (total - back)) + (b - back)
    return total


cdef inline double few_bits(double value, double coarse) noexcept nogil:
    """The value rounded to a multiple of 2⁻⁵² coarse: x minus it is exact for nearly all x, because it has few bits."""
    cdef double rounded = (value + coarse) - coarse
    return rounded if rounded - rounded == 0 else value


cdef inline void chan(double *pivot, double *delta, double *m2, double n, double other_pivot, double other_delta,
                      double other_m2, double other_n) noexcept nogil:
    """Chan's rule: mean (pivot + delta) and m2 of two sets from those of each; a set may be empty."""
    # Without the exchange, the mean would move by many standard deviations, and be rounded as often.
    cdef bint exchanged = other_n > 2 * n
    cdef double near = other_pivot if exchanged else pivot[0], far = pivot[0] if exchanged else other_pivot
    cdef double near_delta = other_delta if exchanged else delta[0], far_delta = delta[0] if exchanged else other_delta
    cdef double near_n = other_n if exchanged else n, far_n = n if exchanged else other_n
    cdef double share = far_n / (n + other_n) if far_n != 0 else 0
    cdef double between = (far - near) + (far_delta - near_delta)
    pivot[0] = near
    delta[0] = near_delta + (between * share if far_n != 0 else 0)
    m2[0] += other_m2 + between * between * (near_n * share)


cdef inline double m2_of(double sum_d, double sum_d2, double n) noexcept nogil:
    """Σ(x − mean)² = Σd² − (Σd)²/n, not below 0."""
    cdef double m2 = sum_d2 - sum_d * (sum_d / n)
    return 0 if m2 < 0 else m2


cdef inline double rstd_of(double var_eps) noexcept nogil:
    """1/√(var + eps), or 0 if var + eps is 0, so that a constant channel maps to beta."""
    return 1 / sqrt(var_eps) if var_eps != 0 else 0


cdef inline void set_var(double *restrict var, const double *restrict m2, Py_ssize_t channels, double n) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        var[c] = m2[c] / n


cdef inline void set_rstd(double *restrict rstd, const double *restrict var, Py_ssize_t channels,
                          double eps) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        rstd[c] = rstd_of(var[c] + eps)


cdef inline double scale_of(double gamma, double rstd) noexcept nogil:
    """The factor of x − mean in y, and of dy in dx."""
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
    """The factor of x − mean in dx."""
    return 2 * dvar / n


cdef inline double tangent_mean_of(double sum_dx, double n) noexcept nogil:
    """The tangent of the mean along dx: Σdx/n"""
    return sum_dx / n


cdef inline double tangent_var_of(double sum_dx_xmu, double n) noexcept nogil:
    """The tangent of the variance along dx: 2·Σdx·(x − mean)/n"""
    return 2 * sum_dx_xmu / n


cdef inline double tangent_slope_of(double gamma, double rstd, double dgamma, double dvar) noexcept nogil:
    """The factor of x − mean in the tangent of y = gamma·(x − mean)·rstd + beta."""
    return dgamma * rstd - 0.5 * scale_of(gamma, rstd) * (rstd * rstd) * dvar


cdef inline double tangent_offset_of(double scale, double dbeta, double dmean) noexcept nogil:
    """The rest of it, besides scale·dx."""
    return dbeta - scale * dmean


cdef inline double followed(double running, double batch, double momentum) noexcept nogil:
    """r ← (1 − momentum)·r + momentum·batch"""
    return (1 - momentum) * running + momentum * batch
