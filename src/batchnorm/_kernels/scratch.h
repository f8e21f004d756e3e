/* Memory for the numbers per channel of one call. The next call gets it again: the C library may return memory to the
 * system after each call, which then has to clear its pages anew, and that can take longer than the call.
 */
#ifndef BATCHNORM_SCRATCH_H
#define BATCHNORM_SCRATCH_H

#include <stdlib.h>

#if defined(__SANITIZE_ADDRESS__)
enum { KEPT = 0 }; /* so that writes beyond the end are found */
#else
enum { KEPT = 1 << 20 }; /* the most bytes that stay allocated between calls */
#endif

typedef struct {
    size_t size, unused; /* so that the numbers are aligned like memory from malloc */
    double number[];
} Scratch;

static Scratch *kept_scratch; /* or NULL: nobody else has it */

static inline void give_scratch(double *number)
{
    Scratch *scratch = (Scratch *)((char *)number - sizeof(Scratch));
    if (scratch->size <= KEPT)
        scratch = __atomic_exchange_n(&kept_scratch, scratch, __ATOMIC_ACQ_REL);
    free(scratch);
}

/* NULL if there is no memory; `give_scratch` ends its use. */
static inline double *take_scratch(size_t size)
{
    Scratch *scratch = __atomic_exchange_n(&kept_scratch, NULL, __ATOMIC_ACQ_REL);
    if (scratch == NULL || scratch->size < size) {
        free(scratch);
        scratch = malloc(sizeof(Scratch) + size);
        if (scratch == NULL)
            return NULL;
        scratch->size = size;
    }
    return scratch->number;
}

#endif
