"""All arithmetic that must be fast, once for both dtypes and once for each layout.

Decisions, and why:

a) One view. Any array is (N, C, S): N the product of the dimensions before the channel axis, S of those after.
   Two families of row kernels serve it. *Lanes* run along a long row of S values of one channel, with LANES
   accumulators carried over the rows. *Columns* run down a block of rows with one accumulator for every column;
   a column is a channel when S = 1, one of S columns of a channel when rows are short, and one of G copies of the
   channels when channels are few. The columns of a channel are added up at the end of the block.
b) One partition. `lay_out` cuts the view into tiles of whole channels and each tile into blocks of rows, from the
   shape, the item size and the pass alone. Sums inside a block have a fixed order, blocks are merged by a fixed
   tree. Threads only decide who computes a block, so the bits do not depend on them. Nor on the processor: nothing
   is reassociated or contracted, and the number of lanes is fixed, whatever the width of a register.
c) float64 inside. A float32 value is widened when read and the result rounded once when written. Statistics are
   shifted by a pivot, the mean of a few values of the block itself, so that a block loses no digits to the size of
   the mean; float64 input, which has no wider type, is shifted once more by the mean of the block. Blocks are
   merged by Chan's rule (Chan, Golub, LeVeque 1983). Never E[x²] − E[x]².
d) Pairs, high + low, where one float64 has too few digits. The mean is one, or data near a large mean would lose its
   last digits. For float64 input so are all sums, from pieces of values short enough that plain addition does no
   harm, and everything between the passes. y and dx are formed with coefficients whose high parts an error of the
   statistics does not reach, so parts of a batch with merged statistics give what the whole gives.
e) Steps are separate: reduce → finish → apply. `sweep` runs the three tile by tile when a tile stays in cache,
   and one after the other over all blocks when there are too few tiles to share among threads. A step that sums
   nothing follows the memory, row by row. A pass over more memory than a cache holds writes its result around it.
f) `each` has the only parallel loop. With one thread it is an ordinary loop that never enters OpenMP.
g) Loops work on pointers that `call` gets through the buffer protocol, of which a typed memoryview is made. The
   object around a memoryview costs 65 ns an argument, and every call has five of them.
"""
from cpython.buffer cimport PyBUF_STRIDED, PyBUF_STRIDED_RO, PyBuffer_Release, PyObject_GetBuffer
from cython.parallel import prange
from libc.math cimport sqrt
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cdef extern from "_vector.h" nogil:
    enum:
        LANES                       # accumulators along a row, on every processor
        VEC                         # float64 values in a vector: 8, 4 or 2
        VECS                        # vectors that hold the lanes
        UNROLLED                    # rows of columns taken together
        PADDED                      # UNROLLED vectors
        WIDEST                      # the most columns of a tile, which tiles of short rows have
        PIECE                       # bytes of a store around the cache
        CAN_STREAM                  # whether there are stores around the cache
    ctypedef struct Columns:
        double *of
    ctypedef double vec             # VEC of them; Cython only has to know that it can calculate with it
    vec load_float(const float *) noexcept
    vec load_double(const double *) noexcept
    void store_float(float *, vec) noexcept
    void store_double(double *, vec) noexcept
    Py_ssize_t to_piece(const void *) noexcept
    void stream_float(float *, vec) noexcept
    void stream_double(double *, vec) noexcept
    void finish_streaming() noexcept
    vec zero_vec() noexcept
    void prefetch(const void *) noexcept
    double fold_vec(vec) noexcept
    double two_sum(double, double, double *) noexcept           # a pair: the result and what rounding left over
    double two_product(double, double, double *) noexcept
    vec two_sum_vec(vec, vec, vec *) noexcept
    vec two_product_vec(vec, vec, vec *) noexcept
    vec leading_vec(vec) noexcept
    vec broadcast(double) noexcept
    double leading(double) noexcept
    const double COUNTED[]             # 0 for the lanes before the last `rest` and 1 for those, at COUNTED + rest

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    static int openmp_version(void) { return _OPENMP; }
    static int usable_processors(void)
    {
        int place, processors = 0;
        for (place = 0; place < omp_get_num_places(); place++) processors += omp_get_place_num_procs(place);
        return processors ? processors : omp_get_num_procs();
    }
    #else
    static int omp_get_max_threads(void) { return 1; }
    static int openmp_version(void) { return 0; }
    static int usable_processors(void) { return 1; }
    #endif
    """
    int omp_get_max_threads() noexcept nogil
    int usable_processors() noexcept nogil
    int openmp_version() noexcept nogil

# OpenMP's threads do not exist in a forked child, where a team, or the end of a thread that had one, would wait for
# them for ever. So the team of a thread that forks is sent home before, where OpenMP can do that (since 5.0, hence
# looked up and not linked), and the child, of whatever kind of fork, is serial. A server that forks workers before it
# has used threads does not make them serial.
cdef extern from *:
    """
    static volatile int is_forked = 0;
    static int had_team = 0;
    static void note_team(void) { __atomic_store_n(&had_team, 1, __ATOMIC_RELAXED); }
    #if defined(__unix__) || defined(__APPLE__)
    #include <dlfcn.h>
    #include <pthread.h>
    static int (*pause_openmp)(int) = NULL;
    static void dismiss_team(void) { if (pause_openmp) pause_openmp(1); }       /* omp_pause_soft */
    static void note_fork(void) { is_forked |= had_team || !pause_openmp; }
    static int dismisses_teams(void) { return pause_openmp != NULL; }
    static const char *openmp_file(void)
    {
        Dl_info runtime;
        return openmp_version() && dladdr((void *)omp_get_max_threads, &runtime) ? runtime.dli_fname : "";
    }
    static int watch_forks(void)
    {
        Dl_info here;
        void *module = dladdr((void *)note_fork, &here) ? dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD) : NULL;
        if (module) *(void **)&pause_openmp = dlsym(module, "omp_pause_resource_all");
        return pthread_atfork(dismiss_team, NULL, note_fork);
    }
    #else
    static int dismisses_teams(void) { return 0; }
    static const char *openmp_file(void) { return ""; }
    static int watch_forks(void) { return 0; }
    #endif
    """
    bint is_forked
    void note_team() noexcept nogil
    int watch_forks() noexcept nogil
    bint dismisses_teams() noexcept nogil
    const char *openmp_file() noexcept nogil

ctypedef fused floating:
    float
    double

cdef enum:
    WIDTH = 512             # the most columns of a tile whose columns are channels: accumulators stay in L1
    GROUPED = 256           # columns that few channels are made into
    BLOCK = 8192            # values of a block of lanes
    COLUMN_ROWS = 128       # rows of a block of columns
    SHORT_ROW = 64          # shorter rows are taken as columns
    RUN = 8192              # values of neighbouring short rows of lanes, so that memory is visited in longer runs
    TOGETHER = 32           # the most channels of a tile of lanes
    VISIT = 512             # values of one channel of a tile before those of its neighbour
    PIECE_ROWS = 32         # rows of columns whose sums are added up as pairs; of lanes a piece is a visit
    SHORTEST_RUN = 16       # a row of one channel worth a call of its own where nothing is summed
    FEW = 64                # fewer values of a channel than this do not average out what rounding does to each
    FEW_TILES = 16          # fewer tiles of lanes than this are cut into blocks to be shared
    STREAM = 33554432       # bytes read and written by a pass whose result goes around the cache
    NEAR = 40960            # bytes that stay in a core's nearest cache
    CACHE = 524288          # bytes of a tile that stay in a core's cache between two passes

# Rows of the tables that the façade allocates, one column a channel.
cdef enum:
    MEAN, MEAN_LOW, VAR, RSTD, GAMMA, BETA, SUM_XMU2, SUM_XMU2_LOW, RSTD_LOW, STATISTICS_ROWS

# The upstream gradients are the caller's, of the mean and the variance that `forward` returned.
cdef enum:
    SUM_DY, SUM_DY_LOW, SUM_DY_XMU, SUM_DY_XMU_LOW, DGAMMA, DMEAN, DVAR, UPSTREAM_DMEAN, UPSTREAM_DVAR, GRADIENT_ROWS

# What dx is made of besides the direct path, as bits.
cdef enum:
    THROUGH_MEAN = 1
    THROUGH_VARIANCE = 2
    UPSTREAM = 4

# Rows of the scratch tables: what a block leaves of a channel, and what `apply` needs of it. The low rows, and for the
# gradient SUM_DY_XMU_LOW, are there where sums are pairs.
cdef enum:
    PIVOT, DELTA, M2, DELTA_LOW, M2_LOW

cdef enum:
    CENTRE, SCALE, SLOPE, SHIFT, SCALE_LOW, SHIFT_LOW

cdef struct Job:
    Py_ssize_t N, C, S
    bint columns            # which family
    bint by_tile            # all three steps tile by tile
    bint pairs              # sums keep what rounding leaves over, as float64 needs
    bint exact              # and that of every value, not of pieces only
    bint stream             # the result goes around the cache
    int through             # the paths of the gradient
    double count            # values of a channel that its statistics were made of
    Py_ssize_t tiles, tile_channels
    Py_ssize_t blocks, block_rows, segments, segment
    Py_ssize_t group        # G: rows of columns laid side by side
    double eps
    double *statistics      # [STATISTICS_ROWS][C]
    double *gradients       # [GRADIENT_ROWS][C]
    Py_ssize_t partial_rows, coefficient_rows
    double *partial         # [blocks][partial_rows][C]
    double *coefficient     # [coefficient_rows][C]

cdef struct Block:
    Py_ssize_t channel, channels
    Py_ssize_t first        # offset of its first value
    Py_ssize_t rows, stride
    Py_ssize_t run, length  # values of a row, of one channel and of all
    bint more               # rows of the tile follow after it
    Py_ssize_t visit        # rows of lanes of one channel before those of its neighbour
    Py_ssize_t wide_rows, wide_stride, width        # the same block, `group` rows side by side as one row of columns
    Py_ssize_t rest, rest_rows, rest_width          # and the rows that do not fill a group, as one shorter row


cdef struct Pair:           # high + low
    double high, low

cdef struct Totals:         # two sums of each column, and what their rounding left over
    Columns sum1, low1, sum2, low2

# Of what the rounding is kept: of nothing, of sums of pieces, of every value; or the squares are not even summed.
cdef enum Care:
    NO_SQUARES, NONE, PIECES, EVERY_VALUE


# ---- Pairs: twice the digits of float64 -----------------------------------------------------------------------------

cdef inline Pair pair(double high, double low) noexcept nogil:
    cdef Pair p
    p.high, p.low = high, low
    return p


cdef inline Pair negative(Pair a) noexcept nogil:
    return pair(-a.high, -a.low)


cdef inline Pair settled(double high, double low) noexcept nogil:
    """The pair whose high part is the sum rounded to float64."""
    cdef Pair p
    p.high = two_sum(high, low, &p.low)
    return p


cdef inline Pair add(Pair a, Pair b) noexcept nogil:
    cdef double left_over, total = two_sum(a.high, b.high, &left_over)
    return settled(total, left_over + (a.low + b.low))


cdef inline Pair multiply(Pair a, Pair b) noexcept nogil:
    cdef double left_over, product = two_product(a.high, b.high, &left_over)
    return settled(product, left_over + (a.high * b.low + a.low * b.high))


cdef inline Pair divide(Pair a, double n) noexcept nogil:
    cdef double left_over, quotient = a.high / n, product = two_product(quotient, n, &left_over)
    return settled(quotient, ((a.high - product) - left_over + a.low) / n)


# ---- Partition ------------------------------------------------------------------------------------------------------

cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef void lay_out(Job *job, Py_ssize_t N, Py_ssize_t C, Py_ssize_t S, Py_ssize_t itemsize,
                  Py_ssize_t arrays) noexcept nogil:
    """Cut the view into tiles and blocks. Only the shape, the item size and the pass may be asked here."""
    cdef Py_ssize_t row_blocks, whole
    job.N, job.C, job.S = N, C, S
    job.stream = CAN_STREAM and arrays * N * C * S * itemsize >= STREAM
    job.pairs = itemsize == sizeof(double)
    job.partial_rows, job.coefficient_rows = (M2_LOW + 1, SHIFT_LOW + 1) if job.pairs else (M2 + 1, SHIFT + 1)
    job.exact = job.pairs and N * S < FEW
    job.columns = S < SHORT_ROW
    job.segments, job.segment, job.group = 1, S, 1
    if job.columns:
        job.tiles = ceil_div(C, max(1, (WIDTH if S == 1 else WIDEST) // S))
        job.tile_channels = ceil_div(C, job.tiles)
        if C * S < GROUPED // 2:
            job.group = max(1, min(GROUPED // (C * S), N // UNROLLED))
        row_blocks = ceil_div(N, COLUMN_ROWS * job.group)
        if row_blocks > 2:
            row_blocks = 4 * ceil_div(row_blocks, 4)        # 2 and 4 threads share them evenly
        whole = UNROLLED * job.group
        job.block_rows = whole * ceil_div(ceil_div(N, row_blocks), whole)
        row_blocks = ceil_div(N, job.block_rows)
        job.by_tile = (job.tiles >= 4 and N * job.tile_channels * S * itemsize <= CACHE) or row_blocks * job.tiles == 1
    else:
        job.tile_channels = min(min(TOGETHER, RUN // S), min(C // FEW_TILES, 2 * CACHE // (5 * N * S * itemsize)))
        if arrays == 3 and 2 * N * S * itemsize <= NEAR and N * S >= RUN // 4:
            job.tile_channels = 1       # x and dy are still in the nearest cache when dx is written
        job.tile_channels = max(1, job.tile_channels)
        job.tiles = ceil_div(C, job.tile_channels)
        if S >= BLOCK:
            job.segment = LANES * ceil_div(ceil_div(S, ceil_div(S, BLOCK)), LANES)
            job.segments = ceil_div(S, job.segment)
        job.block_rows = max(1, BLOCK // (2 * S) * 2)
        job.by_tile = C >= FEW_TILES or N * S <= BLOCK
    job.blocks = ceil_div(N, job.block_rows) * job.segments


cdef Py_ssize_t values_before(const Job *job, Py_ssize_t b) noexcept nogil:
    """Values of one channel in the blocks before block `b`."""
    cdef Py_ssize_t row = min(b // job.segments * job.block_rows, job.N)
    cdef Py_ssize_t rows = min(job.block_rows, job.N - row)
    return row * job.S + rows * min(b % job.segments * job.segment, job.S)


cdef Block block_of(const Job *job, Py_ssize_t tile, Py_ssize_t b) noexcept nogil:
    cdef Block block
    cdef Py_ssize_t row = b // job.segments * job.block_rows
    cdef Py_ssize_t start = b % job.segments * job.segment
    block.channel = tile * job.tile_channels
    block.channels = min(job.tile_channels, job.C - block.channel)
    block.rows = min(job.block_rows, job.N - row)
    block.stride = job.C * job.S
    block.more = row + block.rows < job.N
    block.first = row * block.stride + block.channel * job.S + start
    block.run = min(job.segment, job.S - start)
    block.length = block.run * block.channels
    if job.pairs:
        block.visit = max(1, VISIT // block.run)
    else:
        block.visit = block.rows if block.channels == 1 else max(2, VISIT // block.run)
    block.wide_rows = block.rows // job.group
    block.wide_stride = block.stride * job.group
    block.width = block.length * job.group
    block.rest = block.wide_rows * block.wide_stride
    block.rest_width = block.rows % job.group * block.length
    block.rest_rows = 1 if block.rest_width else 0
    return block


# ---- VEC values at once ---------------------------------------------------------------------------------------------

cdef inline vec load(const floating *p) noexcept nogil:
    if floating is float:
        return load_float(p)
    else:
        return load_double(p)


cdef inline void store(floating *p, vec v) noexcept nogil:
    if floating is float:
        store_float(p, v)
    else:
        store_double(p, v)


cdef inline void write(floating *p, vec v, bint stream) noexcept nogil:
    if not stream:
        store(p, v)
    elif floating is float:
        stream_float(p, v)
    else:
        stream_double(p, v)


# ---- Lanes: along the rows of one channel ---------------------------------------------------------------------------
# Where values are summed, those that do not fill the lanes are the end of the last LANES values of the row, those
# already counted multiplied by 0. Rows have at least SHORT_ROW values, and a short last segment has others before it.

cdef inline double fold(vec *lanes) noexcept nogil:
    """Sum of the lanes by halving."""
    cdef Py_ssize_t k, half = VECS // 2
    while half > 0:
        for k in range(half):
            lanes[k] += lanes[k + half]
        half //= 2
    return fold_vec(lanes[0])


cdef inline double fold_pairs(vec *lanes, vec *low, double *total_low) noexcept nogil:
    """The same sum as a pair, whose low part is left in total_low."""
    cdef double value[VEC]
    cdef double value_low[VEC]
    cdef double left_over
    cdef vec left_overs
    cdef Py_ssize_t j, k, half = VECS // 2
    while half > 0:
        for k in range(half):
            lanes[k] = two_sum_vec(lanes[k], lanes[k + half], &left_overs)
            low[k] += low[k + half] + left_overs
        half //= 2
    store_double(value, lanes[0])
    store_double(value_low, low[0])
    half = VEC // 2
    while half > 0:
        for j in range(half):
            value[j] = two_sum(value[j], value[j + half], &left_over)
            value_low[j] += value_low[j + half] + left_over
        half //= 2
    total_low[0] = value_low[0]
    return value[0]


cdef inline void moments_lanes(const floating *x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t length, bint first,
                               bint more, double pivot, vec *lanes1, vec *lanes2, bint squares) noexcept nogil:
    """Add Σ(x − pivot) and, if wanted, Σ(x − pivot)² to the lanes, which begin at 0 with the first rows."""
    cdef vec s1[VECS]
    cdef vec s2[VECS]
    cdef vec d
    cdef vec quad[4]
    cdef const double *counted = COUNTED + length % LANES
    cdef Py_ssize_t r, i, k, q, at, ahead, whole = length - length % LANES
    cdef Py_ssize_t untouched = (LANES - length % LANES) // VEC     # vectors without a rest
    for k in range(VECS):
        s1[k] = zero_vec() if first else lanes1[k]
        s2[k] = zero_vec() if first else lanes2[k]
    for r in range(rows):
        ahead = stride if more or r + 1 < rows else 0       # the next row, if there is one
        at = 0
        if floating is double:              # four at a time, so that equal values add up without rounding
            while whole - at >= 4 * LANES:
                if ahead:
                    for q in range(8):
                        prefetch(x + ahead + at + q * (LANES // 2))
                for k in range(VECS):
                    for q in range(4):
                        quad[q] = load(x + at + q * LANES + k * VEC) - pivot
                    s1[k] += (quad[0] + quad[1]) + (quad[2] + quad[3])
                    if squares:
                        s2[k] += (quad[0] * quad[0] + quad[1] * quad[1]) + (quad[2] * quad[2] + quad[3] * quad[3])
                at += 4 * LANES
        for i from at <= i < whole by LANES:
            if ahead:
                prefetch(x + ahead + i)
                prefetch(x + ahead + i + LANES // 2)
            for k in range(VECS):
                d = load(x + i + k * VEC) - pivot
                s1[k] += d
                if squares:
                    s2[k] += d * d
        for k in range(VECS):
            if k >= untouched:
                d = (load(x + length - LANES + k * VEC) - pivot) * load_double(counted + k * VEC)
                s1[k] += d
                if squares:
                    s2[k] += d * d
        x += stride
    for k in range(VECS):
        lanes1[k], lanes2[k] = s1[k], s2[k]


cdef void grad_sums_lanes(const floating *dy, const floating *x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t length,
                          bint first, bint more, double mean, vec *lanes1, vec *lanes2) noexcept nogil:
    """Add Σ dy and Σ dy·(x − mean) to the lanes, which begin at 0 with the first rows."""
    cdef vec s1[VECS]
    cdef vec s2[VECS]
    cdef vec g
    cdef const double *counted = COUNTED + length % LANES
    cdef Py_ssize_t r, i, k, ahead, whole = length - length % LANES
    cdef Py_ssize_t untouched = (LANES - length % LANES) // VEC     # vectors without a rest
    for k in range(VECS):
        s1[k] = zero_vec() if first else lanes1[k]
        s2[k] = zero_vec() if first else lanes2[k]
    for r in range(rows):
        ahead = stride if more or r + 1 < rows else 0       # the next row, if there is one
        for i from 0 <= i < whole by LANES:
            if ahead:
                prefetch(dy + ahead + i)
                prefetch(dy + ahead + i + LANES // 2)
                prefetch(x + ahead + i)
                prefetch(x + ahead + i + LANES // 2)
            for k in range(VECS):
                g = load(dy + i + k * VEC)
                s1[k] += g
                s2[k] += g * (load(x + i + k * VEC) - mean)
        for k in range(VECS):
            if k >= untouched:
                g = load(dy + length - LANES + k * VEC) * load_double(counted + k * VEC)
                s1[k] += g
                s2[k] += g * (load(x + length - LANES + k * VEC) - mean)
        dy += stride
        x += stride
    for k in range(VECS):
        lanes1[k], lanes2[k] = s1[k], s2[k]


# Where values are written, those that do not fill a vector are the end of the last VEC values. These are read before
# the row is written, so that out may be the input, which it never is where the result goes around the cache.

cdef struct Span:
    Py_ssize_t first, stop      # values of a row that go around the cache as vectors; the few others are written singly


cdef inline Span span_of(const floating *out, Py_ssize_t length) noexcept nogil:
    cdef Span span
    span.first = to_piece(out) // sizeof(floating)
    span.stop = length - (length - span.first) % (PIECE // sizeof(floating))
    if span.stop - span.first < VEC:
        span.first = span.stop = 0
    return span


cdef inline vec affine_vec(const floating *x, vec centre, vec scale, vec scale_low, vec shift,
                           vec shift_low) noexcept nogil:
    """(x − centre)·scale + shift; for float64 scale and shift are pairs, and what is small is added up first."""
    cdef vec xmu = load(x) - centre
    if floating is double:
        return (xmu * scale + shift) + (xmu * scale_low + shift_low)
    else:
        return xmu * scale + shift


cdef inline floating affine_value(floating x, double centre, double scale, double scale_low, double shift,
                                  double shift_low) noexcept nogil:
    """`affine_vec` for one value."""
    cdef double xmu = x - centre
    if floating is double:
        return (xmu * scale + shift) + (xmu * scale_low + shift_low)
    else:
        return <floating> (xmu * scale + shift)


cdef void affine_values(const floating *x, floating *y, Py_ssize_t first, Py_ssize_t stop, double centre,
                        double scale, double scale_low, double shift, double shift_low) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(first, stop):
        y[i] = affine_value(x[i], centre, scale, scale_low, shift, shift_low)


cdef inline void affine_span(const floating *x, floating *y, Py_ssize_t first, Py_ssize_t stop, double centre,
                             double scale, double scale_low, double shift, double shift_low,
                             bint stream) noexcept nogil:
    cdef Py_ssize_t i, last = stop - VEC
    cdef vec c = broadcast(centre), high = broadcast(scale), low = broadcast(scale_low), s = broadcast(shift)
    cdef vec t = broadcast(shift_low)
    cdef vec end = affine_vec(x + last, c, high, low, s, t)
    for i from first <= i < last by VEC:
        write(y + i, affine_vec(x + i, c, high, low, s, t), stream)
    write(y + last, end, stream)


cdef void affine_around(const floating *x, floating *y, Py_ssize_t length, double centre, double scale,
                        double scale_low, double shift, double shift_low) noexcept nogil:
    cdef Span span = span_of(y, length)
    affine_values(x, y, 0, span.first, centre, scale, scale_low, shift, shift_low)
    if span.stop:
        affine_span(x, y, span.first, span.stop, centre, scale, scale_low, shift, shift_low, True)
    affine_values(x, y, span.stop, length, centre, scale, scale_low, shift, shift_low)


cdef void affine_lanes(const floating *x, floating *y, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t length,
                       double centre, double scale, double scale_low, double shift, double shift_low,
                       bint stream) noexcept nogil:
    """y = (x − centre)·scale + shift."""
    cdef Py_ssize_t _
    for _ in range(rows):
        if stream:
            affine_around(x, y, length, centre, scale, scale_low, shift, shift_low)
        elif length < VEC:
            affine_values(x, y, 0, length, centre, scale, scale_low, shift, shift_low)
        else:
            affine_span(x, y, 0, length, centre, scale, scale_low, shift, shift_low, False)
        x += stride
        y += stride


cdef inline vec grad_affine_vec(const floating *dy, const floating *x, vec centre, vec scale, vec scale_low, vec slope,
                                vec shift) noexcept nogil:
    """dy·scale + (x − centre)·slope + shift; for float32, whose sums have digits to spare, the shift has the centre."""
    cdef vec g = load(dy)
    if floating is double:
        return g * scale + ((load(x) - centre) * slope + (g * scale_low + shift))
    else:
        return g * scale + load(x) * slope + shift


cdef inline floating grad_affine_value(floating dy, floating x, double centre, double scale, double scale_low,
                                       double slope, double shift) noexcept nogil:
    """`grad_affine_vec` for one value."""
    if floating is double:
        return dy * scale + ((x - centre) * slope + (dy * scale_low + shift))
    else:
        return <floating> (dy * scale + x * slope + shift)


cdef void grad_affine_values(const floating *dy, const floating *x, floating *dx, Py_ssize_t first, Py_ssize_t stop,
                             double centre, double scale, double scale_low, double slope,
                             double shift) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(first, stop):
        dx[i] = grad_affine_value(dy[i], x[i], centre, scale, scale_low, slope, shift)


cdef inline void grad_affine_span(const floating *dy, const floating *x, floating *dx, Py_ssize_t first,
                                  Py_ssize_t stop, double centre, double scale, double scale_low, double slope,
                                  double shift, bint stream) noexcept nogil:
    cdef Py_ssize_t i, last = stop - VEC
    cdef vec c = broadcast(centre), high = broadcast(scale), low = broadcast(scale_low)
    cdef vec m = broadcast(slope), s = broadcast(shift)
    cdef vec end = grad_affine_vec(dy + last, x + last, c, high, low, m, s)
    for i from first <= i < last by VEC:
        write(dx + i, grad_affine_vec(dy + i, x + i, c, high, low, m, s), stream)
    write(dx + last, end, stream)


cdef void grad_affine_around(const floating *dy, const floating *x, floating *dx, Py_ssize_t length, double centre,
                             double scale, double scale_low, double slope, double shift) noexcept nogil:
    cdef Span span = span_of(dx, length)
    grad_affine_values(dy, x, dx, 0, span.first, centre, scale, scale_low, slope, shift)
    if span.stop:
        grad_affine_span(dy, x, dx, span.first, span.stop, centre, scale, scale_low, slope, shift, True)
    grad_affine_values(dy, x, dx, span.stop, length, centre, scale, scale_low, slope, shift)


cdef void grad_affine_lanes(const floating *dy, const floating *x, floating *dx, Py_ssize_t rows, Py_ssize_t stride,
                            Py_ssize_t length, double centre, double scale, double scale_low, double slope,
                            double shift, bint stream) noexcept nogil:
    """dx = dy·scale + (x − centre)·slope + shift; for float32 the centre is 0."""
    cdef Py_ssize_t _
    for _ in range(rows):
        if stream:
            grad_affine_around(dy, x, dx, length, centre, scale, scale_low, slope, shift)
        elif length < VEC:
            grad_affine_values(dy, x, dx, 0, length, centre, scale, scale_low, slope, shift)
        else:
            grad_affine_span(dy, x, dx, 0, length, centre, scale, scale_low, slope, shift, False)
        dy += stride
        x += stride
        dx += stride


# ---- Columns: down the rows of neighbouring channels ----------------------------------------------------------------

# Sums of columns have room for a whole vector at the end; columns that do not fill it are read through a padded copy.

cdef inline vec fold_rows(const vec *row) noexcept nogil:
    """Sum of UNROLLED rows by halving: fewer roundings after each other, and fewer additions that wait for another."""
    return ((row[0] + row[4]) + (row[2] + row[6])) + ((row[1] + row[5]) + (row[3] + row[7]))


cdef inline void add_to(double *total, vec v) noexcept nogil:
    store_double(total, load_double(total) + v)


cdef inline void add_pair_to(double *total, double *low, vec v, vec v_low) noexcept nogil:
    cdef vec left_over
    store_double(total, two_sum_vec(load_double(total), v, &left_over))
    add_to(low, left_over + v_low)


cdef inline void add_deviation(double *sum1, double *low1, double *sum2, double *low2, vec d,
                               vec d_low) noexcept nogil:
    """Add d + d_low and its square to pairs, with all their digits."""
    cdef vec high = leading_vec(d)
    cdef vec rest = d - high
    add_pair_to(sum1, low1, d, d_low)
    add_pair_to(sum2, low2, high * high, (d + high) * rest + (d + d) * d_low)


cdef inline void moments_rows(const floating *x, Py_ssize_t rows, Py_ssize_t stride, const double *pivot,
                              double *sum1, double *low1, double *sum2, double *low2, Care care) noexcept nogil:
    """`moments_columns` for VEC columns and at most UNROLLED rows."""
    cdef vec p = load_double(pivot)
    cdef vec d[UNROLLED]
    cdef vec square[UNROLLED]
    cdef vec left_over
    cdef Py_ssize_t r
    if care == EVERY_VALUE:
        for r in range(rows):
            d[0] = two_sum_vec(load(x + r * stride), -p, &left_over)
            add_deviation(sum1, low1, sum2, low2, d[0], left_over)
    elif rows == UNROLLED:
        for r in range(UNROLLED):
            d[r] = load(x + r * stride) - p
            square[r] = d[r] * d[r]
        add_to(sum1, fold_rows(d))
        if care != NO_SQUARES:
            add_to(sum2, fold_rows(square))
    else:
        for r in range(rows):
            d[0] = load(x + r * stride) - p
            add_to(sum1, d[0])
            if care != NO_SQUARES:
                add_to(sum2, d[0] * d[0])


cdef inline void grad_sums_rows(const floating *dy, const floating *x, Py_ssize_t rows, Py_ssize_t stride,
                                const double *mean, double *sum1, double *low1, double *sum2, double *low2,
                                Care care) noexcept nogil:
    """`grad_sums_columns` for VEC columns and at most UNROLLED rows."""
    cdef vec m = load_double(mean)
    cdef vec g[UNROLLED]
    cdef vec product[UNROLLED]
    cdef vec d, d_low, left_over
    cdef Py_ssize_t r
    if care == EVERY_VALUE:
        for r in range(rows):
            g[0] = load(dy + r * stride)
            d = two_sum_vec(load(x + r * stride), -m, &d_low)
            product[0] = two_product_vec(g[0], d, &left_over)
            add_pair_to(sum1, low1, g[0], zero_vec())
            add_pair_to(sum2, low2, product[0], left_over + g[0] * d_low)
    elif rows == UNROLLED:
        for r in range(UNROLLED):
            g[r] = load(dy + r * stride)
            product[r] = g[r] * (load(x + r * stride) - m)
        add_to(sum1, fold_rows(g))
        add_to(sum2, fold_rows(product))
    else:
        for r in range(rows):
            g[0] = load(dy + r * stride)
            product[0] = g[0] * (load(x + r * stride) - m)
            add_to(sum1, g[0])
            add_to(sum2, product[0])


cdef inline void pad(const floating *x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t width,
                     floating *padded) noexcept nogil:
    """Fewer than VEC columns of at most UNROLLED rows, each followed by zeros."""
    cdef Py_ssize_t r, j
    for r in range(rows):
        for j in range(VEC):
            padded[r * VEC + j] = x[r * stride + j] if j < width else 0


cdef inline Py_ssize_t rows_ahead(Py_ssize_t width) noexcept nogil:
    """How far ahead to fetch when rows follow each other in memory: about 1000 values, at least the next rows."""
    return UNROLLED * (1 + 128 // (width + 1))


cdef inline void fetch_rows(const floating *row, Py_ssize_t stride) noexcept nogil:
    """Ask for a cache line of each of UNROLLED rows: eight streams at once are more than the processor foresees."""
    cdef Py_ssize_t r
    for r in range(UNROLLED):
        prefetch(row + r * stride)


cdef inline void moments_columns(const floating *x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t width,
                                 const double *pivot, Totals *to, Care care) noexcept nogil:
    """Add Σ(x − pivot) and Σ(x − pivot)² of each column."""
    cdef floating padded[PADDED]
    cdef double padded_pivot[VEC]
    cdef Py_ssize_t j, taken, whole = width - width % VEC
    cdef Py_ssize_t ahead = rows_ahead(width) * stride
    while rows > 0:
        taken = min(rows, UNROLLED)
        for j from 0 <= j < whole by VEC:
            if stride == width and j % 16 == 0:
                fetch_rows(x + ahead + j, stride)
            moments_rows(x + j, taken, stride, pivot + j, to.sum1.of + j, to.low1.of + j, to.sum2.of + j,
                         to.low2.of + j, care)
        if whole < width:
            pad(x + whole, taken, stride, width - whole, padded)
            pad(pivot + whole, 1, 0, width - whole, padded_pivot)       # so that nothing is added beyond the columns
            moments_rows(padded, taken, VEC, padded_pivot, to.sum1.of + whole, to.low1.of + whole,
                         to.sum2.of + whole, to.low2.of + whole, care)
        x += taken * stride
        rows -= taken


cdef inline void grad_sums_columns(const floating *dy, const floating *x, Py_ssize_t rows, Py_ssize_t stride,
                                   Py_ssize_t width, const double *mean, Totals *to, Care care) noexcept nogil:
    """Add Σ dy and Σ dy·(x − mean) of each column."""
    cdef floating padded_dy[PADDED]
    cdef floating padded[PADDED]
    cdef Py_ssize_t j, taken, whole = width - width % VEC
    cdef Py_ssize_t ahead = rows_ahead(width) * stride
    while rows > 0:
        taken = min(rows, UNROLLED)
        for j from 0 <= j < whole by VEC:
            if stride == width and j % 16 == 0:
                fetch_rows(x + ahead + j, stride)
                fetch_rows(dy + ahead + j, stride)
            grad_sums_rows(dy + j, x + j, taken, stride, mean + j, to.sum1.of + j, to.low1.of + j, to.sum2.of + j,
                           to.low2.of + j, care)
        if whole < width:
            pad(dy + whole, taken, stride, width - whole, padded_dy)
            pad(x + whole, taken, stride, width - whole, padded)
            grad_sums_rows(padded_dy, padded, taken, VEC, mean + whole, to.sum1.of + whole, to.low1.of + whole,
                           to.sum2.of + whole, to.low2.of + whole, care)
        dy += taken * stride
        x += taken * stride
        rows -= taken


cdef struct Coefficients:       # of each column
    Columns centre, scale, scale_low, slope, shift, shift_low


cdef inline vec affine_columns_vec(const floating *x, Py_ssize_t j, const Coefficients *of) noexcept nogil:
    return affine_vec(x + j, load_double(of.centre.of + j), load_double(of.scale.of + j),
                      load_double(of.scale_low.of + j), load_double(of.shift.of + j),
                      load_double(of.shift_low.of + j))


cdef void affine_column_values(const floating *x, floating *y, Py_ssize_t first, Py_ssize_t stop,
                               const Coefficients *of) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(first, stop):
        y[j] = affine_value(x[j], of.centre.of[j], of.scale.of[j], of.scale_low.of[j], of.shift.of[j],
                            of.shift_low.of[j])


cdef inline void affine_columns_span(const floating *x, floating *y, Py_ssize_t first, Py_ssize_t stop,
                                     const Coefficients *of, bint stream) noexcept nogil:
    cdef Py_ssize_t j, last = stop - VEC
    cdef vec end = affine_columns_vec(x, last, of)
    for j from first <= j < last by VEC:
        write(y + j, affine_columns_vec(x, j, of), stream)
    write(y + last, end, stream)


cdef void affine_columns_around(const floating *x, floating *y, Py_ssize_t width,
                                const Coefficients *of) noexcept nogil:
    cdef Span span = span_of(y, width)
    affine_column_values(x, y, 0, span.first, of)
    if span.stop:
        affine_columns_span(x, y, span.first, span.stop, of, True)
    affine_column_values(x, y, span.stop, width, of)


cdef void affine_columns(const floating *x, floating *y, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t width,
                         const Coefficients *of, bint stream) noexcept nogil:
    """`affine_lanes` with the coefficients of each column."""
    cdef Py_ssize_t _
    for _ in range(rows):
        if stream:
            affine_columns_around(x, y, width, of)
        elif width < VEC:
            affine_column_values(x, y, 0, width, of)
        else:
            affine_columns_span(x, y, 0, width, of, False)
        x += stride
        y += stride


cdef inline vec grad_affine_columns_vec(const floating *dy, const floating *x, Py_ssize_t j,
                                        const Coefficients *of) noexcept nogil:
    return grad_affine_vec(dy + j, x + j, load_double(of.centre.of + j), load_double(of.scale.of + j),
                           load_double(of.scale_low.of + j), load_double(of.slope.of + j),
                           load_double(of.shift.of + j))


cdef void grad_affine_column_values(const floating *dy, const floating *x, floating *dx, Py_ssize_t first,
                                    Py_ssize_t stop, const Coefficients *of) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(first, stop):
        dx[j] = grad_affine_value(dy[j], x[j], of.centre.of[j], of.scale.of[j], of.scale_low.of[j], of.slope.of[j],
                                  of.shift.of[j])


cdef inline void grad_affine_columns_span(const floating *dy, const floating *x, floating *dx, Py_ssize_t first,
                                          Py_ssize_t stop, const Coefficients *of, bint stream) noexcept nogil:
    cdef Py_ssize_t j, last = stop - VEC
    cdef vec end = grad_affine_columns_vec(dy, x, last, of)
    for j from first <= j < last by VEC:
        write(dx + j, grad_affine_columns_vec(dy, x, j, of), stream)
    write(dx + last, end, stream)


cdef void grad_affine_columns_around(const floating *dy, const floating *x, floating *dx, Py_ssize_t width,
                                     const Coefficients *of) noexcept nogil:
    cdef Span span = span_of(dx, width)
    grad_affine_column_values(dy, x, dx, 0, span.first, of)
    if span.stop:
        grad_affine_columns_span(dy, x, dx, span.first, span.stop, of, True)
    grad_affine_column_values(dy, x, dx, span.stop, width, of)


cdef void grad_affine_columns(const floating *dy, const floating *x, floating *dx, Py_ssize_t rows, Py_ssize_t stride,
                              Py_ssize_t width, const Coefficients *of, bint stream) noexcept nogil:
    """`grad_affine_lanes` with the coefficients of each column."""
    cdef Py_ssize_t _
    for _ in range(rows):
        if stream:
            grad_affine_columns_around(dy, x, dx, width, of)
        elif width < VEC:
            grad_affine_column_values(dy, x, dx, 0, width, of)
        else:
            grad_affine_columns_span(dy, x, dx, 0, width, of, False)
        dy += stride
        x += stride
        dx += stride


cdef void spread(const double *value, const Block *block, const Job *job, double *column) noexcept nogil:
    """The value of each channel at every column of a (grouped) row, and 0 in the room after them."""
    cdef Py_ssize_t c, j
    if job.S == 1:
        memcpy(column, value, block.channels * sizeof(double))
    else:
        for c in range(block.channels):
            for j in range(job.S):
                column[c * job.S + j] = value[c]
    for j in range(block.length, block.width):
        column[j] = column[j - block.length]
    for j in range(block.width, block.width + VEC):
        column[j] = 0


cdef inline void add_columns(double *total, double *total_low, const double *column, const double *low,
                             Py_ssize_t count, bint pairs) noexcept nogil:
    cdef double left_over
    cdef Py_ssize_t j
    for j in range(count):
        if pairs:
            total[j] = two_sum(total[j], column[j], &left_over)
            total_low[j] += low[j] + left_over
        else:
            total[j] += column[j]


cdef void keep(double *restrict piece, double *restrict total, double *restrict low, Py_ssize_t count) noexcept nogil:
    """Add the sums of a piece to pairs, and begin the next."""
    cdef double left_over
    cdef Py_ssize_t j
    for j in range(count):
        total[j] = two_sum(total[j], piece[j], &left_over)
        low[j] += left_over
        piece[j] = 0


cdef inline void gather(double *column, double *low, const Block *block, const Job *job, double *value,
                        double *value_low, bint pairs) noexcept nogil:
    """Add up the columns of each channel, always in the same order; low parts are there for pairs only."""
    cdef double lane[8]
    cdef double lane_low[8]
    cdef Py_ssize_t c, g, i, half, whole = job.S - job.S % 8
    for g in range(1, job.group):
        add_columns(column, low, column + g * block.length, low + g * block.length, block.length, pairs)
    if job.S == 1:
        memcpy(value, column, block.channels * sizeof(double))
        if pairs:
            memcpy(value_low, low, block.channels * sizeof(double))
        return
    for c in range(block.channels):
        memset(lane, 0, sizeof(lane))
        memset(lane_low, 0, sizeof(lane_low))
        for i from 0 <= i < whole by 8:
            add_columns(lane, lane_low, column + i, low + i, 8, pairs)
        add_columns(lane, lane_low, column + whole, low + whole, job.S - whole, pairs)
        half = 4
        while half > 0:
            add_columns(lane, lane_low, lane + half, lane_low + half, half, pairs)
            half //= 2
        value[c] = lane[0]
        if pairs:
            value_low[c] = lane_low[0]
        column += job.S
        low += job.S


# ---- Reduce: what one block tells of its channels -------------------------------------------------------------------

cdef double mean_of_first(const floating *x, Py_ssize_t count) noexcept nogil:
    """Mean of the first values, a power of two of them, so that the mean of equal values is that value."""
    cdef vec lanes[VECS]
    cdef double value[LANES]
    cdef Py_ssize_t j, k, half = LANES
    if count >= LANES:
        for k in range(VECS):
            lanes[k] = load(x + k * VEC)
        while half > VEC:
            half //= 2
            for k in range(half // VEC):
                lanes[k] = 0.5 * lanes[k] + 0.5 * lanes[k + half // VEC]
        store_double(value, lanes[0])
    else:
        while half > count:
            half //= 2
        for j in range(half):
            value[j] = x[j]
    while half > 1:
        half //= 2
        for j in range(half):
            value[j] = 0.5 * value[j] + 0.5 * value[j + half]
    return value[0]


cdef void choose_pivots(const floating *x, const Block *block, double *pivot) noexcept nogil:
    """A value near the mean of each channel of the block, from the block alone.

    The mean of p of n values is within sqrt(n / p) standard deviations of their mean, which bounds the digits that
    the shifted sums can lose whatever the data.
    """
    cdef Py_ssize_t c, step = block.stride
    if block.run > 1:
        for c in range(block.channels):
            pivot[c] = mean_of_first(x + c * block.run, block.run)
    elif block.rows >= 4:
        for c in range(block.channels):
            pivot[c] = ((0.25 * x[c] + 0.25 * x[c + step])
                        + (0.25 * x[c + 2 * step] + 0.25 * x[c + 3 * step]))
    else:
        for c in range(block.channels):
            pivot[c] = x[c]


cdef inline void add_pieces(const floating *x, Py_ssize_t rows, Py_ssize_t stride, Py_ssize_t length, bint first,
                            bint more, double pivot, vec *lanes1, vec *lanes2, vec *low2) noexcept nogil:
    """`moments_lanes` in pieces so short that rounding does not add up, the lanes of squares being pairs."""
    cdef vec piece[VECS]
    cdef vec left_over
    cdef Py_ssize_t k, taken, at = 0
    while at < length:
        taken = VISIT if length - at >= 2 * VISIT else length - at
        if first and at == 0:
            moments_lanes(x, rows, stride, taken, True, more, pivot, lanes1, lanes2, True)
            memset(low2, 0, VECS * sizeof(vec))
        else:
            memset(piece, 0, sizeof(piece))
            moments_lanes(x + at, rows, stride, taken, False, more, pivot, lanes1, piece, True)
            for k in range(VECS):
                lanes2[k] = two_sum_vec(lanes2[k], piece[k], &left_over)
                low2[k] += left_over
        at += taken


cdef inline void sums_of_lanes(const floating *x, const Block *block, const double *pivot, double *sum1, double *sum2,
                               double *low2, Care care) noexcept nogil:
    cdef vec lanes1[TOGETHER * VECS]
    cdef vec lanes2[TOGETHER * VECS]
    cdef vec lanes2_low[TOGETHER * VECS]
    cdef const floating *at
    cdef Py_ssize_t c, r, rows
    cdef bint more
    for r from 0 <= r < block.rows by block.visit:
        more = block.more or r + block.visit < block.rows
        rows = min(block.visit, block.rows - r)
        for c in range(block.channels):
            at = x + r * block.stride + c * block.run
            if care == PIECES:
                add_pieces(at, rows, block.stride, block.run, r == 0, more, pivot[c], lanes1 + c * VECS,
                           lanes2 + c * VECS, lanes2_low + c * VECS)
            else:
                moments_lanes(at, rows, block.stride, block.run, r == 0, more, pivot[c], lanes1 + c * VECS,
                              lanes2 + c * VECS, care == NONE)
    for c in range(block.channels):
        sum1[c] = fold(lanes1 + c * VECS)
        if care == PIECES:
            sum2[c] = fold_pairs(lanes2 + c * VECS, lanes2_low + c * VECS, low2 + c)
        elif care == NONE:
            sum2[c] = fold(lanes2 + c * VECS)


cdef inline void shifted_sums(const floating *x, const Block *block, const Job *job, const double *pivot, double *sum1,
                              double *low1, double *sum2, double *low2, Care care) noexcept nogil:
    """Σ(x − pivot) and Σ(x − pivot)² of each channel of the block."""
    cdef Columns centre, total
    cdef Totals to
    cdef size_t size = (block.width + VEC) * sizeof(double)
    cdef Py_ssize_t r
    if not job.columns:
        sums_of_lanes(x, block, pivot, sum1, sum2, low2, care)
        return
    spread(pivot, block, job, centre.of)
    memset(to.sum1.of, 0, size)
    if care != NO_SQUARES:
        memset(to.sum2.of, 0, size)
    if care == EVERY_VALUE:
        memset(to.low1.of, 0, size)
    if care == PIECES or care == EVERY_VALUE:
        memset(to.low2.of, 0, size)
    if care == PIECES:
        memset(total.of, 0, size)
        for r from 0 <= r < block.wide_rows by PIECE_ROWS:
            moments_columns(x + r * block.wide_stride, min(PIECE_ROWS, block.wide_rows - r), block.wide_stride,
                            block.width, centre.of, &to, care)
            keep(to.sum2.of, total.of, to.low2.of, block.width)
        moments_columns(x + block.rest, block.rest_rows, 0, block.rest_width, centre.of, &to, care)
        keep(to.sum2.of, total.of, to.low2.of, block.rest_width)
        gather(total.of, to.low2.of, block, job, sum2, low2, True)
        gather(to.sum1.of, to.low1.of, block, job, sum1, low1, False)
        return
    moments_columns(x, block.wide_rows, block.wide_stride, block.width, centre.of, &to, care)
    moments_columns(x + block.rest, block.rest_rows, 0, block.rest_width, centre.of, &to, care)
    gather(to.sum1.of, to.low1.of, block, job, sum1, low1, care == EVERY_VALUE)
    if care != NO_SQUARES:
        gather(to.sum2.of, to.low2.of, block, job, sum2, low2, care == EVERY_VALUE)


cdef void about_the_mean(double *restrict sum1, double *restrict low1, double *restrict sum2, double *restrict low2,
                         Py_ssize_t channels, double n) noexcept nogil:
    """The mean from Σd, and Σ(d − mean)² = Σd² − (Σd)²/n, all of them pairs."""
    cdef Pair total, mean, m2
    cdef Py_ssize_t c
    for c in range(channels):
        total = pair(sum1[c], low1[c])
        mean = divide(total, n)
        m2 = add(pair(sum2[c], low2[c]), negative(multiply(total, mean)))
        sum1[c], low1[c] = mean.high, mean.low
        sum2[c] = 0 if m2.high < 0 else m2.high
        low2[c] = 0 if m2.high < 0 else m2.low


cdef void moments_block(const floating *x, const floating *dy, floating *out, const Job *job, Py_ssize_t tile,
                        Py_ssize_t b) noexcept nogil:
    cdef Block block = block_of(job, tile, b)
    cdef double *pivot = job.partial + (b * job.partial_rows + PIVOT) * job.C + block.channel
    cdef double *delta = job.partial + (b * job.partial_rows + DELTA) * job.C + block.channel
    cdef double *delta_low = job.partial + (b * job.partial_rows + DELTA_LOW) * job.C + block.channel
    cdef double *m2 = job.partial + (b * job.partial_rows + M2) * job.C + block.channel
    cdef double *m2_low = job.partial + (b * job.partial_rows + M2_LOW) * job.C + block.channel
    cdef double n = values_before(job, b + 1) - values_before(job, b)
    cdef Py_ssize_t c
    x += block.first
    choose_pivots(x, &block, pivot)
    if floating is double:
        if job.exact:
            shifted_sums(x, &block, job, pivot, delta, delta_low, m2, m2_low, EVERY_VALUE)
        else:                               # no wider type to lean on, so first the mean of the block itself
            shifted_sums(x, &block, job, pivot, delta, delta_low, m2, m2_low, NO_SQUARES)
            for c in range(block.channels):
                pivot[c] += delta[c] / n
                delta_low[c] = 0
            shifted_sums(x, &block, job, pivot, delta, delta_low, m2, m2_low, PIECES)
        about_the_mean(delta, delta_low, m2, m2_low, block.channels, n)
    else:
        shifted_sums(x, &block, job, pivot, delta, delta_low, m2, m2_low, NONE)
        for c in range(block.channels):
            m2[c] -= delta[c] * (delta[c] / n)
            m2[c] = 0 if m2[c] < 0 else m2[c]
            delta[c] /= n


cdef inline void add_grad_pieces(const floating *dy, const floating *x, Py_ssize_t rows, Py_ssize_t stride,
                                 Py_ssize_t length, bint first, bint more, double mean, vec *lanes1, vec *low1,
                                 vec *lanes2, vec *low2) noexcept nogil:
    """`grad_sums_lanes` in pieces so short that rounding does not add up, the lanes being pairs."""
    cdef vec piece1[VECS]
    cdef vec piece2[VECS]
    cdef vec left_over
    cdef Py_ssize_t k, taken, at = 0
    while at < length:
        taken = VISIT if length - at >= 2 * VISIT else length - at
        if first and at == 0:
            grad_sums_lanes(dy, x, rows, stride, taken, True, more, mean, lanes1, lanes2)
            memset(low1, 0, VECS * sizeof(vec))
            memset(low2, 0, VECS * sizeof(vec))
        else:
            grad_sums_lanes(dy + at, x + at, rows, stride, taken, True, more, mean, piece1, piece2)
            for k in range(VECS):
                lanes1[k] = two_sum_vec(lanes1[k], piece1[k], &left_over)
                low1[k] += left_over
                lanes2[k] = two_sum_vec(lanes2[k], piece2[k], &left_over)
                low2[k] += left_over
        at += taken


cdef void grad_sums_block(const floating *x, const floating *dy, floating *out, const Job *job, Py_ssize_t tile,
                          Py_ssize_t b) noexcept nogil:
    cdef Block block = block_of(job, tile, b)
    cdef double *sum1 = job.partial + (b * job.partial_rows + SUM_DY) * job.C + block.channel
    cdef double *low1 = job.partial + (b * job.partial_rows + SUM_DY_LOW) * job.C + block.channel
    cdef double *sum2 = job.partial + (b * job.partial_rows + SUM_DY_XMU) * job.C + block.channel
    cdef double *low2 = job.partial + (b * job.partial_rows + SUM_DY_XMU_LOW) * job.C + block.channel
    cdef const double *mean = job.statistics + MEAN * job.C + block.channel
    x += block.first
    dy += block.first
    if not job.columns:
        grad_sums_of_lanes(dy, x, &block, mean, sum1, low1, sum2, low2)
    elif floating is float:
        grad_sums_of_columns(dy, x, &block, job, mean, sum1, low1, sum2, low2, NONE)
    elif job.exact:
        grad_sums_of_columns(dy, x, &block, job, mean, sum1, low1, sum2, low2, EVERY_VALUE)
    else:
        grad_sums_of_columns(dy, x, &block, job, mean, sum1, low1, sum2, low2, PIECES)


cdef inline void grad_sums_of_lanes(const floating *dy, const floating *x, const Block *block, const double *mean,
                                    double *sum1, double *low1, double *sum2, double *low2) noexcept nogil:
    cdef vec lanes1[TOGETHER * VECS]
    cdef vec lanes2[TOGETHER * VECS]
    cdef vec lanes1_low[TOGETHER * VECS]
    cdef vec lanes2_low[TOGETHER * VECS]
    cdef Py_ssize_t c, r, at, rows
    cdef bint more
    for r from 0 <= r < block.rows by block.visit:
        more = block.more or r + block.visit < block.rows
        rows = min(block.visit, block.rows - r)
        for c in range(block.channels):
            at = r * block.stride + c * block.run
            if floating is double:
                add_grad_pieces(dy + at, x + at, rows, block.stride, block.run, r == 0, more, mean[c],
                                lanes1 + c * VECS, lanes1_low + c * VECS, lanes2 + c * VECS, lanes2_low + c * VECS)
            else:
                grad_sums_lanes(dy + at, x + at, rows, block.stride, block.run, r == 0, more, mean[c],
                                lanes1 + c * VECS, lanes2 + c * VECS)
    for c in range(block.channels):
        if floating is double:
            sum1[c] = fold_pairs(lanes1 + c * VECS, lanes1_low + c * VECS, low1 + c)
            sum2[c] = fold_pairs(lanes2 + c * VECS, lanes2_low + c * VECS, low2 + c)
        else:
            sum1[c] = fold(lanes1 + c * VECS)
            sum2[c] = fold(lanes2 + c * VECS)


cdef inline void grad_sums_of_columns(const floating *dy, const floating *x, const Block *block, const Job *job,
                                      const double *mean, double *sum1, double *low1, double *sum2, double *low2,
                                      Care care) noexcept nogil:
    cdef Columns centre, total1, total2
    cdef Totals to
    cdef size_t size = (block.width + VEC) * sizeof(double)
    cdef Py_ssize_t r
    spread(mean, block, job, centre.of)
    memset(to.sum1.of, 0, size)
    memset(to.sum2.of, 0, size)
    if care != NONE:
        memset(to.low1.of, 0, size)
        memset(to.low2.of, 0, size)
    if care == PIECES:
        memset(total1.of, 0, size)
        memset(total2.of, 0, size)
        for r from 0 <= r < block.wide_rows by PIECE_ROWS:
            grad_sums_columns(dy + r * block.wide_stride, x + r * block.wide_stride,
                              min(PIECE_ROWS, block.wide_rows - r), block.wide_stride, block.width, centre.of, &to,
                              care)
            keep(to.sum1.of, total1.of, to.low1.of, block.width)
            keep(to.sum2.of, total2.of, to.low2.of, block.width)
        grad_sums_columns(dy + block.rest, x + block.rest, block.rest_rows, 0, block.rest_width, centre.of, &to, care)
        keep(to.sum1.of, total1.of, to.low1.of, block.rest_width)
        keep(to.sum2.of, total2.of, to.low2.of, block.rest_width)
        gather(total1.of, to.low1.of, block, job, sum1, low1, True)
        gather(total2.of, to.low2.of, block, job, sum2, low2, True)
        return
    grad_sums_columns(dy, x, block.wide_rows, block.wide_stride, block.width, centre.of, &to, care)
    grad_sums_columns(dy + block.rest, x + block.rest, block.rest_rows, 0, block.rest_width, centre.of, &to, care)
    gather(to.sum1.of, to.low1.of, block, job, sum1, low1, care != NONE)
    gather(to.sum2.of, to.low2.of, block, job, sum2, low2, care != NONE)


# ---- Finish: merge the blocks of a tile, derive the coefficients ----------------------------------------------------

cdef void merge_moments(double *left, const double *right, Py_ssize_t C, Py_ssize_t channels,
                        double n_left, double n_right) noexcept nogil:
    """Chan's rule: the moments of two sets from the moments of each."""
    cdef double share = n_right / (n_left + n_right)
    cdef double weight = n_left * share
    cdef double apart
    cdef Py_ssize_t c
    for c in range(channels):
        apart = (right[PIVOT * C + c] - left[PIVOT * C + c]) + (right[DELTA * C + c] - left[DELTA * C + c])
        left[DELTA * C + c] += apart * share
        left[M2 * C + c] += right[M2 * C + c] + apart * apart * weight


