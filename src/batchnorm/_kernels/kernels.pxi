"""The passes over an array, for one data type: each is a function here, with its parallel loop in sight.

Words:

- The *view*: every array is seen as (N, C, S). N is the product of the dimensions before the channel axis, S of those
  after it.
- A *row* is contiguous in memory: the S values of one channel, or all C·S values of one of the N.
- *Lanes* are LANES sums side by side along a row of one channel. *Columns* are sums down the rows, one per place: a
  column is a channel if S = 1, one of the S columns of a channel if rows are short, and one of `group` copies of the
  channels if channels are few. The columns of a channel are added up at the end of the block.
- A *place* is one of the N·S values of every channel. A mask, lengths or weights have one entry per place.
- A *tile* is some neighbouring channels, a *block* some rows of a tile, a *segment* a piece of a long row.
- A *pivot* is a value near the mean: the sums are of x − pivot instead of x, because sums of x would lose the digits
  of x − mean. The *centre* is the mean in the same role when y and dx are written.

Decisions, and why:

a) One partition. `cut` makes tiles and blocks from the shape, the item size and the pass alone. Sums inside a block
   have a fixed order, and a fixed tree merges blocks. Threads only decide who computes a block, so the bits do not
   depend on them. They do not depend on the processor either: nothing is reassociated or contracted, and the number of
   lanes is fixed.
b) Each type in itself. float32 is computed in float32, in sums of at most 48 values that are added up in float64, and
   float64 in float64. 16-bit floats are float32 from load to store, in the same blocks, so their results are those of
   float32, rounded. Statistics are shifted by a pivot with few bits, so that the differences are exact, and Chan's rule
   merges blocks (Chan, Golub, LeVeque 1983). E[x²] − E[x]² is never used.
c) Sums that cannot be trusted, because they overflowed or the pivot was far from the mean, are repeated in float64
   about a better pivot. Coefficients that do not fit the type are applied in float64. Only the data decides this,
   channel by channel.
d) The steps are separate: reduce → finish → apply. A pass does them tile by tile if a tile stays in cache, and one
   after the other over all blocks if there are too few tiles to share among threads, if they are two halves of the same
   rows, or if their rows are short pieces of memory. A step that sums nothing follows memory, row by row. A pass over
   more memory than a cache holds writes its result around the cache, where lines are whole, and fetches what it sums
   next into the core's second cache, because the nearest one waits for few lines at once.
e) If some values count more than others, or not at all, the same loops sum. Lengths only shorten rows. A mask sets
   terms to 0 in rows of one channel; of rows of all channels, the loops see a copy, in cache, of those that count.
   With weights they see w·(x − pivot) instead of dy: Σa and Σa·d are then the weighted moments.
"""
from cpython.buffer cimport PyBUF_CONTIG, PyBUF_CONTIG_RO, PyBUF_FORMAT, PyBuffer_Release, PyObject_GetBuffer
from cython.parallel import prange
from libc.math cimport INFINITY, fabs, sqrt
from libc.string cimport memcpy, memset
from batchnorm._kernels.per_channel cimport (
    Selection, borrow, borrow_values, set_parameters, set_selection, take_parameters)
from batchnorm._kernels.runtime cimport (
    BETA, CENTRE, COEFFICIENT_ROWS, DGAMMA, GAMMA, GRADIENT_ROWS, M2, MEAN, MEAN_LOW, OFFSET, OWN, REST, RSTD, SCALE,
    SHIFT, SLOPE, STATISTICS_ROWS, SUM_DY, SUM_DY_XMU, THROUGH_MEAN, THROUGH_VARIANCE, UPSTREAM, UPSTREAM_DMEAN,
    UPSTREAM_DVAR, VAR, team_size)

