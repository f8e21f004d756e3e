/* One bit per value, in memory order: whether the activation is closed there.
 */
#ifndef BATCHNORM_CLOSED_H
#define BATCHNORM_CLOSED_H

#include "vector.h"

enum {
    SPARE = 3   /* bytes of padding after the bits, because several are read at once */
};

/* Bit i is 1 where a[i] <= b[i]. */
static inline unsigned at_most_bits_vec(vec a, vec b)
{
    mask m = a <= b;
#if defined(__AVX512F__) && BATCHNORM_SINGLE
    return _mm512_movepi32_mask((__m512i)m);
#elif defined(__AVX512F__)
    return _mm512_movepi64_mask((__m512i)m);
#elif defined(__AVX__) && BATCHNORM_SINGLE
    return (unsigned)_mm256_movemask_ps((__m256)m);
#elif defined(__AVX__)
    return (unsigned)_mm256_movemask_pd((__m256d)m);
#elif defined(__SSE2__) && BATCHNORM_SINGLE
    return (unsigned)_mm_movemask_ps((__m128)m);
#else
    unsigned found = 0;
    for (int i = 0; i < VEC; i++)
        found |= (m[i] & 1u) << i;
    return found;
#endif
}

static inline unsigned at_most_bits_wide(wide a, wide b)
{
    wide_mask m = a <= b;
    unsigned found = 0;
    for (int i = 0; i < PART; i++)
        found |= (m[i] & 1u) << i;
    return found;
}

/* Bits that are written one after the other. Another thread may share the first and the last byte. */
typedef struct {
    uint8_t *byte;
    uint64_t bits;
    int count;
    int shared;
} Notes;

static inline Notes notes_from(uint8_t *closed, ptrdiff_t at)
{
    return (Notes){closed + at / 8, 0, (int)(at % 8), 1};
}

static inline void share_byte(Notes *notes)
{
    __atomic_fetch_or(notes->byte, (uint8_t)notes->bits, __ATOMIC_RELAXED);
}

static inline void note(Notes *notes, unsigned found, ptrdiff_t count)
{
    notes->bits |= (uint64_t)found << notes->count;
    for (notes->count += (int)count; notes->count >= 8; notes->count -= 8) {
        if (notes->shared)
            share_byte(notes);
        else
            *notes->byte = (uint8_t)notes->bits;
        notes->shared = 0;
        notes->byte++;
        notes->bits >>= 8;
    }
}

static inline void finish_notes(Notes *notes)
{
    if (notes->count)
        share_byte(notes);
}

/* `then` in the lanes whose bit is set, counted from place `at`, and `otherwise` in the others. */
static inline vec closed_vec(const uint8_t *closed, ptrdiff_t at, vec then, vec otherwise)
{
    const uint8_t *byte = closed + at / 8;
    int found = (byte[0] | byte[1] << 8 | byte[2] << 16) >> at % 8;
    mask lane, m;
    for (int i = 0; i < VEC; i++)
        lane[i] = 1 << i;
    m = ((found - (mask){0}) & lane) != 0;
    return (vec)((m & (mask)then) | (~m & (mask)otherwise));
}

#endif
