"""Runs any `transformers` causal language model one stage at a time.

A *stage* is what a pass visits: the input embedding (stage 0), each transformer block (a *layer*),
and the head (final norm, output embedding). The model is built without weights; a stage's
parameters are pointed at buffers when its turn comes and taken away afterwards. The arithmetic is
`transformers`' own: nothing of a model family is written here.

This module does not know where weights or the KV cache live.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D

from engine.errors import UnsupportedModelError, first_line
from engine.kernels.calls import Computable, PackedMatrix, RowSource
from engine.models.attention import ATTENTION_NAME, AttentionBatch, attending
from engine.models.linear import PACKED, PACKED_MODULES, PackedEmbedding, choose_kernels, install_linear
from engine.spec.precision import MatmulPrecision


@dataclass
class LayerCall:
    """The arguments, besides the hidden states, that the base model hands to one layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorded(Exception):
    """Leaves the base model's forward once the last layer has been recorded."""


class _StandIn(nn.Module):
    """In the place of a module, with its attributes: base models read such things as layer.attention_type."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple, so that it is not registered as a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_module"][0], name)


class _Recorder(_StandIn):
    """Stands in for a decoder layer: notes how it is called and returns the hidden states."""

    def __init__(self, layer: nn.Module, calls: list[LayerCall], stop: bool) -> None:
        super().__init__(layer)
        self._calls, self._stop = calls, stop
        self.hidden: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden = hidden_states
        self._calls.append(LayerCall(args, kwargs))
        if self._stop:
            raise _Recorded
        return hidden_states


class _FinalHidden(BaseModelOutputWithPast):
    """A base model's output that has the last hidden states and nothing else."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None  # router logits, cross attentions: whatever else a causal LM passes on


class _Injector(_StandIn):
    """Stands in for the base model, so that the causal LM's own forward turns hidden states into logits."""

    def __init__(self, base: nn.Module, hidden: Tensor) -> None:
        super().__init__(base)
        self._hidden = hidden

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return self if isinstance(found, PreTrainedModel) else found  # OPT calls model.decoder itself

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return _FinalHidden(last_hidden_state=self._hidden)  # type: ignore[arg-type]


class StagePlaces:
    """Places in a stage's modules with the tensors that belong there while it runs; filled at every pass."""

    def __init__(self, places: Sequence[tuple[dict[str, Any], str, Any, Any]]) -> None:
        """Each is a module's table, a name in it, and what is there while the stage runs and rests."""
        self._places = places

    def fill(self) -> None:
        """Put the tensors there, past `nn.Module`'s own setattr, which would search for parameters."""
        for table, name, tensor, _ in self._places:
            table[name] = tensor

    def empty(self) -> None:
        """Put back what was there."""
        for table, name, _, before in self._places:
            table[name] = before


