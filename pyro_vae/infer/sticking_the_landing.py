"""Gradients that reach the guide through its draws alone, and the ELBO that uses nothing else."""

from typing import Any

import torch

from pyro_vae.infer.bounds import Bound, BoundTerms, elbo_terms
from pyro_vae.pair.contract import refuse_score_function
from pyro_vae.pair.sites import TracePair, sample_sites
from pyro_vae.weights.pathwise import PathwiseDraws, gated, has_score


class StickingTheLanding(Bound):
    r"""The ELBO with the path derivative alone as the guide's gradient.

    .. math:: \nabla_\phi L = E_e[\nabla_z (\log p(x, z) - \log q(z|x)) \nabla_\phi z(e, \phi)]

    The total derivative has one more term, the score :math:`-\nabla_\phi \log q(z|x)` at a fixed z.
    Its mean is 0, its variance is not: without it the gradient is still unbiased, and it is exactly 0
    in every draw where q is the posterior. The model's gradient is the ELBO's.

    A density that a guide gives by the Jacobian of a point mass (Pyro's autoguides) or by
    ``pyro.factor`` is no score, and keeps its whole gradient. With beta the latent terms of the
    gradient are scaled; the loss is the ELBO without it.

    Options are those of :class:`Bound`.

    Raises:
        InputError: at the first use, for a latent that is not reparameterised or is enumerated.

    Source:
        Roeder, Wu, Duvenaud 2017, "Sticking the Landing", equation 8.
    """

    def terms(self, model: Any, guide: Any, args: Any, kwargs: Any) -> BoundTerms:
        """Draw once and return loss, surrogate, rate and distortion."""
        surrogate: Any = 0.0
        traces: list[TracePair] = []
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            traces.append((model_trace, guide_trace))
            surrogate = surrogate - sum(s["log_prob_sum"] for s in sample_sites(model_trace))
            surrogate = surrogate + self._path_term(sample_sites(guide_trace))
        rate, distortion = elbo_terms(traces, self.num_particles)
        return BoundTerms(rate + distortion, surrogate / self.num_particles, rate, distortion)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> TracePair:
        self._draws = PathwiseDraws()
        pair = super()._get_trace(model, gated(guide, self._draws), args, kwargs)
        refuse_score_function(sample_sites(pair[1]), "StickingTheLanding")
        return pair

    def _path_term(self, sites: list[dict[str, Any]]) -> Any:
        """Return what has log q's value of no interest and its gradient through the draws alone."""
        term: Any = sum(site["log_prob_sum"] for site in sites if not has_score(site))
        random = [site["log_prob_sum"] for site in sites if has_score(site)]
        if random:
            for name, slope in self._draws.slopes(torch.stack(random).sum()).items():
                term = term + (slope * self._draws.drawn[name]).sum()
        return term
