"""A classifier head that is computed from what a state keeps of labelled examples, with learned coefficients.

Axes: B tasks, n examples of a chunk, C classes, P prototypes of a class, d features.
"""

import torch
from torch import Tensor, nn

from ..tensors import clamp_with_gradient, zero_linear
from .logistic import fit
from .prototypes import absorb, unite

Kept = dict[str, Tensor]
PROTOTYPES, FIT_STEPS = 32, 4  # of a class; of a chunk
SCALE = 15.0  # of the discriminant's rows before training
# lambda d before training; lambda is 0.01 for the 384 features of MiniLM. Unit features have a mean square of 1 / d
PENALTY = 3.84
GAIN = 3.0  # factor on the small networks' outputs, which have to move by whole units within a few hundred steps
UNSEEN = -1e4  # bias of a class without an example; fits into every half-precision type
MOST_MARGIN, DISTANCE = 20.0, 3.0  # clamp of a margin; f before training
# Bounds of the learned logarithms of s, lambda, h and f. A discriminant on a large scale explains all examples, and
# leaves nothing to the fit.
MOST_LOGS = (0.5, 0.7, 3.0, 1.1)
MEMORY = 0.99  # how much a guess counts after one more example
MOST_DOUBT, SURE = 6.0, 0.1  # bound of e; w from which on labels are doubted in full
PRIOR = 10  # examples with right labels that w assumes
LEAST = 1e-6  # counts are clamped to this before something is divided by them


