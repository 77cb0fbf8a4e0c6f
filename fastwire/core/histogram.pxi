# Distributions for metrics, since the process began: how long messages take to their socket, how many go at a time.

cdef enum:
    BOUND_COUNT = 18        # at most; one more bucket is for what is beyond

cdef struct Histogram:
    uint64_t bounds[BOUND_COUNT]
    uint64_t counts[BOUND_COUNT + 1]
    int bound_count
    double total

cdef Histogram time_to_flush        # ns
cdef Histogram messages_per_flush
cdef Histogram batches_per_flush


cdef int prepare_histogram(Histogram *histogram, bounds) except -1:
    memset(histogram, 0, sizeof(Histogram))
    histogram.bound_count = <int>min(<Py_ssize_t>BOUND_COUNT, len(bounds))
    for i in range(histogram.bound_count):
        histogram.bounds[i] = bounds[i]
    return 0


SECOND = 1_000_000_000
DECADES = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
prepare_histogram(&time_to_flush, [*[n * unit // 10 for unit in DECADES for n in (10, 25, 50)], SECOND, 5 * SECOND,
                                   30 * SECOND])
prepare_histogram(&messages_per_flush, [4**i for i in range(9)])
prepare_histogram(&batches_per_flush, [2**i for i in range(9)])


cdef inline void observe(Histogram *histogram, uint64_t value, uint64_t times) noexcept nogil:
    """``times`` observations of the same value."""
    cdef int i = 0
    while i < histogram.bound_count and value > histogram.bounds[i]:
        i += 1
    histogram.counts[i] += times
    histogram.total += <double>value * times


cdef inline uint64_t nanoseconds() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1_000_000_000 + <uint64_t>now.tv_nsec


cdef tuple histogram_of(const Histogram *histogram, double unit):
    cdef int i
    bounds = tuple([histogram.bounds[i] / unit for i in range(histogram.bound_count)])
    return bounds, tuple([histogram.counts[i] for i in range(histogram.bound_count + 1)]), histogram.total / unit


def histograms():
    return {
        "time_to_flush": histogram_of(&time_to_flush, 1e9),
        "messages_per_flush": histogram_of(&messages_per_flush, 1),
        "batches_per_flush": histogram_of(&batches_per_flush, 1),
    }