class LayeredModel:
    """A causal LM whose stages run separately.

    Attributes:
        model: the `transformers` model; on the meta device unless built with weights.
        num_layers: transformer blocks.
        stage_tensors: for each of the ``num_layers + 2`` stages the names, as in the state dict, of
            the parameters and persistent buffers it reads. A tied embedding is listed under one name
            in both stages that read it.
        precision: of the products of its linear layers and of prompts' attention.
    """

    def __init__(self, model: nn.Module, precision: MatmulPrecision = MatmulPrecision.HIGHEST) -> None:
        self.model = model.eval()
        self.precision = precision
        self._base_name = str(model.base_model_prefix)
        self.base = getattr(model, self._base_name, None)
        if not isinstance(self.base, nn.Module) or self.base is model:
            raise UnsupportedModelError(f"{type(model).__name__} is refused: it has no separate base model")
        self._layers_owner, self._layers_name = _find_layers(model)
        self.layers: nn.ModuleList = getattr(self._layers_owner, self._layers_name)
        self.num_layers = len(self.layers)
        self._modules = dict(model.named_modules())
        self.aliases = {**getattr(model, "all_tied_weights_keys", {})}
        self.tail = self._find_tail()
        self.stage_tensors = self._group_tensors()
        self._places = [
            [(*self._place(name), self.canonical(name)) for name in names] for names in self._stage_places
        ]

    @classmethod
    def empty(
        cls,
        config: PretrainedConfig,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
        precision: MatmulPrecision = MatmulPrecision.HIGHEST,
    ) -> LayeredModel:
        """Build the model without weights: parameters on the meta device, computed buffers real.

        Args:
            precision: of the products of its linear layers.

        Raises:
            UnsupportedModelError: if `transformers` has no causal LM with an attention interface for it.
        """
        if config.get_text_config() is not config:
            raise UnsupportedModelError(
                f"{(config.architectures or [config.model_type])[0]} is refused: it wraps a text model "
                "together with other parts; use a checkpoint of the text model alone"
            )
        try:
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(
                    config,
                    attn_implementation=ATTENTION_NAME,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                )
        except Exception as error:  # whatever an unknown architecture or an impossible size raises
            name = (getattr(config, "architectures", None) or [config.model_type])[0]
            raise UnsupportedModelError(
                f"{name} is refused: transformers cannot build it here: {first_line(error)}"
            ) from error
        install_linear(model, dtype, precision)
        return cls(model, precision)

    def to(self, device: torch.device) -> LayeredModel:
        """Compute on ``device``: its kernels, and buffers (rotary frequencies and the like) there."""
        choose_kernels(self.model, device)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        return self

    def canonical(self, name: str) -> str:
        """The one name under which a tied tensor is stored."""
        return self.aliases.get(name, name)

    def computes_packed(self, name: str) -> bool:
        """Whether every module that reads a tensor (canonical name) can compute from its packed form."""
        return all(isinstance(module, PACKED_MODULES) for module in self._readers(name))

    def is_transposed(self, name: str) -> bool:
        """Whether a tensor is a weight kept as [inputs, outputs]."""
        return any(isinstance(module, Conv1D) for module in self._readers(name))

    def is_table(self, name: str) -> bool:
        """Whether the first stage reads single rows of a tensor, and nothing else of it."""
        readers = self._readers(name, within=self._stage_places[0])
        return bool(readers) and all(isinstance(module, PackedEmbedding) for module in readers)

    def _readers(self, name: str, within: Sequence[str] | None = None) -> list[nn.Module | None]:
        """The modules that read a tensor (canonical name) as their weight; None for one of another kind.

        Args:
            within: names under which it is read; None for all.
        """
        names = [other for other in self._modules_of[name] if within is None or other in within]
        places = [self._place(other) for other in names]
        return [module if leaf == "weight" else None for module, _, leaf in places]

    def places(self, stage: int, tensors: Mapping[str, Computable]) -> StagePlaces:
        """Where a stage's parameters and buffers are, and what of ``tensors`` (canonical name) goes there."""
        places: list[tuple[dict[str, Any], str, Any, Any]] = []
        for module, kind, leaf, canonical in self._places[stage]:
            tensor = tensors[canonical]
            if isinstance(tensor, (PackedMatrix, RowSource)):
                places.append((module.__dict__, PACKED, tensor, None))
                continue
            if kind == "_parameters" and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            registry = getattr(module, kind)
            places.append((registry, leaf, tensor, registry[leaf]))
        return StagePlaces(places)

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, list[LayerCall]]:
        """Stage 0: embed packed tokens.

        Args:
            input_ids: [1, P] token ids of all sequences, one after the other.
            position_ids: [1, P] their positions within each sequence.

        Returns:
            Hidden states [1, P, hidden] and, for every layer, how it wants to be called.
        """
        calls: list[LayerCall] = []
        recorders = [
            _Recorder(layer, calls, index == self.num_layers - 1) for index, layer in enumerate(self.layers)
        ]
        setattr(self._layers_owner, self._layers_name, nn.ModuleList(recorders))
        try:
            self.base(input_ids=input_ids, position_ids=position_ids, use_cache=False)  # type: ignore[misc]
        except _Recorded:
            pass
        finally:
            setattr(self._layers_owner, self._layers_name, self.layers)
        if len(calls) != self.num_layers or recorders[0].hidden is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} is refused: "
                f"{len(calls)} of its {self.num_layers} layers were visited"
            )
        return recorders[0].hidden, calls

    def run_layer(self, index: int, hidden: Tensor, call: LayerCall, batch: AttentionBatch) -> Tensor:
        """One transformer block over a device batch: [1, P, hidden] -> [1, P, hidden]."""
        with attending(batch):
            out = self.layers[index](hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def head(self, hidden: Tensor) -> Tensor:
        """Last stage: hidden states [1, R, hidden] of the wanted positions -> logits [R, vocabulary]."""
        for name in self.tail:
            hidden = self._modules[name](hidden)
        setattr(self.model, self._base_name, _Injector(self.base, hidden))  # type: ignore[arg-type]
        try:
            logits = self.model(
                input_ids=hidden.new_zeros(hidden.shape[:2], dtype=torch.long), use_cache=False
            ).logits
        finally:
            setattr(self.model, self._base_name, self.base)
        return logits[0]

    def _find_tail(self) -> list[str]:
        """Names of the modules that the base model applies after its layers: norms, then projections.

        Which of a base model's own modules those are is decided by their position: they are defined
        after the layers or are named as final norms or output projections. The architecture check
        compares the result with `transformers`, so a wrong guess is refused, never answered with.
        """
        owner = next(name for name, module in self._modules.items() if module is self._layers_owner)
        prefix = f"{owner}." if owner else ""
        norms, projections = [], []
        for name, _ in self._layers_owner.named_children():
            lowered = name.lower()
            if lowered in ("project_out", "proj_out"):
                projections.append(f"{prefix}{name}")
            elif any(word in lowered for word in ("norm", "ln_f", "ln_out")) and "embed" not in lowered:
                norms.append(f"{prefix}{name}")
        return norms + projections

    def _group_tensors(self) -> list[list[str]]:
        layers = next(name for name, module in self._modules.items() if module is self.layers)
        layers_prefix = f"{layers}."
        self._stage_places: list[list[str]] = [[] for _ in range(self.num_layers + 2)]
        self._modules_of: dict[str, list[str]] = {}
        base_prefix = f"{self._base_name}."
        for name in self.model.state_dict():
            if name.startswith(layers_prefix):
                stage = int(name[len(layers_prefix) :].split(".", 1)[0]) + 1
            elif not name.startswith(base_prefix) or any(name.startswith(f"{tail}.") for tail in self.tail):
                stage = self.num_layers + 1
            else:
                stage = 0
            self._stage_places[stage].append(name)
            self._modules_of.setdefault(self.canonical(name), []).append(name)
        return [list(dict.fromkeys(self.canonical(name) for name in names)) for names in self._stage_places]

    def _place(self, name: str) -> tuple[nn.Module, str, str]:
        owner, _, leaf = name.rpartition(".")
        module = self._modules[owner]
        return module, "_parameters" if leaf in module._parameters else "_buffers", leaf


def _find_layers(model: nn.Module) -> tuple[nn.Module, str]:
    """The module list of transformer blocks: the one as long as the config's number of layers."""
    wanted = model.config.get_text_config().num_hidden_layers  # type: ignore[operator,union-attr]
    for module in model.modules():
        for name, child in module.named_children():
            is_list = isinstance(child, nn.ModuleList) and len(child) == wanted
            if is_list and name in ("layers", "h", "blocks", "block"):
                return module, name
    raise UnsupportedModelError(
        f"{type(model).__name__} is refused: no list of {wanted} decoder layers was found in it"
    )