cdef extern from "stored.h" nogil:
    enum:
        VEC, PART, LINE, TWO_LINES, TRAINS, LANES, VECTORS, CARRIED, UNROLLED, TOTALS, WIDEST, BEYOND, SPARE
        CAN_STREAM, PACKS_TWO
        IS_DOUBLE
        FORMAT
    const double SMALLEST, LARGEST, FINEST, COARSEST
    ctypedef float vec              # VEC values of the data's type; Cython only needs to know that it is arithmetic
    ctypedef double wide            # PART float64 numbers
    ctypedef struct Row:
        real *at
    ctypedef struct WideRow:
        double *at
    vec load_column(const real *) noexcept
    void store_column(real *, vec) noexcept
    wide load_wide_column(const real *) noexcept
    real value_at(const stored *) noexcept
    stored stored_of(real) noexcept
    vec load_vec(const stored *) noexcept
    vec load_first(const stored *, Py_ssize_t, vec) noexcept
    vec first_lanes(vec, vec, Py_ssize_t) noexcept
    wide load_wide(const stored *) noexcept
    wide load_first_wide(const stored *, Py_ssize_t, wide) noexcept
    vec counted_vec(const unsigned char *, vec, vec) noexcept
    wide counted_wide(const unsigned char *, wide, wide) noexcept
    void store_vec(stored *, vec) noexcept
    void store_two(stored *, vec, vec) noexcept
    void store_wide(stored *, wide, Py_ssize_t) noexcept
    void store_first(stored *, vec, Py_ssize_t) noexcept
    void store_each(stored *, vec, Py_ssize_t) noexcept
    void stream_vec(stored *, vec) noexcept
    void stream_two(stored *, vec, vec) noexcept
    void finish_streaming() noexcept
    Py_ssize_t to_line(const stored *) noexcept
    double plain(double) noexcept
    void narrow(const double *, real *, Py_ssize_t) noexcept
    vec same_vec(double) noexcept
    wide same_wide(double) noexcept
    vec everywhere_vec(real) noexcept
    wide everywhere_wide(real) noexcept
    vec at_most_vec(vec, vec, vec, vec) noexcept
    wide at_most_wide(wide, wide, wide, wide) noexcept
    unsigned at_most_bits_vec(vec, vec) noexcept
    unsigned at_most_bits_wide(wide, wide) noexcept
    ctypedef struct Notes:
        pass
    Notes notes_from(unsigned char *, Py_ssize_t) noexcept
    void note(Notes *, unsigned, Py_ssize_t) noexcept
    void finish_notes(Notes *) noexcept
    vec closed_vec(const unsigned char *, Py_ssize_t, vec, vec) noexcept
    vec narrowed(wide) noexcept
    wide first_part(vec) noexcept
    void add_vec(double *, vec) noexcept
    void add_wide(double *, wide) noexcept
    double fold(const double *) noexcept
    double sum_of(const double *, Py_ssize_t) noexcept
    void add_lanes_vec(double *, const vec *) noexcept
    void add_lanes_wide(double *, const wide *) noexcept
    void prefetch(const void *) noexcept
    void prefetch_early(const void *) noexcept
    void fetch(const stored *, const stored *, bint, Py_ssize_t) noexcept

cdef extern from "scratch.h" nogil:
    double *take_scratch(size_t) noexcept
    void give_scratch(double *) noexcept

include "partition.pxi"
include "channel_formula.pxi"
include "formula.pxi"
include "selection.pxi"
include "sums.pxi"
include "reduce.pxi"
include "finish.pxi"
include "apply.pxi"
include "passes.pxi"


# ---- Doors ----------------------------------------------------------------------------------------------------------
# The façade has checked the user's arguments. The checks here prevent writes beyond an array.
#
# x, y, dy and dx of a single step are typed views of shape (N, C, S). Whole passes borrow the memory of these arrays,
# beside that shape: a typed view, and the reshape before it, would add a tenth of a call on (32, 64) per array.

cdef int check_view(str name, const stored[:, :, ::1] array, const Py_ssize_t *view) except -1:
    if array.shape[0] != view[0] or array.shape[1] != view[1] or array.shape[2] != view[2]:
        raise ValueError(f"{name} must have the view of x, {(view[0], view[1], view[2])}, "
                         f"got {(array.shape[0], array.shape[1], array.shape[2])}")
    return 0


