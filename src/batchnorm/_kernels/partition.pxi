# ---- Partition: how the work is cut ---------------------------------------------------------------------------------
# It depends only on the shape, the item size and the pass, so that threads and processors change no bits.

cdef enum:
    WIDTH = 512             # the most columns of a tile whose columns are channels: accumulators stay in L1
    GROUPED = 256           # columns of a group of rows, if channels are few
    FEW = 16                # fewer values of a channel are summed in float64: their rounding does not average out
    COPIED = 16384 // sizeof(real)      # values that are copied together before they are summed
    BLOCK = 8192            # values of a block of lanes; a quarter if float64 rows are combined
    COLUMN_ROWS = 256       # rows of a block of columns
    WRITTEN_ROWS = 64       # those of a step that sums nothing, if columns are cut into tiles to be summed
    SHORT_ROW = 64          # shorter rows are summed as columns
    AHEAD = 8192 // sizeof(stored)      # values of a channel from those that are summed to those that are fetched
    FETCHED = 512           # the most values of the next channel that are fetched if rows have lengths
    FEW_ROWS = 3            # how many rows ahead memory is fetched then: reads have gaps that no processor predicts
    SHORTEST_RUN = 16       # the shortest row of one channel for lanes, if few others follow or nothing is summed
    RUN = 8192              # values of neighbouring short rows of lanes, so that memory is visited in longer runs
    TOGETHER = 32           # the most channels of a tile of lanes
    FINISHED = 128          # channels whose coefficients are computed together before a step: tables stay in L1
    NEIGHBOURS = 16         # channels that are summed again together
    VISIT = 512             # values of one channel before its neighbour's, after which lanes are always emptied
    FEW_TILES = 16          # fewer tiles of lanes than this are cut into blocks to be shared
    PIECES = 64             # a step that sums nothing has about this many blocks, unless they would be small
    SPREAD = 8388608        # bytes of an array whose short rows are written as columns, which jump in memory
    FAR = 16777216          # a pass that reads and writes this many bytes fetches ahead what it sums
    STREAM = 33554432       # and from this many on it writes its result around the cache
    NEAR = 40960            # bytes of x and dy of a channel that stay in a core's nearest cache until dx is written
    NEAREST = 28672         # those of a tile, if it has several channels
    NARROW = 1024           # bytes of the narrowest row of a tile that is summed and then written
    CACHE = 524288          # bytes of a tile that stay in a core's cache between two passes
    PIVOTED = 8             # values of a block from which a pivot is chosen


cdef struct Census:                 # of a block
    double before, rest             # values that count in the blocks before it, or their weights: the sum of both
    Py_ssize_t place[PIVOTED]       # places that count, from all over the block

cdef struct Activation:
    bint on
    bint leaky                      # slope·pre at low and below, else low
    bint bounded                    # high at high and above
    bint in_steps                   # y was written in the data's type, not in float64
    real low, high, slope

cdef struct Work:
    Py_ssize_t N, C, S              # the view
    bint columns                    # sum by columns, not by lanes
    bint by_tile                    # run both steps tile by tile, because a tile stays in cache
    bint far                        # what is summed is fetched ahead
    bint stream                     # the result goes around the cache, if processors of this level can do that
    Py_ssize_t tiles, tile_channels
    Py_ssize_t next_tile            # how far away the tile is that is fetched while one is written, or 0
    Py_ssize_t blocks, block_rows   # of a tile
    Py_ssize_t segments, segment    # pieces of a long row
    Py_ssize_t group                # rows of columns laid side by side
    double *statistics              # [STATISTICS_ROWS][C]
    double *gradients               # [GRADIENT_ROWS][C]
    double *partial                 # [blocks][PARTIAL_ROWS][C], the sums of each block
    double *coefficient             # [COEFFICIENT_ROWS][C], what `apply` needs
    double eps
    double count                    # values of a channel in its statistics, or the sum of their weights
    Selection selection
    Census *census                  # [blocks + 1]
    int through                     # the paths of the gradient
    Activation activation
    const stored *add               # the residual, added before the activation, or NULL
    unsigned char *closed           # one bit per value: where the activation is closed, or NULL

