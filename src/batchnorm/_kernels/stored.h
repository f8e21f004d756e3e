/* Values in memory: loads and stores of whole vectors and of the ends of rows.
 *
 * `stored` is the type of x, y, dy and dx: the type of the computation, or a 16-bit float.
 */
#ifndef BATCHNORM_STORED_H
#define BATCHNORM_STORED_H

#include "closed.h"
#include "half.h"

/* The format of a stored value in a Python buffer. */
#if IS_SHORT
#define FORMAT 'H'
#else
#define FORMAT (IS_DOUBLE ? 'd' : 'f')
typedef real stored;
typedef vec packed;

static inline vec unpacked(packed v)
{
    return v;
}

static inline packed pack(vec v)
{
    return v;
}
#endif

enum {
    LINE = 64 / sizeof(stored),                             /* values in a cache line */
    TWO_LINES = 2 * LINE,                                   /* shorter rows are written as columns */
    TRAINS = sizeof(stored) == sizeof(float) && BYTES > 16  /* has more loops for activations: for most that is trained */
};

/* Prefetch memory that is needed soon, line by line: no processor predicts several rows at a time, or gaps. */
static inline void fetch(const stored *x, const stored *dy, int gradient, ptrdiff_t values)
{
    for (ptrdiff_t i = 0; i < values; i += LINE) {
        prefetch_early(x + i);
        if (gradient)
            prefetch_early(dy + i);
    }
}

static inline real value_at(const stored *p)
{
    packed h = {*p};
    return unpacked(h)[0];
}

static inline stored stored_of(real value)
{
    vec v = {value};
    return pack(v)[0];
}

static inline vec load_vec(const stored *p)
{
    packed h;
    memcpy(&h, p, sizeof h);
    return unpacked(h);
}

static inline void store_vec(stored *p, vec v)
{
    packed h = pack(v);
    memcpy(p, &h, sizeof h);
}

static inline void store_two(stored *p, vec first, vec second)
{
#if PACKS_TWO
    words h = pack_two(first, second);
    memcpy(p, &h, sizeof h);
#else
    store_vec(p, first);
    store_vec(p + VEC, second);
#endif
}

/* All bits for the first `count` lanes, at COUNTED + VEC - count. */
#if BATCHNORM_SINGLE
static const int32_t COUNTED[2 * VEC] = {[0 ... VEC - 1] = -1};
#else
static const int64_t COUNTED[2 * VEC] = {[0 ... VEC - 1] = -1};
#endif

/* The first `count` lanes of a, and the others of b. */
static inline vec first_lanes(vec a, vec b, ptrdiff_t count)
{
    mask counted;
    memcpy(&counted, COUNTED + VEC - count, sizeof counted);
    return (vec)((counted & (mask)a) | (~counted & (mask)b));
}

/* `count` values, fewer than VEC, followed by those of `fill`; nothing beyond them is read. */
static inline vec load_first(const stored *p, ptrdiff_t count, vec fill)
{
#if IS_SHORT && defined(__AVX512F__)
    __mmask16 counted = (__mmask16)((1u << count) - 1);
    packed h = (packed)_mm256_maskz_loadu_epi16(counted, p);
    return (vec)_mm512_mask_mov_ps((__m512)fill, counted, (__m512)unpacked(h));
#elif IS_SHORT
    mask counted;
    memcpy(&counted, COUNTED + VEC - count, sizeof counted);
    return (vec)chosen(counted, (bits)unpacked(few(p, count)), (bits)fill);
#elif defined(__AVX512F__) && BATCHNORM_SINGLE
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

/* Store `count` values one by one. A masked store of AVX2 takes twenty times as long on AMD, and so does one of AVX-512
 * next to lines that are streamed. */
static inline void store_each(stored *p, vec v, ptrdiff_t count)
{
    stored value[VEC];
    store_vec(value, v);
    for (int i = 0; i < (int)count; i++)
        p[i] = value[i];
}

static inline void store_first(stored *p, vec v, ptrdiff_t count)
{
#if defined(__AVX512F__) && IS_SHORT
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), (__m256i)pack(v));
#elif defined(__AVX512F__) && BATCHNORM_SINGLE
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#elif defined(__AVX512F__)
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)v);
#else
    store_each(p, v, count);
