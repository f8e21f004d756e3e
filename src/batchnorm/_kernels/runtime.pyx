"""The processor, OpenMP and forks: compiled once, without any instruction-set option, and used by every level.

Decisions, and why:

- This module finds out which levels a processor can run. A kernel module cannot: its first instructions may already
  be ones that the processor does not have.
- OpenMP's threads do not exist in a forked child. There, a team, or the end of a thread that had one, would wait for
  them forever. So before a thread forks, its team is dismissed if OpenMP can do that (since 5.0, so the function is
  looked up and not linked), and the child is serial, whatever kind of fork made it. Workers that a server forks before
  it has used threads are not serial.
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

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    static int openmp_version(void) { return _OPENMP; }
    static int usable_processors(void)
    {
        int place, processors = 0;
        for (place = 0; place < omp_get_num_places(); place++) processors += omp_get_place_num_procs(place);
        return processors ? processors : omp_get_num_procs();
    }
    #else
    static int omp_get_max_threads(void) { return 1; }
    static int openmp_version(void) { return 0; }
    static int usable_processors(void) { return 1; }
    #endif

    static volatile int is_forked = 0;
    static int had_team = 0;
    static void note_team(void) { __atomic_store_n(&had_team, 1, __ATOMIC_RELAXED); }
    #if defined(__unix__) || defined(__APPLE__)
    #include <dlfcn.h>
    #include <pthread.h>
    static int (*pause_openmp)(int) = NULL;
    static void dismiss_team(void) { if (pause_openmp) pause_openmp(1); }       /* omp_pause_soft */
    static void note_fork(void) { is_forked |= had_team || !pause_openmp; }
    static int dismisses_teams(void) { return pause_openmp != NULL; }
    static const char *openmp_file(void)
    {
        Dl_info runtime;
        return openmp_version() && dladdr((void *)omp_get_max_threads, &runtime) ? runtime.dli_fname : "";
    }
    static int watch_forks(void)
    {
        Dl_info here;
        void *module = dladdr((void *)note_fork, &here) ? dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD) : NULL;
        if (module) *(void **)&pause_openmp = dlsym(module, "omp_pause_resource_all");
        return pthread_atfork(dismiss_team, NULL, note_fork);
    }
    #else
    static int dismisses_teams(void) { return 0; }
    static const char *openmp_file(void) { return ""; }
    static int watch_forks(void) { return 0; }
    #endif
    """
    int omp_get_max_threads() noexcept nogil
    int usable_processors() noexcept nogil
    int openmp_version() noexcept nogil
    bint is_forked
    void note_team() noexcept nogil
    int watch_forks() noexcept nogil
    bint dismisses_teams() noexcept nogil
    const char *openmp_file() noexcept nogil


cdef int team_size(int num_threads) noexcept nogil:
    """The threads that a call may start, of those it was given; remembers that there was a team."""
    if num_threads <= 1 or is_forked:
        return 1
    note_team()
    return num_threads


def supported():
    """The levels that this processor can run, best first."""
    runs = {"v4": runs_v4(), "v3": runs_v3(), "v2": runs_v2(), "baseline": True}
    return tuple(level for level, able in runs.items() if able)


def built():
    """The levels in this build, in build order."""
    return tuple(BATCHNORM_LEVELS.decode().split())


def max_threads():
    """The number of threads that OpenMP would use from this Python thread now; 1 in a serial build."""
    return omp_get_max_threads()


def processors():
    """The processors on which OpenMP's threads may run; if OpenMP has pinned this thread, more than it may use."""
    return usable_processors()


def forked():
    """Whether this process was forked, directly or not, from one that had used threads."""
    return is_forked


def safe_forks():
    """Whether a child of a thread that has a team can exit normally."""
    return openmp_version() == 0 or dismisses_teams()


def openmp():
    """The date of the OpenMP specification that the compiler implements; 0 in a serial build."""
    return openmp_version()


def openmp_runtime():
    """The path of the OpenMP library in use, empty if it is unknown."""
    return openmp_file().decode(errors="replace")


if watch_forks():
    raise MemoryError("no memory to register the fork handlers")
