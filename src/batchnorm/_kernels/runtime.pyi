"""The processor, OpenMP and forks, and the rows of the tables."""

MEAN: int
MEAN_LOW: int
M2: int
VAR: int
RSTD: int
GAMMA: int
BETA: int
STATISTICS_ROWS: int

SUM_DY: int
SUM_DY_XMU: int
DGAMMA: int
DMEAN: int
DVAR: int
UPSTREAM_DMEAN: int
UPSTREAM_DVAR: int
GRADIENT_ROWS: int

CENTRE: int
SCALE: int
SHIFT: int
SLOPE: int
OFFSET: int
REST: int
OWN: int
COEFFICIENT_ROWS: int

THROUGH_MEAN: int
THROUGH_VARIANCE: int
UPSTREAM: int

STATUS: int
VALUES: int
WEIGHT: int
SQUARES: int
HEAD: int

def supported() -> tuple[str, ...]: ...
def built() -> tuple[str, ...]: ...
def max_threads() -> int: ...
def processors() -> int: ...
def forked() -> bool: ...
def safe_forks() -> bool: ...
def openmp() -> int: ...
def openmp_runtime() -> str: ...