cdef void merge_pairs(const double *restrict pivot, double *restrict delta, double *restrict delta_low,
                      double *restrict m2, double *restrict m2_low, const double *restrict right, Py_ssize_t C,
                      Py_ssize_t channels, double n_left, double n_right) noexcept nogil:
    """The same with twice the digits, for float64."""
    cdef double n = n_left + n_right
    cdef Pair apart, shift, centre, within
    cdef Py_ssize_t c
    for c in range(channels):
        centre = pair(delta[c], delta_low[c])
        within = pair(m2[c], m2_low[c])
        apart = add(add(pair(right[PIVOT * C + c], 0), pair(-pivot[c], 0)),
                    add(pair(right[DELTA * C + c], right[DELTA_LOW * C + c]), negative(centre)))
        shift = divide(multiply(apart, pair(n_right, 0)), n)
        centre = add(centre, shift)
        within = add(add(within, pair(right[M2 * C + c], right[M2_LOW * C + c])),
                     multiply(multiply(apart, shift), pair(n_left, 0)))
        delta[c], delta_low[c] = centre.high, centre.low
        m2[c], m2_low[c] = within.high, within.low


cdef void merge_sums(double *left, const double *right, Py_ssize_t C, Py_ssize_t channels) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        left[SUM_DY * C + c] += right[SUM_DY * C + c]
        left[SUM_DY_XMU * C + c] += right[SUM_DY_XMU * C + c]