class ClassRows(nn.Module):
    """A classifier head: it computes the rows W and biases b of a linear classifier from chunks of labelled features.

    The state holds sums over the examples: for every class the count n_c and the sum of features t_c, for all examples
    together M = sum x x'. It also holds 32 prototypes of every class, weighted points that stand for its examples
    (`heads.prototypes`), the fitted rows V and biases v, and how well the rows guessed each chunk before it was read.
    Let g be the mean of all examples and S = M - sum_c t_c t_c' / n_c the scatter within classes. Then

        m_c  = t_c / n_c                                         class mean
        U_c  = s (I + rho S)^-1 m_c                              rows of the discriminant
        a_c  = o_c - U_c m_c / 2                                 its biases; -1e4 for a class without an example
        q_j  = exp(-e sigmoid(-f - margin_j))                    trust in the label of prototype z_j, of mass u_j
        V, v = argmin sum_j q_j u_j CE((U + V) z_j + a + v, c_j) + lambda / 2 |V, v|^2
        W    = h (U + V),   b = h (a + v)

    The discriminant is what is known after few examples. The fit is a logistic regression that starts from it: every
    chunk takes four steps of conjugate gradients on the prototypes (`heads.logistic`), from the V before. A label is
    doubted where the discriminant contradicts it: margin_j is how far the logit of its class is above the others. How
    much depends on the estimated share w of wrong labels. Rank the C classes read so far by their logits before an
    example is read. If the right one is above, a wrong label, any other class at random, is in the lower half with
    probability r = floor(C / 2) / (C - 1). Over N examples of classes read before, those before a chunk of n examples
    times 0.99^n,

        L = sum [the label is in the lower half] / r,   E = sum p(the class is in the lower half) / r
        w = (L - E) / (N - E + 10), clamped to 0 .. 1

    So a clean label that is hard to guess raises w only if p was too sure. Small networks give the coefficients:

    - one gives rho, s, lambda, the sharpness h, the distance f, and y for e = min(1, 10 w) 6 tanh(max(y, 0) / 6). It
      sees the number of examples and of classes, the scatter within and between classes, the effective rank of M, w,
      and of the N examples how many were guessed right, how many labels were in the lower half, and the mean p;
    - one sees the same, the counts of a class and how far m_c is from g, and gives o_c.

    The last layer of both starts at zero. Then o = rho = e = 0, q = h = 1, lambda = 3.84 / d and U is the nearest class
    mean, 15 m_c: the head starts as a logistic regression on prototypes. The rows stay in the span of what was read.
    The inputs of the networks do not change if the features are rotated, and do not depend on the number of a class or
    of a step. Reading a chunk costs the same once all prototypes are taken, and less before. Two states can be united
    (`united`): sums are added, prototypes united, and V is the mean, weighted by how many examples of the class each
    state has read.

    Features must be float32 and have unit length. Gradients run through the sums and through the steps of the last
    chunk, not through prototypes and earlier steps.

    Args:
        hidden: width of the hidden layers.

    Example:
        >>> import torch
        >>> head = ClassRows()
        >>> kept = head.initial(num_tasks=1, num_classes=2, width=2)
        >>> kept = head(kept, torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[0, 1]]))
        >>> head.rows(kept)[0].argmax(-1)
        tensor([[0, 1]])

    Source: shrunk linear discriminants, Friedman, Regularized Discriminant Analysis (1989), and their streaming form,
    Hayes and Kanan, arXiv 1909.01520. The fit from their rows and the learned coefficients are ours.
    """

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.of_task, self.of_class = _network(10, hidden, 6), _network(13, hidden, 1)

    @staticmethod
    def initial(num_tasks: int, num_classes: int, width: int, device=None) -> Kept:
        """The state before anything was read, all 0.

        `count` (B, C), `total` and `fitted` (B, C, d), `prototype` (B, C, P, d), `mass` (B, C, P), `moment` (B, d, d).
        """
        shapes = {
            "count": (num_classes,),
            "total": (num_classes, width),
            "fitted": (num_classes, width + 1),
            "prototype": (num_classes, PROTOTYPES, width),
            "mass": (num_classes, PROTOTYPES),
            "moment": (width, width),
            "guessed": (5,),
        }
        return {name: torch.zeros(num_tasks, *shape, device=device) for name, shape in shapes.items()}

    def forward(self, kept: Kept, features: Tensor, labels: Tensor) -> Kept:  # (B, n, d), (B, n)
        """Read the examples of a chunk; a label of -100 marks padding."""
        real = labels >= 0
        x = features.float().masked_fill(~real.unsqueeze(-1), 0.0)
        y = nn.functional.one_hot(labels.clamp_min(0), kept["count"].shape[1]).float() * real.unsqueeze(-1)  # (B, n, C)
        prototype, mass = absorb(kept["prototype"], kept["mass"], x, labels)
        read = {
            "count": kept["count"] + y.sum(1),
            "total": kept["total"] + y.mT @ x,
            "moment": kept["moment"] + x.mT @ x,
            "guessed": kept["guessed"] * MEMORY ** real.sum(1, keepdim=True) + self._guess(kept, x, y),
            "prototype": prototype,
            "mass": mass,
            "fitted": kept["fitted"],
        }
        return read | {"fitted": self._fit(read, real.any(1))}

    def rows(self, kept: Kept) -> tuple[Tensor, Tensor]:
        """The classifier that the state gives: W (B, C, d) and b (B, C)."""
        rows, bias, _, sharpness, _ = self._discriminant(kept)
        rows, bias = rows + kept["fitted"][..., :-1], bias + kept["fitted"][..., -1]
        return sharpness.unsqueeze(-1) * rows, (sharpness * bias).masked_fill(kept["count"] == 0, UNSEEN)

    def _discriminant(self, kept: Kept) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """U (B, C, d), a (B, C), lambda (B,), h (B, 1), and e, f (B, 2)."""
        means, seen, task = _means(kept), kept["count"] > 0, _of_task(kept)
        scatter = kept["moment"] - kept["total"].mT @ means
        rho, doubt, *logs = (GAIN * self.of_task(task)).unbind(-1)
        bounded = ((log / most).tanh() * most for log, most in zip(logs, MOST_LOGS, strict=True))
        scale, penalty, sharpness, distance = (log.exp() for log in bounded)  # (B,) each
        doubt = MOST_DOUBT * (clamp_with_gradient(doubt, low=0) / MOST_DOUBT).tanh()
        doubt = (_wrong(kept) / SURE).clamp_max(1) * doubt
        doubts = torch.stack([doubt, DISTANCE * distance], -1)
        offset = GAIN * self.of_class(_of_class(kept, task)).squeeze(-1)
        rows = SCALE * scale.view(-1, 1, 1) * _solve(scatter, rho, means)
        bias = offset - 0.5 * (rows * means).sum(-1)
        penalty = PENALTY / means.shape[-1] * penalty
        return rows, bias.masked_fill(~seen, UNSEEN), penalty, sharpness.unsqueeze(-1), doubts

    def _fit(self, kept: Kept, has_read: Tensor) -> Tensor:  # (B,) -> (B, C, d)
        """V after the steps of this chunk; tasks without an example in it keep theirs."""
        rows, bias, penalty, _, doubts = self._discriminant(kept)
        points, said, mass = _occupied(kept)
        prior = points @ rows.mT + bias.unsqueeze(1)
        mass = mass * _trust(prior.detach(), said, doubts)
        points, moment = nn.functional.pad(points, (0, 1), value=1.0), _moment_with_one(kept)
        fitted = fit(kept["fitted"], points, said, mass, prior, moment, penalty, FIT_STEPS)
        return torch.where(has_read.view(-1, 1, 1), fitted, kept["fitted"])

    @torch.no_grad()
    def _guess(self, kept: Kept, x: Tensor, y: Tensor) -> Tensor:  # (B, n, d), (B, n, C) -> (B, 5)
        """Sums over the examples that can be judged: 1, whether it is right, p, and for `_wrong` low / r, p_low / r."""
        rows, bias = self.rows(kept)
        seen = (kept["count"] > 0).float().unsqueeze(1)  # (B, 1, C)
        known = (seen * y).sum(-1) * (seen * (1 - y)).amax(-1)  # its class and another one have been read
        logits = x @ rows.mT + bias.unsqueeze(1)
        p, margin = _right(logits, y)
        num = seen.sum(-1, keepdim=True).clamp_min(2)  # (B, 1, 1) classes
        half = num.div(2).floor()
        in_lower = logits.argsort(-1, descending=True).argsort(-1) >= num - half  # (B, n, C); unseen ones have p = 0
        share = half / (num - 1)  # r
        low, expected = ((in_lower * of).sum(-1) / share.squeeze(-1) for of in (y, logits.softmax(-1)))
        return torch.stack([known, known * (margin > 0), known * p, known * low, known * expected], -1).sum(1)


