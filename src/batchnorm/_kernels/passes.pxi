# ---- Passes: the steps over all tiles and blocks, on several threads -------------------------------------------------

cdef inline bint alone(int threads, Py_ssize_t pieces) noexcept nogil:
    """Whether one thread does everything, without OpenMP: a team of one takes 200 ns, a larger one a microsecond."""
    return threads == 1 or pieces == 1


cdef void reduce_all(const Work *work, const stored *x, const stored *dy, bint gradient, int threads) noexcept nogil:
    cdef Py_ssize_t i
    if alone(threads, work.tiles * work.blocks):
        for i in range(work.tiles * work.blocks):
            reduce_block(work, tile_at(work, i), block_at(work, i), x, dy, gradient)
    else:
        for i in prange(work.tiles * work.blocks, schedule="static", num_threads=threads):
            reduce_block(work, tile_at(work, i), block_at(work, i), x, dy, gradient)


cdef void moments_of_all(const Work *work, const stored *x, int threads) noexcept nogil:
    cdef Py_ssize_t tile
    reduce_all(work, x, x, False, threads)
    for tile in range(work.tiles):
        finish_moments(work, tile)


cdef bint finish_normalize_all(const Work *work) noexcept nogil:
    cdef bint fit = True
    cdef Py_ssize_t tile
    cdef Work finished = work[0]
    finished.tile_channels = FINISHED
    for tile in range(ceil_div(work.C, FINISHED)):
        fit &= finish_normalize(&finished, tile)
    return fit


cdef void normalize_all(const Work *work, const stored *x, stored *y, bint fit, int threads) noexcept nogil:
    cdef Work ordered = in_memory_order(work)
    cdef Py_ssize_t i
    if alone(threads, ordered.tiles * ordered.blocks):
        for i in range(ordered.tiles * ordered.blocks):
            normalize_block(&ordered, tile_at(&ordered, i), block_at(&ordered, i), x, y, fit, work.selection.fill)
    else:
        for i in prange(ordered.tiles * ordered.blocks, schedule="static", num_threads=threads):
            normalize_block(&ordered, tile_at(&ordered, i), block_at(&ordered, i), x, y, fit, work.selection.fill)


cdef void forward_tile(const Work *work, Py_ssize_t tile, const stored *x, stored *y) noexcept nogil:
    cdef Py_ssize_t b
    cdef bint fit
    for b in range(work.blocks):
        reduce_block(work, tile, b, x, x, False)
    finish_moments(work, tile)
    fit = finish_normalize(work, tile)
    for b in range(work.blocks - 1, -1, -1):        # the last block is the one still in cache
        normalize_block(work, tile, b, x, y, fit, work.selection.fill)


cdef void grad_sums_of_all(const Work *work, const stored *x, const stored *dy, int threads) noexcept nogil:
    cdef Py_ssize_t tile
    for tile in range(work.tiles):
        start_gradient(work, tile)
    reduce_all(work, x, dy, True, threads)
    for tile in range(work.tiles):
        finish_grad_sums(work, tile)


cdef void grad_apply_all(const Work *work, const stored *x, const stored *dy, stored *dx, int threads) noexcept nogil:
    cdef Work ordered = in_memory_order(work)
    cdef bint fit = True
    cdef Py_ssize_t i, tile
    for tile in range(work.tiles):
        start_gradient(work, tile)
        fit &= finish_grad_apply(work, tile)
    if alone(threads, ordered.tiles * ordered.blocks):
        for i in range(ordered.tiles * ordered.blocks):
            gradient_block(&ordered, tile_at(&ordered, i), block_at(&ordered, i), x, dy, dx, fit)
    else:
        for i in prange(ordered.tiles * ordered.blocks, schedule="static", num_threads=threads):
            gradient_block(&ordered, tile_at(&ordered, i), block_at(&ordered, i), x, dy, dx, fit)


cdef void backward_tile(const Work *work, Py_ssize_t tile, const stored *x, const stored *dy,
                        stored *dx) noexcept nogil:
    cdef Py_ssize_t b
    cdef bint fit
    start_gradient(work, tile)
    for b in range(work.blocks):
        reduce_block(work, tile, b, x, dy, True)
    finish_grad_sums(work, tile)
    fit = finish_grad_apply(work, tile)
    for b in range(work.blocks - 1, -1, -1):        # the last block is the one still in cache
        gradient_block(work, tile, b, x, dy, dx, fit)
