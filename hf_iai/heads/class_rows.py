"""A classifier head that is computed from running sums: class means, scatter within classes, learned corrections.

Axes: B tasks, n examples of a chunk, C classes, d features.
"""

import torch
from torch import Tensor, nn

from ..tensors import clamp_with_gradient, zero_linear

Kept = dict[str, Tensor]
SCALE = 50.0  # scale of the logits before training; features have unit length
GAIN = 3.0  # factor on the small networks' outputs, which have to move by whole units within a few hundred steps
UNSEEN = -1e4  # bias of a class without an example; fits into every half-precision type
MOST_LOG_WEIGHT, MOST_MARGIN = 3.0, 20.0  # clamps of an example's log weight and of a margin
PUSH = 10.0  # unit of the correction's steps: a step of about 1 moves a margin by about 1
LEAST = 1e-6  # counts are clamped to this before something is divided by them
LEAST_SIGMA = 0.2  # smallest sigma in eval mode: below it, steps hardly shrink and rows diverge on long streams


class ClassRows(nn.Module):
    """A classifier head: it computes the rows W and biases b of a linear classifier from chunks of labelled features.

    The state holds sums over weighted examples: for every class the count n_c, the sum of features t_c and n_c r_c,
    where r_c is a learned correction; for all examples together M = sum w x x'. Let g be the mean of all examples and
    S = M - sum_c t_c t_c' / n_c the scatter within classes. Then

        m_c = (t_c + k_c g) / (n_c + k_c)                        class mean, pulled towards the common mean
        A   = I + rho S
        W_c = s A^-1 m_c + r_c
        b_c = a_c - s m_c' A^-1 m_c / 2 - r_c' g                 -1e4 for a class without an example

    Three small networks give the coefficients:

    - one sees counts, traces and the effective rank of M, and gives rho, s and sigma for the task;
    - one sees the same and the counts of a class, and gives k_c and a_c;
    - one sees how the current rows judge an example, and gives the weight w of the example and its step v_c in every
      class. Its inputs are y (1 if this is the label), the probability p, y - p, the margin, logarithms of counts,
      y (1 - p) and (1 - y) p.

    With T = M - n g g', the scatter of all examples so far including this chunk, the correction takes the step

        r_c += 10 v_c |y_c - p_c| (I + sigma T)^-1 (x - g)

    If v has the sign of y - p, this resembles an online Newton step on the softmax loss, with the scatter in place of
    the curvature. Steps get smaller as more is read, without a learning rate that depends on the step number. They do
    not get smaller if sigma is 0, which can happen on streams much longer than those of training. In eval mode sigma
    is therefore at least 0.2.

    The last layer of every network starts at zero. Then k = a = rho = sigma = r = 0, w = 1 and the logits are
    50 (m_c' x - |m_c|^2 / 2): the streaming classifier by nearest class mean (Euclidean distance). The rows stay in the
    span of what was read, since A^-1 x differs from x by a combination of examples and means. The inputs of the
    networks do not change if the features are rotated, and do not depend on the number of a class or of a step.
    Reading a chunk always costs the same: two d x d linear systems with n and C right-hand sides. Two states can be
    added up. The corrections of the sum are means, weighted by how many examples of the class each state has read.

    Features must be float32 and have unit length.

    Args:
        hidden: width of the hidden layers of the first two networks.

    Example:
        >>> import torch
        >>> head = ClassRows()
        >>> kept = head.initial(num_tasks=1, num_classes=2, width=2)
        >>> kept = head(kept, torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[0, 1]]))
        >>> head.rows(kept)[0].detach()
        tensor([[[50.,  0.],
                 [ 0., 50.]]])

    Source: shrunk linear discriminants, Friedman, Regularized Discriminant Analysis (1989), and their streaming form,
    Hayes and Kanan, arXiv 1909.01520; online Newton steps, Hazan, Agarwal and Kale, Logarithmic Regret Algorithms for
    Online Convex Optimization (2007). The learned coefficients are ours.
    """

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.of_task, self.of_class = _network(6, hidden, outputs=3), _network(8, hidden)
        self.of_example = _network(9, 24, num_layers=2)

    @staticmethod
    def initial(num_tasks: int, num_classes: int, width: int, device=None) -> Kept:
        """The sums before anything was read, all 0.

        `count` (B, C), `total` and `correction` (B, C, d), `moment` (B, d, d).
        """
        shapes = {
            "count": (num_classes,),
            "total": (num_classes, width),
            "moment": (width, width),
            "correction": (num_classes, width),
        }
        return {name: torch.zeros(num_tasks, *shape, device=device) for name, shape in shapes.items()}

    @staticmethod
    def grow(kept: Kept, num_classes: int) -> Kept:
        """Append empty classes until there are `num_classes`."""
        more = num_classes - kept["count"].shape[1]
        grown = {name: nn.functional.pad(kept[name], (0, 0, 0, more)) for name in ("total", "correction")}
        return kept | grown | {"count": nn.functional.pad(kept["count"], (0, more))}

    def forward(self, kept: Kept, features: Tensor, labels: Tensor) -> Kept:  # (B, n, d), (B, n)
        """Add the examples of a chunk to the sums; a label of -100 marks padding."""
        real = labels >= 0
        x = features.float().masked_fill(~real.unsqueeze(-1), 0.0)
        y = nn.functional.one_hot(labels.clamp_min(0), kept["count"].shape[1]).float() * real.unsqueeze(-1)  # (B, n, C)
        judged, error = self._judge(kept, x, y)
        log_weight, push = self.of_example(judged).unbind(-1)  # (B, n, C) each
        weight = (log_weight * y).sum(-1, keepdim=True).clamp(-MOST_LOG_WEIGHT, MOST_LOG_WEIGHT).exp()  # (B, n, 1)
        weighted = y * weight
        sums = {
            "count": kept["count"] + weighted.sum(1),
            "total": kept["total"] + weighted.mT @ x,
            "moment": kept["moment"] + (x * weight).mT @ x,
        }
        count, steps = sums["count"].unsqueeze(-1), PUSH * (push * error).mT @ self._steps(sums, x)
        grown = count / kept["count"].clamp_min(LEAST).unsqueeze(-1)  # exactly 1 where nothing was read
        return sums | {"correction": kept["correction"] * grown + steps * count}

    def rows(self, kept: Kept) -> tuple[Tensor, Tensor]:
        """The classifier that the sums give: W (B, C, d) and b (B, C)."""
        count, total, common = kept["count"], kept["total"], _common(kept)
        seen, number = count > 0, count.sum(1, keepdim=True).clamp_min(LEAST)
        scatter = kept["moment"] - total.mT @ _means(kept)
        task = _of_task(kept)
        rho, log_scale, _ = (GAIN * self.of_task(task)).unbind(-1)
        share = count.clamp_min(LEAST) * seen.sum(1, keepdim=True).clamp_min(1) / number
        single = torch.stack([count.log1p() - 2, share.log().clamp(-4, 4)], -1)
        by_class = torch.cat([task.unsqueeze(1).expand(-1, count.shape[1], -1), single], -1)
        drawn, offset = (GAIN * self.of_class(by_class)).unbind(-1)
        drawn = clamp_with_gradient(drawn, low=0).unsqueeze(-1)
        means = (total + drawn * common) / (count.unsqueeze(-1) + drawn).clamp_min(LEAST)
        means = means.masked_fill(~seen.unsqueeze(-1), 0.0)
        scale, correction = SCALE * log_scale.exp().view(-1, 1, 1), _correction(kept)
        rows = scale * _solve(scatter, rho, means)
        bias = offset - 0.5 * (rows * means).sum(-1) - (correction * common).sum(-1)
        return rows + correction, bias.masked_fill(~seen, UNSEEN)

    def _steps(self, sums: Kept, x: Tensor) -> Tensor:  # (B, n, d)
        """(I + sigma T)^-1 (x - g), the direction in which each example moves the rows."""
        common, number = _common(sums), sums["count"].sum(1).view(-1, 1, 1)
        spread = sums["moment"] - number * common.mT @ common
        sigma = GAIN * self.of_task(_of_task(sums))[:, 2]
        return _solve(spread, sigma if self.training else sigma.clamp_min(LEAST_SIGMA), x - common)

    @torch.no_grad()  # the current rows are only measured here, so no gradient runs back through the whole stream
    def _judge(self, kept: Kept, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # (B, n, C, 9), (B, n, C)
        """The third network's inputs for each example and class, and |y - p|."""
        rows, bias = self.rows(kept)
        seen = (kept["count"] > 0).float().unsqueeze(1)  # (B, 1, C)
        logits = x @ rows.mT + bias.unsqueeze(1)
        p = logits.softmax(-1) * seen
        own, other = (logits * y).sum(-1, keepdim=True), logits.masked_fill(y > 0, -1e9).amax(-1, keepdim=True)
        margin = torch.where(y > 0, logits - other, logits - own).clamp(-MOST_MARGIN, MOST_MARGIN) / 10
        margin = margin * seen * (y @ seen.mT)  # 0 unless both classes have been read
        counts = [kept["count"].unsqueeze(1).log1p() - 2, y.sum(1, keepdim=True).log1p()]
        counts.append(kept["count"].sum(1).log1p().view(-1, 1, 1) - 4)
        counts = [t.expand_as(p) for t in counts]
        missed, wrong = y * (1 - p), (1 - y) * p
        error = (missed + wrong) * y.sum(-1, keepdim=True)  # 0 for padding
        return torch.stack([y, p, y - p, margin, *counts, missed, wrong], -1), error


def _means(kept: Kept) -> Tensor:  # (B, C, d)
    return kept["total"] / kept["count"].clamp_min(LEAST).unsqueeze(-1)


def _common(kept: Kept) -> Tensor:  # (B, 1, d)
    return kept["total"].sum(1, keepdim=True) / kept["count"].sum(1).clamp_min(LEAST).view(-1, 1, 1)


def _correction(kept: Kept) -> Tensor:  # (B, C, d)
    return kept["correction"] / kept["count"].clamp_min(LEAST).unsqueeze(-1)


def _solve(scatter: Tensor, factor: Tensor, rows: Tensor) -> Tensor:  # (B, d, d), (B,), (B, n, d) -> (B, n, d)
    """(I + factor * scatter)^-1 applied to each row; a factor below 0 counts as 0."""
    eye = torch.eye(scatter.shape[-1], device=scatter.device)
    # A Cholesky factorisation would cost several times as much in the backward pass.
    return torch.linalg.solve(eye + clamp_with_gradient(factor, low=0).view(-1, 1, 1) * scatter, rows.mT).mT


def _of_task(kept: Kept) -> Tensor:  # (B, 6)
    """The task's inputs to the networks, each scaled to about 1.

    Number of examples, number of classes, degrees of freedom, scatter within classes, scatter between classes,
    effective rank.
    """
    count, moment = kept["count"], kept["moment"]
    number, classes = count.sum(1), (count > 0).sum(1)
    trace = moment.diagonal(dim1=1, dim2=2).sum(-1)
    of_means = (kept["total"] * _means(kept)).sum((1, 2))
    within, between = trace - of_means, of_means - number * _common(kept).square().sum((1, 2))
    rank = trace.square() / moment.square().sum((1, 2)).clamp_min(1e-9)
    sizes = [number.log1p() - 4, classes.clamp_min(1).log() - 2, (number - classes).clamp_min(0).log1p() - 3]
    parts = [2 * within / number.clamp_min(1), 2 * between / number.clamp_min(1), rank.clamp_min(1).log() - 3]
    return torch.stack([*sizes, *parts], -1)


def _network(inputs: int, hidden: int, num_layers: int = 1, outputs: int = 2) -> nn.Sequential:
    """A small network whose outputs are all 0 at the start."""
    widths = [inputs] + num_layers * [hidden]
    layers = [f(*w) for w in zip(widths, widths[1:], strict=False) for f in (nn.Linear, lambda *_: nn.GELU())]
    return nn.Sequential(*layers, zero_linear(hidden, outputs))
