/* A vector of the data's type, as wide as a register: what Cython cannot say.
 *
 * Written with the vector extensions of GCC and Clang: operations go lane by lane and nothing is reassociated, so
 * every width gives the same bits, and the compiler is not left to decide whether a loop becomes vector code.
 * A module is compiled for one type, float32 where BATCHNORM_SINGLE is 1, and `wide` holds the same values as float64.
 */
#ifndef BATCHNORM_VECTOR_H
#define BATCHNORM_VECTOR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

/* What is written as inline has a literal among its arguments and is meant to be compiled once for each. */
#undef CYTHON_INLINE
#define CYTHON_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif

#if BATCHNORM_SINGLE
typedef float real;
#else
typedef double real;
#endif
#define IS_DOUBLE (!BATCHNORM_SINGLE)

/* Sums of squares that are smaller on average, or larger, may have lost digits; so may products with coefficients. */
#define SMALLEST (IS_DOUBLE ? 0x1p-1000 : 0x1p-100)
#define LARGEST (IS_DOUBLE ? 0x1p1023 : 0x1p120)
#define FINEST 0x1p-100
#define COARSEST 0x1p100

enum {
    VEC = BYTES / sizeof(real), /* values in a vector */
    PART = BYTES / sizeof(double), /* those of which fill a vector as float64 */
    LINE = 64 / sizeof(real),   /* values in a line of the cache */
    LANES = LINE,               /* sums side by side along a row, whatever VEC is: memory is read in its order */
    VECS = LANES / VEC,
    CARRIED = 256 / LANES,      /* values that are added to each lane before the lanes are emptied */
    UNROLLED = 8,               /* vectors that are summed as a tree */
    TOTALS = 8,                 /* what the lanes are folded to before they are added up in float64 */
    WIDEST = 1024,              /* the most columns of a tile */
    PIECE = 16 / sizeof(real)   /* values that are stored around the cache at a time */
};

typedef real vec __attribute__((vector_size(BYTES)));
typedef double wide __attribute__((vector_size(VEC * sizeof(double))));
typedef real part __attribute__((vector_size(PART * sizeof(real))));
typedef double wide_part __attribute__((vector_size(BYTES)));
typedef real folded __attribute__((vector_size(TOTALS * sizeof(real))));

/* A number for each column of a tile, and room for the rest of a vector. Aligned, because a vector that lies in two
 * lines of the cache is loaded twice. */
typedef struct {
    real at[WIDEST + VEC] __attribute__((aligned(64)));
} Row;

typedef struct {
    double at[WIDEST + VEC] __attribute__((aligned(64)));
} WideRow;

static inline vec load_vec(const real *p)
{
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store_vec(real *p, vec v)
{
    memcpy(p, &v, sizeof v);
}

static inline wide widened(vec v)
{
    return __builtin_convertvector(v, wide);
}

static inline vec narrowed(wide v)
{
    return __builtin_convertvector(v, vec);
}

/* The same number in every lane; of a zero the sign, too. */
static inline vec same_vec(double value)
{
    return (real)value - (vec){0};
}

static inline wide same_wide(double value)
{
    return value - (wide){0};
}

/* All bits for the first `count` lanes, at COUNTED + VEC - count. */
#if BATCHNORM_SINGLE
static const int32_t COUNTED[2 * VEC] = {[0 ... VEC - 1] = -1};
#else
static const int64_t COUNTED[2 * VEC] = {[0 ... VEC - 1] = -1};
#endif

/* `count` values, fewer than VEC, and those of `fill` after them; nothing is read beyond them. */
static inline vec load_first(const real *p, ptrdiff_t count, vec fill)
{
#if defined(__AVX512F__) && BATCHNORM_SINGLE
    return (vec)_mm512_mask_loadu_ps((__m512)fill, (__mmask16)((1u << count) - 1), p);
#elif defined(__AVX512F__)
    return (vec)_mm512_mask_loadu_pd((__m512d)fill, (__mmask8)((1u << count) - 1), p);
#elif defined(__AVX__)
    __m256i counted = _mm256_loadu_si256((const __m256i *)(COUNTED + VEC - count));
#if BATCHNORM_SINGLE
    return (vec)_mm256_blendv_ps((__m256)fill, _mm256_maskload_ps(p, counted), (__m256)counted);
#else
    return (vec)_mm256_blendv_pd((__m256d)fill, _mm256_maskload_pd(p, counted), (__m256d)counted);
#endif
#else
    for (int i = 0; i < (int)count; i++)
        fill[i] = p[i];
    return fill;
#endif
}

static inline void store_first(real *p, vec v, ptrdiff_t count)
{
#if defined(__AVX512F__) && BATCHNORM_SINGLE
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#elif defined(__AVX512F__)
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)v);
#else
    real value[VEC]; /* a masked store of AVX2 takes twenty times as long on AMD */
    store_vec(value, v);
    for (int i = 0; i < (int)count; i++)
        p[i] = value[i];
