/* How many threads whoever calls shares its work with. */
#ifdef _OPENMP
#include <omp.h>
#endif

#include "formats.h"

/* From now on none, in these kernels and in all else that uses the same OpenMP. */
EXPORT void work_alone(void) {
#ifdef _OPENMP
    omp_set_num_threads(1);
#endif
}
