/* A vector of float64 as wide as a register, the one thing the kernels need that Cython cannot say.
 *
 * Written with the vector extensions of GCC and Clang: operations go lane by lane and nothing is reassociated. The
 * kernels keep a fixed number of lanes whatever VEC is, so every width gives the same bits. The compiler is not left to
 * decide whether a loop becomes vector code, which depends on details of the code around it.
 * float32 is widened when loaded and rounded once when stored.
 */
#ifndef BATCHNORM_VECTOR_H
#define BATCHNORM_VECTOR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define VEC 8
#elif defined(__AVX__)
#define VEC 4
#else
#define VEC 2
#endif

/* So many that an addition need not wait for the one before: four vectors of AVX-512. */
#define LANES 32
#define VECS (LANES / VEC)

/* Rows of columns taken together, so that an accumulator is loaded once for eight values. */
#define UNROLLED 8
#define PADDED (UNROLLED * VEC)

/* A number for each column of a tile, and a vector more for columns that do not fill one. Aligned, because a vector
 * that lies in two cache lines is loaded twice. */
#define WIDEST 1024
typedef struct {
    double of[WIDEST + VEC] __attribute__((aligned(64)));
} Columns;

typedef double vec __attribute__((vector_size(8 * VEC)));
typedef float narrow_vec __attribute__((vector_size(4 * VEC)));

/* Spelled out because GCC 12 makes one instruction of this and five of __builtin_convertvector. */
static inline vec load_float(const float *p)
{
#if VEC == 8
    return (vec){p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
#elif VEC == 4
    return (vec){p[0], p[1], p[2], p[3]};
#else
    return (vec){p[0], p[1]};
#endif
}

static inline vec load_double(const double *p)
{
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store_float(float *p, vec v)
{
    narrow_vec n = __builtin_convertvector(v, narrow_vec);
    memcpy(p, &n, sizeof n);
}

static inline void store_double(double *p, vec v)
{
    memcpy(p, &v, sizeof v);
}

/* Stores that go around the cache, in pieces of 16 bytes, for results larger than any cache: an ordinary store reads
 * the line first. A piece has to be aligned. */
#define PIECE 16

#if defined(__SSE2__) && VEC > 2
#include <xmmintrin.h>

#define CAN_STREAM 1

static inline void stream_pieces(void *p, const void *bytes, size_t size)
{
    for (size_t at = 0; at < size; at += PIECE) {
        __m128 piece;
        memcpy(&piece, (const char *)bytes + at, PIECE);
        _mm_stream_ps((float *)((char *)p + at), piece);
    }
}

static inline void stream_float(float *p, vec v)
{
    narrow_vec n = __builtin_convertvector(v, narrow_vec);
    stream_pieces(p, &n, sizeof n);
}

static inline void stream_double(double *p, vec v)
{
    stream_pieces(p, &v, sizeof v);
}

/* Before another thread may read what was streamed. */
static inline void finish_streaming(void)
{
    _mm_sfence();
}
#else
#define CAN_STREAM 0

static inline void stream_float(float *p, vec v)
{
    store_float(p, v);
}

static inline void stream_double(double *p, vec v)
{
    store_double(p, v);
}

static inline void finish_streaming(void)
{
}
#endif

/* Bytes from p to the next piece. */
static inline ptrdiff_t to_piece(const void *p)
{
    return (ptrdiff_t)(-(uintptr_t)p % PIECE);
}

/* 0 for the lanes before the last `rest` and 1 for those, at `COUNTED + rest`. */
static const double COUNTED[2 * LANES] = {[LANES ... 2 * LANES - 1] = 1};

/* Sum of the values by halving. */
static inline double fold_vec(vec v)
{
#if VEC == 8
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#elif VEC == 4
    return (v[0] + v[2]) + (v[1] + v[3]);
#else
    return v[0] + v[1];
#endif
}

static inline vec zero_vec(void)
{
    return (vec){0};
}

/* The same number in every lane; of a zero the sign, too. */
static inline vec broadcast(double value)
{
    return value - zero_vec();
}

/* Pairs: a number and what its rounding left over. The same lines for one float64 and for a vector of them. */
#define PAIRS(type, of_type, leading)                                                                                  \
    /* a + b (Knuth, TAOCP 2, section 4.2.2). */                                                                       \
    static inline type two_sum##of_type(type a, type b, type *left_over)                                               \
    {                                                                                                                  \
        type sum = a + b, back = sum - a;                                                                              \
        *left_over = (a - (sum - back)) + (b - back);                                                                  \
        return sum;                                                                                                    \
    }                                                                                                                  \
    /* a * b (Dekker 1971), by halves whose products are exact: no fused multiply-add, which not every level has. */   \
    static inline type two_product##of_type(type a, type b, type *left_over)                                           \
    {                                                                                                                  \
        type product = a * b, a1 = leading(a), b1 = leading(b), a2 = a - a1, b2 = b - b1;                              \
        *left_over = ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2;                                              \
        return product;                                                                                                \
    }

/* The first 26 of 53 bits. */
#define LEADING_BITS (~(int64_t)0x7ffffff)

static inline double leading(double value)
{
    int64_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits &= LEADING_BITS;
    memcpy(&value, &bits, sizeof bits);
    return value;
}

static inline vec leading_vec(vec v)
{
    typedef int64_t bits __attribute__((vector_size(8 * VEC)));
    return (vec)((bits)v & LEADING_BITS);
}

PAIRS(double, , leading)
PAIRS(vec, _vec, leading_vec)

static inline void prefetch(const void *p)
{
    __builtin_prefetch(p);
}

#endif