cdef struct Block:
    bint columns, far
    Py_ssize_t channel, channels
    Py_ssize_t place, start         # its first place, among all and within its row; the others follow
    Py_ssize_t first                # offset of its first value
    Py_ssize_t rows, stride
    Py_ssize_t run                  # values of one channel in a row
    Py_ssize_t left                 # rows of the tile from the block's first on
    Py_ssize_t visit                # rows of one channel before those of its neighbour
    Py_ssize_t later                # rows of a channel from the one that is summed to the one that is fetched


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t even_share(Py_ssize_t total, Py_ssize_t most) noexcept nogil:
    """The largest share, if `total` is shared as evenly as it can be into the fewest shares of at most `most`."""
    return ceil_div(total, ceil_div(total, max(1, most)))


cdef void cut(Work *work, Py_ssize_t N, Py_ssize_t C, Py_ssize_t S, Py_ssize_t arrays) noexcept nogil:
    """Cut the view into tiles of channels, and tiles into blocks of rows, for a pass over this many arrays."""
    cdef Py_ssize_t size = sizeof(stored)
    cdef const Selection *selection = &work.selection
    work.N, work.C, work.S = N, C, S
    work.far = arrays * N * C * S * size >= FAR
    if selection.on:
        work.columns = S == 1
    else:
        work.columns = S < SHORTEST_RUN or (S < SHORT_ROW and N >= UNROLLED)
    work.stream = arrays * N * C * S * size >= STREAM and (work.columns or S >= TWO_LINES)
    work.segments, work.segment, work.group, work.next_tile = 1, S, 1, 0
    if work.columns:
        cut_columns(work, size)
    else:
        cut_lanes(work, size, arrays)
    work.blocks = ceil_div(N, work.block_rows) * work.segments


cdef void cut_rows(Work *work, Py_ssize_t most) noexcept nogil:
    """Cut the rows of columns into blocks of about `most` groups at most."""
    cdef Py_ssize_t whole = UNROLLED * work.group, row_blocks = ceil_div(work.N, most * work.group)
    if row_blocks > 2:
        row_blocks = 4 * ceil_div(row_blocks, 4)        # so that 2 or 4 threads share them evenly
    work.block_rows = whole * ceil_div(ceil_div(work.N, row_blocks), whole)
    work.blocks = ceil_div(work.N, work.block_rows)


