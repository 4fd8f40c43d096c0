"""Means, spreads and paired comparisons over few seeds."""

import importlib
import itertools
import math
import statistics
from typing import Any

from engine.errors import RunError

# An interval or a test of fewer pairs says nothing but that.
LEAST_FOR_INTERVAL = 2
LEAST_FOR_TEST = 3
MOST_ENUMERATED = 16
LEVEL = 0.05


def spread(values: list[float]) -> dict[str, Any]:
    """n, mean and standard deviation (ddof 1; None below two values)."""
    if not values:
        return dict(n=0, mean=None, sd=None)
    sd = statistics.stdev(values) if len(values) > 1 else None
    return dict(n=len(values), mean=statistics.fmean(values), sd=sd)


def paired(differences: list[float]) -> dict[str, Any]:
    """What n differences between two rows, paired by seed, say about the mean difference.

    mean ± t · sd / sqrt(n) with Student's t of n - 1 degrees of freedom at 95 %, and the p value of
    the two-sided paired t test. Both hold at any n >= 2 if the differences are normally
    distributed; at n = 2 nothing in the data could show that they are not, so no p value is given
    there.

    sign_flip_p is that of the exact sign-flip test, which assumes of the differences under the
    null hypothesis only that they are symmetric: the share of all 2**n choices of signs whose
    |mean| is at least the observed one. It cannot fall below 2 / 2**n, so that it says something
    about a level of 0.05 from n = 6 on; below it is None.

    Returns:
        n, mean, sd, low, high, p, sign_flip_p; None where n is too small to say.
    """
    n = len(differences)
    result = dict(spread(differences), low=None, high=None, p=None, sign_flip_p=None)
    if n < LEAST_FOR_INTERVAL:
        return result
    student = _scipy_stats().t(n - 1)
    error = result["sd"] / math.sqrt(n)
    reach = float(student.ppf(1 - LEVEL / 2)) * error
    result.update(low=result["mean"] - reach, high=result["mean"] + reach)
    if n >= LEAST_FOR_TEST and error > 0:
        result["p"] = 2 * float(student.sf(abs(result["mean"]) / error))
    if 2 / 2**n < LEVEL and n <= MOST_ENUMERATED:
        result["sign_flip_p"] = sign_flip(differences)
    return result


def sign_flip(differences: list[float]) -> float:
    """The exact two-sided sign-flip test; see paired."""
    observed = abs(math.fsum(differences)) * (1 - 1e-12)
    signs = itertools.product((1, -1), repeat=len(differences))
    sums = (abs(math.fsum(s * d for s, d in zip(row, differences, strict=True))) for row in signs)
    return float(sum(total >= observed for total in sums) / 2 ** len(differences))


def holm(values: list[float | None]) -> list[float | None]:
    """Holm's (1979) adjustment of several p values, so that all of them hold together.

    Sorted, p_(i) becomes max over j <= i of min(1, (m - j + 1) p_(j)); None stays None and does
    not count.
    """
    known = sorted((p, i) for i, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return adjusted


def agreement(here: list[float], published: list[float]) -> dict[str, Any]:
    """Whether n rows' differences to a base have the published signs and the published order.

    Returns:
        n; same_sign, how many of the differences have the published one's sign; tau, Kendall's
        rank correlation of the two lists (tau-b), and p, its two-sided p value (exact if there are
        no ties). tau and p are None below n = 3, and where a list has only one value.
    """
    n = len(here)
    same_sign = sum(a * b > 0 for a, b in zip(here, published, strict=True))
    result: dict[str, Any] = dict(n=n, same_sign=same_sign, tau=None, p=None)
    if n >= LEAST_FOR_TEST and len(set(here)) > 1 and len(set(published)) > 1:
        found = _scipy_stats().kendalltau(here, published)
        result.update(tau=float(found.statistic), p=float(found.pvalue))
    return result


def _scipy_stats() -> Any:
    try:
        return importlib.import_module("scipy.stats")
    except ImportError:
        raise RunError("scipy, which the table's statistics need, is not installed") from None