#endif
}

/* Stores that go around the cache, in aligned pieces, for results larger than any cache: an ordinary store reads the
 * line first. */
#if defined(__SSE2__) && BYTES > 16
#define CAN_STREAM 1

static inline void stream_first(real *p, vec v, ptrdiff_t count)
{
    real value[VEC];
    int i = 0;
    store_vec(value, v);
    for (; i + PIECE <= (int)count; i += PIECE)
        _mm_stream_ps((float *)(p + i), _mm_loadu_ps((const float *)(value + i)));
    for (; i < (int)count; i++)
        p[i] = value[i];
}

/* Before another thread may read what was streamed. */
static inline void finish_streaming(void)
{
    _mm_sfence();
}
#else
#define CAN_STREAM 0

static inline void stream_first(real *p, vec v, ptrdiff_t count)
{
    store_first(p, v, count);
}

static inline void finish_streaming(void)
{
}
#endif

/* Values from p to where the next piece begins. */
static inline ptrdiff_t to_piece(const real *p)
{
    return (ptrdiff_t)(-(uintptr_t)p / sizeof(real) % PIECE);
}

static inline void prefetch(const void *p)
{
    __builtin_prefetch(p);
}

/* Add a number to each of PART totals. */
static inline void add_part(double *total, part p)
{
    wide_part sum;
    memcpy(&sum, total, sizeof sum);
    /* GCC 12 makes five instructions of a conversion that is one. */
#if BATCHNORM_SINGLE && defined(__AVX512F__)
    sum += (wide_part)_mm512_cvtps_pd((__m256)p);
#elif BATCHNORM_SINGLE && defined(__AVX__)
    sum += (wide_part)_mm256_cvtps_pd((__m128)p);
#else
    sum += __builtin_convertvector(p, wide_part);
#endif
    memcpy(total, &sum, sizeof sum);
}

static inline void add_vec(double *total, vec v)
{
    part p[VEC / PART];
    memcpy(p, &v, sizeof v);
    for (int i = 0; i < VEC / PART; i++)
        add_part(total + i * PART, p[i]);
}

static inline void add_wide(double *total, wide v)
{
    for (int i = 0; i < VEC; i++)
        total[i] += v[i];
}

/* Fold LANES sums, and add them to TOTALS totals. */
static inline void add_lanes_vec(double *total, const vec *lanes)
{
    folded f[LANES / TOTALS];
    part p[TOTALS / PART];
    memcpy(f, lanes, sizeof f);
    for (int i = 1; i < LANES / TOTALS; i++)
        f[0] += f[i];
    memcpy(p, f, sizeof p);
    for (int i = 0; i < TOTALS / PART; i++)
        add_part(total + i * PART, p[i]);
}

static inline void add_lanes_wide(double *total, const wide *lanes)
{
    double f[LANES];
    memcpy(f, lanes, sizeof f);
    for (int i = TOTALS; i < LANES; i++)
        f[i % TOTALS] += f[i];
    for (int i = 0; i < TOTALS; i++)
        total[i] += f[i];
}

#endif
