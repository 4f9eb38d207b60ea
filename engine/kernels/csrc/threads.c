/* The number of threads that the calling thread shares its work with. */
#ifdef _OPENMP
#include <omp.h>
#endif

#include "formats.h"

/* None from now on, in these kernels and in all code that uses the same OpenMP. */
EXPORT void work_alone(void) {
#ifdef _OPENMP
    omp_set_num_threads(1);
#endif
}