def united(one: Kept, other: Kept) -> Kept:
    """The state of two that read different chunks of the same tasks, with the same classes."""
    added = {name: one[name] + other[name] for name in ("count", "total", "moment", "guessed")}
    parts = [(kept["prototype"], kept["mass"]) for kept in (one, other)]
    share = other["count"] / added["count"].clamp_min(LEAST)
    prototype, mass = unite(*parts)
    fitted = one["fitted"].lerp(other["fitted"], share.unsqueeze(-1))
    return added | {"fitted": fitted, "prototype": prototype, "mass": mass}


def _wrong(kept: Kept) -> Tensor:  # (B,)
    """w, the share of wrong labels among the latest examples."""
    known, _, _, low, expected = kept["guessed"].unbind(-1)
    return ((low - expected) / (known - expected + PRIOR)).clamp(0, 1)


def _trust(logits: Tensor, said: Tensor, doubts: Tensor) -> Tensor:  # (B, N, C), (B, N, C), (B, 2) -> (B, N, 1)
    """q, from e and f: less where the discriminant contradicts a label."""
    doubt, distance = doubts.unsqueeze(-1).unbind(1)  # (B, 1) each
    return (-doubt * (-distance - _right(logits, said)[1]).sigmoid()).exp().unsqueeze(-1)


