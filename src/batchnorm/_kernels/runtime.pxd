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

# Gradients of a channel. The caller gives the upstream ones, with respect to the mean and variance from `forward`.
cpdef enum:
    SUM_DY
    SUM_DY_XMU
    DGAMMA
    DMEAN
    DVAR
    UPSTREAM_DMEAN
    UPSTREAM_DVAR
    GRADIENT_ROWS

# The coefficients of y and dx, per channel; REST is mean − centre. Those before REST are there twice: from OWN on, in
# the data's type.
cpdef enum:
    CENTRE
    SCALE
    SHIFT
    SLOPE
    OFFSET
    REST
    OWN
    COEFFICIENT_ROWS = 11   # OWN + REST

# The parts of dx besides the direct path, as bits.
cpdef enum:
    THROUGH_MEAN = 1
    THROUGH_VARIANCE = 2
    UPSTREAM = 4

# The head of a packet of moments, which one rank sends to another; mean, mean_low and m2 of each channel follow.
# A packet of sums has only the status before its rows.
cpdef enum:
    STATUS
    VALUES
    WEIGHT
    SQUARES
    HEAD

cdef int team_size(int num_threads) noexcept nogil