#endif
}

/* PART values as float64 numbers, or fewer, followed by those of `fill`. */
static inline wide load_wide(const stored *p)
{
    part v;
#if IS_SHORT
    vec all = load_first(p, PART, (vec){0});
    memcpy(&v, &all, sizeof v);
#else
    memcpy(&v, p, sizeof v);
#endif
    return widened(v);
}

static inline wide load_first_wide(const stored *p, ptrdiff_t count, wide fill)
{
    for (int i = 0; i < (int)count; i++)
        fill[i] = value_at(p + i);
    return fill;
}

static inline void store_wide(stored *p, wide v, ptrdiff_t count)
{
    vec rounded = {0};
    for (int i = 0; i < PART; i++)
        rounded[i] = (real)v[i];
    store_first(p, rounded, count);
}

/* v in the lanes whose byte is not 0, else `otherwise`. GCC 12 converts the bytes one by one, although processors have
 * instructions for that. */
static inline wide counted_wide(const uint8_t *bytes, wide v, wide otherwise)
{
#if defined(__AVX512F__)
    __m128i few = _mm_loadl_epi64((const __m128i *)bytes);
    return (wide)_mm512_mask_mov_pd((__m512d)otherwise, (__mmask8)_mm_test_epi8_mask(few, few), (__m512d)v);
#else
    wide_mask m;
#if defined(__AVX2__)
    int32_t few;
    memcpy(&few, bytes, PART);
    m = (wide_mask)_mm256_cvtepi8_epi64(_mm_cvtsi32_si128(few));
#else
    for (int i = 0; i < PART; i++)
        m[i] = bytes[i];
#endif
    m = m != 0;
    return (wide)((m & (wide_mask)v) | (~m & (wide_mask)otherwise));
#endif
}

static inline vec counted_vec(const uint8_t *bytes, vec v, vec otherwise)
{
#if !BATCHNORM_SINGLE
    return counted_wide(bytes, v, otherwise);
#elif defined(__AVX512F__)
    __m128i few = _mm_loadu_si128((const __m128i *)bytes);
    return (vec)_mm512_mask_mov_ps((__m512)otherwise, _mm_test_epi8_mask(few, few), (__m512)v);
#else
    mask m;
#if defined(__AVX2__)
    m = (mask)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)bytes));
#elif defined(__SSE4_1__)
    int32_t few;
    memcpy(&few, bytes, VEC);
    m = (mask)_mm_cvtepi8_epi32(_mm_cvtsi32_si128(few));
#else
    for (int i = 0; i < VEC; i++)
        m[i] = bytes[i];
#endif
    m = m != 0;
    return (vec)((m & (mask)v) | (~m & (mask)otherwise));
#endif
}

/* Stores around the cache, for results larger than any cache: an ordinary store reads the line first. Each line is
 * written either one way or the other, because mixed stores wait for each other. */
#if defined(__SSE2__) && BYTES > 16
#define CAN_STREAM 1

static inline void stream_vec(stored *p, vec v)
{
    packed h = pack(v);
#if BYTES == 64 && !IS_SHORT
    _mm512_stream_ps((void *)p, (__m512)h);
#else
    __m128 piece[sizeof h / 16];
    memcpy(piece, &h, sizeof h);
    for (size_t i = 0; i < sizeof h / 16; i++)
        _mm_stream_ps((float *)p + 4 * i, piece[i]);
#endif
}

static inline void stream_two(stored *p, vec first, vec second)
{
#if PACKS_TWO
    _mm512_stream_si512((void *)p, (__m512i)pack_two(first, second));
#else
    stream_vec(p, first);
    stream_vec(p + VEC, second);
#endif
}

/* Needed before another thread may read what was streamed. */
static inline void finish_streaming(void)
{
    _mm_sfence();
}
#else
#define CAN_STREAM 0

static inline void stream_vec(stored *p, vec v)
{
    store_vec(p, v);
}

static inline void stream_two(stored *p, vec first, vec second)
{
    store_two(p, first, second);
}

static inline void finish_streaming(void)
{
}
#endif

/* The number of values from p to the start of the next line. */
static inline ptrdiff_t to_line(const stored *p)
{
    return (ptrdiff_t)(-(uintptr_t)p / sizeof(stored) % LINE);
}

#endif
