/* float16 and bfloat16: loaded exactly as float32, and rounded to nearest (ties to even) when stored.
 *
 * The conversions give the same bits on every processor. They never turn a float16 into a subnormal float32, because a
 * processor may be set to flush those to 0.
 */
#ifndef BATCHNORM_HALF_H
#define BATCHNORM_HALF_H

#include "vector.h"

#define IS_SHORT (BATCHNORM_FLOAT16 || BATCHNORM_BFLOAT16)

#if IS_SHORT
typedef uint16_t stored;
typedef uint16_t packed __attribute__((vector_size(VEC * sizeof(stored))));
typedef uint32_t bits __attribute__((vector_size(BYTES)));

static inline bits chosen(mask condition, bits a, bits b)
{
    return ((bits)condition & a) | (~(bits)condition & b);
}
#endif

/* Whether two vectors are rounded together. */
#if BATCHNORM_BFLOAT16 && BYTES == 64
#define PACKS_TWO 1
#else
#define PACKS_TWO 0
#endif

#if BATCHNORM_BFLOAT16

typedef uint16_t words __attribute__((vector_size(BYTES)));

/* GCC 12 uses five instructions for each of these conversions; the processor needs one or two. */
static inline vec unpacked(packed h)
{
#if defined(__AVX512F__)
    words place;
    for (int i = 0; i < 2 * VEC; i++)
        place[i] = i / 2;
    return (vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)place, _mm512_castsi256_si512((__m256i)h));
#elif defined(__AVX2__)
    const __m256i high = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1, -1, 10,
                                          11, -1, -1, 12, 13, -1, -1, 14, 15);
    return (vec)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256((__m128i)h), high);
#else
    return (vec)(__builtin_convertvector(h, bits) << 16);
#endif
}

static inline packed shortened(bits b)
{
#if defined(__AVX512F__)
    return (packed)_mm512_cvtepi32_epi16((__m512i)b);
#elif defined(__AVX2__)
    return (packed)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)b), _mm256_extracti128_si256((__m256i)b, 1));
#else
    return __builtin_convertvector(b, packed);
#endif
}

/* A NaN stays NaN, because those of x, of the coefficients and of the processor have zeros in the lower half. */
static inline packed pack(vec v)
{
    bits b = (bits)v;
    return shortened((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

#if PACKS_TWO
/* The same for two vectors at once, in half the instructions: the upper halves go up by 1 where the lower ones are more
 * than half of that, or half of it beside an odd upper half. */
static inline words pack_two(vec first, vec second)
{
    words lower, upper;
    for (int i = 0; i < 2 * VEC; i++) {
        lower[i] = 2 * i;
        upper[i] = 2 * i + 1;
    }
    lower = (words)_mm512_permutex2var_epi16((__m512i)first, (__m512i)lower, (__m512i)second);
    upper = (words)_mm512_permutex2var_epi16((__m512i)first, (__m512i)upper, (__m512i)second);
    return upper - (words)(lower > 0x8000 - (upper & 1));
}
#endif

#elif BATCHNORM_FLOAT16 && defined(__AVX512F__)

static inline vec unpacked(packed h)
{
    return (vec)_mm512_cvtph_ps((__m256i)h);
}

static inline packed pack(vec v)
{
    return (packed)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif BATCHNORM_FLOAT16 && defined(__F16C__)

static inline vec unpacked(packed h)
{
    return (vec)_mm256_cvtph_ps((__m128i)h);
}

static inline packed pack(vec v)
{
    return (packed)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif BATCHNORM_FLOAT16

#define REBIASED (112u << 23)      /* the difference between the exponents of float16 and float32 */

/* Not inline, because they are long, and only old processors need them. */
static __attribute__((noinline)) vec unpacked(packed h)
{
    bits all = __builtin_convertvector(h, bits), size = all & 0x7fff;
    bits normal = (size << 13) + REBIASED;
    bits small = (bits)(__builtin_convertvector((mask)size, vec) * 0x1p-24f);
    bits special = (normal + REBIASED) | ((bits)((mask)size > 0x7c00) & 0x400000);
    bits value = chosen((mask)size < 0x400, small, chosen((mask)size < 0x7c00, normal, special));
    return (vec)(value | (all & 0x8000) << 16);
}

static __attribute__((noinline)) packed pack(vec v)
{
    bits all = (bits)v, size = all & 0x7fffffff;
    bits normal = (size + 0xfff + (size >> 13 & 1) - REBIASED) >> 13;
    bits small = (bits)((vec)size * 0x1p24f + 0x1p23f) - 0x4b000000;       /* in units of 2^-24, below those of 2^23 */
    bits special = 0x7c00 | ((bits)(v != v) & (0x200 | (size >> 13 & 0x3ff)));
    bits value = chosen((mask)size < 0x38800000, small, chosen((mask)size < 0x47800000, normal, special));
    return __builtin_convertvector(value | (all >> 16 & 0x8000), packed);
}

#endif

#if IS_SHORT && !defined(__AVX512F__)
/* `count` values, fewer than VEC, and zeros after them. */
static inline packed few(const stored *p, ptrdiff_t count)
{
    packed h = {0};
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    for (int i = 0; i < (int)count; i++)
        h[i] = p[i];
#else
    /* In registers, because loading a vector that was just stored value by value waits for those stores. */
    uint64_t word[VEC / 4] = {0};
    if (VEC > 4 && count >= 4) {
        memcpy(word, p, 8);
        memcpy(word + VEC / 4 - 1, p + count - 4, 8);
        word[VEC / 4 - 1] = word[VEC / 4 - 1] >> 8 * (8 - count) >> 8 * (8 - count);
    } else {
        word[0] = p[0] | (uint64_t)p[count / 2] << 16 * (count / 2) | (uint64_t)p[count - 1] << 16 * (count - 1);
    }
    memcpy(&h, word, sizeof h);
#endif
    return h;
}
#endif

#endif
