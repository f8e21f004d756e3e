# ---- Formula, values: each line of the mathematics, once -------------------------------------------------------------
# The names are those of docs/derivation.md. A `number` is a vector of the data's type or, if that would lose digits, of
# float64. Nothing here knows about layouts.

ctypedef fused number:
    vec
    wide

cdef enum:
    COEFFICIENTS = REST     # those that are applied to values

cdef struct Values:                 # where the sums read
    const stored *x
    const stored *dy
    const unsigned char *mask       # whether each value counts, or NULL if all do


cdef inline Py_ssize_t size_of(number like) noexcept nogil:
    """The number of values in a vector."""
    return VEC if number is vec else PART


cdef inline number load(const stored *p, Py_ssize_t count, number fill) noexcept nogil:
    """`count` values, followed by those of `fill` if they are fewer than a vector."""
    if number is vec:
        return load_vec(p) if count == VEC else load_first(p, count, fill)
    else:
        return load_wide(p) if count == PART else load_first_wide(p, count, fill)


cdef inline void write(stored *p, number v, Py_ssize_t count) noexcept nogil:
    if number is wide:
        store_wide(p, v, count)
    elif count == VEC:
        store_vec(p, v)
    else:
        store_first(p, v, count)


cdef inline number column_at(const real *p, number like) noexcept nogil:
    """The numbers of the columns of a vector."""
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


cdef inline number everywhere(real value, number like) noexcept nogil:
    """The same for a number that is not NaN."""
    if number is vec:
        return everywhere_vec(value)
    else:
        return everywhere_wide(value)


cdef inline number at_most(number a, number b, number then, number otherwise) noexcept nogil:
    """`then` in the lanes where a <= b, else `otherwise`."""
    if number is vec:
        return at_most_vec(a, b, then, otherwise)
    else:
        return at_most_wide(a, b, then, otherwise)


cdef inline number counted(const unsigned char *counts, number v, number otherwise) noexcept nogil:
    """v in the lanes that count, else `otherwise`."""
    if number is vec:
        return counted_vec(counts, v, otherwise)
    else:
        return counted_wide(counts, v, otherwise)


cdef inline unsigned at_most_bits(number a, number b) noexcept nogil:
    """One bit per lane: whether a <= b."""
    if number is vec:
        return at_most_bits_vec(a, b)
    else:
        return at_most_bits_wide(a, b)


cdef inline number rounded(number v) noexcept nogil:
    """The values rounded to the data's type."""
    if number is vec:
        return v
    else:
        return first_part(narrowed(v))


cdef inline number tree(number *row, Py_ssize_t rows) noexcept nogil:
    """Sum of 8, 4, 2 or 1 vectors by halving: few successive roundings, and none for equal values."""
    if rows == 8:
        row[0] += row[4]
        row[1] += row[5]
        row[2] += row[6]
        row[3] += row[7]
    if rows >= 4:
        row[0] += row[2]
        row[1] += row[3]
    return row[0] + row[1] if rows >= 2 else row[0]


cdef inline void summands(Values at, bint gradient, const Activation *act, Py_ssize_t count, const number *k,
                          number *a, number *a_d) noexcept nogil:
    """The terms of the sums, a and a·d with d = x − pivot: a is d itself for the moments, dy·act′ for the gradient."""
    cdef number d, none = same(0, k[CENTRE]), value = load(at.x, count, k[CENTRE])
    if at.mask != NULL:
        value = counted(at.mask, value, k[CENTRE])
    d = value - k[CENTRE]
    a[0] = load(at.dy, count, none) if gradient else d
    if at.mask != NULL and gradient:
        a[0] = counted(at.mask, a[0], none)
    if act != NULL:
        a[0] = passed(a[0], written(value, k, act), act)
    a_d[0] = a[0] * d


cdef inline number y_of(number x, const number *k) noexcept nogil:
    """y = (x − centre)·scale + shift, with scale = gamma·rstd and shift = beta − (mean − centre)·scale."""
    return (x - k[CENTRE]) * k[SCALE] + k[SHIFT]


cdef inline number written(number x, const number *k, const Activation *act) noexcept nogil:
    """y before the activation, with every rounding of the forward pass: it decides where the activation is closed."""
    cdef vec own[SHIFT + 1]
    if number is wide and act.in_steps:
        own[CENTRE], own[SCALE], own[SHIFT] = narrowed(k[CENTRE]), narrowed(k[SCALE]), narrowed(k[SHIFT])
        return first_part(y_of(narrowed(x), own))
    return rounded(y_of(x, k))


cdef inline number activated(number pre, const Activation *act) noexcept nogil:
    """act(pre): slope·pre or low where pre <= low, high where pre >= high. NaN stays."""
    cdef number low = everywhere(act.low, pre), high = everywhere(act.high, pre)
    cdef number y = at_most(pre, low, everywhere(act.slope, pre) * pre if act.leaky else low, pre)
    return at_most(high, pre, high, y) if act.bounded else y


cdef inline number passed(number dy, number pre, const Activation *act) noexcept nogil:
    """dy·act′(pre): act′ is slope or 0 where pre <= low, 0 where pre >= high, else 1."""
    cdef number none = everywhere(0, pre)
    cdef number below = rounded(everywhere(act.slope, pre) * dy) if act.leaky else none
    cdef number g = at_most(pre, everywhere(act.low, pre), below, dy)
    return at_most(everywhere(act.high, pre), pre, none, g) if act.bounded else g


cdef inline bint is_relu(const Activation *act) noexcept nogil:
    """Whether the activation has loops of its own: ReLU, or another that only has a lower bound."""
    return TRAINS and not act.leaky and not act.bounded


cdef inline Activation as_relu(Activation act) noexcept nogil:
    """The same with literals, so that the loops for ReLU are compiled without the questions of the others."""
    act.leaky = act.bounded = False
    return act


cdef inline real weighted(real x, real pivot, real weight) noexcept nogil:
    """The term that replaces x − pivot if x has a weight."""
    return weight * (x - pivot)


cdef inline number through_of(number x, const number *k) noexcept nogil:
    """The paths through the statistics: slope = 2·dvar/n, offset = dmean/n − (mean − centre)·slope."""
    return (x - k[CENTRE]) * k[SLOPE] + k[OFFSET]


cdef inline number weighted_through_of(number x, number weight, const number *k) noexcept nogil:
    """weight·through, which is 0 for a weight of 0, however far x is from the mean."""
    return (x - k[CENTRE]) * (weight * k[SLOPE]) + weight * k[OFFSET]


cdef inline number dx_of(number dy, number through, const number *k) noexcept nogil:
    """dx = dy·scale + through"""
    return dy * k[SCALE] + through


cdef inline double centre_of(double mean, double var) noexcept nogil:
    """The mean to about 1/64 of a standard deviation, as a value of the data's type."""
    return <real> few_bits(mean, 7e13 * sqrt(var))