cdef void merge_pair_sums(double *restrict sum1, double *restrict low1, double *restrict sum2, double *restrict low2,
                          const double *restrict right, Py_ssize_t C, Py_ssize_t channels) noexcept nogil:
    cdef Pair dy, dy_xmu
    cdef Py_ssize_t c
    for c in range(channels):
        dy = add(pair(sum1[c], low1[c]), pair(right[SUM_DY * C + c], right[SUM_DY_LOW * C + c]))
        dy_xmu = add(pair(sum2[c], low2[c]), pair(right[SUM_DY_XMU * C + c], right[SUM_DY_XMU_LOW * C + c]))
        sum1[c], low1[c] = dy.high, dy.low
        sum2[c], low2[c] = dy_xmu.high, dy_xmu.low


cdef void merge_blocks(const Job *job, Py_ssize_t first, Py_ssize_t channels, bint moments) noexcept nogil:
    """Merge neighbours, then pairs of neighbours, and so on: a tree that depends on the number of blocks alone."""
    cdef Py_ssize_t i, step = 1, row = job.partial_rows * job.C
    cdef Py_ssize_t start, middle, stop
    cdef double *left
    while step < job.blocks:
        for i from 0 <= i < job.blocks - step by 2 * step:
            left = job.partial + i * row + first
            if moments:
                start = values_before(job, i)
                middle = values_before(job, i + step)
                stop = values_before(job, min(i + 2 * step, job.blocks))
                if job.pairs:
                    merge_pairs(left + PIVOT * job.C, left + DELTA * job.C, left + DELTA_LOW * job.C,
                                left + M2 * job.C, left + M2_LOW * job.C, left + step * row,
                                job.C, channels, middle - start, stop - middle)
                else:
                    merge_moments(left, left + step * row, job.C, channels, middle - start, stop - middle)
            elif job.pairs:
                merge_pair_sums(left + SUM_DY * job.C, left + SUM_DY_LOW * job.C, left + SUM_DY_XMU * job.C,
                                left + SUM_DY_XMU_LOW * job.C, left + step * row, job.C, channels)
            else:
                merge_sums(left, left + step * row, job.C, channels)
        step *= 2


