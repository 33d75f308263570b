"""IAIConfig: everything that is saved in `adapter_config.json`."""

import os
from dataclasses import dataclass, field

from peft import LoraConfig

from .bases.registration import IAIType
from .embedded import EMBEDDED_NAME, embedded_base
from .heads import LearnedStepSettings

# What exists, and what the design names but this version does not have yet.
AVAILABLE = {
    "regime": (("parametric", "explicit", "implicit"), ()),
    "state_type": (("prefix", "prompt", "lora", "linear", "mlp"), ()),
    "signal": (("observations", "gradients", "both"), ()),
    "accumulation": (("average", "recent"), ()),
    "task_type": (("CAUSAL_LM", "SEQ_CLS"), ("TOKEN_CLS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")),
    "pooling": (("mean", "cls"), ()),
    "likelihood": (("softmax", "gaussian"), ()),
    "prediction": (("logits", "probabilities", "latent", None), ()),
}
# The heads of each signal; the first is the default.
HEADS = {
    "observations": ("gated",),
    "gradients": ("learned_optimizer", "sgd", "meta_sgd", "path_aware"),
    "both": ("gated",),
}
SIGNALS_OF_VECTORS = {"explicit": ("observations",), "parametric": ("observations", "gradients")}
# What a linear state, which has neither slots nor a gated head, leaves at their defaults.
NOT_OF_LINEAR = (
    "num_state_tokens signal head accumulation num_kept_tokens correction delta_rule pin_bos second_order initial_rate "
    "learned_optimizer"
).split()
# What has no meaning where there is no task state.
NOT_OF_IMPLICIT = (*NOT_OF_LINEAR, *"state_type state_r state_target_modules path_window pooling".split())


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
        if self.regime is None:
            self.regime = "parametric" if self.state_type in ("linear", "mlp") else "explicit"
        if self.uses_reader:
            super().__post_init__()
        else:  # nothing reads with LoRA, so none is created: data-parallel training finds no unused parameter
            self.target_modules = "dummy-target-modules"
            super().__post_init__()
        self.peft_type = IAIType.IAI
        for name, (now, later) in AVAILABLE.items():
            _check_choice(name, getattr(self, name), now, later)
        if (self.state_type == "linear") != (self.task_type == "SEQ_CLS"):
            raise ValueError(
                f"state_type='linear' and task_type='SEQ_CLS' need each other, got state_type={self.state_type!r} and "
                f"task_type={getattr(self.task_type, 'value', self.task_type)!r}: set both, or neither"
            )
        if self.regime != "implicit" and self.prediction is not None:
            raise ValueError(
                f"prediction={self.prediction!r} needs regime='implicit', got regime={self.regime!r}: leave it out"
            )
        if (self.state_type, self.likelihood) != ("linear", "gaussian"):
            self._check_unused(("fit_intercept",), "anything but state_type='linear' with likelihood='gaussian'")
        self._check_vectors()
        if self.regime == "implicit":
            self._check_implicit()
        elif self.state_type == "linear":
            self._check_unused(NOT_OF_LINEAR, "state_type='linear'")
        else:
            self._check_slots()
        if self.bias != "none":
            raise ValueError(f"bias={self.bias!r} would change the bare base: leave it 'none'")
        if isinstance(self.init_lora_weights, str) and self.init_lora_weights not in ("gaussian", "orthogonal"):
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r} rewrites the base: use True or 'gaussian'")
        for name in ("use_dora", "alora_invocation_tokens", "modules_to_save", "trainable_token_indices"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} cannot be combined with IAI: leave it unset")
        if self.base_model_name_or_path == EMBEDDED_NAME:
            self.base_model_name_or_path = embedded_base()

    def _check_unused(self, names: tuple[str, ...] | list[str], user: str) -> None:
        for name in names:
            given, default = getattr(self, name), self.__dataclass_fields__[name].default
            if given != default:
                raise ValueError(f"{name}={given!r} has no meaning for {user}: leave it {default!r}")

    def _check_implicit(self) -> None:
        self._check_unused(NOT_OF_IMPLICIT, "regime='implicit'")
        self.prediction = self.prediction or "logits"
        if self.vector_width is None:
            self._check_unused(("likelihood",), "text")
        if self.likelihood == "gaussian" and self.prediction != "logits":
            raise ValueError(
                f"likelihood='gaussian' keeps natural parameters, got prediction={self.prediction!r}: leave it out"
            )

    def _check_vectors(self) -> None:
        width, num = self.vector_width, self.num_outputs
        if (width is None) != (num is None) or (width is not None and (width < 1 or num < 1)):
            raise ValueError(
                f"vector_width and num_outputs must both be at least 1, or both None for text, got {width} and {num}"
            )
        if width is None:
            if self.state_type == "mlp":
                raise ValueError("state_type='mlp' answers about vectors: pass vector_width and num_outputs")
            return
        if self.state_type == "linear":
            raise ValueError(
                f"vector_width={width} has no meaning for state_type='linear', which takes any vectors of its base's "
                "width: leave it out, with vector_base(width) as the base"
            )
        if self.regime != "implicit" and (self.regime == "parametric") != (self.state_type == "mlp"):
            raise ValueError(
                f"vector_width={width} with regime={self.regime!r} and state_type={self.state_type!r}: the bare base "
                "says nothing of vectors. Use regime='explicit' with 'prefix', 'prompt' or 'lora', 'parametric' with "
                "'mlp', or 'implicit'"
            )
        if self.regime != "implicit" and self.signal not in (signals := SIGNALS_OF_VECTORS[self.regime]):
            raise ValueError(f"vectors in regime={self.regime!r} have the signals {signals}, got {self.signal!r}")
        for name, default in (("accumulation", "average"), ("num_kept_tokens", 0), ("delta_rule", False)):
            if (given := getattr(self, name)) != default:
                raise ValueError(f"{name}={given!r} is for text, got vector_width={width}: leave it {default!r}")

    def _check_slots(self) -> None:
        """Of a state that is read in slots, or behind them."""
        self.num_state_tokens = 16 if self.num_state_tokens is None else self.num_state_tokens
        if self.pooling != "mean":
            raise ValueError(
                f"pooling={self.pooling!r} needs state_type='linear', got {self.state_type!r}: leave it out"
            )
        if self.likelihood != "softmax" and self.vector_width is None:
            raise ValueError(
                f"likelihood={self.likelihood!r} needs state_type='linear' or vector_width, got {self.state_type!r}: "
                "leave it out"
            )
        self._check_gradients()
        if self.state_r < 1:
            raise ValueError(f"state_r must be at least 1, got {self.state_r}")
        if self.state_type == "lora" and self.accumulation == "recent":
            raise ValueError("accumulation='recent' keeps tokens, which state_type='lora' cannot: use 'average'")
        if self.num_state_tokens < 1:
            raise ValueError(f"num_state_tokens must be at least 1, got {self.num_state_tokens}")
        if self.pin_bos and self.accumulation != "recent":
            raise ValueError(f"pin_bos=True needs accumulation='recent', got accumulation={self.accumulation!r}")
        if not 0 <= self.num_kept_tokens < self.num_state_tokens:
            raise ValueError(
                f"num_kept_tokens must be from 0 to num_state_tokens - 1 = {self.num_state_tokens - 1}, "
                f"got {self.num_kept_tokens}"
            )
        if self.num_kept_tokens and (self.state_type, self.accumulation) != ("prefix", "average"):
            raise ValueError(
                f"num_kept_tokens={self.num_kept_tokens} needs state_type='prefix' and accumulation='average', "
                f"got {self.state_type!r} and {self.accumulation!r}"
            )
        if self.delta_rule and (self.state_type, self.accumulation, self.correction) != ("prefix", "average", True):
            raise ValueError(
                f"delta_rule=True needs state_type='prefix', accumulation='average' and correction=True, "
                f"got {self.state_type!r}, {self.accumulation!r} and {self.correction}"
            )

    def _check_gradients(self) -> None:
        heads = HEADS[self.signal]
        self.head = heads[0] if self.head is None else self.head
        if self.head not in heads:
            raise ValueError(f"signal={self.signal!r} has the heads {list(heads)}, got head={self.head!r}")
        if self.signal == "observations":
            if self.second_order:
                raise ValueError("second_order=True needs signal='gradients' or 'both', got signal='observations'")
        elif (self.accumulation, self.num_kept_tokens) != ("average", 0):
            raise ValueError(
                f"accumulation='recent' and num_kept_tokens need signal='observations', got signal={self.signal!r} "
                f"with {self.accumulation!r} and {self.num_kept_tokens}"
            )
        elif self.delta_rule and self.signal == "gradients":
            raise ValueError("delta_rule=True needs signal='observations' or 'both', got signal='gradients'")
        if self.signal == "both" and not self.correction:
            raise ValueError("signal='both' uses gradients in the correction, got correction=False: leave it True")
        if self.initial_rate is not None and (self.signal != "gradients" or self.initial_rate <= 0):
            raise ValueError(
                f"initial_rate must be above 0, with signal='gradients', got {self.initial_rate} with {self.signal!r}"
            )
        if self.path_window < 1:
            raise ValueError(f"path_window must be at least 1, got {self.path_window}")
        self._complete_learned_optimizer()

    def _complete_learned_optimizer(self) -> None:
        if self.head == "learned_optimizer":  # all of it is saved, so that new defaults change no trained adapter
            self.learned_optimizer = LearnedStepSettings.from_dict(self.learned_optimizer).to_dict()
        elif self.learned_optimizer is not None:
            raise ValueError(
                f"learned_optimizer={self.learned_optimizer} needs head='learned_optimizer', got head={self.head!r}: "
                "leave it None"
            )

    @property
    def uses_reader(self) -> bool:
        """Whether any pass runs with LoRA: a predictor's, or one that reads chunks out."""
        reads_out = self.state_type != "linear" and self.accumulation == "average" and self.signal != "gradients"
        return self.regime != "parametric" or reads_out

    def to_dict(self) -> dict:
        """As saved: an adapter of the embedded base names it, not the folder that holds it on this machine."""
        values = super().to_dict()
        if self.state_type == "linear":
            values["modules_to_save"] = None  # see `compat.leave_out_classifier`
        if is_embedded_base(values.get("base_model_name_or_path")):
            values["base_model_name_or_path"] = EMBEDDED_NAME
        return values


def is_embedded_base(path: str | None) -> bool:
    return bool(path) and os.path.realpath(path) == os.path.realpath(embedded_base())


def _check_choice(name: str, value: str | None, now: tuple[str, ...], later: tuple[str, ...]) -> None:
    value = getattr(value, "value", value)
    if value in now:
        return
    if value in later:
        raise ValueError(f"{name}={value!r} is not available yet in this version; use one of {list(now)}")
    raise ValueError(f"{name} must be one of {list(now)}, got {value!r}")