cdef void cut_columns(Work *work, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t N = work.N, C = work.C, S = work.S
    cdef Py_ssize_t width = COPIED // UNROLLED if work.selection.copied else WIDTH if S == 1 else WIDEST
    work.tiles = ceil_div(C, max(1, width // S))
    if work.tiles == 1 and C * S >= GROUPED and N <= COLUMN_ROWS and N * C * S >= 4 * BLOCK:
        work.tiles = 2      # otherwise one block is all there is, and one thread
    work.tile_channels = ceil_div(C, work.tiles)
    if C * S < GROUPED // 2 and not work.selection.copied:
        work.group = max(1, min(GROUPED // (C * S), N // UNROLLED))
    cut_rows(work, COLUMN_ROWS)
    work.by_tile = work.blocks == 1 or (work.tiles >= 4 and N * work.tile_channels * S * size <= CACHE)
    if work.tiles == 2 and 2 * N > COLUMN_ROWS and N * C * S > 8 * BLOCK:
        work.by_tile = False    # two threads would write to the same rows


cdef void set_tile_channels(Work *work, Py_ssize_t size, Py_ssize_t arrays, Py_ssize_t held) noexcept nogil:
    """Set how many channels a tile of lanes has; if its rows are too short, all is summed, and then written."""
    cdef Py_ssize_t N = work.N, C = work.C, S = work.S
    cdef Py_ssize_t channel = 2 * N * S * size                   # bytes of x and dy
    # To read x once more takes less time than to jump from row to row; in backward, dy is read once more too.
    cdef Py_ssize_t shortest = 3 * NARROW // 2 if work.stream and arrays == 2 else NARROW
    cdef Py_ssize_t narrowest = min(TOGETHER, ceil_div(shortest, S * size))
    work.tile_channels = max(1, min(min(TOGETHER, RUN // S), min(C // FEW_TILES, held)))
    if N > 1 and work.tile_channels < narrowest:
        work.tile_channels, work.by_tile = min(C, narrowest), False
    elif arrays == 3 and channel <= NEAR and not work.stream and (N == 1 or (
            2 * S * size >= NARROW and (N * S >= RUN // 4 or N * C * S * size <= CACHE))):
        # A row may be half as long here, because the nearest cache is that much quicker.
        work.tile_channels = min(work.tile_channels, max(1, NEAREST // channel))


cdef void cut_lanes(Work *work, Py_ssize_t size, Py_ssize_t arrays) noexcept nogil:
    cdef Py_ssize_t N = work.N, C = work.C, S = work.S, longest = COPIED if work.selection.copied else BLOCK
    cdef Py_ssize_t together = BLOCK // 4 if IS_DOUBLE else BLOCK
    cdef Py_ssize_t held = 2 * CACHE // (5 * N * S * size)       # channels that leave room for the next tile
    work.by_tile = C >= FEW_TILES or N * S <= BLOCK
    if S < longest:
        set_tile_channels(work, size, arrays, held)
    else:
        work.tile_channels = 1          # in memory the next segment follows, not the next channel
        work.segment = LANES * ceil_div(even_share(S, longest), LANES)
        work.segments = ceil_div(S, work.segment)
    work.tiles = ceil_div(C, work.tile_channels)
    work.block_rows = max(1, together // (2 * S) * 2) if work.segments == 1 else 1
    if work.stream and held:
        work.next_tile = work.tile_channels * S


cdef inline bint written_in_columns(const Work *work) noexcept nogil:
    """Whether columns are written as such too: setting the coefficients of each takes too long for few long rows."""
    return work.columns and (work.S < TWO_LINES or work.N >= 2 * UNROLLED or work.stream)


cdef Work in_memory_order(const Work *work) noexcept nogil:
    """The same work for a step that sums nothing: row after row, in pieces, unless columns are quicker."""
    cdef Work ordered = work[0]
    cdef Py_ssize_t N = work.N, C = work.C, S = work.S, piece = max(BLOCK, N * C * S // PIECES)
    cdef bint near = N * C * S * <Py_ssize_t> sizeof(stored) <= SPREAD
    cdef Py_ssize_t whole = TWO_LINES if work.stream else SHORTEST_RUN      # too few lines of shorter rows are whole
    if not written_in_columns(work) or (S >= whole and not near):
        ordered.columns, ordered.next_tile = False, 0
        ordered.segment = LANES * ceil_div(even_share(S, piece), LANES)
        ordered.segments = ceil_div(S, ordered.segment)
        ordered.tile_channels = even_share(C, piece // S)
        ordered.tiles = ceil_div(C, ordered.tile_channels)
        ordered.block_rows = even_share(N, piece // (C * S))
        ordered.blocks = ceil_div(N, ordered.block_rows) * ordered.segments
    elif work.tiles > 1:        # whole rows if possible: threads that write to the same ones share lines of the cache
        ordered.tiles = ceil_div(C, WIDEST // S)
        ordered.tile_channels = ceil_div(C, ordered.tiles)
        cut_rows(&ordered, min(WRITTEN_ROWS, ceil_div(N, 2)))
    return ordered


cdef Block block_of(const Work *work, Py_ssize_t tile, Py_ssize_t b) noexcept nogil:
    cdef Block block
    cdef Py_ssize_t row = b // work.segments * work.block_rows
    cdef Py_ssize_t start = b % work.segments * work.segment
    block.columns, block.far = work.columns, work.far
    block.channel = tile * work.tile_channels
    block.channels = min(work.tile_channels, work.C - block.channel)
    block.rows = min(work.block_rows, work.N - row)
    block.stride = work.C * work.S
    block.left = work.N - row
    block.place, block.start = row * work.S + start, start
    block.first = row * block.stride + block.channel * work.S + start
    block.run = min(work.segment, work.S - start)
    block.later = max(1, AHEAD // block.run)
    block.visit = max(1 if work.selection.copied else 2, VISIT // block.run)
    return block


# The blocks of all tiles are numbered in memory order.

cdef inline Py_ssize_t tile_at(const Work *work, Py_ssize_t i) noexcept nogil:
    return i // work.segments % work.tiles


cdef inline Py_ssize_t block_at(const Work *work, Py_ssize_t i) noexcept nogil:
    return i // (work.tiles * work.segments) * work.segments + i % work.segments