cdef inline double rstd_of(double spread) noexcept nogil:
    """1/√spread; 0 where the spread is 0, so that a channel without one maps to beta."""
    return 1 / sqrt(spread) if spread != 0 else 0


cdef void set_rstd(const double *restrict m2, double *restrict var, double *restrict rstd, Py_ssize_t channels,
                   double n, double eps) noexcept nogil:
    """var = m2/n and rstd = 1/√(var + eps)."""
    cdef Py_ssize_t c
    for c in range(channels):
        var[c] = m2[c] / n
        rstd[c] = rstd_of(var[c] + eps)


cdef void set_rstd_low(const double *restrict m2, const double *restrict m2_low, const double *restrict var,
                       const double *restrict rstd, double *restrict rstd_low, Py_ssize_t channels, double n,
                       double eps) noexcept nogil:
    """What 1/√(m2/n + eps) has more digits than `rstd`, by one step of Newton's method."""
    cdef double product, product_low, spread, spread_low, root, root_low, one, one_low, rest
    cdef Py_ssize_t c
    for c in range(channels):
        product = two_product(var[c], n, &product_low)
        spread = two_sum(var[c], eps, &spread_low)
        spread_low += ((m2[c] - product) - product_low + m2_low[c]) / n
        root = two_product(spread, rstd[c], &root_low)
        one = two_product(root, rstd[c], &one_low)
        rest = (1 - one) - one_low - (root_low + spread_low * rstd[c]) * rstd[c]
        rstd_low[c] = 0.5 * rstd[c] * (rest if rest - rest == 0 else 0)      # infinity has no more digits


