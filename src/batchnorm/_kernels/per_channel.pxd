"""What the kernel modules need of the numbers per channel."""

cdef void *borrow_values(str name, values, Py_ssize_t least, Py_ssize_t itemsize, bint written) except NULL
cdef double *borrow(str name, table, Py_ssize_t rows, Py_ssize_t channels) except NULL
cdef int set_parameters(double *s, gamma, beta, Py_ssize_t C) except -1
cdef int take_parameters(const double *g, dgamma, dbeta, Py_ssize_t C) except -1
