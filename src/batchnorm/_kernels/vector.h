/* Vectors as wide as a register, which Cython cannot express.
 *
 * Written with the vector extensions of GCC and Clang: operations go lane by lane and nothing is reassociated, so
 * every width gives the same bits, and the compiler need not decide whether a loop becomes vector code. A module is
 * compiled for one type, float32 if BATCHNORM_SINGLE is 1: a `vec` holds values of that type, a `wide` float64.
 */
#ifndef BATCHNORM_VECTOR_H
#define BATCHNORM_VECTOR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

/* Inline functions have literals among their arguments, and must be compiled separately for each. */
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

/* Sums of squares that average below SMALLEST, or exceed LARGEST, may have lost digits; likewise products with
 * coefficients outside FINEST to COARSEST. */
#define SMALLEST (IS_DOUBLE ? 0x1p-1000 : 0x1p-100)
#define LARGEST (IS_DOUBLE ? 0x1p1023 : 0x1p120)
#define FINEST 0x1p-100
#define COARSEST 0x1p100

enum {
    VEC = BYTES / sizeof(real), /* values in a vector */
    PART = BYTES / sizeof(double), /* values in a vector of float64 */
    LANES = 64 / sizeof(real),  /* sums side by side along a row: one cache line, for any VEC */
    VECTORS = LANES / PART,     /* the most vectors for these lanes */
    CARRIED = 256 / LANES,      /* values that are added to each lane before the lanes are emptied */
    UNROLLED = 8,               /* vectors that are summed as a tree */
    TOTALS = 8,                 /* sums into which the lanes are folded before they are added up in float64 */
    WIDEST = 1024,              /* the most columns of a tile */
    BEYOND = 32                 /* columns repeated after the last one, for vectors that go on in the next row */
};

typedef real vec __attribute__((vector_size(BYTES)));
typedef double wide __attribute__((vector_size(BYTES)));
typedef int64_t wide_mask __attribute__((vector_size(BYTES)));
#if BATCHNORM_SINGLE
typedef int32_t mask __attribute__((vector_size(BYTES)));
#else
typedef wide_mask mask;
#endif
typedef real part __attribute__((vector_size(PART * sizeof(real))));
typedef real folded __attribute__((vector_size(TOTALS * sizeof(real))));
typedef double halved __attribute__((vector_size(TOTALS / 2 * sizeof(double))));
typedef double quartered __attribute__((vector_size(TOTALS / 4 * sizeof(double))));

/* A number for each column of a tile. Aligned, because a vector that crosses a cache line is loaded twice. */
typedef struct {
    real at[WIDEST + BEYOND] __attribute__((aligned(64)));
} Row;

typedef struct {
    double at[WIDEST + BEYOND] __attribute__((aligned(64)));
} WideRow;

/* GCC 12 uses five instructions for this conversion; the processor has one. */
static inline wide widened(part p)
{
#if BATCHNORM_SINGLE && defined(__AVX512F__)
    return (wide)_mm512_cvtps_pd((__m256)p);
#elif BATCHNORM_SINGLE && defined(__AVX__)
    return (wide)_mm256_cvtps_pd((__m128)p);
#else
    return __builtin_convertvector(p, wide);
#endif
}

static inline vec load_column(const real *p)
{
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store_column(real *p, vec v)
{
    memcpy(p, &v, sizeof v);
}

static inline wide load_wide_column(const real *p)
{
    part v;
    memcpy(&v, p, sizeof v);
    return widened(v);
}

/* The number, or the one NaN whose digits are all in the upper half of a float32. */
static inline double plain(double value)
{
    return value == value ? value : (double)__builtin_nanf("");
}

/* Many numbers of float64 in the data's type. Not inline: it is called for each coefficient in each of the loops. */
static __attribute__((noinline)) void narrow(const double *restrict value, real *restrict rounded, ptrdiff_t count)
{
    for (ptrdiff_t i = 0; i < count; i++)
        rounded[i] = (real)plain(value[i]);
}

/* The same number in every lane, even the sign of a zero. */
static inline vec same_vec(double value)
{
    return (real)plain(value) - (vec){0};
}

static inline wide same_wide(double value)
{
    return plain(value) - (wide){0};
}

static inline void prefetch(const void *p)
{
    __builtin_prefetch(p);
}

/* Into the second cache, which can wait for more lines at once than the nearest one. */
static inline void prefetch_early(const void *p)
{
    __builtin_prefetch(p, 0, 2);
}

static inline vec everywhere_vec(real value)
{
    return value - (vec){0};
}

static inline wide everywhere_wide(real value)
{
    return (double)value - (wide){0};
}

/* `then` in the lanes where a <= b, which is false for NaN, and `otherwise` in the others. */
static inline vec at_most_vec(vec a, vec b, vec then, vec otherwise)
{
    mask m = a <= b;
    return (vec)((m & (mask)then) | (~m & (mask)otherwise));
}

static inline wide at_most_wide(wide a, wide b, wide then, wide otherwise)
{
    wide_mask m = a <= b;
    return (wide)((m & (wide_mask)then) | (~m & (wide_mask)otherwise));
}

/* PART numbers rounded to the data's type. */
static inline vec narrowed(wide v)
{
    vec rounded = {0};
    for (int i = 0; i < PART; i++)
        rounded[i] = (real)v[i];
    __asm__("" : "+m"(rounded)); /* otherwise GCC 12 drops this conversion together with the one back */
    return rounded;
}

static inline wide first_part(vec v)
{
    part p;
    memcpy(&p, &v, sizeof p);
    return widened(p);
}

/* Add one number to each of PART totals. */
static inline void add_wide(double *total, wide v)
{
    wide sum;
    memcpy(&sum, total, sizeof sum);
    sum += v;
    memcpy(total, &sum, sizeof sum);
}

static inline void add_vec(double *total, vec v)
{
    part p[VEC / PART];
    memcpy(p, &v, sizeof v);
    for (int i = 0; i < VEC / PART; i++)
        add_wide(total + i * PART, widened(p[i]));
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
        add_wide(total + i * PART, widened(p[i]));
}

/* Sum of TOTALS totals by halving. */
static inline double fold(const double *total)
{
    halved h[2];
    quartered q[2];
    memcpy(h, total, sizeof h);
    h[0] += h[1];
    memcpy(q, h, sizeof q);
    q[0] += q[1];
    return q[0][0] + q[0][1];
}

/* Sum of `count` numbers, by way of TOTALS totals; some beyond the last one are read, but not used. */
static inline double sum_of(const double *number, ptrdiff_t count)
{
    static const int64_t COUNTED[2 * TOTALS] = {[0 ... TOTALS - 1] = -1};
    wide total[TOTALS / PART] = {{0}}, v;
    wide_mask counted;
    double totals[TOTALS];
    for (ptrdiff_t i = 0; i < count; i += TOTALS)
        for (int j = 0; j < TOTALS / PART; j++) {
            memcpy(&v, number + i + j * PART, sizeof v);
            if (i + TOTALS > count) {
                memcpy(&counted, COUNTED + TOTALS - (count - i) + j * PART, sizeof counted);
                v = (wide)((wide_mask)v & counted);
            }
            total[j] += v;
        }
    memcpy(totals, total, sizeof totals);
    return fold(totals);
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
