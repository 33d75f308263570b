"""What the Hub refuses in a card's metadata, as far as it can be checked without the Hub.

Sources: huggingface_hub's `repocard_data.py` (the `model-index`), `validate_repo_id`, the specification
https://github.com/huggingface/hub-docs/blob/main/modelcard.md ("'model-index', 'datasets' and 'license' contents will
be verified"), the licences of https://huggingface.co/docs/hub/repositories-licenses, and the Hub's own message about
`base_model`. Whether an id exists, only the Hub knows.
"""

import math
import os

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

LICENSES = set(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl "
    "gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql "
    "ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown other".split()
)
TEXTS = ("library_name", "pipeline_tag", "license", "license_name", "license_link")
TEXTS_OR_LISTS = ("base_model", "datasets", "language", "tags", "metrics")


def errors(content: str) -> list[str]:
    """One message for each thing wrong in the YAML block of a model card."""
    block = REGEX_YAML_BLOCK.search(content)
    if not block:
        return []
    try:
        data = yaml.load(block[2], _NoDuplicates)
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"]
    return [*_wrong_types(data), *_wrong_ids(data), *_wrong_license(data), *_wrong_model_index(data)]


def warnings(content: str) -> list[str]:
    return [] if REGEX_YAML_BLOCK.search(content) else ["empty or missing yaml metadata in repo card"]


class _NoDuplicates(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(names) != len(set(names)):
            raise yaml.YAMLError(f"duplicated mapping key among {names}")
        return super().construct_mapping(node, deep)


def _listed(data: dict, key: str) -> list:
    value = data.get(key, [])
    return value if isinstance(value, list) else [value]


def _wrong_types(data: dict) -> list[str]:
    wrong = [key for key in TEXTS if key in data and not isinstance(data[key], str)]
    wrong += [key for key in TEXTS_OR_LISTS if not all(isinstance(item, str) for item in _listed(data, key))]
    return [f'"{key}" must be text, or a list of texts where it may be one' for key in wrong]


def _wrong_ids(data: dict) -> list[str]:
    wrong = []
    for key in ("base_model", "datasets"):
        for value in _listed(data, key):
            try:
                validate_repo_id(value)
                if not value or os.path.isabs(value):
                    raise HFValidationError("no id")
            except HFValidationError:
                wrong.append(f'"{key}" with value "{value}" is not valid. Use an id from https://hf.co.')
    return wrong


def _wrong_license(data: dict) -> list[str]:
    if data.get("license") == "other" and "license_name" not in data:
        return ['"license" other needs a "license_name"']
    unknown = [name for name in _listed(data, "license") if name not in LICENSES]
    return [f'"license" must be one of the Hub\'s identifiers, got {unknown}'] if unknown else []


def _wrong_model_index(data: dict) -> list[str]:
    if "model-index" not in data:
        return []
    try:
        read = ModelCardData(**data)
    except (ValueError, AttributeError) as error:
        return [f"model-index: {error}"]
    wrong = []
    if read.to_dict().get("model-index") != data["model-index"]:
        wrong.append("model-index holds more than evaluation results")
    for result in read.eval_results or []:
        required = (read.model_name, result.task_type, result.dataset_type, result.dataset_name, result.metric_type)
        if not all(isinstance(text, str) and text for text in required):
            wrong.append(f"model-index: name, task, dataset and metric must be texts, got {required}")
        value = result.metric_value
        if not isinstance(value, int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
            wrong.append(f"model-index: a metric's value must be a number or a text, got {value}")
    return wrong
