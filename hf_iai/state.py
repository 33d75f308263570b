"""TaskState: the state of a batch of tasks, as a value."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from torch import Tensor
from transformers import Cache

from .bases.hub_ids import is_hub_id
from .heads import KEPT, followed_by, same_outputs, united
from .heads.chosen import with_later
from .label_names import Names, in_order, union, with_classes
from .state_file import CONFIG, WEIGHTS, names_of, read_state_file, write_state_file
from .tensors import along

KEPT_BY = "kept by "  # then the rule by which slots hold tokens of chunks that were read apart


@dataclass(frozen=True)
class Identity:
    """The base and adapter that a state belongs to. Two identities are equal if their fingerprints are.

    Args:
        fingerprint: a hash, see `identity.fingerprint`.
        name: a display name for error messages.
    """

    fingerprint: str
    name: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


@dataclass(frozen=True, eq=False)
class TaskState:
    """The state theta of B tasks. It is never changed: every update returns a new one.

    Args:
        tensors: name -> tensor (B, ...). The classes of `hf_iai.states` document the layout of each state type.
        step: number of chunks read, (B,) int64.
        num_tokens: number of tokens read, (B,) int64.
        identity: the base and adapter that made the state.
        accumulation: how the state was made: `"average"`, `"recent"`, `"gradients"`, `"both"`, or `"sums"` for a linear
            state.
        class_names: the names of each task's classes, for a classifier; see `label_names`. None for all other states.

    Example:
        >>> import torch
        >>> from hf_iai.state import Identity, TaskState
        >>> zero = torch.zeros(2, dtype=torch.long)
        >>> state = TaskState({"prompt": torch.ones(2, 4, 8)}, zero, zero, Identity("ab", "tiny"), "average")
        >>> state.batch_size, state.nbytes, state.select(1).batch_size
        (2, 256, 1)
    """

    tensors: dict[str, Tensor]
    step: Tensor  # (B,)
    num_tokens: Tensor  # (B,)
    identity: Identity
    accumulation: str
    class_names: tuple[Names, ...] | None = None

    def __repr__(self) -> str:
        """One line: accumulation, number of tasks, chunks and tokens read, bytes, adapter."""
        counts = [sorted({*t.tolist()}) for t in (self.step, self.num_tokens)]
        chunks, tokens = (f"{c[0]}" if len(c) == 1 else f"{c[0]}..{c[-1]}" if c else "0" for c in counts)
        return (
            f"TaskState({self.accumulation}, tasks={self.batch_size}, chunks={chunks}, tokens={tokens}, "
            f"bytes={self.nbytes}, adapter={self.identity.name!r})"
        )

    @property
    def label_names(self) -> Names:
        """The names of the logits' columns, for a classifier of one task.

        Raises:
            ValueError: if the state has no classes, or holds several tasks.
        """
        if self.class_names is None:
            raise ValueError("only a linear state of likelihood 'softmax' has classes, which this is not")
        if self.batch_size != 1:
            raise ValueError(f"{self.batch_size} tasks have names of their own: use select(i).label_names")
        return self.class_names[0]

    @property
    def batch_size(self) -> int:
        return len(self.step)

    @property
    def nbytes(self) -> int:
        """The size of `tensors` in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def map(self, function: Callable[[Tensor], Tensor]) -> "TaskState":
        """The state after `function` was applied to every tensor, counts included."""
        return replace(
            self,
            tensors={name: function(t) for name, t in self.tensors.items()},
            step=function(self.step),
            num_tokens=function(self.num_tokens),
        )

    def detach(self) -> "TaskState":
        return self.map(Tensor.detach)

    def clone(self) -> "TaskState":
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str) -> "TaskState":
        return self.map(lambda t: t.to(device))

    def select(self, index: int) -> "TaskState":
        """The state of task `index` alone, with B = 1.

        Raises:
            IndexError: if there is no such task.
        """
        if not -self.batch_size <= index < self.batch_size:
            raise IndexError(f"task {index} of a state of {self.batch_size} tasks")
        index %= self.batch_size
        one = self.map(lambda t: t[index : index + 1])
        if self.class_names is None:
            return one
        names = self.class_names[index]
        return replace(one, tensors=with_classes(one.tensors, len(names)), class_names=(names,))

    @staticmethod
    def stack(states: Sequence["TaskState"]) -> "TaskState":
        """Combine states into one state that holds all their tasks, in order.

        Raises:
            ValueError: if there is no state, or states belong to different adapters.
        """
        first, names = _same_kind(states), None
        if first.class_names is not None:
            names = tuple(own for s in states for own in s.class_names)
            most = max(map(len, names))
            states = [replace(s, tensors=with_classes(s.tensors, most)) for s in states]
        elif first.accumulation == "sums":
            sums = same_outputs([s.tensors for s in states])
            states = [replace(s, tensors=own) for s, own in zip(states, sums, strict=True)]
        return replace(
            first,
            class_names=names,
            tensors={name: torch.cat([s.tensors[name] for s in states]) for name in first.tensors},
            step=torch.cat([s.step for s in states]),
            num_tokens=torch.cat([s.num_tokens for s in states]),
        )

    @staticmethod
    def merge(states: Sequence["TaskState"]) -> "TaskState":
        """Combine states that read different chunks of the same tasks into the state that has read all these chunks.

        An averaged slot is a weighted mean of read-outs. The state also stores the mean weight as `precision`. With n_s
        chunks read by state s,

            weight_s = n_s precision_s,   slot = sum_s weight_s slot_s / sum_s weight_s

        This equals reading all chunks in sequence, in any order, except that forgetting rates and the delta rule are
        left out, because they depend on the order. Kept tokens (`num_kept_tokens`) age by the tokens that later states
        have read, so give the states in the order of their texts, the earliest first.

        The sums of linear states are added. Classes of the same name are added to each other. For regressions this
        equals reading in sequence. The prototypes of a classifier are united and its fitted rows averaged; both depend
        on the order in which examples were read, so there it is only close.

        Slots that hold tokens (`accumulation="attention"` or `"surprisal"`, with `read_behind="start"`) keep the tokens
        that they would have kept in sequence. Fast weights of a prefix+lora state become the mean over all chunks.

        Raises:
            ValueError: if there is no state, adapters or batch sizes differ, or the states cannot be merged.
        """
        first = _same_kind(states)
        merge_two = _merge_of(first.accumulation)
        if len({s.batch_size for s in states}) > 1:
            raise ValueError(f"states of different batches cannot be merged: {[s.batch_size for s in states]}")
        merged = first
        for other in states[1:]:
            merged = merge_two(merged, other)
        return merged

    @staticmethod
    def from_past_key_values(
        cache: Cache, model: Any, *, attention_mask: Tensor | None = None, attentions: Sequence[Tensor] | None = None
    ) -> "TaskState":
        """The state of a text that was read already, from the keys and values that transformers kept of it.

        All tokens are kept if there are as many slots (`num_state_tokens`). Otherwise the slots hold those that the
        model's `accumulation` chooses. The fast weights of a prefix+lora state are where training lets
        them start.

        Args:
            cache: `past_key_values` of a forward pass of the model's base, over B texts of T tokens.
            model: an IAI model whose slots hold tokens: state_type `"prefix+lora"`, or `"prefix"` with accumulation
                `"attention"`, `"novelty"` or `"surprisal"`.
            attention_mask: 1 for real tokens, 0 for padding, (B, T). None: there is no padding.
            attentions: of the same pass, with `output_attentions=True`; needed to choose by attention or novelty.

        Raises:
            ValueError: if the model's slots hold no tokens, the cache is empty, does not fit the base or forgets, or it
                is not known which tokens to keep.

        Example:
            >>> from peft import get_peft_model
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from hf_iai import IAIConfig, TaskState
            >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
            ...     num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)).eval()
            >>> cache = base(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
            >>> config = IAIConfig(task_type="CAUSAL_LM", state_type="prefix+lora", num_state_tokens=8)
            >>> TaskState.from_past_key_values(cache, get_peft_model(base, config)).num_tokens
            tensor([3])
        """
        return model.state_of_cache(cache, attention_mask, attentions)

    def save_pretrained(self, folder: str | os.PathLike, *, notes: Mapping[str, Any] | None = None) -> None:
        """Write `task_state.safetensors`, in one step, and a copy of its metadata for people, `config.json`.

        Args:
            folder: is made if it is missing. An earlier state in it is replaced.
            notes: what the caller wants to keep with the state, as JSON; `state_file.read_notes` gives it back.

        Raises:
            OSError: if nothing can be written there; an earlier state is as it was.
        """
        fields = {"fingerprint": self.identity.fingerprint, "name": self.identity.name}
        fields |= {"accumulation": self.accumulation}
        if self.class_names is not None:
            fields["label_names"] = [list(names) for names in self.class_names]
        if notes is not None:
            fields["notes"] = dict(notes)
        write_state_file(folder, self.tensors | {"step": self.step, "num_tokens": self.num_tokens}, fields)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload task state",
    ) -> str:
        """Save the state to a repository on the Hub, which is created if needed. Returns the commit's address.

        Args:
            repo_id: `"name"` or `"owner/name"`.
            private, token, revision, commit_message: as in `huggingface_hub.HfApi`.

        Raises:
            The errors of huggingface_hub.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
            )
        return commit.commit_url

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
    ) -> "TaskState":
        """Load a saved state from a folder. If there is no such folder, load it from the Hub.

        Args:
            folder: a folder, or the id of a repository, `"owner/name"`.
            revision, token: for the repository, as in `huggingface_hub.snapshot_download`.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if the format is unknown, a file is damaged, or a value is none that a state can have.
            huggingface_hub's own errors: if the repository is missing, gated, or not cached while offline.
        """
        if is_hub_id(folder, with_owner=True):
            folder = snapshot_download(folder, revision=revision, token=token, allow_patterns=[CONFIG, WEIGHTS])
        tensors, fields = read_state_file(folder)
        step, num_tokens = tensors.pop("step"), tensors.pop("num_tokens")
        identity = Identity(fields["fingerprint"], fields["name"])
        return cls(tensors, step, num_tokens, identity, fields["accumulation"], names_of(fields))


def _same_kind(states: Sequence[TaskState]) -> TaskState:
    if not states:
        raise ValueError("no task state given: pass at least one")
    for state in states[1:]:
        if state.identity != states[0].identity:
            raise ValueError(f"states of different adapters: {states[0].identity.name!r} and {state.identity.name!r}")
    return states[0]


def _merge_of(accumulation: str) -> Callable[[TaskState, TaskState], TaskState]:
    """How two states are merged."""
    if accumulation.startswith(KEPT_BY):
        return partial(_keep_of_two, rule=accumulation.removeprefix(KEPT_BY))
    if accumulation not in ("average", "sums"):
        why = ": it was read behind earlier chunks; set read_behind='start'" if accumulation == "memory" else ""
        raise ValueError(f"only states of accumulation 'average' or 'sums' merge, got {accumulation!r}{why}")
    return _merge_two if accumulation == "average" else _add_two


def _keep_of_two(a: TaskState, b: TaskState, rule: str) -> TaskState:
    kept = with_later(a.tensors, b.tensors, b.num_tokens, rule)
    step = a.step + b.step
    share = b.step / step.clamp_min(1)  # fast weights and their averages: the mean over all chunks
    kept["loss"] = torch.where(b.step > 0, b.tensors["loss"], a.tensors["loss"])
    others = [name for name in a.tensors if name not in kept]
    tensors = {n: a.tensors[n] + _times(b.tensors[n] - a.tensors[n], share) for n in others}
    return replace(a, tensors=kept | tensors, step=step, num_tokens=a.num_tokens + b.num_tokens)


def _merge_two(a: TaskState, b: TaskState) -> TaskState:
    step = a.step + b.step
    weight_a, weight_b = a.tensors["precision"], b.tensors["precision"]
    weight_a, weight_b = _times(weight_a, a.step), _times(weight_b, b.step)
    total = weight_a + weight_b
    share = torch.where(total > 0, weight_b / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
    tensors = {
        name: t.lerp(b.tensors[name], share.unsqueeze(-1))
        for name, t in a.tensors.items()
        if name not in ("precision", *KEPT)
    }
    tensors["precision"] = _times(total, 1 / step.clamp_min(1))
    if KEPT[0] in a.tensors:
        kept_a, kept_b = ({name: state.tensors[name] for name in KEPT} for state in (a, b))
        tensors |= followed_by(kept_a, kept_b, b.num_tokens)
    return replace(a, tensors=tensors, step=step, num_tokens=a.num_tokens + b.num_tokens)


def _add_two(a: TaskState, b: TaskState) -> TaskState:
    if a.class_names is None:
        names = None
        one, other = same_outputs([a.tensors, b.tensors])
        tensors = {name: tensor + other[name] for name, tensor in one.items()}
    else:
        names, places_of_b = union(a.class_names, b.class_names)
        most = max(map(len, names))
        tensors = united(with_classes(a.tensors, most), in_order(b.tensors, places_of_b, most))
    return replace(
        a,
        tensors=tensors,
        step=a.step + b.step,
        num_tokens=a.num_tokens + b.num_tokens,
        class_names=names,
    )


def _times(tensor: Tensor, row: Tensor) -> Tensor:  # (B, ...), (B,)
    return tensor * along(row.to(tensor.dtype), tensor)
