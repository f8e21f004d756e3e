# ---- Formula, values: each line of the mathematics, once -------------------------------------------------------------
# The names are those of docs/derivation.md. A `number` is a vector of the data's type or, where that would lose digits,
# of float64. Nothing here knows a layout.

ctypedef fused number:
    vec
    wide


cdef inline Py_ssize_t size_of(number like) noexcept nogil:
    """Values in a vector."""
    return VEC if number is vec else PART


cdef inline number load(const stored *p, Py_ssize_t count, number fill) noexcept nogil:
    """`count` values, and those of `fill` after them where they are less than a vector."""
    if number is vec:
        return load_vec(p) if count == VEC else load_first(p, count, fill)
    else:
        return load_wide(p) if count == PART else load_first_wide(p, count, fill)


cdef inline number column_at(const real *p, number like) noexcept nogil:
    """A number for each column of a vector."""
    if number is vec:
        return load_column(p)
    else:
        return load_wide_column(p)


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


cdef inline void summands(const stored *x, const stored *dy, bint gradient, Py_ssize_t count, number pivot, number *a,
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


cdef inline double centre_of(double mean, double var) noexcept nogil:
    """The mean to about 1/64 of a standard deviation, as a value of the data's type."""
    return <real> few_bits(mean, 7e13 * sqrt(var))
