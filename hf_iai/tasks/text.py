"""Text: chunks are tokens of documents or examples, a query is a text, and the base's own output layer answers."""

from ..bases.base import Base
from ..config import IAIConfig
from ..cores import Core
from ..registry import SIGNALS, TASKS
from .inputs import Inputs
from .task import Task, is_linear, is_of_vectors

CARD_EXAMPLE = """\
import hf_iai  # registers the method with PEFT
from hf_iai import chunk_text
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

text = {text}  # what the task is learned from, of any length
prompt = {prompt}
model = AutoPeftModelForCausalLM.from_pretrained("{model_id}")  # its Hub id, or its folder
tokenizer = AutoTokenizer.from_pretrained(model.active_peft_config.base_model_name_or_path)
state = model.adapt(chunk_text(text, tokenizer, {chunking}))
query = tokenizer(prompt, return_tensors="pt")
tokens = model.generate(**query, task_state=state, max_new_tokens=64)
print(tokenizer.decode(tokens[0]))
"""


@TASKS.register("text")
class Text(Task):
    """A state of text: a prefix, a soft prompt, or a LoRA for each task."""

    asked_for_by = "text"
    fields = frozenset({"regime", "state_type", "signal"})
    exports = frozenset({"peft"})
    card_example = CARD_EXAMPLE

    @classmethod
    def matches(cls, config: IAIConfig) -> bool:
        return config.regime != "implicit" and not is_of_vectors(config) and not is_linear(config)

    def core(self, base: Base) -> Core:
        return SIGNALS[self.config.signal].make(base, self.config)

    def inputs(self, base: Base, core: Core) -> Inputs:
        return Inputs(base, core)
