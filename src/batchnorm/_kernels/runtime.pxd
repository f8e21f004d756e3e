"""What every kernel module shares: the rows of the tables, and how many threads a call may start."""

# Statistics of a channel, one column per channel. The mean is a pair, `mean + mean_low`; m2 is Σ(x − μ)².
cpdef enum:
    MEAN
    MEAN_LOW
    M2
    VAR
    RSTD
    GAMMA
    BETA
    STATISTICS_ROWS

# Gradients of a channel. The upstream ones are the caller's, of the mean and the variance that `forward` returned.
cpdef enum:
    SUM_DY
    SUM_DY_XMU
    DGAMMA
    DMEAN
    DVAR
    UPSTREAM_DMEAN
    UPSTREAM_DVAR
    GRADIENT_ROWS

# What y and dx are calculated with, per channel; REST is that of the mean, mean − centre.
cpdef enum:
    CENTRE
    SCALE
    SHIFT
    SLOPE
    OFFSET
    REST
    COEFFICIENT_ROWS

# What dx is made of besides the direct path, as bits.
cpdef enum:
    THROUGH_MEAN = 1
    THROUGH_VARIANCE = 2
    UPSTREAM = 4

# How a packet of moments begins, which one rank sends to another; mean, mean_low and m2 of each channel follow.
# A packet of sums has the status alone, and then its rows.
cpdef enum:
    STATUS
    VALUES
    WEIGHT
    SQUARES
    HEAD

cdef int team_size(int num_threads) noexcept nogil