cdef inline Pair scale_of(double gamma, double rstd, double rstd_low) noexcept nogil:
    """gamma·rstd; the high part has so few digits that an error of the variance does not reach it."""
    cdef double left_over, product = two_product(gamma, rstd, &left_over), high = leading(product)
    return pair(high, (product - high) + (left_over + gamma * rstd_low))


cdef inline double centre_of(double mean, double var) noexcept nogil:
    """The mean to about a millionth of a standard deviation, so that an error of the mean does not reach it."""
    cdef double coarse = 4294967296.0 * sqrt(var), centre = (mean + coarse) - coarse
    return centre if centre - centre == 0 else mean         # an infinite variance is no reason for NaN


# Each row to be written is a pointer of its own, or the compiler does not see that the loop can become vector code.

cdef void set_affine_pairs(const double *restrict s, double *restrict centre, double *restrict scale,
                           double *restrict scale_low, double *restrict shift, double *restrict shift_low,
                           Py_ssize_t C, Py_ssize_t channels) noexcept nogil:
    """`set_affine` for float64."""
    cdef Py_ssize_t c
    cdef double apart
    cdef Pair product
    for c in range(channels):
        product = scale_of(s[GAMMA * C + c], s[RSTD * C + c], s[RSTD_LOW * C + c])
        centre[c] = centre_of(s[MEAN * C + c], s[VAR * C + c])
        apart = (s[MEAN * C + c] - centre[c]) + s[MEAN_LOW * C + c]
        scale[c], scale_low[c] = product.high, product.low
        shift[c], shift_low[c] = s[BETA * C + c], -apart * (product.high + product.low)