cdef Py_ssize_t set_view(Py_ssize_t *shape, view) except -1:
    """Set N, C and S; return the number of values."""
    shape[0], shape[1], shape[2] = view
    return shape[0] * shape[1] * shape[2]


cdef void *borrow_array(str name, values, Py_ssize_t size, bint written) except NULL:
    """The address of `size` contiguous values of the module's type, which the caller keeps alive."""
    cdef Py_buffer buffer
    cdef bint fits
    PyObject_GetBuffer(values, &buffer, (PyBUF_CONTIG if written else PyBUF_CONTIG_RO) | PyBUF_FORMAT)
    fits = buffer.len == size * buffer.itemsize and buffer.format[0] == FORMAT and buffer.format[1] == 0
    PyBuffer_Release(&buffer)
    if not fits:
        raise ValueError(f"{name} must have {size} values of the kernel's type")
    return buffer.buf


cdef int set_activation(Activation *act, activation) except -1:
    """Set the activation from (low, high, slope), or none."""
    act.on = activation is not None
    if act.on:
        act.low, act.high, act.slope = activation
        act.leaky, act.bounded, act.in_steps = act.slope != 0, act.high < INFINITY, True
    return 0


cdef unsigned char *bits(closed, Py_ssize_t values, bint written) except NULL:
    return <unsigned char *> borrow_values("closed", closed, values // 8 + SPARE, 1, written)


cdef int prepare(Work *work, const Py_ssize_t *view, Py_ssize_t arrays, activation, add, closed,
                 selection) except -1:
    """Cut the work, and borrow the arrays that accompany x."""
    cdef Py_ssize_t N = view[0], C = view[1], S = view[2]
    set_selection(&work.selection, selection, N * S, S, sizeof(real), VEC)
    cut(work, N, C, S, arrays)
    set_activation(&work.activation, activation)
    work.add, work.closed = NULL, NULL
    if add is not None:
        work.add = <const stored *> borrow_values("add", add, N * C * S, sizeof(stored), False)
    if closed is not None:
        work.closed = bits(closed, N * C * S, True)
    return 0


cdef int begin(Work *work, const Py_ssize_t *view, Py_ssize_t arrays, statistics, gradients, activation, add, closed,
               selection) except -1:
    """The same, with memory for a few numbers per block and channel, until `give_scratch(work.coefficient)`."""
    cdef Py_ssize_t numbers
    prepare(work, view, arrays, activation, add, closed, selection)
    work.statistics = borrow("statistics", statistics, STATISTICS_ROWS, work.C)
    if gradients is not None:
        work.gradients = borrow("gradients", gradients, GRADIENT_ROWS, work.C)
    numbers = (COEFFICIENT_ROWS + PARTIAL_ROWS * work.blocks) * work.C
    work.coefficient = take_scratch(numbers * sizeof(double) + (work.blocks + 1) * sizeof(Census))
    if work.coefficient == NULL:
        raise MemoryError(f"no memory for the sums of {work.blocks} blocks of {work.C} channels")
    work.partial = work.coefficient + COEFFICIENT_ROWS * work.C
    work.census = <Census *> (work.coefficient + numbers)
    return 0


def moments(const stored[:, :, ::1] x, statistics, double eps, int num_threads, selection=None):
    """Write mean, m2, var and rstd of each channel to `statistics`."""
    cdef Work work
    cdef int threads = team_size(num_threads)
    begin(&work, x.shape, 1, statistics, None, None, None, None, selection)
    work.eps = eps
    with nogil:
        take_census(&work)
        moments_of_all(&work, &x[0, 0, 0], threads)
    give_scratch(work.coefficient)


def forward(x, y, view, statistics, gamma, beta, double eps, int num_threads, activation=None, add=None, closed=None,
            selection=None):
    """`moments`, then y = act(gamma·(x − mean)·rstd + beta + add); `closed` gets the bits for where act is closed."""
    cdef Work work
    cdef Py_ssize_t shape[3]
    cdef int threads = team_size(num_threads)
    cdef Py_ssize_t tile, values = set_view(shape, view)
    cdef const stored *x0 = <const stored *> borrow_array("x", x, values, False)
    cdef stored *y0 = <stored *> borrow_array("y", y, values, True)
    set_parameters(borrow("statistics", statistics, STATISTICS_ROWS, shape[1]), gamma, beta, shape[1])
    begin(&work, shape, 2, statistics, None, activation, add, closed, selection)
    work.eps = eps
    with nogil:
        take_census(&work)
        if work.by_tile:
            if alone(threads, work.tiles):
                for tile in range(work.tiles):
                    forward_tile(&work, tile, x0, y0)
            else:
                for tile in prange(work.tiles, schedule="static", num_threads=threads):
                    forward_tile(&work, tile, x0, y0)
        else:
            moments_of_all(&work, x0, threads)
            normalize_all(&work, x0, y0, finish_normalize_all(&work), threads)
    give_scratch(work.coefficient)


def normalize(x, y, view, statistics, int num_threads, activation=None, add=None, closed=None, selection=None):
    """y = act(gamma·(x − mean)·rstd + beta + add) from the mean and rstd in `statistics`."""
    cdef Work work
    cdef Py_ssize_t shape[3]
    cdef int threads = team_size(num_threads)
    cdef Py_ssize_t values = set_view(shape, view)
    cdef const stored *x0 = <const stored *> borrow_array("x", x, values, False)
    cdef stored *y0 = <stored *> borrow_array("y", y, values, True)
    # Counted as one array: streaming pays only if that alone exceeds the cache.
    begin(&work, shape, 1, statistics, None, activation, add, closed, selection)
    with nogil:
        normalize_all(&work, x0, y0, finish_normalize_all(&work), threads)
    give_scratch(work.coefficient)


def coefficients(statistics, table):
    """Write the coefficients of y from the mean and rstd in `statistics`; return whether all fit the data's type."""
    cdef Work work
    work.C = work.tile_channels = statistics.shape[1]
    work.statistics = borrow("statistics", statistics, STATISTICS_ROWS, work.C)
    work.coefficient = borrow("table", table, COEFFICIENT_ROWS, work.C)
    return finish_normalize(&work, 0)


def normalize_prepared(x, y, view, table, bint fit, int num_threads, activation=None, add=None):
    """The same from the coefficients in `table`, and whether all of them fit."""
    cdef Work work
    cdef Py_ssize_t shape[3]
    cdef int threads = team_size(num_threads)
    cdef Py_ssize_t values = set_view(shape, view)
    cdef const stored *x0 = <const stored *> borrow_array("x", x, values, False)
    cdef stored *y0 = <stored *> borrow_array("y", y, values, True)
    prepare(&work, shape, 1, activation, add, None, None)
    work.coefficient = borrow("table", table, COEFFICIENT_ROWS, work.C)
    with nogil:
        normalize_all(&work, x0, y0, fit, threads)


def grad_sums(const stored[:, :, ::1] dy, const stored[:, :, ::1] x, statistics, gradients, dgamma, dbeta,
              int num_threads, activation=None, selection=None):
    """Write Σdy, Σdy·(x − mean) and dgamma of each channel to `gradients`, and dgamma and dbeta = Σdy if given.

    With an activation of y, dy·act′ replaces dy, here and below.
    """
    cdef Work work
    cdef int threads = team_size(num_threads)
    check_view("dy", dy, x.shape)
    begin(&work, x.shape, 2, statistics, gradients, activation, None, None, selection)
    with nogil:
        take_census(&work)
        grad_sums_of_all(&work, &x[0, 0, 0], &dy[0, 0, 0], threads)
    give_scratch(work.coefficient)
    take_parameters(work.gradients, dgamma, dbeta, work.C)


def grad_apply(const stored[:, :, ::1] dy, const stored[:, :, ::1] x, stored[:, :, ::1] dx, statistics, gradients,
               int through, double count, int num_threads, activation=None, selection=None):
    """dx = dy·gamma·rstd + dmean/n + dvar·2(x − mean)/n from the sums in `gradients`, with the paths in `through`.

    n is `count`, the number of values of a channel in the statistics. With both paths dx is
    gamma·rstd·(dy − dbeta/n − xhat·dgamma/n); with neither, the statistics do not depend on x.
    """
    cdef Work work
    cdef int threads = team_size(num_threads)
    check_view("dy", dy, x.shape)
    check_view("dx", dx, x.shape)
    begin(&work, x.shape, 3, statistics, gradients, activation, None, None, selection)
    work.through, work.count = through, count
    with nogil:
        grad_apply_all(&work, &x[0, 0, 0], &dy[0, 0, 0], &dx[0, 0, 0], threads)
    give_scratch(work.coefficient)


def backward(dy, x, dx, view, statistics, gradients, dgamma, dbeta, int through, double count, int num_threads,
             activation=None, selection=None):
    """`grad_sums`, then `grad_apply`."""
    cdef Work work
    cdef Py_ssize_t shape[3]
    cdef int threads = team_size(num_threads)
    cdef Py_ssize_t tile, values = set_view(shape, view)
    cdef const stored *dy0 = <const stored *> borrow_array("dy", dy, values, False)
    cdef const stored *x0 = <const stored *> borrow_array("x", x, values, False)
    cdef stored *dx0 = <stored *> borrow_array("dx", dx, values, True)
    begin(&work, shape, 3, statistics, gradients, activation, None, None, selection)
    work.through, work.count = through, count
    with nogil:
        take_census(&work)
        if work.by_tile:
            if alone(threads, work.tiles):
                for tile in range(work.tiles):
                    backward_tile(&work, tile, x0, dy0, dx0)
            else:
                for tile in prange(work.tiles, schedule="static", num_threads=threads):
                    backward_tile(&work, tile, x0, dy0, dx0)
        else:
            grad_sums_of_all(&work, x0, dy0, threads)
            grad_apply_all(&work, x0, dy0, dx0, threads)
    give_scratch(work.coefficient)
    take_parameters(work.gradients, dgamma, dbeta, work.C)


def pass_back(const stored[:, :, ::1] dy, closed, stored[:, :, ::1] out, activation, int num_threads):
    """dy·act′, from the bits that `forward` wrote."""
    cdef Activation act
    cdef int threads = team_size(num_threads)
    cdef const stored *dy0 = &dy[0, 0, 0]
    cdef stored *out0 = &out[0, 0, 0]
    cdef Py_ssize_t i, size = dy.shape[0] * dy.shape[1] * dy.shape[2]
    cdef const unsigned char *noted = bits(closed, size, False)
    check_view("out", out, dy.shape)
    set_activation(&act, activation)
    for i in prange(ceil_div(size, BLOCK), schedule="static", num_threads=threads, nogil=True,
                    use_threads_if=threads > 1):
        pass_run(dy0, noted, out0, i * BLOCK, min(size, (i + 1) * BLOCK), &act)


def partition(view, Py_ssize_t arrays, bint ordered, bint selected=False, bint copied=False):
    """Each block of a pass over this many arrays: channel, channels, offset, rows, stride and run.

    `ordered` asks for the partition of a step that sums nothing, `selected` for that with a selection of values, and
    `copied` for that of a selection whose rows are copied.
    """
    cdef Work work
    cdef Block block
    cdef Py_ssize_t i
    cdef Py_ssize_t shape[3]
    set_view(shape, view)
    memset(&work.selection, 0, sizeof(Selection))
    work.selection.on, work.selection.copied = selected, copied
    cut(&work, shape[0], shape[1], shape[2], arrays)
    if ordered:
        work = in_memory_order(&work)
    blocks = []
    for i in range(work.tiles * work.blocks):
        block = block_of(&work, tile_at(&work, i), block_at(&work, i))
        blocks.append((block.channel, block.channels, block.first, block.rows, block.stride, block.run))
    return blocks
