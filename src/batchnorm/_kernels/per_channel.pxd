"""What the kernel modules need of the numbers per channel."""

cdef double *borrow(str name, table, Py_ssize_t rows, Py_ssize_t channels) except NULL
cdef int set_parameters(double *s, gamma, beta, Py_ssize_t C) except -1
cdef int take_parameters(const double *g, dgamma, dbeta, Py_ssize_t C) except -1