cdef void set_affine(const Job *job, Py_ssize_t first, Py_ssize_t channels) noexcept nogil:
    """The coefficients of y = (x − mean)·scale + shift from the statistics."""
    cdef Py_ssize_t c, C = job.C
    cdef const double *restrict s = job.statistics + first
    cdef double *restrict to = job.coefficient + first
    if job.pairs:
        set_affine_pairs(s, to + CENTRE * C, to + SCALE * C, to + SCALE_LOW * C, to + SHIFT * C, to + SHIFT_LOW * C,
                         C, channels)
        return
    for c in range(channels):
        to[CENTRE * C + c] = s[MEAN * C + c]
        to[SCALE * C + c] = s[GAMMA * C + c] * s[RSTD * C + c]
        to[SHIFT * C + c] = s[BETA * C + c] - s[MEAN_LOW * C + c] * to[SCALE * C + c]


cdef void set_moments(const double *restrict merged, double *restrict s, Py_ssize_t C, Py_ssize_t channels,
                      bint pairs) noexcept nogil:
    cdef const double *low = merged + (DELTA_LOW if pairs else DELTA) * C
    cdef const double *m2_lows = merged + (M2_LOW if pairs else M2) * C
    cdef double delta_low, m2_low
    cdef Pair mean
    cdef Py_ssize_t c
    for c in range(channels):
        # Something is always read, so that choosing needs no branch.
        delta_low, m2_low = low[c], m2_lows[c]
        mean = add(pair(merged[PIVOT * C + c], 0), pair(merged[DELTA * C + c], delta_low if pairs else 0))
        s[MEAN * C + c], s[MEAN_LOW * C + c] = mean.high, mean.low
        s[SUM_XMU2 * C + c], s[SUM_XMU2_LOW * C + c] = merged[M2 * C + c], m2_low if pairs else 0


cdef void finish_moments(const Job *job, Py_ssize_t tile) noexcept nogil:
    cdef Py_ssize_t C = job.C, first = tile * job.tile_channels
    cdef Py_ssize_t channels = min(job.tile_channels, C - first)
    cdef double *s = job.statistics + first
    merge_blocks(job, first, channels, True)
    set_moments(job.partial + first, s, C, channels, job.pairs)
    set_rstd(s + SUM_XMU2 * C, s + VAR * C, s + RSTD * C, channels, job.N * job.S, job.eps)
    if job.pairs:
        set_rstd_low(s + SUM_XMU2 * C, s + SUM_XMU2_LOW * C, s + VAR * C, s + RSTD * C, s + RSTD_LOW * C, channels,
                     job.N * job.S, job.eps)
    else:
        memset(s + RSTD_LOW * C, 0, channels * sizeof(double))
    set_affine(job, first, channels)


cdef void finish_statistics(const Job *job, Py_ssize_t tile) noexcept nogil:
    """Nothing to merge: the statistics are given."""
    cdef Py_ssize_t first = tile * job.tile_channels
    set_affine(job, first, min(job.tile_channels, job.C - first))


cdef inline double dmean_of(double scale, double sum_dy) noexcept nogil:
    """The gradient of the mean, scale being gamma·rstd."""
    return -scale * sum_dy


cdef inline double dvar_of(double scale, double rstd, double dgamma) noexcept nogil:
    """The gradient of var."""
    return -0.5 * scale * (rstd * dgamma)


cdef inline double dgamma_low_of(double sum_dy_xmu, double sum_low, double rstd, double rstd_low) noexcept nogil:
    """What the low parts add to dgamma; infinities have none."""
    cdef double more = sum_dy_xmu * rstd_low + sum_low * rstd
    return more if more - more == 0 else 0


cdef void set_pair_sums(const double *restrict merged, const double *restrict s, double *restrict sum1,
                        double *restrict low1, double *restrict sum2, double *restrict low2, double *restrict dgamma,
                        Py_ssize_t C, Py_ssize_t channels) noexcept nogil:
    """`finish_sums` for float64."""
    cdef double rstd, rstd_low
    cdef Pair dy, dy_xmu
    cdef Py_ssize_t c
    for c in range(channels):
        rstd, rstd_low = s[RSTD * C + c], s[RSTD_LOW * C + c]
        dy = settled(merged[SUM_DY * C + c], merged[SUM_DY_LOW * C + c])
        dy_xmu = add(pair(merged[SUM_DY_XMU * C + c], merged[SUM_DY_XMU_LOW * C + c]),
                     pair(-s[MEAN_LOW * C + c] * dy.high, 0))
        sum1[c], low1[c] = dy.high, dy.low
        sum2[c], low2[c] = dy_xmu.high, dy_xmu.low
        dgamma[c] = dy_xmu.high * rstd + dgamma_low_of(dy_xmu.high, dy_xmu.low, rstd, rstd_low)


cdef void finish_sums(const Job *job, Py_ssize_t tile) noexcept nogil:
    cdef Py_ssize_t c, C = job.C, first = tile * job.tile_channels
    cdef Py_ssize_t channels = min(job.tile_channels, C - first)
    cdef const double *restrict merged = job.partial + first
    cdef const double *restrict s = job.statistics + first
    cdef double *restrict g = job.gradients + first
    merge_blocks(job, first, channels, False)
    if job.pairs:
        set_pair_sums(merged, s, g + SUM_DY * C, g + SUM_DY_LOW * C, g + SUM_DY_XMU * C, g + SUM_DY_XMU_LOW * C,
                      g + DGAMMA * C, C, channels)
        return
    for c in range(channels):
        g[SUM_DY * C + c], g[SUM_DY_LOW * C + c] = merged[SUM_DY * C + c], 0
        g[SUM_DY_XMU * C + c] = merged[SUM_DY_XMU * C + c] - s[MEAN_LOW * C + c] * merged[SUM_DY * C + c]
        g[SUM_DY_XMU_LOW * C + c] = 0
        g[DGAMMA * C + c] = g[SUM_DY_XMU * C + c] * s[RSTD * C + c]


