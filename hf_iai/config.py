"""IAIConfig: all settings of an adapter, saved in `adapter_config.json`."""

import warnings
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, get_args

from peft import LoraConfig

from .bases.compat import UNUSED_CLASSIFIER
from .bases.registration import IAIType
from .embedded import EMBEDDED_NAME, embedded_base, is_embedded_base
from .registry import HEADS, SIGNALS, STATES, TASKS, defaults_of, kind_of, owners, unused_fields

LARGEST = 10**6  # of any number in a configuration
# Values of the fields that have no registry; and values that are planned, but not available in this version.
CHOICES = {
    "regime": ("parametric", "explicit", "implicit"),
    "accumulation": ("average", "recent", "attention", "novelty", "surprisal", None),
    "read_behind": ("state", "start"),
    "pooling": ("mean", "cls"),
    "prediction": ("logits", "probabilities", "latent", None),
}
# Fields that earlier versions accepted, and saved, also where nothing used them.
ACCEPTED_BEFORE = {"state_r", "state_target_modules", "path_window", "correction"}
NOT_YET = {"task_type": ("TOKEN_CLS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")}


@dataclass
class IAIConfig(LoraConfig):
    """Configuration of iterative amortized inference: `theta(i+1) = h_phi(theta(i), chunk(i))`.

    A model reads a task chunk by chunk into a state theta, and answers queries under that state. The adapter learns how
    to do this from many tasks. It consists of theta(0), the update h_phi, and a LoRA in the base.

    The fields of `LoraConfig` (`r`, `lora_alpha`, `target_modules`, ...) describe this LoRA. It is active while the
    base reads a chunk out, and in regime `"explicit"` also while a query is answered.

    Only fields that belong to the chosen task, state type, signal and head may be set; all others keep their defaults:

        task                     chosen by                              fields
        text                     task_type="CAUSAL_LM"                  regime, state_type, signal
        vectors                  vector_width, num_outputs              the same, and likelihood
        classification           task_type="SEQ_CLS", "linear"          regime, state_type, pooling
        regression               the same, likelihood="gaussian"        the same, and likelihood, fit_intercept
        predictions of text      regime="implicit"                      regime, prediction
        predictions of vectors   the same, vector_width, num_outputs    the same, and likelihood

        state_type   the state of a task                                num_state_tokens   further fields
        "prefix"     keys and values of m slots in every layer          m slots            num_kept_tokens, delta_rule,
                                                                                           read_behind
        "prefix+lora"  slots that hold tokens, and fast weights         m slots            those of "lora", read_behind,
                                                                                           accumulation, write_steps,
                                                                                           initial_rate
        "prompt"     m input embeddings (a soft prompt)                 m slots
        "lora"       a low-rank update of the base's weights            m read-out slots   state_r, state_target_modules
        "mlp"        weights of a small network that answers (vectors)  m hidden units
        "linear"     rows of a classifier or regression over features   none

        signal           heads, the default first                                  further fields
        "observations"   "gated"
        "gradients"      "learned_optimizer", "sgd", "meta_sgd", "path_aware",     second_order, initial_rate
                         "normalized"
        "both"           "gated"                                                   second_order

        head                  the update                                             further fields
        "gated"               average of read-outs, and a learned correction         accumulation, correction, pin_bos
        "learned_optimizer"   a small network computes the step                      learned_optimizer
        "sgd"                 one learned rate per tensor (MAML)
        "meta_sgd"            one learned rate per coordinate
        "path_aware"          the same, and a step back every w chunks               path_window
        "normalized"          steps that do not depend on the size of the gradient

    A prefix+lora state has signal "both", and all heads of "gradients": "normalized" by default. Untrained, it is meant
    to be at least as good as the last m tokens in context, on any base, and better after a few chunks.

    Classification and regression have a head of their own. Predictions have neither state type, signal nor head.

    Args:
        regime: who answers a query. `"parametric"`: the bare base. `"explicit"`: base and LoRA. `"implicit"`: there is
            no task state; each query has its own prediction, which every chunk refines (`IAIModel.refine`). For a
            linear state, `"parametric"` means that the frozen encoder embeds examples and queries, and `"explicit"`
            that encoder and LoRA embed them. None: `"parametric"` for a linear or mlp state, else `"explicit"`.
        vector_width: width of the vectors, if examples and queries are vectors (x, y) instead of text. The base,
            usually a small one without pretraining, reads each example as one token. A state `"prefix"`, `"prompt"` or
            `"lora"` then needs regime `"explicit"` and `signal="observations"`, and a learned map turns what base and
            LoRA make of a query into the answer. `"mlp"` needs regime `"parametric"`. None: text, or features of an
            encoder.
        num_outputs: number of classes, or of real targets per vector. Set it together with `vector_width`.
        likelihood: the targets of vectors and linear states. `"softmax"`: classes. `"gaussian"`: real numbers.

        state_type: what the state is, see the table. `"prefix"` needs a base in which all layers are attention. `"mlp"`
            needs `vector_width`. `"linear"` and `task_type="SEQ_CLS"` need each other.
        num_state_tokens: m, at least 1. None: 16, or none for a linear state; for prefix+lora a quarter of the window,
            at most 256. A lora state learned from gradients alone does not use it.
        state_r: rank of a lora or prefix+lora state.
        state_target_modules: the modules that such a state updates: the last parts of their names, a regular expression
            for whole paths, or `"all-linear"`. None: `"all-linear"` for prefix+lora; for lora PEFT's choice for the
            base's family (such as query and value projections), or `"all-linear"` for a family that PEFT does not know.

        signal: what a chunk is learned from. `"observations"`: what the base holds after reading it (keys, values,
            hidden states). `"gradients"`: the gradient of the chunk's loss with respect to the state. `"both"`: both of
            them. None: `"both"` for prefix+lora, else `"observations"`.
        head: how the state is updated, see the table. None: the default of the signal, or of the state type.
        second_order: whether training differentiates through the chunks' gradients. This takes several times the
            memory.
        initial_rate: initial value of the learned rates of gradient steps. None: a measured value for the state type.
        learned_optimizer: hyperparameters of `head="learned_optimizer"`, keys of `heads.LearnedStepSettings`. Missing
            keys get their defaults. The trained weights are only valid with the hyperparameters of their training.
        path_window: w of `head="path_aware"`. After every w-th chunk it mixes in the state from w chunks before.

        accumulation: `"average"`: a running average of what was read out of the chunks. `"recent"`: exactly the last m
            tokens, as a control. For prefix and prefix+lora also, with the first token always kept, and the latest m /
            2: `"attention"`: the tokens that received most attention, a choice for each layer and head; `"novelty"`: a
            quarter that nothing later repeats, such as facts told once, and the others by attention; `"surprisal"`:
            those after large surprises. None: `"attention"` for prefix+lora, else `"average"`.
        read_behind: what a chunk is read behind, if slots hold tokens. `"state"`: the current state, so that what is
            kept knows what came before. `"start"`: nothing, so that states can be merged; not with `"novelty"`.
        write_steps: gradient steps per chunk of a prefix+lora state. Every one after the first reads the chunk again.
        correction: whether an average has learned weights and a learned correction; only with `accumulation="average"`.
        num_kept_tokens: K < m, how many slots of an averaged prefix hold single tokens unchanged: the latest tokens,
            and those after large surprises (`heads.kept`). Only with `signal="observations"`. Meant for text that
            repeats names.
        delta_rule: whether the value that a token replaces is subtracted from an averaged prefix before the token is
            added (`heads.delta`). Meant for text in which newer facts replace older ones. The order of chunks then
            matters, so `TaskState.merge`, which does not know it, leaves the rule out.
        pin_bos: keep a beginning token for bases that need an attention sink: in slot 0 if `accumulation="recent"`;
            before the slots of an averaged prefix, where theta(0) is then hidden from queries. Read-outs of an averaged
            prompt are then added to theta(0). None: False, and for averages whether the base needs a sink, which is
            measured (`bases.Base.needs_sink`).

        pooling: how a linear state makes one vector of a text. `"mean"`: the mean of its last hidden states. `"cls"`:
            the last hidden state of its first token. For classes the vector is then centred and scaled to unit length;
            for a regression it stays as it is, since the scale matters.
        fit_intercept: whether a linear regression has an intercept b. False: b = 0, for targets that are known to be 0
            at features of 0.
        prediction: the form of a prediction in regime `"implicit"`: `"logits"`, `"probabilities"` or `"latent"` (hidden
            states). None: `"logits"`.

    With `likelihood="gaussian"`, linear and mlp states predict means only; the variance is fixed at 1.

    Raises:
        ValueError: for an unknown value, one that is not available yet, a field that the choice does not use, or values
            that cannot work together.

    Example:
        >>> from hf_iai import IAIConfig
        >>> IAIConfig(task_type="CAUSAL_LM", num_state_tokens=8).state_type
        'prefix'

    Source: Mittal et al., Iterative Amortized Inference, arXiv 2510.11471, section 3.
    """

    regime: str | None = field(
        default=None, metadata={"help": "who answers: parametric, explicit or implicit; None: the state type's default"}
    )
    prediction: str | None = field(
        default=None,
        metadata={"help": "form of a prediction (regime implicit): logits (default), probabilities, latent"},
    )
    state_type: str = field(
        default="prefix", metadata={"help": "form of the task state: prefix, prefix+lora, prompt, lora, linear or mlp"}
    )
    signal: str | None = field(
        default=None,
        metadata={"help": "what a chunk is learned from: observations, gradients or both; None: the state's default"},
    )
    head: str | None = field(default=None, metadata={"help": "how the state is updated; None: the signal's default"})
    second_order: bool = field(
        default=False, metadata={"help": "training differentiates through the chunks' gradients"}
    )
    initial_rate: float | None = field(
        default=None, metadata={"help": "initial value of the learned rates; None: a measured value"}
    )
    learned_optimizer: dict | None = field(
        default=None, metadata={"help": "hyperparameters of the learned_optimizer head; missing keys get defaults"}
    )
    path_window: int = field(
        default=5, metadata={"help": "w of the path_aware head: it mixes in an older state every w chunks"}
    )
    state_r: int = field(default=8, metadata={"help": "rank of a lora state"})
    state_target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "modules that a lora state updates; None: PEFT's choice for the family"}
    )
    vector_width: int | None = field(
        default=None, metadata={"help": "width of examples and queries that are vectors; None: text"}
    )
    num_outputs: int | None = field(
        default=None, metadata={"help": "number of classes, or of real targets, of vectors"}
    )
    num_state_tokens: int | None = field(
        default=None, metadata={"help": "number m of slots of the state; None: 16 (a linear state has none)"}
    )
    accumulation: str | None = field(
        default=None,
        metadata={"help": "what slots hold: average, recent, attention, novelty, surprisal; None: the state's default"},
    )
    read_behind: str = field(
        default="state", metadata={"help": "what a chunk is read behind: the current state, or start, for merging"}
    )
    write_steps: int = field(default=1, metadata={"help": "gradient steps per chunk of a prefix+lora state"})
    num_kept_tokens: int = field(default=0, metadata={"help": "number of slots of a prefix that keep single tokens"})
    correction: bool = field(
        default=True, metadata={"help": "the average has learned weights and a learned correction"}
    )
    delta_rule: bool = field(
        default=False, metadata={"help": "the value that a token replaces is taken out of the average"}
    )
    pin_bos: bool | None = field(
        default=None, metadata={"help": "keep a beginning token before the slots; None: if an average's base needs it"}
    )
    pooling: str = field(
        default="mean", metadata={"help": "how a linear state makes one vector of a text: mean or cls"}
    )
    likelihood: str = field(
        default="softmax", metadata={"help": "targets of vectors and linear states: softmax (classes) or gaussian"}
    )
    fit_intercept: bool = field(default=True, metadata={"help": "a linear regression has an intercept"})

    def __post_init__(self) -> None:
        saved = self.peft_version is not None  # PEFT fills it in; in a new configuration it is still open
        self._check_types()
        self._check_choices()
        for name, value in STATES[self.state_type].defaults.items():
            setattr(self, name, value if getattr(self, name) is None else getattr(self, name))
        task = kind_of(self)
        self.regime = task.default_regime(self) if self.regime is None else self.regime
        task.check(self)
        task.complete(self)
        parts = task.parts(self)
        self._refuse_unused(parts, task, saved=saved)
        for part in parts[1:]:
            part.check(self)
        if not self.uses_reader:  # unused LoRA layers would be unused parameters in data-parallel training
            self.target_modules = "dummy-target-modules"
        super().__post_init__()
        self.peft_type = IAIType.IAI
        self._check_lora()
        if self.base_model_name_or_path == EMBEDDED_NAME:
            self.base_model_name_or_path = embedded_base()

    def _check_types(self) -> None:
        """Check the type of every field of ours, and that numbers are neither negative, infinite nor beyond reason."""
        for name, annotation in IAIConfig.__annotations__.items():
            value = getattr(self, name)
            value = sorted(value) if isinstance(value, set | tuple) else value
            if not _fits(value, annotation):
                raise ValueError(f"{name} must be {_in_words(annotation)}, got {value!r:.80}")
            if isinstance(value, int | float) and not 0 <= value <= LARGEST:
                raise ValueError(f"{name} must be from 0 to {LARGEST}, got {value}")

    def _check_choices(self) -> None:
        tasks = TASKS.values()
        choices = CHOICES | {"state_type": tuple(STATES)}
        choices |= {"head": (None, *HEADS), "regime": (None, *CHOICES["regime"]), "signal": (None, *SIGNALS)}
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

    def _refuse_unused(self, parts: list[type], task: type, *, saved: bool) -> None:
        """Refuse a field that nothing uses. A saved adapter may have those that earlier versions accepted."""
        for name in unused_fields(self, parts):
            users = f"; it is for {' or '.join(owners(name))}" if owners(name) else ""
            message = (
                f"{name}={getattr(self, name)!r} has no meaning for {task.called(self)}: "
                f"leave it {defaults_of(self)[name]!r}{users}"
            )
            if not (saved and name in ACCEPTED_BEFORE):
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
        """Whether any pass uses LoRA: answering a query, or reading a chunk out."""
        return self.lora_answers or kind_of(self).reads_out(self)

    def to_dict(self) -> dict[str, Any]:
        """The values to save. An adapter of the embedded base names it instead of its folder on this machine."""
        values = super().to_dict()
        if values.get("modules_to_save") == [UNUSED_CLASSIFIER]:  # see `compat.leave_out_classifier`
            values["modules_to_save"] = None
        if is_embedded_base(values.get("base_model_name_or_path")):
            values["base_model_name_or_path"] = EMBEDDED_NAME
        return values


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value has an annotated type; whole numbers are floats too, truth values are no numbers."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if isinstance(value, list):
        return list[str] in kinds and all(isinstance(item, str) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int in kinds or float in kinds
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))


def _in_words(annotation: Any) -> str:
    return str(getattr(annotation, "__name__", annotation)).replace(" | ", " or ")
