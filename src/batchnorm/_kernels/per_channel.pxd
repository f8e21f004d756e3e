"""The functions for numbers per channel that the kernel modules use."""

cdef void *borrow_values(str name, values, Py_ssize_t least, Py_ssize_t itemsize, bint written) except NULL
cdef double *borrow(str name, table, Py_ssize_t rows, Py_ssize_t channels) except NULL
cdef int fill_row(double *row, values, Py_ssize_t channels, double otherwise) except -1
cdef int set_parameters(double *s, gamma, beta, Py_ssize_t C) except -1
cdef int take_parameters(const double *g, dgamma, dbeta, Py_ssize_t C) except -1

cdef struct Selection:              # which values count; a place is one of the N·S values of every channel
    bint on
    bint copied                     # the summing loops see copies
    const unsigned char *mask       # whether each place counts, padded by a vector, or NULL
    const Py_ssize_t *lengths       # how many places count at the start of each sequence, or NULL
    Py_ssize_t period               # places of a sequence
    const void *weights             # how much each place counts, padded by a vector, or NULL
    double fill                     # y where x does not count

cdef int set_selection(Selection *chosen, selection, Py_ssize_t places, Py_ssize_t S, Py_ssize_t itemsize,
                       Py_ssize_t room) except -1