cdef inline bint is_sloped(int through) noexcept nogil:
    """Whether dx has a part that is proportional to x − mean."""
    return through & (THROUGH_VARIANCE | UPSTREAM)


cdef void set_gradient(const Job *job, Py_ssize_t tile) noexcept nogil:
    """Coefficients of dx = dy·scale + (x − mean)·slope + shift: the paper's three terms by what they multiply."""
    cdef Py_ssize_t c, C = job.C, first = tile * job.tile_channels
    cdef Py_ssize_t channels = min(job.tile_channels, C - first)
    cdef const double *restrict s = job.statistics + first
    cdef const double *restrict g = job.gradients + first
    cdef double *restrict to = job.coefficient + first
    cdef double n = job.count
    cdef double scale, dmean, dvar, upstream_dmean, upstream_dvar, slope, apart
    cdef bint sloped = is_sloped(job.through)
    cdef bint mean = job.through & THROUGH_MEAN, variance = job.through & THROUGH_VARIANCE
    cdef bint upstream = job.through & UPSTREAM
    if job.pairs:
        set_gradient_pairs(s, g, to + CENTRE * C, to + SCALE * C, to + SCALE_LOW * C, to + SLOPE * C, to + SHIFT * C,
                           to + SHIFT_LOW * C, C, channels, n, job.through)
        return
    for c in range(channels):
        # Everything is read, so that choosing needs no branch.
        upstream_dmean, upstream_dvar = g[UPSTREAM_DMEAN * C + c], g[UPSTREAM_DVAR * C + c]
        scale = s[GAMMA * C + c] * s[RSTD * C + c]
        dmean = dmean_of(scale, g[SUM_DY * C + c])
        dvar = dvar_of(scale, s[RSTD * C + c], g[DGAMMA * C + c])
        dmean = (dmean if mean else 0) + (upstream_dmean if upstream else 0)
        dvar = (dvar if variance else 0) + (upstream_dvar if upstream else 0)
        slope = 2 * dvar / n
        apart = s[MEAN * C + c] + s[MEAN_LOW * C + c]
        to[CENTRE * C + c] = 0
        to[SCALE * C + c] = scale
        to[SLOPE * C + c] = slope
        to[SHIFT * C + c] = dmean / n - (apart * slope if sloped else 0)


cdef void set_gradient_pairs(const double *restrict s, const double *restrict g, double *restrict centre,
                             double *restrict scale, double *restrict scale_low, double *restrict slope,
                             double *restrict shift, double *restrict shift_low, Py_ssize_t C, Py_ssize_t channels,
                             double n, int through) noexcept nogil:
    """The same with twice the digits, and the centre apart from the shift, for float64."""
    cdef double upstream_dmean, upstream_dvar, coarse, apart
    cdef Pair product, rstd, dgamma, dmean, dvar, over_n
    cdef bint sloped = is_sloped(through), upstream = through & UPSTREAM
    cdef bint mean = through & THROUGH_MEAN, variance = through & THROUGH_VARIANCE
    cdef Py_ssize_t c
    for c in range(channels):
        # Everything is read and calculated, so that choosing needs no branch.
        upstream_dmean, upstream_dvar = g[UPSTREAM_DMEAN * C + c], g[UPSTREAM_DVAR * C + c]
        coarse = centre_of(s[MEAN * C + c], s[VAR * C + c])
        coarse = coarse if sloped else 0
        apart = (s[MEAN * C + c] - coarse) + s[MEAN_LOW * C + c]
        product = scale_of(s[GAMMA * C + c], s[RSTD * C + c], s[RSTD_LOW * C + c])
        rstd = pair(s[RSTD * C + c], s[RSTD_LOW * C + c])
        dgamma = multiply(rstd, pair(g[SUM_DY_XMU * C + c], g[SUM_DY_XMU_LOW * C + c]))
        dmean = multiply(product, pair(-g[SUM_DY * C + c], -g[SUM_DY_LOW * C + c]))
        dvar = multiply(product, multiply(rstd, pair(-0.5 * dgamma.high, -0.5 * dgamma.low)))
        dmean = add(pair(dmean.high if mean else 0, dmean.low if mean else 0),
                    pair(upstream_dmean if upstream else 0, 0))
        dvar = add(pair(dvar.high if variance else 0, dvar.low if variance else 0),
                   pair(upstream_dvar if upstream else 0, 0))
        over_n = divide(pair(2 * dvar.high, 2 * dvar.low), n)
        apart *= over_n.high
        centre[c] = coarse
        scale[c], scale_low[c], slope[c] = product.high, product.low, over_n.high
        over_n = divide(dmean, n)
        shift[c] = over_n.high + (over_n.low - apart) if sloped else over_n.high
        shift_low[c] = over_n.low


cdef void finish_backward(const Job *job, Py_ssize_t tile) noexcept nogil:
    finish_sums(job, tile)
    set_gradient(job, tile)


# ---- Apply: write one block -----------------------------------------------------------------------------------------

cdef inline double low_part(const floating *x, const double *low) noexcept nogil:
    """The number, which is there for float64 only; x only tells the type."""
    return low[0] if floating is double else 0


cdef void affine_block(const floating *x, const floating *dy, floating *out, const Job *job, Py_ssize_t tile,
                       Py_ssize_t b) noexcept nogil:
    cdef Block block = block_of(job, tile, b)
    cdef const double *of = job.coefficient + block.channel
    cdef Coefficients column
    cdef Py_ssize_t c, r, at, C = job.C
    cdef bint stream = job.stream and out != x
    x += block.first
    out += block.first
    if not job.columns:
        for r from 0 <= r < block.rows by block.visit:
            for c in range(block.channels):
                at = r * block.stride + c * block.run
                affine_lanes(x + at, out + at, min(block.visit, block.rows - r), block.stride, block.run,
                             of[CENTRE * C + c], of[SCALE * C + c], low_part(x, of + SCALE_LOW * C + c),
                             of[SHIFT * C + c], low_part(x, of + SHIFT_LOW * C + c), stream)
    else:
        spread(of + CENTRE * C, &block, job, column.centre.of)
        spread(of + SCALE * C, &block, job, column.scale.of)
        spread(of + SHIFT * C, &block, job, column.shift.of)
        if floating is double:
            spread(of + SCALE_LOW * C, &block, job, column.scale_low.of)
            spread(of + SHIFT_LOW * C, &block, job, column.shift_low.of)
        affine_columns(x, out, block.wide_rows, block.wide_stride, block.width, &column, stream)
        affine_columns(x + block.rest, out + block.rest, block.rest_rows, 0, block.rest_width, &column, stream)
    if stream:
        finish_streaming()


cdef void grad_affine_block(const floating *x, const floating *dy, floating *out, const Job *job, Py_ssize_t tile,
                            Py_ssize_t b) noexcept nogil:
    cdef Block block = block_of(job, tile, b)
    cdef const double *of = job.coefficient + block.channel
    cdef Coefficients column
    cdef Py_ssize_t c, r, at, C = job.C
    cdef bint stream = job.stream and out != dy
    x += block.first
    dy += block.first
    out += block.first
    if not job.columns:
        for r from 0 <= r < block.rows by block.visit:
            for c in range(block.channels):
                at = r * block.stride + c * block.run
                grad_affine_lanes(dy + at, x + at, out + at, min(block.visit, block.rows - r), block.stride, block.run,
                                  of[CENTRE * C + c], of[SCALE * C + c], low_part(x, of + SCALE_LOW * C + c),
                                  of[SLOPE * C + c], of[SHIFT * C + c], stream)
    else:
        spread(of + CENTRE * C, &block, job, column.centre.of)
        spread(of + SCALE * C, &block, job, column.scale.of)
        spread(of + SLOPE * C, &block, job, column.slope.of)
        spread(of + SHIFT * C, &block, job, column.shift.of)
        if floating is double:
            spread(of + SCALE_LOW * C, &block, job, column.scale_low.of)
        grad_affine_columns(dy, x, out, block.wide_rows, block.wide_stride, block.width, &column, stream)
        grad_affine_columns(dy + block.rest, x + block.rest, out + block.rest, block.rest_rows, 0, block.rest_width,
                            &column, stream)
    if stream:
        finish_streaming()


cdef void gradient_block(const floating *x, const floating *dy, floating *out, const Job *job, Py_ssize_t tile,
                         Py_ssize_t b) noexcept nogil:
    if is_sloped(job.through):
        grad_affine_block(x, dy, out, job, tile, b)
    else:
        affine_block(dy, x, out, job, tile, b)


# ---- Drive ----------------------------------------------------------------------------------------------------------

ctypedef void (*BlockStep)(const floating *x, const floating *dy, floating *out, const Job *job, Py_ssize_t tile,
                           Py_ssize_t b) noexcept nogil
ctypedef void (*TileStep)(const Job *job, Py_ssize_t tile) noexcept nogil


cdef void item(BlockStep reduce, TileStep finish, BlockStep apply, const floating *x, const floating *dy, floating *out,
               const Job *job, bint by_tile, Py_ssize_t i) noexcept nogil:
    """A whole tile, or one block; blocks are counted in the order of memory."""
    cdef Py_ssize_t tile, b, first, last
    if by_tile:
        tile, first, last = i, 0, job.blocks
    else:
        first = i // (job.tiles * job.segments) * job.segments + i % job.segments
        tile, last = i // job.segments % job.tiles, first + 1
    if reduce != NULL:
        for b in range(first, last):
            reduce(x, dy, out, job, tile, b)
    if finish != NULL:
        finish(job, tile)
    if apply != NULL:
        for b in range(last - 1, first - 1, -1):        # the last block is the one still in cache
            apply(x, dy, out, job, tile, b)


cdef void each(BlockStep reduce, TileStep finish, BlockStep apply, const floating *x, const floating *dy, floating *out,
               const Job *job, bint by_tile, int num_threads) noexcept nogil:
    cdef Py_ssize_t i, items = job.tiles if by_tile else job.tiles * job.blocks
    if num_threads == 1 or is_forked:
        for i in range(items):
            item(reduce, finish, apply, x, dy, out, job, by_tile, i)
    else:
        note_team()
        for i in prange(items, schedule="static", num_threads=num_threads):
            item(reduce, finish, apply, x, dy, out, job, by_tile, i)


