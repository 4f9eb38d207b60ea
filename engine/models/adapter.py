"""Runs any `transformers` causal language model one stage at a time.

A *stage* is what a pass visits: the input embedding (stage 0), each transformer block (a *layer*),
and the head (final norm, output embedding). The model is built without weights; a stage's
parameters are pointed at buffers when its turn comes and taken away afterwards. The arithmetic is
`transformers`' own: nothing of a model family is written here.

This module does not know where weights or the KV cache live.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from engine.errors import UnsupportedModelError, first_line
from engine.kernels.calls import Computable, PackedMatrix, RowSource
from engine.models.attention import AttentionBatch, attending
from engine.models.decoder.build import build, show_rest
from engine.models.decoder.measure import measure
from engine.models.decoder.parts import find_parts, name_of, text_config
from engine.models.decoder.stand_ins import LayerCall, hidden_of, logits_of, record_layers
from engine.models.decoder.ways import SequenceCalls, Way, record_sequences, run_apart
from engine.models.linear import PACKED, PACKED_MODULES, PackedEmbedding, choose_kernels, install_linear
from engine.models.recurrent.mixers import LayerStates, install_mixers, with_states
from engine.spec.model import StateTensor
from engine.spec.precision import MatmulPrecision


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
        model: the `transformers` model, a wrapper of several modalities included; on the meta device unless
            built with weights.
        parts: where its text decoder is.
        measured: what that does, found by running it without weights.
        num_layers: transformer blocks.
        stage_tensors: for each of the ``num_layers + 2`` stages the names, as in the state dict, of
            the parameters and persistent buffers it reads. A tied embedding is listed under one name
            in both stages that read it. What belongs to no stage, as a wrapper's vision tower, is not listed.
        precision: of the products of its linear layers and of prompts' attention.
        way: how its attention runs.
        states: per layer what it keeps of a sequence besides keys and values.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: MatmulPrecision = MatmulPrecision.HIGHEST,
        way: Way = Way.PACKED,
    ) -> None:
        """Find the text decoder of a model and measure it.

        Raises:
            UnsupportedModelError: if the model has none that runs layer by layer.
        """
        self.model = model.eval()
        self.precision, self.way = precision, way
        self._device = torch.device("cpu")
        self.parts = find_parts(model)
        self.layers = self.parts.layers
        self.num_layers = len(self.layers)
        self.measured = measure(model, self.parts, way)
        self._last = max(index for index, is_visited in enumerate(self.measured.visited) if is_visited)
        self.state_count = int(getattr(text_config(model.config), "number_of_conv_states", 1))
        self.states: tuple[tuple[StateTensor, ...], ...] = ()
        if way is not Way.LAYER:
            self.states = install_mixers(self.layers, self.measured.hidden, self.state_count)
        self._modules = dict(model.named_modules())
        self.aliases = {**getattr(model, "all_tied_weights_keys", {})}
        self.stage_tensors = self._group_tensors()
        show_rest(model, self.text_names, self._device)
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
        way: Way = Way.PACKED,
    ) -> LayeredModel:
        """Build the model without weights: parameters on the meta device, computed buffers real.

        Args:
            precision: of the products of its linear layers.
            way: how its attention runs, which the architecture check tells.

        Raises:
            UnsupportedModelError: if `transformers` cannot build it, or its layers do not run one by one.
        """
        try:
            model = build(config, dtype, way.implementation, trust_remote_code, empty=True)
            built = cls(model, precision, way)
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever an unknown architecture or an impossible size raises
            raise UnsupportedModelError(
                f"{name_of(config)} is refused: transformers cannot build it here: {first_line(error)}"
            ) from error
        install_linear(model, dtype, precision)
        return built

    def to(self, device: torch.device) -> LayeredModel:
        """Compute on ``device``: its kernels, and buffers (rotary frequencies and the like) there."""
        choose_kernels(self.model, device)
        self._device = device
        show_rest(self.model, self.text_names, device)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        return self

    @property
    def text_names(self) -> frozenset[str]:
        """Names, as in the state dict, of all tensors that some stage reads; a tied one has several."""
        return self._text_names

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
                empty = module._parameters[leaf]  # models look at its kind and device
                if empty is not None and empty.is_meta:
                    shown = torch.zeros((), dtype=empty.dtype, device=self._device).expand(empty.shape)
                    places.append((module._parameters, leaf, shown, empty))
                continue
            if kind == "_parameters" and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            registry = getattr(module, kind)
            places.append((registry, leaf, tensor, registry[leaf]))
        return StagePlaces(places)

    def embed(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        lengths: Sequence[int],
        padding: Sequence[int] = (),
    ) -> tuple[Tensor, Sequence[LayerCall | SequenceCalls | None]]:
        """Stage 0: embed packed tokens.

        Args:
            input_ids: [1, P] token ids of all sequences, one after the other.
            position_ids: [1, P] their positions within each sequence.
            lengths: fresh tokens of each sequence.
            padding: how many of them come before each sequence; empty for none anywhere.

        Returns:
            Hidden states [1, P, hidden] and, for every layer, how it wants to be called; None for one that
            text does not pass through.
        """
        outputs, last = self.measured.outputs, self._last
        if self.way is not Way.PACKED:
            return record_sequences(self.parts, outputs, input_ids, position_ids, lengths, padding, last)
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        return record_layers(self.parts, inputs, outputs, last)

    def run_layer(
        self,
        index: int,
        hidden: Tensor,
        call: LayerCall | SequenceCalls | None,
        batch: AttentionBatch,
        states: LayerStates | None = None,
    ) -> Tensor:
        """One transformer block over a device batch: [1, P, hidden] -> [1, P, hidden].

        Args:
            call: how it wants to be called; None for a layer that text does not pass through.
            states: of its sequences at this layer, where it is recurrent.
        """
        if call is None:
            return hidden
        with with_states(states):
            if isinstance(call, SequenceCalls):
                out = run_apart(self.layers[index], hidden, call, batch, self.way)
            else:
                with attending(batch):
                    out = self.layers[index](hidden, *call.args, **call.kwargs)
        return hidden_of(out)

    def head(self, hidden: Tensor) -> Tensor:
        """Last stage: hidden states [1, R, hidden] of the wanted positions -> logits [R, vocabulary]."""
        return logits_of(self.parts, [self._modules[name] for name in self.measured.tail], hidden)[0]

    def _group_tensors(self) -> list[list[str]]:
        """Names of the tensors of every stage; those of parts that do not run for text are in none."""
        parts = self.parts
        in_layers, in_base, in_owner = f"{parts.layers_name}.", f"{parts.base_path}.", f"{parts.owner_name}."
        self._stage_places: list[list[str]] = [[] for _ in range(self.num_layers + 2)]
        self._modules_of: dict[str, list[str]] = {}
        for name in self.model.state_dict():
            runs = name.rpartition(".")[0] in self.measured.called
            if name.startswith(in_layers):
                layer = int(name[len(in_layers) :].split(".", 1)[0])
                stage = layer + 1 if self.measured.visited[layer] else -1
            elif any(name.startswith(f"{tail}.") for tail in self.measured.tail):
                stage = self.num_layers + 1
            elif name.startswith(in_base):
                stage = 0 if runs or name.startswith(in_owner) else -1
            else:
                stage = self.num_layers + 1 if runs else -1
            if stage >= 0:
                self._stage_places[stage].append(name)
                self._modules_of.setdefault(self.canonical(name), []).append(name)
        self._text_names = frozenset(name for names in self._stage_places for name in names)
        return [list(dict.fromkeys(self.canonical(name) for name in names)) for names in self._stage_places]

    def _place(self, name: str) -> tuple[nn.Module, str, str]:
        owner, _, leaf = name.rpartition(".")
        module = self._modules[owner]
        return module, "_parameters" if leaf in module._parameters else "_buffers", leaf
