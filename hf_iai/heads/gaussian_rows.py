"""Rows of a linear regression out of running sums: ridge regression whose penalty is learned.

Axes: B tasks, n examples of a chunk, o outputs, d features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Kept = dict[str, Tensor]
OF_OUTPUTS = ("target", "cross", "square")  # the tensors (B, o, ...)
PENALTY = 1e-3  # lambda before anything is learned, in units of the features' mean scatter tr(S) / d
ROUNDING = 1e-10  # least lambda, in units of tr(M): below it, features that differ may be the same up to rounding
MOST_LOG = 10.0  # of the learned factor of lambda, either way
GAIN = 3.0  # of the network: what it gives has to move by units within a few hundred steps
PROBES = (PENALTY, 0.1, 10.0)  # penalties, in the same unit, whose fits the network sees


class GaussianRows(nn.Module):
    """Refines the rows W and biases b of a linear regression from chunks of features x and targets y.

    The state is sums over examples: n, sum x, M = sum x x', sum y, sum y x', and sum y^2 of each output. With S and C
    the centred M and sum y x',

        W      = C (S + lambda I)^-1
        b      = mean(y) - W mean(x)
        lambda = 0.001 exp(g) tr(S) / d + 1e-10 tr(M)

    which is the posterior mean under a Gaussian likelihood and a Gaussian prior of the rows. g, at most 10 either way,
    is given by a small network that sees logarithms of n, d and n / d, the effective rank of S, and of the fits with
    three fixed penalties the share of variance they explain and that they would leave unexplained in new examples
    (generalised cross-validation, of a fit with an intercept). It ends in zeros: then g = 0, streaming ridge
    regression, which is nearly least squares where n is above d. The last term keeps S + lambda I regular where no
    feature varies.

    Every input of the network is invariant to rotations and units of the features and to units of the targets, so that
    predictions scale as the targets do. The order of examples has no part in the state, and sums of two states are the
    state that read both. Reading a chunk costs n d (d + o); rows take an eigendecomposition and a Cholesky factor of S.

    Sums are float64: with fewer examples than features, the rounding of float32 sums would stand out against
    so small a lambda, in predictions by 0.001 of the targets' spread, or by 0.01 where the features' mean is three
    times theirs.

    Args:
        hidden: width of the network's hidden layer.
        fit_intercept: False, where targets are known to be 0 at x = 0: nothing is centred, and b = 0.

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
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.of_task = nn.Sequential(nn.Linear(4 + 2 * len(PROBES), hidden), nn.GELU(), last)

    @staticmethod
    def initial(num_tasks: int, num_outputs: int, width: int, device=None) -> Kept:
        """Nothing read: all 0, in float64.

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
        """Read a chunk."""
        padding = (real == 0).unsqueeze(-1)
        x, y = (t.double().masked_fill(padding, 0.0) for t in (features, targets))
        centred = float(self.fit_intercept)  # without, both means stay 0
        return {
            "count": kept["count"] + (real != 0).sum(1),
            "total": kept["total"] + centred * x.sum(1),
            "moment": kept["moment"] + x.mT @ x,
            "target": kept["target"] + centred * y.sum(1),
            "cross": kept["cross"] + y.mT @ x,
            "square": kept["square"] + y.square().sum(1),
        }

    def rows(self, kept: Kept) -> tuple[Tensor, Tensor]:
        """W (B, o, d) and b (B, o) in float32: 0 where nothing was read, and W where b had one example to fit."""
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
    """The same sums with room for o outputs, where nothing was read before.

    Raises:
        ValueError: for sums of another number of outputs.
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
    """All with the outputs of those that have read."""
    most = max(kept["target"].shape[1] for kept in states)
    return [with_outputs(kept, most) for kept in states]


def _centred(kept: Kept) -> tuple[Tensor, Tensor]:
    """S (B, d, d) and C (B, o, d)."""
    mean = kept["total"] / kept["count"].clamp_min(1).unsqueeze(-1)
    scatter = kept["moment"] - kept["total"].unsqueeze(-1) * mean.unsqueeze(-2)
    return scatter, kept["cross"] - kept["target"].unsqueeze(-1) * mean.unsqueeze(-2)


def _penalty(kept: Kept, scatter: Tensor, relative: Tensor | float) -> Tensor:  # (B,)
    spread, size = (t.diagonal(dim1=1, dim2=2).sum(-1) for t in (scatter, kept["moment"]))
    least = ROUNDING * size + torch.finfo(size.dtype).tiny ** 0.5  # above 0 where all features are 0
    return relative * spread.clamp_min(0) / scatter.shape[-1] + least


@torch.no_grad()  # measurements: training moves lambda, not what it is made from
def _of_task(kept: Kept) -> Tensor:  # (B, 4 + 2 probes)
    """Examples, features, their ratio, effective rank; what fits explain, and would leave; all of order 1."""
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