cdef void follow_memory(Job *job) noexcept nogil:
    """Cut anew for a step that sums nothing: pieces of one row after the other."""
    if job.S >= SHORTEST_RUN:
        job.columns = False
        job.tile_channels = max(1, BLOCK // job.S)
        job.tiles = ceil_div(job.C, job.tile_channels)
        job.block_rows = max(1, BLOCK // (job.C * job.S))
        job.blocks = ceil_div(job.N, job.block_rows) * job.segments


cdef void sweep(BlockStep reduce, TileStep finish, BlockStep apply, const floating *x, const floating *dy,
                floating *out, const Job *job, int num_threads) noexcept nogil:
    """reduce → finish → apply over all tiles, in one parallel region where tiles stay in cache."""
    cdef Py_ssize_t tile
    cdef Job in_order = job[0]
    if job.by_tile and reduce != NULL and apply != NULL:
        each(reduce, finish, apply, x, dy, out, job, True, num_threads)
        return
    if reduce != NULL:
        each(reduce, NULL, NULL, x, dy, out, job, False, num_threads)
    for tile in range(job.tiles):
        finish(job, tile)
    if apply != NULL:
        follow_memory(&in_order)
        each(NULL, NULL, apply, x, dy, out, &in_order, False, num_threads)


# ---- Calls ----------------------------------------------------------------------------------------------------------
# The façade has checked dtypes and shapes, and arrays lie in memory as the view says.

cdef enum Pass:
    MOMENTS, FORWARD, NORMALIZE, GRAD_SUMS, GRAD_APPLY, BACKWARD


cdef void run(Pass which, const floating *x, const floating *dy, floating *out, const Job *job,
              int num_threads) noexcept nogil:
    if which == MOMENTS:
        sweep(moments_block[floating], finish_moments, NULL, x, dy, out, job, num_threads)
    elif which == FORWARD:
        sweep(moments_block[floating], finish_moments, affine_block[floating], x, dy, out, job, num_threads)
    elif which == NORMALIZE:
        sweep(NULL, finish_statistics, affine_block[floating], x, dy, out, job, num_threads)
    elif which == GRAD_SUMS:
        sweep(grad_sums_block[floating], finish_sums, NULL, x, dy, out, job, num_threads)
    elif which == GRAD_APPLY:
        sweep(NULL, set_gradient, gradient_block[floating], x, dy, out, job, num_threads)
    else:
        sweep(grad_sums_block[floating], finish_backward, gradient_block[floating], x, dy, out, job, num_threads)


cdef int borrow(Py_buffer *buffer, object array, bint to_write) except -1:
    """Where an array is; None is nowhere."""
    memset(buffer, 0, sizeof(Py_buffer))
    if array is None:
        return 0
    return PyObject_GetBuffer(array, buffer, PyBUF_STRIDED if to_write else PyBUF_STRIDED_RO)


cdef int refuse(str wanted) except -1:
    raise ValueError(f"a buffer of the kernel must hold {wanted}")


cdef int measure(const Py_buffer *buffer, Py_ssize_t values, Py_ssize_t itemsize) except -1:
    """Refuse memory that is not so many values of that size side by side, whatever the façade has checked."""
    cdef Py_ssize_t i, extent = itemsize
    if buffer.buf == NULL:              # nowhere
        return 0
    for i in range(buffer.ndim):
        if buffer.shape[i] > 1:
            if buffer.strides[i] < 0:
                refuse("values in the order of memory")
            extent += (buffer.shape[i] - 1) * buffer.strides[i]
    if buffer.itemsize != itemsize or buffer.len != values * itemsize or (values > 0 and extent != buffer.len):
        refuse(f"{values} values of {itemsize} bytes without gaps")
    return 0


cdef int call(Pass which, x, dy, out, tuple view, statistics, gradients, double eps, int through,
              double count, int num_threads) except -1:
    """Borrow the memory of the arrays, lay out the work, get scratch for a few numbers a block and channel, and run."""
    cdef Py_buffer at[5]
    cdef Job job
    cdef Py_ssize_t N, C, S
    # Inference is quicker around the cache only where one array fills it.
    cdef Py_ssize_t arrays = 1 if which == NORMALIZE else 1 + (dy is not None) + (out is not None)
    N, C, S = view
    memset(at, 0, sizeof(at))
    try:
        borrow(&at[0], x, False)
        borrow(&at[1], dy, False)
        borrow(&at[2], out, True)
        borrow(&at[3], statistics, which <= NORMALIZE)
        borrow(&at[4], gradients, True)
        if at[0].itemsize != sizeof(float) and at[0].itemsize != sizeof(double):
            refuse("float32 or float64")
        for i in range(3):
            measure(&at[i], N * C * S, at[0].itemsize)
        measure(&at[3], STATISTICS_ROWS * C, sizeof(double))
        measure(&at[4], GRADIENT_ROWS * C, sizeof(double))
        lay_out(&job, N, C, S, at[0].itemsize, arrays)
        job.eps, job.through, job.count = eps, through, count
        job.statistics, job.gradients = <double *> at[3].buf, <double *> at[4].buf
        job.coefficient = <double *> malloc((job.coefficient_rows + job.partial_rows * job.blocks) * C * sizeof(double))
        if job.coefficient == NULL:
            raise MemoryError(f"no memory for the partial sums of {job.blocks} blocks of {C} channels")
        job.partial = job.coefficient + job.coefficient_rows * C
        with nogil:
            if at[0].itemsize == sizeof(float):
                run[float](which, <const float *> at[0].buf, <const float *> at[1].buf, <float *> at[2].buf, &job,
                           num_threads)
            else:
                run[double](which, <const double *> at[0].buf, <const double *> at[1].buf, <double *> at[2].buf, &job,
                            num_threads)
            free(job.coefficient)
    finally:
        for i in range(5):
            PyBuffer_Release(&at[i])
    return 0


cdef int set_channels(table, Py_ssize_t row, values, double otherwise) except -1:
    """A row of a table from one number a channel, of either dtype and any stride, or None."""
    cdef Py_buffer to
    cdef Py_buffer buffer
    cdef Py_ssize_t c, C, stride
    cdef const char *at
    cdef double *numbers
    cdef float single
    borrow(&to, table, True)
    try:
        C = to.shape[1] if to.ndim == 2 else 0
        measure(&to, STATISTICS_ROWS * C, sizeof(double))
        borrow(&buffer, values, False)
        numbers = <double *> to.buf + row * C
        if values is None:
            for c in range(C):
                numbers[c] = otherwise
            return 0
        if (buffer.ndim != 1 or buffer.shape[0] != C
                or (buffer.itemsize != sizeof(float) and buffer.itemsize != sizeof(double))):
            PyBuffer_Release(&buffer)
            refuse(f"{C} values of float32 or float64")
        at, stride = <const char *> buffer.buf, buffer.strides[0]
        if buffer.itemsize == sizeof(double):
            for c in range(C):
                memcpy(numbers + c, at + c * stride, sizeof(double))
        else:
            for c in range(C):
                memcpy(&single, at + c * stride, sizeof(float))
                numbers[c] = single
        PyBuffer_Release(&buffer)
    finally:
        PyBuffer_Release(&to)
    return 0


def moments(x, tuple view, statistics, double eps, int num_threads):
    """mean, var and rstd of each channel into `statistics`."""
    call(MOMENTS, x, None, None, view, statistics, None, eps, 0, 0, num_threads)


def forward(x, y, tuple view, statistics, gamma, beta, double eps, int num_threads):
    """`moments`, then y = gamma·(x − mean)·rstd + beta."""
    set_channels(statistics, GAMMA, gamma, 1)
    set_channels(statistics, BETA, beta, 0)
    call(FORWARD, x, None, y, view, statistics, None, eps, 0, 0, num_threads)


def normalize(x, y, tuple view, statistics, int num_threads):
    """y = gamma·(x − mean)·rstd + beta with the mean and rstd in `statistics`."""
    call(NORMALIZE, x, None, y, view, statistics, None, 0, 0, 0, num_threads)


def grad_sums(dy, x, tuple view, statistics, gradients, int num_threads):
    """Σdy, Σdy·(x − mean) and dgamma of each channel into `gradients`."""
    call(GRAD_SUMS, x, dy, None, view, statistics, gradients, 0, 0, 0, num_threads)


def grad_apply(dy, x, dx, tuple view, statistics, gradients, int through, double count, int num_threads):
    """dx = dy·gamma·rstd + dmean/n + dvar·2(x − mean)/n from the sums in `gradients`, as far as `through` says.

    n is `count`, the values of a channel that the statistics were made of. With both paths it is
    gamma·rstd·(dy − dbeta/n − xhat·dgamma/n); with neither the statistics do not depend on x.
    """
    call(GRAD_APPLY, x, dy, dx, view, statistics, gradients, 0, through, count, num_threads)


def backward(dy, x, dx, tuple view, statistics, gradients, int through, double count, int num_threads):
    """`grad_sums`, then `grad_apply`."""
    call(BACKWARD, x, dy, dx, view, statistics, gradients, 0, through, count, num_threads)


def channel_gradients(const double[:, ::1] statistics, double[:, ::1] gradients):
    """dgamma, dmean and dvar from the sums in `gradients`."""
    cdef Py_ssize_t c
    cdef double scale
    for c in range(gradients.shape[1]):
        scale = statistics[GAMMA, c] * statistics[RSTD, c]
        gradients[DGAMMA, c] = (gradients[SUM_DY_XMU, c] * statistics[RSTD, c]
                                + dgamma_low_of(gradients[SUM_DY_XMU, c], gradients[SUM_DY_XMU_LOW, c],
                                                statistics[RSTD, c], statistics[RSTD_LOW, c]))
        gradients[DMEAN, c] = dmean_of(scale, gradients[SUM_DY, c])
        gradients[DVAR, c] = dvar_of(scale, statistics[RSTD, c], gradients[DGAMMA, c])


def fix_statistics(statistics, mean, m2, gamma, beta, double eps, bint pairs, mean_low=None, m2_low=None,
                   double count=1):
    """Fill the table with statistics that are given, var as m2/count; the first channel with a negative one, or -1."""
    cdef double[:, ::1] table
    cdef Py_ssize_t c, C
    cdef double *s
    set_channels(statistics, MEAN, mean, 0)
    set_channels(statistics, MEAN_LOW, mean_low, 0)
    set_channels(statistics, SUM_XMU2, m2, 0)
    set_channels(statistics, SUM_XMU2_LOW, m2_low, 0)
    set_channels(statistics, GAMMA, gamma, 1)
    set_channels(statistics, BETA, beta, 0)
    table = statistics
    C = table.shape[1]
    for c in range(C):
        if table[SUM_XMU2, c] < 0:
            return c
    if C > 0:
        s = &table[0, 0]
        set_rstd(s + SUM_XMU2 * C, s + VAR * C, s + RSTD * C, C, count, eps)
        if pairs:
            set_rstd_low(s + SUM_XMU2 * C, s + SUM_XMU2_LOW * C, s + VAR * C, s + RSTD * C, s + RSTD_LOW * C, C, count,
                         eps)
        else:
            memset(s + RSTD_LOW * C, 0, C * sizeof(double))
    return -1


def update_running(floating[:] running_mean, floating[:] running_var, const double[:, ::1] statistics,
                   double momentum, double correction):
    """r ← (1 − momentum)·r + momentum·batch; the batch variance is multiplied by `correction`."""
    cdef double keep = 1 - momentum
    cdef Py_ssize_t c
    with nogil:
        for c in range(running_mean.shape[0]):
            running_mean[c] = <floating> (keep * running_mean[c] + momentum * statistics[MEAN, c])
            running_var[c] = <floating> (keep * running_var[c] + momentum * (correction * statistics[VAR, c]))


def max_threads():
    """Threads that OpenMP would use from this Python thread now; 1 in a serial build."""
    return omp_get_max_threads()


def processors():
    """Processors that OpenMP's threads may run on; where it has pinned this thread to one, more than this thread may."""
    return usable_processors()


def forked():
    """Whether this process is a child, or a child's child, of one that had used threads."""
    return is_forked


def safe_forks():
    """Whether a child of a thread that has a team may end like any other."""
    return openmp_version() == 0 or dismisses_teams()


def openmp():
    """Date of the OpenMP specification that the compiler implements, 0 in a serial build."""
    return openmp_version()


def openmp_runtime():
    """Path of the OpenMP library in use, empty where it is not known."""
    return openmp_file().decode(errors="replace")


if watch_forks():
    raise MemoryError("no memory to be told of forks")
