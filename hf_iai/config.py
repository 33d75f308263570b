"""IAIConfig: everything that is saved in `adapter_config.json`."""

import warnings
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from .bases.compat import UNUSED_CLASSIFIER
from .bases.registration import IAIType
from .embedded import EMBEDDED_NAME, embedded_base, is_embedded_base
from .registry import HEADS, SIGNALS, STATES, TASKS, kind_of, own_fields, owners, unused_fields

# Values of the fields that no part registers itself for, and what the design names but this version does not have yet.
CHOICES = {
    "regime": ("parametric", "explicit", "implicit"),
    "accumulation": ("average", "recent"),
    "pooling": ("mean", "cls"),
    "prediction": ("logits", "probabilities", "latent", None),
}
NOT_YET = {"task_type": ("TOKEN_CLS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")}


@dataclass
class IAIConfig(LoraConfig):
    """Configuration of iterative amortized inference: `theta(i+1) = h_phi(theta(i), chunk(i))`.

    The LoRA fields (`r`, `lora_alpha`, `target_modules`, ...) describe the reader: it is active while a chunk is read,
    and, in regime `"explicit"`, while a query is answered. A linear state compares queries with what was read, so that
    both are embedded alike: by the frozen encoder in regime `"parametric"`, by encoder + LoRA in `"explicit"`.

    Args:
        regime: `"parametric"` (queries are answered by the bare base), `"explicit"` (by base + LoRA), or `"implicit"`:
            there is no task state, each query refines its own prediction by each chunk (`IAIModel.refine`). None:
            explicit, but for a linear state and an mlp.
        prediction: of regime `"implicit"`, what a prediction is kept as: `"logits"` (None: this), `"probabilities"` or
            `"latent"`.
        vector_width: observations are vectors of so many numbers, each with a class or real targets (`likelihood`), and
            the base, often a small one made from a configuration, reads each as one token. In regime `"explicit"` a
            state of observations is averaged, and a learned map decodes what base and LoRA make of a query. None: text.
        num_outputs: of vectors, how many classes there are, or how many targets each has.
        state_type: `"prefix"` (keys and values of every layer; all layers must be attention), `"prompt"` (input
            embeddings), `"lora"` (a low-rank update of the base's weights, one per task), with `vector_width` also
            `"mlp"` (the weights of a small network that answers by itself, with `num_state_tokens` hidden units; see
            `states.MLPState`), or, with `task_type="SEQ_CLS"` and only there, `"linear"` (the rows of a classifier; see
            `cores.LinearCore`).
        signal: `"observations"`: what the base holds about the chunk's tokens; `"gradients"`: how the loss of the
            chunk's labels changes with the state; or `"both"`.
        head: how the state is refined. Of observations and of both: `"gated"`, an average with a learned
            correction. Of gradients: `"learned_optimizer"`, `"sgd"` (one learned rate per tensor; MAML),
            `"meta_sgd"` (one per coordinate) or `"path_aware"`. None: the first of these.
        second_order: whether training differentiates through the gradients of a chunk; several times the memory.
        initial_rate: what the learned rates of gradients start as; None: measured for the state type.
        learned_optimizer: decays, times and sizes of `head="learned_optimizer"`, which its trained weights mean nothing
            without: keys of `heads.LearnedStepSettings`. What is not given is completed with the defaults.
        path_window: w of `"path_aware"`, which mixes in the state of w chunks before after every w-th.
        num_state_tokens: m, the number of slots; at least 1. None: 16. Of a lora state the read-out slots; gradients
            alone need none. A linear state has none; of an mlp state they are the hidden units.
        state_r: r, the rank of a lora state.
        state_target_modules: which modules a lora state updates: the last parts of their names, a regular expression
            for whole paths, or `"all-linear"`. None: PEFT's choice for the base's family, such as the query and value
            projections, and `"all-linear"` for a family that PEFT does not know.
        accumulation: `"average"`, the running average of the read-outs, or `"recent"`, exactly the last m tokens.
        num_kept_tokens: K < m, how many slots of an averaged prefix keep single tokens as they are: the latest, and
            those after most surprise (see `heads.kept`); for text that repeats names.
        correction: whether learned precisions and the learned correction exist (`"average"` only).
        delta_rule: before a token is added to an averaged prefix, take out what the state recalls in its place (see
            `heads.delta`); for text in which newer facts replace older ones. It needs the order of the text:
            `TaskState.merge` cannot know which of two states is the newer, and leaves it out.
        pin_bos: keep a begin-of-sequence token in slot 0, for bases that need an attention sink (`"recent"` only).
        pooling: how the last hidden states of a text become one vector, of a linear state: `"mean"` over its tokens, or
            its first token's, `"cls"`.
        likelihood: of a linear state, and of vectors. `"softmax"`: targets are classes; a linear state's features are
            centred and of unit length. `"gaussian"`: targets are real vectors; a linear state is a linear regression
            (`cores.GaussianCore`) on the pooled vector as it is, since it needs its scale; a linear and an mlp state
            say nothing of the variance, which is 1.
        fit_intercept: of a linear regression; False, where targets are known to be 0 at features of 0: b = 0.

    Raises:
        ValueError: for an unknown value, one that is not available yet, or a combination that cannot work.

    Example:
        >>> from hf_iai import IAIConfig
        >>> IAIConfig(task_type="CAUSAL_LM", num_state_tokens=8).state_type
        'prefix'

    Source: Mittal et al., Iterative Amortized Inference, arXiv 2510.11471, section 3.
    """

    regime: str | None = field(
        default=None, metadata={"help": "parametric, explicit or implicit; None: the state type's default"}
    )
    prediction: str | None = field(
        default=None, metadata={"help": "regime implicit keeps it as: logits (None: this), probabilities or latent"}
    )
    state_type: str = field(
        default="prefix", metadata={"help": "what the task state is: prefix, prompt, lora, linear or mlp"}
    )
    signal: str = field(default="observations", metadata={"help": "learned from: observations, gradients or both"})
    head: str | None = field(default=None, metadata={"help": "how the state is refined; None: the signal's default"})
    second_order: bool = field(default=False, metadata={"help": "differentiate through the chunks' gradients"})
    initial_rate: float | None = field(default=None, metadata={"help": "learned rates start here; None: measured"})
    learned_optimizer: dict | None = field(
        default=None, metadata={"help": "constants of the learned_optimizer head; what is missing: the defaults"}
    )
    path_window: int = field(default=5, metadata={"help": "w, chunks between skips of the path_aware head"})
    state_r: int = field(default=8, metadata={"help": "rank of a lora state"})
    state_target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "what a lora state updates; None: PEFT's choice for the family"}
    )
    vector_width: int | None = field(
        default=None, metadata={"help": "observations are vectors of this width; None: text"}
    )
    num_outputs: int | None = field(default=None, metadata={"help": "of vectors: number of classes, or of targets"})
    num_state_tokens: int | None = field(
        default=None, metadata={"help": "m, the number of slots of the state; None: 16, or none of a linear state"}
    )
    accumulation: str = field(default="average", metadata={"help": "backbone of the state: average or recent"})
    num_kept_tokens: int = field(default=0, metadata={"help": "K, slots of an average prefix that keep single tokens"})
    correction: bool = field(default=True, metadata={"help": "learned precisions and correction of the average"})
    delta_rule: bool = field(default=False, metadata={"help": "what a token replaces is taken out of the average"})
    pin_bos: bool = field(default=False, metadata={"help": "keep a BOS token in slot 0 (recent only)"})
    pooling: str = field(default="mean", metadata={"help": "hidden states to one vector (linear only): mean or cls"})
    likelihood: str = field(
        default="softmax", metadata={"help": "of targets, linear states and vectors: softmax or gaussian"}
    )
    fit_intercept: bool = field(default=True, metadata={"help": "of a linear regression (gaussian linear state)"})

    def __post_init__(self) -> None:
        from_file = self.peft_version is not None  # which PEFT writes into every saved configuration
        self._check_choices()
        task = kind_of(self)
        self.regime = task.default_regime(self) if self.regime is None else self.regime
        parts = task.parts(self)
        self._refuse_unused(parts, task, only_warn=from_file)
        for part in parts:
            part.check(self)
        if not self.uses_reader:  # without LoRA, data-parallel training finds no unused parameter
            self.target_modules = "dummy-target-modules"
        super().__post_init__()
        self.peft_type = IAIType.IAI
        self._check_lora()
        if self.base_model_name_or_path == EMBEDDED_NAME:
            self.base_model_name_or_path = embedded_base()

    def _check_choices(self) -> None:
        tasks = TASKS.values()
        choices = CHOICES | {registry.field: tuple(registry) for registry in (STATES, SIGNALS)}
        choices |= {"head": (None, *HEADS), "regime": (None, *CHOICES["regime"])}
        choices["likelihood"] = tuple(dict.fromkeys(name for task in tasks for name in task.likelihoods))
        choices["task_type"] = tuple(dict.fromkeys(task.task_type for task in tasks))
        for name, values in choices.items():
            given = getattr(self, name)
            given = getattr(given, "value", given)
            if given not in values:
                known = [value for value in values if value is not None]
                if given in NOT_YET.get(name, ()):
                    raise ValueError(f"{name}={given!r} is not available yet in this version; use one of {known}")
                raise ValueError(f"{name} must be one of {known}, got {given!r}")

    def _refuse_unused(self, parts: list[type], task: type, *, only_warn: bool) -> None:
        """A field that nothing uses is a mistake; an adapter that was saved with one still loads."""
        for name in unused_fields(self, parts):
            users = f"; it is for {' or '.join(owners(name))}" if owners(name) else ""
            message = (
                f"{name}={getattr(self, name)!r} has no meaning for {task.called(self)}: "
                f"leave it {own_fields(self)[name]!r}{users}"
            )
            if not only_warn:
                raise ValueError(message)
            warnings.warn(f"this saved configuration has a field that is not used: {message}", stacklevel=4)

    def _check_lora(self) -> None:
        if self.bias != "none":
            raise ValueError(f"bias={self.bias!r} would change the bare base: leave it 'none'")
        if isinstance(self.init_lora_weights, str) and self.init_lora_weights not in ("gaussian", "orthogonal"):
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r} rewrites the base: use True or 'gaussian'")
        for name in ("use_dora", "alora_invocation_tokens", "modules_to_save", "trainable_token_indices"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} cannot be combined with IAI: leave it unset")

    @property
    def lora_answers(self) -> bool:
        """Whether LoRA is active while a query is answered."""
        return self.regime != "parametric"

    @property
    def uses_reader(self) -> bool:
        """Whether any pass runs with LoRA: one that answers, or one that reads chunks out."""
        return self.lora_answers or kind_of(self).reads_out(self)

    def to_dict(self) -> dict[str, Any]:
        """As saved: an adapter of the embedded base names it, not the folder that holds it on this machine."""
        values = super().to_dict()
        if values.get("modules_to_save") == [UNUSED_CLASSIFIER]:  # see `compat.leave_out_classifier`
            values["modules_to_save"] = None
        if is_embedded_base(values.get("base_model_name_or_path")):
            values["base_model_name_or_path"] = EMBEDDED_NAME
        return values
