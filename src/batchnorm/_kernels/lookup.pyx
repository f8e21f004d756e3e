"""y of 8-bit integers: there are 256 values per channel, so y is looked up in a table and rounded only once.

Decisions, and why:

- The table has the type of y and includes everything, even the activation. So this module copies items of 2, 4 or 8
  bytes, does no arithmetic, and is compiled once.
- x and y may have different memory orders: channels last becomes channels first in the same pass.
- The loop writes pieces: some places of all channels, one channel after the other. So only one row of the table is in
  use, and the piece stays in the nearest cache. If y is larger than any cache, a piece is assembled in a buffer, and
  its lines are copied around the cache.
"""
from cython.parallel import prange
from batchnorm._kernels.per_channel cimport borrow_values
from batchnorm._kernels.runtime cimport team_size

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    #if defined(__SSE2__)
    #include <emmintrin.h>
    /* Copy whole cache lines around the cache, and the rest through it. */
    static void copy_around(char *to, const char *from, ptrdiff_t size)
    {
        ptrdiff_t i, start = -(uintptr_t)to % 64, stop;
        if (start > size)
            start = size;
        stop = size - (size - start) % 64;
        memcpy(to, from, start);
        for (i = start; i < stop; i += 16)
            _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
        memcpy(to + stop, from + stop, size - stop);
    }
    static void finish_copies(void) { _mm_sfence(); }
    #else
    static void copy_around(char *to, const char *from, ptrdiff_t size) { memcpy(to, from, size); }
    static void finish_copies(void) {}
    #endif
    """
    void copy_around(char *to, const char *source, Py_ssize_t size) noexcept nogil
    void finish_copies() noexcept nogil

ctypedef fused item:
    unsigned short
    unsigned int
    unsigned long long

cdef enum:
    VALUES = 256
    PIECE = 16384               # bytes of y in a piece
    PLACES = 64                 # the number of places in a piece is a multiple of this
    STREAM = 33554432           # bytes of y from which no cache holds it

cdef struct Strides:            # of values in memory, for the axes of the view (N, C, S)
    Py_ssize_t n, c, s


cdef inline void look_up_row(const unsigned char *x, Py_ssize_t of_x, const item *row, item *y, Py_ssize_t of_y,
                             Py_ssize_t places) noexcept nogil:
    cdef Py_ssize_t s
    for s in range(places):
        y[s * of_y] = row[x[s * of_x]]


cdef inline void look_up_piece(const unsigned char *x, Strides of_x, const item *table, item *y, Strides of_y,
                               Py_ssize_t channels, Py_ssize_t places) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        look_up_row(x + c * of_x.c, of_x.s, table + c * VALUES, y + c * of_y.c, of_y.s, places)


cdef inline void stream_piece(const unsigned char *x, Strides of_x, const item *table, item *y, Strides of_y,
                              Py_ssize_t channels, Py_ssize_t places) noexcept nogil:
    """The same through a buffer in cache, which has the rows of y side by side."""
    cdef char beside[PIECE]
    cdef bint first = of_y.s == 1           # channels first: a row has the places of one channel
    cdef Py_ssize_t rows = channels if first else places, length = places if first else channels, row
    cdef Py_ssize_t step = of_y.c if first else of_y.s
    cdef Strides here = Strides(0, places if first else 1, 1 if first else channels)
    look_up_piece(x, of_x, table, <item *> beside, here, channels, places)
    if step == length:
        rows, length = 1, rows * length
    for row in range(rows):
        copy_around(<char *> (y + row * step), beside + row * length * sizeof(item), length * sizeof(item))
    finish_copies()


cdef inline void look_up_all(const unsigned char *x, Strides of_x, const item *table, item *y, Strides of_y,
                             Py_ssize_t N, Py_ssize_t C, Py_ssize_t S, int threads) noexcept nogil:
    cdef Py_ssize_t channels = min(C, PIECE // (PLACES * <Py_ssize_t> sizeof(item)))
    cdef Py_ssize_t places = PIECE // (channels * <Py_ssize_t> sizeof(item)) // PLACES * PLACES
    cdef Py_ssize_t tiles = (C + channels - 1) // channels, pieces = (S + places - 1) // places
    cdef bint stream = N * C * S * <Py_ssize_t> sizeof(item) >= STREAM
    cdef Py_ssize_t i, n, c, s
    for i in prange(N * tiles * pieces, schedule="static", num_threads=threads, use_threads_if=threads > 1):
        n, c, s = i // pieces // tiles, i // pieces % tiles * channels, i % pieces * places
        if stream:
            stream_piece(x + n * of_x.n + c * of_x.c + s * of_x.s, of_x, table + c * VALUES,
                         y + n * of_y.n + c * of_y.c + s * of_y.s, of_y, min(channels, C - c), min(places, S - s))
        else:
            look_up_piece(x + n * of_x.n + c * of_x.c + s * of_x.s, of_x, table + c * VALUES,
                          y + n * of_y.n + c * of_y.c + s * of_y.s, of_y, min(channels, C - c), min(places, S - s))


cdef int set_strides(Strides *of, strides, Py_ssize_t N, Py_ssize_t C, Py_ssize_t S) except -1:
    of.n, of.c, of.s = strides
    if min(of.n, of.c, of.s) < 0 or (N - 1) * of.n + (C - 1) * of.c + (S - 1) * of.s >= N * C * S:
        raise ValueError(f"strides must stay within the view {(N, C, S)}, got {strides}")
    return 0


def look_up(x, y, table, view, of_x, of_y, int num_threads):
    """y = table[channel, x]; x and y have N·C·S values each, at these strides of the view (N, C, S)."""
    cdef int threads = team_size(num_threads)
    cdef Py_ssize_t N, C, S, size = table.itemsize
    cdef Strides from_x, to_y
    N, C, S = view
    set_strides(&from_x, of_x, N, C, S)
    set_strides(&to_y, of_y, N, C, S)
    cdef const unsigned char *x0 = <const unsigned char *> borrow_values("x", x, N * C * S, 1, False)
    cdef void *y0 = borrow_values("y", y, N * C * S, size, True)
    cdef const void *table0 = borrow_values("table", table, C * VALUES, size, False)
    with nogil:
        if size == 2:
            look_up_all(x0, from_x, <const unsigned short *> table0, <unsigned short *> y0, to_y, N, C, S, threads)
        elif size == 4:
            look_up_all(x0, from_x, <const unsigned int *> table0, <unsigned int *> y0, to_y, N, C, S, threads)
        else:
            look_up_all(x0, from_x, <const unsigned long long *> table0, <unsigned long long *> y0, to_y, N, C, S,
                        threads)
