"""Classifier rows out of running sums: class means, the scatter within classes, and what the means get wrong.

Axes: B tasks, n examples of a chunk, C classes, d features.
"""

import torch
from torch import Tensor, nn

Kept = dict[str, Tensor]
SCALE = 50.0  # of the logits before anything is learned; features have unit length
GAIN = 3.0  # of the small networks: what they give has to move by units within a few hundred steps
UNSEEN = -1e4  # bias of a class without an example; any half-precision type can hold it
MOST_LOG_WEIGHT, MOST_MARGIN = 3.0, 20.0
PUSH = 10.0  # unit of the steps of the correction, which are about 1 where a margin is to move by 1
LEAST = 1e-6  # of a count that is divided by
LEAST_SIGMA = 0.2  # in use: below it steps hardly shrink, and long streams throw rows out


class ClassRows(nn.Module):
    """Refines the rows W and biases b of a linear classifier from chunks of labelled features.

    The state is sums over weighted examples: n_c and t_c of each class, M = sum w x x' of all, and n_c r_c, with r_c a
    correction. With g the mean of all examples and S = M - sum_c t_c t_c' / n_c their scatter within classes,

        m_c = (t_c + k_c g) / (n_c + k_c)                        class mean, drawn towards the common one
        A   = I + rho S
        W_c = s A^-1 m_c + r_c
        b_c = a_c - s m_c' A^-1 m_c / 2 - r_c' g                 and -1e4 for a class without an example

    Two small networks that see counts, traces and the effective rank of M give k_c and a_c, and rho, s and sigma. A
    third one sees how the rows so far judge each example: is-label y, probability p, their difference, margin,
    logarithms of counts, y (1 - p) and (1 - y) p. It gives the weight w of an example, and v of the step that it makes
    in every class. With T = M - n g g', the scatter of all examples so far, those of the chunk included,

        r_c += 10 v_c |y_c - p_c| (I + sigma T)^-1 (x - g)

    which for v of the sign of y - p is a step like online Newton's on the softmax loss, with the scatter in place of
    its curvature: what is added shrinks where much was read, without a rate that depends on the step. It does not where
    sigma is 0, as it may become on streams far longer than those of training: in use (`eval()`) it is 0.2 at least.

    All three end in zeros: then k = a = rho = sigma = r = 0, w = 1, and the logits are 50 (m_c' x - |m_c|^2 / 2), the
    streaming nearest class mean (Euclidean). Rows lie in the span of what was read: A^-1 x differs from x by examples
    and means. Every input of the networks is invariant to rotations of the features, and none is tied to a class or to
    a step. Reading a chunk costs the same at any point: two d x d systems of n and C right sides. Sums of two states
    are a state, whose corrections are means, weighted by what each has read of a class.

    Features are expected at unit length, float32.

    Args:
        hidden: width of the networks' hidden layers.

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
        """Nothing read: `count` (B, C), `total` and `correction` (B, C, d), `moment` (B, d, d), all 0."""
        shapes = {
            "count": (num_classes,),
            "total": (num_classes, width),
            "moment": (width, width),
            "correction": (num_classes, width),
        }
        return {name: torch.zeros(num_tasks, *shape, device=device) for name, shape in shapes.items()}

    @staticmethod
    def grow(kept: Kept, num_classes: int) -> Kept:
        """The same state with room for more classes, at the end."""
        more = num_classes - kept["count"].shape[1]
        grown = {name: nn.functional.pad(kept[name], (0, 0, 0, more)) for name in ("total", "correction")}
        return kept | grown | {"count": nn.functional.pad(kept["count"], (0, more))}

    def forward(self, kept: Kept, features: Tensor, labels: Tensor) -> Kept:  # (B, n, d), (B, n)
        """Read a chunk; a label of -100 marks padding."""
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
        """W (B, C, d) and b (B, C)."""
        count, total, common = kept["count"], kept["total"], _common(kept)
        seen, number = count > 0, count.sum(1, keepdim=True).clamp_min(LEAST)
        scatter = kept["moment"] - total.mT @ _means(kept)
        task = _of_task(kept)
        rho, log_scale, _ = (GAIN * self.of_task(task)).unbind(-1)
        share = count.clamp_min(LEAST) * seen.sum(1, keepdim=True).clamp_min(1) / number
        single = torch.stack([count.log1p() - 2, share.log().clamp(-4, 4)], -1)
        by_class = torch.cat([task.unsqueeze(1).expand(-1, count.shape[1], -1), single], -1)
        drawn, offset = (GAIN * self.of_class(by_class)).unbind(-1)
        drawn = _at_least_0(drawn).unsqueeze(-1)
        means = (total + drawn * common) / (count.unsqueeze(-1) + drawn).clamp_min(LEAST)
        means = means.masked_fill(~seen.unsqueeze(-1), 0.0)
        scale, correction = SCALE * log_scale.exp().view(-1, 1, 1), _correction(kept)
        rows = scale * _solve(scatter, rho, means)
        bias = offset - 0.5 * (rows * means).sum(-1) - (correction * common).sum(-1)
        return rows + correction, bias.masked_fill(~seen, UNSEEN)

    def _steps(self, sums: Kept, x: Tensor) -> Tensor:  # (B, n, d)
        """(I + sigma T)^-1 (x - g): where each example draws a row."""
        common, number = _common(sums), sums["count"].sum(1).view(-1, 1, 1)
        spread = sums["moment"] - number * common.mT @ common
        sigma = GAIN * self.of_task(_of_task(sums))[:, 2]
        return _solve(spread, sigma if self.training else sigma.clamp_min(LEAST_SIGMA), x - common)

    @torch.no_grad()  # what the rows so far say is a measurement: no gradient through the whole stream
    def _judge(self, kept: Kept, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # (B, n, C, 9), (B, n, C)
        """What the third network sees of each example and class, and |y - p|."""
        rows, bias = self.rows(kept)
        seen = (kept["count"] > 0).float().unsqueeze(1)  # (B, 1, C)
        logits = x @ rows.mT + bias.unsqueeze(1)
        p = logits.softmax(-1) * seen
        own, other = (logits * y).sum(-1, keepdim=True), logits.masked_fill(y > 0, -1e9).amax(-1, keepdim=True)
        margin = torch.where(y > 0, logits - other, logits - own).clamp(-MOST_MARGIN, MOST_MARGIN) / 10
        margin = margin * seen * (y @ seen.mT)  # between classes that both have rows
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
    """(I + factor * scatter)^-1 of each row; a factor below 0 counts as 0."""
    eye = torch.eye(scatter.shape[-1], device=scatter.device)
    # Not by a Cholesky factor: differentiating that one costs several times as much.
    return torch.linalg.solve(eye + _at_least_0(factor).view(-1, 1, 1) * scatter, rows.mT).mT


def _of_task(kept: Kept) -> Tensor:  # (B, 6)
    """Examples, classes, degrees of freedom, scatter within and between classes, effective rank; all of order 1."""
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
    """Numbers that are all 0 at the start."""
    widths = [inputs] + num_layers * [hidden]
    layers = [f(*w) for w in zip(widths, widths[1:], strict=False) for f in (nn.Linear, lambda *_: nn.GELU())]
    last = nn.Linear(hidden, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def _at_least_0(value: Tensor) -> Tensor:
    """Below 0 counts as 0 but keeps its gradient, so that it can come back."""
    return value + (value.clamp_min(0) - value).detach()
