"""Makes a model under a policy known to HELM, as a model deployment of its own.

HELM's tables have one row per model, so each pair of model and policy is registered as a model, a
deployment and a tokenizer, all in the name space ``tierbench/`` (names that begin with
``huggingface/`` and the like would make HELM ask the hub). The same entries are written to HELM's
``prod_env`` folder, so that the stock ``helm-summarize`` and ``helm-server`` know the display names and
the stock ``helm-run`` can ask the engine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UsageError, storage_errors
from engine.files.documents import DocumentError, read_yaml
from engine.files.whole import write_whole
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.spec.settings import EngineSettings
from harness.tokenizer import Text

NAMESPACE = "tierbench"

_LONGEST_SLUG = 60  # bytes

_UNLIMITED_POSITIONS = 1 << 30

_FILES = {  # HELM's file -> the key of its list
    "model_metadata.yaml": "models",
    "model_deployments.yaml": "model_deployments",
    "tokenizer_configs.yaml": "tokenizer_configs",
}


@dataclass(frozen=True)
class Deployment:
    """A model under a policy, in HELM's terms."""

    name: str
    """Of the model and of its deployment: ``tierbench/<model>_<policy>``."""

    entries: Mapping[str, Mapping[str, Any]]
    """HELM's YAML entries by file name, as its stock commands read them."""


def make_deployment(
    settings: EngineSettings,
    policy: Policy,
    spec: ModelSpec,
    model_name: str,
    text: Text,
    forbid_truncation: bool,
    chat: bool = False,
) -> Deployment:
    """Describe a model under a policy.

    Args:
        model_name: the model's name in tables.
        text: the model's tokenizer.
        forbid_truncation: whether a prompt that does not fit is an error instead of being shortened.
        chat: whether prompts are put into the tokenizer's chat template.
    """
    anywhere = settings.anywhere()
    source = anywhere.model
    short = slug(model_name)
    name, tokenizer = f"{NAMESPACE}/{short}_{slug(policy.name)}", f"{NAMESPACE}/{short}"
    length = _longest_prompt(spec, text, chat)
    keys = ", ".join(f"{key}={value}" for key, value in policy.to_dict().items() if key != "name")
    metadata = {
        "name": name,
        "creator_organization_name": "Tierbench",
        "display_name": f"{model_name} [{policy.name}]",
        "description": f"{spec.architecture}, {settings.weights} weights, policy {policy.name}: {keys}",
        "access": "open",
        "release_date": None,
        "num_parameters": spec.num_parameters,
        "tags": ["TEXT_MODEL_TAG", "FULL_FUNCTIONALITY_TEXT_MODEL_TAG"],
    }
    deployment = {
        "name": name,
        "model_name": name,
        "tokenizer_name": tokenizer,
        "max_sequence_length": length - 1,
        "max_request_length": length,
        "client_spec": _object_spec(
            "harness.helm.client.TierbenchClient",
            **anywhere.to_dict(),
            policy=policy.to_dict(),
            apply_chat_template=chat,
        ),
        "window_service_spec": _object_spec(
            "harness.helm.window.SuiteWindowService", forbid_truncation=forbid_truncation
        ),
    }
    tokenizer_config = {
        "name": tokenizer,
        "tokenizer_spec": _object_spec(
            "helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer",
            pretrained_model_name_or_path=source,
            trust_remote_code=settings.trust_remote_code,
        ),
        "end_of_text_token": text.end_token,
        "prefix_token": text.prefix_token,
    }
    return Deployment(name, dict(zip(_FILES, (metadata, deployment, tokenizer_config), strict=True)))


def _longest_prompt(spec: ModelSpec, text: Text, chat: bool) -> int:
    """Tokens of the longest prompt, as HELM counts them: without ids put in front of it and chat template.

    One position more than the window holds, since a prompt's last token is never computed.
    """
    around = len(text.encode(text.chat([{"role": "user", "content": "a"}]))) if chat else 0
    in_front = max(len(text.scoring_prefix), len(text.start_ids), around)
    return (spec.max_positions or _UNLIMITED_POSITIONS) + min(0, 1 - in_front)


def _object_spec(class_name: str, **args: Any) -> dict[str, Any]:
    return {"class_name": class_name, "args": args}


def slug(name: str) -> str:
    """A name for folders and run entries: letters, digits, dots, underscores and hyphens only.

    A run's folder has both the model's and the policy's in its name, and file systems take 255 bytes in all,
    so that of a long name the beginning is kept, and a digest of the whole in place of the rest.
    """
    short = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "unnamed"
    if len(short.encode()) <= _LONGEST_SLUG:
        return short
    begin = short.encode()[: _LONGEST_SLUG - 9].decode(errors="ignore")
    return f"{begin}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def register(deployments: Sequence[Deployment]) -> None:
    """Register HELM's own models and these deployments in this process."""
    import dacite
    from helm.benchmark import config_registry
    from helm.benchmark.model_deployment_registry import ModelDeployment, register_model_deployment
    from helm.benchmark.model_metadata_registry import ModelMetadata, register_model_metadata
    from helm.benchmark.tokenizer_config_registry import (
        ALL_TOKENIZER_CONFIGS,
        TokenizerConfig,
        register_tokenizer_config,
    )

    if not ALL_TOKENIZER_CONFIGS:  # once in a process
        config_registry.register_builtin_configs_from_helm_package()
    for deployment in deployments:
        entries = deployment.entries
        register_tokenizer_config(dacite.from_dict(TokenizerConfig, entries["tokenizer_configs.yaml"]))
        register_model_metadata(dacite.from_dict(ModelMetadata, entries["model_metadata.yaml"]))
        register_model_deployment(dacite.from_dict(ModelDeployment, entries["model_deployments.yaml"]))


def write_prod_env(folder: Path, deployments: Sequence[Deployment]) -> None:
    """Add the deployments to HELM's configuration folder; entries of other names stay as they are.

    Raises:
        UsageError: if a file there is not what HELM would read.
        StorageError: if it cannot be read or written.
    """
    import yaml

    for file_name, key in _FILES.items():
        path = folder / file_name
        try:
            with storage_errors(path):
                content = read_yaml(path, typed=True) if path.exists() else None
            listed = list((content or {}).get(key) or [])
            new = {d.entries[file_name]["name"]: d.entries[file_name] for d in deployments}
            kept = [entry for entry in listed if entry["name"] not in new]
        except (DocumentError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is not a HELM configuration file: mend it or move it away") from error
        write_whole(path, yaml.safe_dump({key: kept + list(new.values())}, sort_keys=False))
