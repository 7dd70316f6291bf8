"""A heuristic for epsilon where only the last iterate of DP-SGD is released: what linear losses would leak."""

import dataclasses
import math

import numpy as np
from scipy import optimize, special, stats

from metacanary import accounting


def last_iterate_epsilon(
    *,
    noise_multiplier: float,
    sampling_prob: float,
    num_steps: int,
    delta: float,
    adjacency: str = "add_remove",
) -> float:
    """Epsilon at delta of the last iterate of DP-SGD, if all losses were linear.

    Gradients of linear losses do not depend on the iterate, so the last one is the noisy sum of all steps, and an
    example of full norm shifts it by the number of batches it entered. In units of the clip norm the neighbours are

        add_remove:  P = Binomial(T, q) + N(0, sigma^2 T)    Q = N(0, sigma^2 T)
        replace_one: P = Binomial(T, q) + N(0, sigma^2 T)    Q = -Binomial(T, q) + N(0, sigma^2 T)

    and epsilon is the smallest >= 0 with max(H(P, Q), H(Q, P)) <= delta, H(P, Q) = max_A P(A) - e^epsilon Q(A).
    The likelihood ratio grows with the output, so the best A are half-lines. The binomial is not truncated.

    This is no bound on epsilon. The losses of a network are not linear, and there are losses whose last iterate leaks
    more (the paper constructs some). It predicts what an audit of the last iterate may find, before any training.

    Args:
      noise_multiplier: Standard deviation of the noise over the clip norm (sigma), >= 0; 0 means no privacy.
      sampling_prob: Probability that an example enters a batch (q), in (0, 1].
      num_steps: Updates (T), >= 1, at one learning rate.
      delta: In (0, 1).
      adjacency: "add_remove", the paper's; "replace_one" is our extension to an example whose gradient turns round.

    Returns:
      Epsilon; 0 where delta covers all; inf for noise_multiplier = 0.

    Raises:
      ValueError: If an argument is out of range.

    Guarantees:
      - Exact for that P and Q up to rounding, with no grid and no truncation.
      - At most what all iterates leak, and so at most `accounting.epsilon`: the sum is a function of the steps.
      - Equal to what all iterates leak for num_steps = 1, and for sampling_prob = 1, where it is
        `accounting.gaussian_epsilon` of mu = sqrt(T) / sigma (twice that mu under replace_one).
      - Grows with sampling_prob, falls as noise_multiplier or delta grows. With num_steps it may grow or fall: under
        little noise, more steps hide an example that is rarely drawn.

    References:
      Steinke, Nasr, Ganesh, Balle, Choquette-Choo, Jagielski, Hayes, Thakurta, Smith, Terzis 2024, "The Last Iterate
      Advantage: Empirical Auditing and Principled Heuristic Analysis of Differentially Private SGD", arXiv 2410.06186.
    """
    noisy = 0 <= noise_multiplier < math.inf
    accounting._check_number("noise_multiplier", noise_multiplier, noisy, "a finite number >= 0")
    accounting._check_mechanism(sampling_prob, num_steps, delta, "pld", adjacency)
    if noise_multiplier == 0:
        return math.inf
    counts = np.arange(num_steps + 1)
    shifts = counts / (noise_multiplier * math.sqrt(num_steps))
    log_weights = stats.binom.logpmf(counts, num_steps, sampling_prob)
    directions = ((True, False), (False, True)) if adjacency == "add_remove" else ((True, True),)
    return max(_Pair(shifts, log_weights, *moves).epsilon(delta) for moves in directions)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The right neighbour, N(shift, 1) or N(0, 1), against the left one, N(-shift, 1) or N(0, 1).

    The log ratio of their densities grows with the output z. Half-lines from z upwards thus give the hockey-stick
    divergence at epsilon = log ratio(z), so z parametrises epsilon and delta at once: one root instead of two nested.

    Attributes:
      shifts: In standard deviations, ascending from 0.
      log_weights: Log probabilities of the shifts.
      right, left: Whether the neighbour is shifted at all.
    """

    shifts: np.ndarray
    log_weights: np.ndarray
    right: bool
    left: bool

    def epsilon(self, delta: float) -> float:
        """The smallest epsilon >= 0 at which the divergence of right from left is at most delta."""

        def excess(z: float) -> float:
            return self._log_delta(z) - math.log(delta)

        most = float(self.shifts[-1])
        start = 0.0 if self.right else -most  # the log ratio is at most 0 there
        if excess(start) <= 0:
            return 0.0
        # delta is at most the half-line's mass under right, and that at most Phi(shift - z). 1 more covers rounding.
        end = (most if self.right else 0.0) - float(special.ndtri(delta)) + 1.0
        root = float(optimize.brentq(excess, start, end, xtol=1e-13))
        return max(0.0, self._log_ratio(root))

    def _log_ratio(self, z: float) -> float:
        """Log of the density of right over that of left."""
        log_right = self._log_density(z) if self.right else 0.0
        return log_right - (self._log_density(-z) if self.left else 0.0)

    def _log_density(self, z: float) -> float:
        """Log of the density of N(shift, 1) over that of N(0, 1)."""
        return float(special.logsumexp(self.log_weights + self.shifts * (z - self.shifts / 2)))

    def _log_delta(self, z: float) -> float:
        """Log of right(> z) - ratio(z) left(> z), as a sum of terms >= 0: nothing cancels between shifts."""
        terms = []
        if self.right:
            terms.append(self.log_weights + _log_gap(z, self.shifts))
        if self.left:
            terms.append(self._log_ratio(z) + self.log_weights + _log_gap(z, -self.shifts))
        return float(special.logsumexp(np.concatenate(terms)))


def _log_gap(z: float, shifts: np.ndarray) -> np.ndarray:
    """log |P(N(shift, 1) > z) - ratio(z) P(N(0, 1) > z)|, with the ratio of their densities; -inf for shift 0."""
    shifted = special.log_ndtr(shifts - z)
    still = shifts * (z - shifts / 2) + special.log_ndtr(-z)
    with np.errstate(divide="ignore"):
        return np.maximum(shifted, still) + np.log(-np.expm1(-np.abs(shifted - still)))
