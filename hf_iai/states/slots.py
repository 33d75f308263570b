"""What states of named tensors have in common, one row of each for a task."""

from torch import Tensor, nn

from ..bases.base import Base


class SlotState(nn.Module):
    """A state whose tensors are those of `start`, theta(0), name -> (...) without the axis of tasks."""

    num_slots_in_front = 0
    start: nn.ParameterDict

    def initial(self, batch_size: int) -> dict[str, Tensor]:  # (B, ...) each
        """The state of B tasks that have read nothing."""
        return {name: t.expand(batch_size, *t.shape) for name, t in self.start.items()}

    def visible(self, base: Base, tensors: dict[str, Tensor]) -> dict[str, Tensor]:  # (B, ...) each
        """What a query sees, of all that is kept."""
        return {name: tensors[name] for name in self.start}

    def kind(self, name: str) -> str:
        """What tensors of the same kind have in common; heads learn one rate for each."""
        return name