def _right(logits: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:  # (B, n, C) each -> (B, n) each
    """The probability of the right class, and how far its logit is above the others."""
    own, other = (logits * said).sum(-1), logits.masked_fill(said > 0, 2 * UNSEEN).amax(-1)
    return (logits.softmax(-1) * said).sum(-1), (own - other).clamp(-MOST_MARGIN, MOST_MARGIN)


def _occupied(kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
    """The prototypes that stand for something, in any order: points (B, N, d), classes (B, N, C), masses (B, N, 1)."""
    mass = kept["mass"].flatten(1)  # (B, C P)
    mass, places = mass.sort(descending=True, stable=True)
    num = int((mass > 0).sum(1).max()) if mass.numel() else 0
    mass, places = mass[:, :num].unsqueeze(-1), places[:, :num]
    points = kept["prototype"].flatten(1, 2)
    points = points.gather(1, places.unsqueeze(-1).expand(-1, -1, points.shape[-1]))
    return points, nn.functional.one_hot(places // kept["mass"].shape[2], kept["mass"].shape[1]).float(), mass


def _moment_with_one(kept: Kept) -> Tensor:  # (B, d + 1, d + 1)
    """The sum of (x, 1) (x, 1)'."""
    total, number = kept["total"].sum(1), kept["count"].sum(1)  # (B, d), (B,)
    moment = torch.cat([kept["moment"], total.unsqueeze(1)], 1)
    return torch.cat([moment, torch.cat([total, number.unsqueeze(1)], 1).unsqueeze(-1)], -1)


def _means(kept: Kept) -> Tensor:  # (B, C, d)
    return kept["total"] / kept["count"].clamp_min(LEAST).unsqueeze(-1)


def _common(kept: Kept) -> Tensor:  # (B, 1, d)
    return kept["total"].sum(1, keepdim=True) / kept["count"].sum(1).clamp_min(LEAST).view(-1, 1, 1)


def _solve(scatter: Tensor, factor: Tensor, rows: Tensor) -> Tensor:  # (B, d, d), (B,), (B, n, d) -> (B, n, d)
    """(I + factor * scatter)^-1 applied to each row; a factor below 0 counts as 0."""
    eye = torch.eye(scatter.shape[-1], device=scatter.device)
    # A Cholesky factorisation would cost several times as much in the backward pass.
    return torch.linalg.solve(eye + clamp_with_gradient(factor, low=0).view(-1, 1, 1) * scatter, rows.mT).mT


def _of_task(kept: Kept) -> Tensor:  # (B, 10)
    """The task's inputs to the networks, each scaled to about 1.

    Number of examples, number of classes, degrees of freedom, scatter within classes, scatter between classes,
    effective rank; of the latest guesses, those that were right, their mean probability, labels in the lower half; w.
    """
    count, moment = kept["count"], kept["moment"]
    number, classes = count.sum(1), (count > 0).sum(1)
    trace = moment.diagonal(dim1=1, dim2=2).sum(-1)
    of_means = (kept["total"] * _means(kept)).sum((1, 2))
    within, between = trace - of_means, of_means - number * _common(kept).square().sum((1, 2))
    rank = trace.square() / moment.square().sum((1, 2)).clamp_min(1e-9)
    sizes = [number.log1p() - 4, classes.clamp_min(1).log() - 2, (number - classes).clamp_min(0).log1p() - 3]
    parts = [2 * within / number.clamp_min(1), 2 * between / number.clamp_min(1), rank.clamp_min(1).log() - 3]
    known, right, p, low, _ = kept["guessed"].unbind(-1)
    guessed = [(2 * right - known) / (known + PRIOR), (2 * p - known) / (known + PRIOR), 2 * low / (known + PRIOR)]
    return torch.stack([*sizes, *parts, *guessed, 5 * _wrong(kept)], -1)


def _of_class(kept: Kept, task: Tensor) -> Tensor:  # (B, 10) -> (B, C, 13)
    """The inputs of each class: those of the task, its count, its share of all, how far it is from the common mean."""
    count = kept["count"]
    seen, number = count > 0, count.sum(1, keepdim=True).clamp_min(LEAST)
    share = count.clamp_min(LEAST) * seen.sum(1, keepdim=True).clamp_min(1) / number
    away = (_means(kept) - _common(kept)).square().sum(-1)
    single = torch.stack([count.log1p() - 2, share.log().clamp(-4, 4), 2 * away - 1], -1)
    return torch.cat([task.unsqueeze(1).expand(-1, count.shape[1], -1), single], -1)


def _network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """A small network whose outputs are all 0 at the start."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), zero_linear(hidden, outputs))
