"""Sides that take turns, so that what disturbs the machine disturbs all of them."""
import statistics
import time


def seconds(fn, clock=time.perf_counter):
    "What one call takes"
    t = clock()
    fn()
    return clock() - t


def medians(sides, repeat, clock=time.perf_counter):
    "Median seconds of each side; a first turn, for warming up, does not count"
    times = {k: [] for k in sides}
    for turn in range(repeat + 1):
        for k, fn in sides.items():
            t = seconds(fn, clock)
            if turn: times[k].append(t)
    return {k: statistics.median(v) for k, v in times.items()}
