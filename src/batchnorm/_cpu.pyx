"""Which levels of kernels exist here: those this processor can run and those this build has.

Compiled without any instruction-set option, so that asking is safe on every processor. A kernel module itself must
not be asked: its first instructions may already be ones that the processor does not have.
"""
cdef extern from *:
    """
    #if defined(BATCHNORM_KNOWS_LEVELS)
    static int runs_v2(void) { __builtin_cpu_init(); return __builtin_cpu_supports("x86-64-v2") != 0; }
    static int runs_v3(void) { __builtin_cpu_init(); return __builtin_cpu_supports("x86-64-v3") != 0; }
    static int runs_v4(void) { __builtin_cpu_init(); return __builtin_cpu_supports("x86-64-v4") != 0; }
    #else
    static int runs_v2(void) { return 0; }
    static int runs_v3(void) { return 0; }
    static int runs_v4(void) { return 0; }
    #endif
    """
    bint runs_v2()
    bint runs_v3()
    bint runs_v4()
    const char *BATCHNORM_LEVELS


def supported():
    """Levels this processor can run, best first."""
    runs = {"v4": runs_v4(), "v3": runs_v3(), "v2": runs_v2(), "baseline": True}
    return tuple(level for level, able in runs.items() if able)


def built():
    """Levels this build has, in the order of the build."""
    return tuple(BATCHNORM_LEVELS.decode().split())
