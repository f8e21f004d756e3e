/* What clang's ThreadSanitizer does not see by itself: memcpy and memset of modules beside modules it does not know. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <string.h>

void __tsan_read_range(void *, unsigned long);
void __tsan_write_range(void *, unsigned long);

static inline __attribute__((always_inline)) void *seen_memcpy(void *to, const void *from, size_t n)
{
    if (n) {
        __tsan_read_range((void *)from, n);
        __tsan_write_range(to, n);
    }
    return __builtin_memcpy(to, from, n);
}

static inline __attribute__((always_inline)) void *seen_memset(void *to, int byte, size_t n)
{
    if (n)
        __tsan_write_range(to, n);
    return __builtin_memset(to, byte, n);
}

#define memcpy(to, from, n) seen_memcpy(to, from, n)
#define memset(to, byte, n) seen_memset(to, byte, n)
