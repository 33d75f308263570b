"""A regression head that is computed from running sums: ridge regression with a learned penalty.

Axes: B tasks, n examples of a chunk, o outputs, d features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..tensors import zero_linear

Kept = dict[str, Tensor]
OF_OUTPUTS = ("target", "cross", "square")  # the tensors of shape (B, o, ...)
PENALTY = 1e-3  # lambda before training, in units of the features' mean scatter tr(S) / d
ROUNDING = 1e-10  # smallest lambda, in units of tr(M): smaller differences between features may be rounding errors
MOST_LOG = 10.0  # bound of the learned log factor of lambda, up and down
GAIN = 3.0  # factor on the network's output, which has to move by whole units within a few hundred steps
PROBES = (PENALTY, 0.1, 10.0)  # the network sees the fits with these penalties, in the same unit


class GaussianRows(nn.Module):
    """A regression head: it computes the rows W and biases b of a linear regression from features x and targets y.

    The state holds sums over examples: n, sum x, M = sum x x', sum y, sum y x', and sum y^2 of each output. Let S and C
    be the centred M and sum y x'. Then

        W      = C (S + lambda I)^-1
        b      = mean(y) - W mean(x)
        lambda = 0.001 exp(g) tr(S) / d + 1e-10 tr(M)

    This is the posterior mean under a Gaussian likelihood and a Gaussian prior on the rows. A small network gives g,
    which is between -10 and 10. The network sees the logarithms of n, d and n / d, the effective rank of S, and two
    numbers for each of three fixed penalties: the share of variance that the fit explains, and the share that it would
    leave unexplained in new examples (generalised cross-validation of a fit with an intercept). Its last layer starts
    at zero. With g = 0 this is streaming ridge regression, nearly least squares if n is larger than d. The last term
    of lambda keeps S + lambda I invertible if no feature varies.

    The network's inputs do not change if the features are rotated or rescaled or the targets are rescaled, so
    predictions scale as the targets do. The order of examples does not matter. The sum of two states is the state that
    has read both. Reading a chunk costs n d (d + o). Computing the rows takes an eigendecomposition and a Cholesky
    factorisation of S.

    Sums are float64. With fewer examples than features and such a small lambda, float32 sums would change predictions
    by 0.001 of the targets' spread, and by 0.01 if the features' mean is three times their spread.

    Args:
        hidden: width of the network's hidden layer.
        fit_intercept: False if targets are known to be 0 at x = 0. Then nothing is centred, and b = 0.

    Example:
        >>> import torch
        >>> head = GaussianRows()
        >>> kept = head.initial(num_tasks=1, num_outputs=1, width=1)
        >>> x, y = torch.tensor([[[0.0], [1.0], [2.0]]]), torch.tensor([[[1.0], [3.0], [5.0]]])
        >>> rows, bias = head.rows(head(kept, x, y, torch.ones(1, 3)))
        >>> round(rows.item(), 2), round(bias.item(), 2)
        (2.0, 1.0)

    Source: Hoerl and Kennard, Ridge Regression (1970); Golub, Heath and Wahba, Generalized Cross-Validation (1979); the
    learned penalty is ours.
    """

    def __init__(self, hidden: int = 16, fit_intercept: bool = True) -> None:
        super().__init__()
        self.fit_intercept = fit_intercept
        last = zero_linear(hidden, 1)  # made before the first layer, since the order of the layers decides their draws
        self.of_task = nn.Sequential(nn.Linear(4 + 2 * len(PROBES), hidden), nn.GELU(), last)

    @staticmethod
    def initial(num_tasks: int, num_outputs: int, width: int, device=None) -> Kept:
        """The sums before anything was read, all 0, in float64.

        `count` (B,), `total` (B, d), `moment` (B, d, d), `target` and `square` (B, o), `cross` (B, o, d).
        """
        shapes = {
            "count": (),
            "total": (width,),
            "moment": (width, width),
            "target": (num_outputs,),
            "cross": (num_outputs, width),
            "square": (num_outputs,),
        }
        return {
            name: torch.zeros(num_tasks, *shape, dtype=torch.float64, device=device) for name, shape in shapes.items()
        }

    def forward(
        self,
        kept: Kept,
        features: Tensor,  # (B, n, d)
        targets: Tensor,  # (B, n, o)
        real: Tensor,  # (B, n), 0 for padding
    ) -> Kept:
        """Add the examples of a chunk to the sums."""
        padding = (real == 0).unsqueeze(-1)
        x, y = (t.double().masked_fill(padding, 0.0) for t in (features, targets))
        centred = float(self.fit_intercept)  # 0 keeps both means at 0
        return {
            "count": kept["count"] + (real != 0).sum(1),
            "total": kept["total"] + centred * x.sum(1),
            "moment": kept["moment"] + x.mT @ x,
            "target": kept["target"] + centred * y.sum(1),
            "cross": kept["cross"] + y.mT @ x,
            "square": kept["square"] + y.square().sum(1),
        }

    def rows(self, kept: Kept) -> tuple[Tensor, Tensor]:
        """The regression that the sums give: W (B, o, d) and b (B, o), in float32.

        Both are 0 before anything was read. W is 0 after a single example, which b fits alone.
        """
        scatter, cross = _centred(kept)
        number = kept["count"].clamp_min(1).unsqueeze(-1)  # (B, 1)
        eye = torch.eye(scatter.shape[-1], dtype=scatter.dtype, device=scatter.device)
        factor = torch.linalg.cholesky(scatter + self.penalty(kept).view(-1, 1, 1) * eye)
        rows = torch.cholesky_solve(cross.mT, factor).mT
        bias = (kept["target"] - (rows @ kept["total"].unsqueeze(-1)).squeeze(-1)) / number
        return rows.float(), bias.float()

    def penalty(self, kept: Kept) -> Tensor:
        """lambda (B,)."""
        scatter, _ = _centred(kept)
        learned = MOST_LOG * torch.tanh(GAIN / MOST_LOG * self.of_task(_of_task(kept))).squeeze(-1)
        return _penalty(kept, scatter, PENALTY * learned.double().exp())


def with_outputs(kept: Kept, num_outputs: int) -> Kept:
    """Give the sums of a state that has read nothing their `num_outputs` outputs.

    Raises:
        ValueError: if the sums already have another number of outputs.
    """
    there = kept["target"].shape[1]
    if there not in (0, num_outputs):
        raise ValueError(
            f"states of {there} and {num_outputs} outputs do not go together: read the same outputs into both"
        )
    more = num_outputs - there
    grown = {name: nn.functional.pad(kept[name], (0, more)) for name in ("target", "square")}
    return kept | grown | {"cross": nn.functional.pad(kept["cross"], (0, 0, 0, more))}


def same_outputs(states: Sequence[Kept]) -> list[Kept]:
    """Give all states the same outputs: those of the states that have read something."""
    most = max(kept["target"].shape[1] for kept in states)
    return [with_outputs(kept, most) for kept in states]


def _centred(kept: Kept) -> tuple[Tensor, Tensor]:
    """The centred sums S (B, d, d) and C (B, o, d)."""
    mean = kept["total"] / kept["count"].clamp_min(1).unsqueeze(-1)
    scatter = kept["moment"] - kept["total"].unsqueeze(-1) * mean.unsqueeze(-2)
    return scatter, kept["cross"] - kept["target"].unsqueeze(-1) * mean.unsqueeze(-2)


def _penalty(kept: Kept, scatter: Tensor, relative: Tensor | float) -> Tensor:  # (B,)
    spread, size = (t.diagonal(dim1=1, dim2=2).sum(-1) for t in (scatter, kept["moment"]))
    least = ROUNDING * size + torch.finfo(size.dtype).tiny ** 0.5  # above 0 even if all features are 0
    return relative * spread.clamp_min(0) / scatter.shape[-1] + least


@torch.no_grad()  # these are measurements; only the network that maps them to lambda is trained
def _of_task(kept: Kept) -> Tensor:  # (B, 4 + 2 probes)
    """The network's inputs, each scaled to about 1.

    Number of examples, number of features, their ratio, effective rank; then for every probe the share of variance
    that its fit explains, and the logarithm of the share that it would leave in new examples.
    """
    scatter, cross = _centred(kept)
    number, (num_outputs, width) = kept["count"], cross.shape[1:]
    values, vectors = torch.linalg.eigh(scatter)
    values = values.clamp_min(0)
    rank = values.sum(-1).square() / values.square().sum(-1).clamp_min(torch.finfo(values.dtype).tiny)
    size = torch.full_like(number, width).log()
    seen = [number.log1p() - 4, size - 4, number.log1p() - size, rank.clamp_min(1).log() - 3]
    square = kept["square"] - kept["target"].square() / number.clamp_min(1).unsqueeze(-1)  # (B, o)
    varies = square > ROUNDING * kept["square"]
    along = (cross @ vectors).square()  # (B, o, d)
    for relative in PROBES:
        raised = values + _penalty(kept, scatter, relative).unsqueeze(-1)  # (B, d)
        explained = (along * ((2 * raised - values) / raised.square()).unsqueeze(1)).sum(-1)
        share = torch.where(varies, 1 - explained / square.where(varies, 1.0), 1.0).clamp(0, 1)  # not explained
        free = 1 - (1 + (values / raised).sum(-1, keepdim=True)) / number.clamp_min(1).unsqueeze(-1)
        left = (share / free.clamp_min(0.05).square()).clamp_min(1e-3).log()
        seen += [t.sum(-1) / max(1, num_outputs) for t in (1 - share, left)]
    return torch.stack(seen, -1).float()
