"""Smoothie's denoiser: a transformer with UNet-style skips that looks at the source text and at its own last answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from smoothie_kernels import Vocabulary
from smoothie_kernels.diffusion.generation import Generation
from smoothie_kernels.diffusion.layers import KeysValues, Layer, Places
from smoothie_kernels.diffusion.schedules import Schedule, make_schedule
from smoothie_kernels.stream import sum_dtype
from smoothie_kernels.vocabulary import OneStep

METRICS = ("euclidean", "cosine", "learned")
SQUARES_ROWS = 8192  # of the table at a time
ROWS_BYTES = 2**27  # of a block of logits of the token head


class SmoothieConfig(PretrainedConfig):  # type: ignore[misc]
    """What a `SmoothieModel` is made of; the defaults are the paper's.

    Args:
        vocab_size, embedding_size: V and D of the table.
        hidden_size: of the transformer; there is a projection where it is not the table's width.
        num_hidden_layers, num_attention_heads, intermediate_size, dropout, norm_first: of all its layers;
            intermediate_size None means 4 hidden_size.
        condition_layers: of the encoder of the source text; 0 makes an unconditional model.
        self_condition_layers: of the encoder of the last answer; 0 makes a model without one.
        target_length, source_length: the most positions of each.
        trainable_embeddings: whether the table takes gradients.
        metric: the distances of the step: "euclidean", "cosine", or "learned": (x - E)^T A A^T (x - E), A a parameter
            that starts as the identity, scaled so that the mean of E^T A A^T E over the table stays that of ||E||^2.
        token_head: predict tokens, by a linear layer to all of them, instead of embeddings.
        initializer_range: standard deviation of initial weights.
        noise_schedule, noise_options, sigma_min: the forward process (`make_schedule`).
        unseen_token_ids: special tokens that no target had in training: no text is decoded to them. None: not known.
    """

    model_type = "smoothie"

    def __init__(
        self,
        vocab_size: int = 30522,
        embedding_size: int = 768,
        *,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int | None = None,
        dropout: float = 0.0,
        norm_first: bool = True,
        condition_layers: int = 6,
        self_condition_layers: int = 3,
        target_length: int = 64,
        source_length: int = 64,
        trainable_embeddings: bool = False,
        metric: str = "euclidean",
        token_head: bool = False,
        initializer_range: float = 0.02,
        noise_schedule: str = "arctan",
        noise_options: dict[str, Any] | None = None,
        sigma_min: float = 1.5,
        unseen_token_ids: list[int] | None = None,
        **others: Any,
    ) -> None:
        sizes = {
            "intermediate_size": 1 if intermediate_size is None else intermediate_size,
            "vocab_size": vocab_size, "embedding_size": embedding_size, "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers, "num_attention_heads": num_attention_heads,
            "target_length": target_length, "source_length": source_length,
        }  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        encoders = {"condition_layers": condition_layers, "self_condition_layers": self_condition_layers}
        for name, layers in encoders.items():
            if layers < 0:
                raise ValueError(f"{name} must be at least 0, got {layers}")
        if hidden_size % 2 or hidden_size % num_attention_heads:
            heads = f"num_attention_heads = {num_attention_heads}"
            raise ValueError(f"hidden_size must be even and a multiple of {heads}, got {hidden_size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if not 0 < sigma_min < math.inf:
            raise ValueError(f"sigma_min must be positive and finite, got {sigma_min}")
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")
        make_schedule(noise_schedule, **(noise_options or {}))
        self.metric = metric
        self.vocab_size, self.embedding_size = vocab_size, embedding_size
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.dropout, self.norm_first = num_attention_heads, dropout, norm_first
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.condition_layers, self.self_condition_layers = condition_layers, self_condition_layers
        self.target_length, self.source_length = target_length, source_length
        self.trainable_embeddings, self.token_head = trainable_embeddings, token_head
        self.initializer_range = initializer_range
        self.noise_schedule, self.noise_options, self.sigma_min = noise_schedule, noise_options or {}, sigma_min
        self.unseen_token_ids = unseen_token_ids
        super().__init__(**others)


class Condition(NamedTuple):
    """What the denoiser sees of the source text."""

    states: Tensor  # (B, 1 + S, hidden): a slot that is always there, then the source
    there: Tensor  # (B, 1 + S) bool: where there is something to look at
    projected: tuple[KeysValues, ...] | None = None  # keys and values of every layer, for calls that share the source

    def of_layer(self, i: int) -> tuple[Tensor | KeysValues, Tensor]:
        return self.states if self.projected is None else self.projected[i], self.there

    def expand(self, count: int) -> Condition:
        """One sample's, for as many."""
        projected = self.projected and tuple(
            (keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)) for keys, values in self.projected
        )
        return Condition(self.states.expand(count, -1, -1), self.there.expand(count, -1), projected)


class SmoothieModel(Generation, PreTrainedModel):  # type: ignore[misc]
    """Predicts clean embeddings from smoothed ones: `model(smoothed, t, condition, self_condition)`.

    The input of layer i is added to the input of layer L - 1 - i; time and the encoded last answer enter every layer
    through linear layers of its own. The table is the model's own: `model.vocabulary()` is what the step takes.
    In half precision (`from_pretrained(..., dtype=torch.bfloat16)`, `.half()`) the weights and the table are stored and
    multiplied in 16 bits; the time's angles, the step's sums, the answers and what a sampler carries stay in float32.
    Such a model samples, but does not train: `LossOptions(bf16=True)` keeps float32 weights. Source: arXiv 2505.18853.
    """

    config_class = SmoothieConfig
    main_input_name = "smoothed"
    _supports_sdpa = True

    def __init__(self, config: SmoothieConfig, embeddings: Tensor | None = None) -> None:
        super().__init__(config)
        wide, layers = config.hidden_size, range(config.num_hidden_layers)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.positions = nn.Embedding(config.target_length, wide)
        self.input = self._projection()
        self.output = nn.Linear(wide, config.vocab_size if config.token_head else config.embedding_size)
        self.time = nn.Sequential(nn.Linear(wide, 4 * wide), nn.SiLU(), nn.Linear(4 * wide, wide))
        self.time_of_layer = nn.ModuleList(nn.Linear(wide, wide) for _ in layers)
        self.layers = self._layers(config.num_hidden_layers, source=config.condition_layers > 0)
        self.norm = nn.LayerNorm(wide)
        if config.condition_layers:
            self.source = self._projection()
            self.source_positions = nn.Embedding(config.source_length, wide)
            self.nothing = nn.Embedding(1, wide)  # what there is to look at where the source is empty or dropped
            self.source_encoder = self._layers(config.condition_layers)
        if config.self_condition_layers:
            self.answer = self._projection()
            self.answer_encoder = self._layers(config.self_condition_layers)
            self.answer_of_layer = nn.ModuleList(nn.Linear(wide, wide) for _ in layers)
        if config.metric == "learned":
            self.factor = nn.Parameter(torch.eye(config.embedding_size))
        self._vocabulary: tuple[Any, Vocabulary] | None = None
        self._kept_squares: tuple[Any, Tensor] | None = None
        self.post_init()
        self.embeddings.weight.requires_grad_(config.trainable_embeddings)
        if embeddings is not None:
            self.set_embeddings(embeddings)

    @classmethod
    def from_pretrained(cls, *names: Any, **options: Any) -> Any:
        """As of every transformers model; what `save_pretrained` wrote."""
        loaded = super().from_pretrained(*names, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.embeddings.weight.requires_grad_(model.config.trainable_embeddings)  # loading forgets it
        return loaded

    def forward(
        self,
        smoothed: Tensor,
        t: Tensor,
        condition: Condition | None = None,
        self_condition: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The predicted embeddings, (B, L, D) float32, or float64 of a float64 model.

        Args:
            smoothed: (B, L, D), of `noise_tokens` or `fused_smoothie_step`; any floating-point type.
            t: (B,) in [0, 1].
            condition: of `encode`; needed where the model has condition_layers.
            self_condition: (B, L, D), the last answer; None means zeros.
            mask: (B, L) bool: positions outside are not looked at, and left out of the products.
        """
        return self.predict(self.hidden_states(smoothed, t, condition, self_condition, mask))

    def encode(self, source: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> Condition:
        """The source text as the denoiser sees it: once per text, for all steps.

        Args:
            source: (B, S) int64 tokens.
            mask: (B, S) bool, True on text.
            keep: (B,) bool: False drops the source of a sample, as guidance wants it.
        """
        if not self.config.condition_layers:
            raise ValueError("source must be None: the model is unconditional (condition_layers = 0)")
        _check_length("source", source, self.config.source_length)
        b, s = source.shape
        states = self.source(self.embeddings(source)) + self.source_positions.weight[:s]
        there = torch.ones(b, s, dtype=torch.bool, device=source.device) if mask is None else mask
        there = functional.pad(there if keep is None else there & keep[:, None], (1, 0), value=True)
        states = torch.cat((self.nothing.weight.expand(b, 1, -1), states), 1)
        for layer in self.source_encoder:
            states = layer(states, there)
        return Condition(states, there)

    def project(self, condition: Condition) -> Condition:
        """With the keys and values that every layer makes of it: a fifth of a small model's work in each later step."""
        layers: Any = self.layers
        return condition._replace(projected=tuple(layer.source_attention.project(condition.states) for layer in layers))

    def hidden_states(
        self,
        smoothed: Tensor,
        t: Tensor,
        condition: Condition | None = None,
        self_condition: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What `predict` makes embeddings of: (B, L, hidden). Arguments as of the model itself."""
        config = self.config
        _check_length("smoothed", smoothed, config.target_length)
        if (condition is None) != (config.condition_layers == 0):
            raise ValueError(
                f"condition must be {'what encode() gives' if condition is None else 'None'}: the model has "
                f"condition_layers = {config.condition_layers}"
            )
        places = None if mask is None else Places.of(mask)
        rows, of_position, of_sample = _views(smoothed.shape[1], places)
        positions = of_position(self.positions.weight)
        dtype = positions.dtype  # the weights': a sampler's input is float32 whatever they are
        x = self.input(rows(smoothed).to(dtype)) + positions
        time = self.time(sinusoids(t, config.hidden_size).to(x.dtype))
        extra = [of_sample(linear(time)) for linear in self.time_of_layer]
        if config.self_condition_layers:
            if self_condition is None:
                # The same for all samples, unless dropout or masks tell them apart: encoded once, then broadcast.
                apart = mask is not None or (self.training and config.dropout > 0)
                self_condition = smoothed.new_zeros(len(smoothed) if apart else 1, *smoothed.shape[1:])
            answer = self.answer(rows(self_condition).to(dtype)) + positions
            for layer in self.answer_encoder:
                answer = layer(answer, mask, places=places)
            extra = [e + linear(answer) for e, linear in zip(extra, self.answer_of_layer, strict=True)]
        inputs: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            mirrored = len(self.layers) - 1 - i
            x = x + extra[i] if mirrored >= i else x + extra[i] + inputs[mirrored]
            inputs.append(x)
            x = layer(x, mask, None if condition is None else condition.of_layer(i), places)
        hidden: Tensor = self.norm(x)
        return hidden if places is None else places.pad(hidden)

    def predict(self, hidden: Tensor) -> Tensor:
        """Embeddings, (..., D) float32 or float64: the head's answer, or the mean embedding under the token head's
        softmax."""
        table = self.embeddings.weight
        dtype = sum_dtype(table)
        if not self.config.token_head:
            predicted: Tensor = self.output(hidden)
            return predicted.to(dtype)
        blocks = torch.split(hidden.flatten(0, -2), max(1, ROWS_BYTES // (4 * len(table))))
        means = [self.output(block).to(dtype).softmax(-1).to(table.dtype) @ table for block in blocks]
        return torch.cat(means).view(*hidden.shape[:-1], -1).to(dtype)

    def vocabulary(self, backend: str = "auto") -> Vocabulary:
        """The table as `fused_smoothie_step` takes it; made again only after the table was written to or moved, and
        every time where it takes gradients."""
        table, metric = self.embeddings.weight, self.config.metric
        if table.requires_grad or metric == "learned":
            used = self._factor() if metric == "learned" else metric
            return OneStep(table, metric=used, backend=backend, check_finite=False)
        contents = (*self._contents(), backend)
        if self._vocabulary is None or self._vocabulary[0] != contents:
            self._vocabulary = contents, Vocabulary(table, metric=metric, backend=backend)
        return self._vocabulary[1]

    def _contents(self) -> tuple[Any, ...]:
        """Differs after the table was written to or moved."""
        table = self.embeddings.weight
        version = 0 if table.is_inference() else table._version
        return table.data_ptr(), version, table.dtype, table.device

    def _factor(self) -> Tensor:
        """Scaled: a longer one would be less noise, so that nothing would keep it from growing."""
        squares, dtype = self._squares(), sum_dtype(self.embeddings.weight)
        with torch.autocast(squares.device.type, enabled=False):
            factor = self.factor.to(dtype)
            return factor * (squares.diagonal().sum() / (factor * (squares @ factor)).sum()).sqrt()

    @torch.no_grad()
    def _squares(self) -> Tensor:
        """E^T E, (D, D)."""
        table, contents = self.embeddings.weight, self._contents()
        if self._kept_squares is None or self._kept_squares[0] != contents:
            with torch.autocast(table.device.type, enabled=False):
                blocks = (block.to(sum_dtype(table)) for block in torch.split(table, SQUARES_ROWS))
                self._kept_squares = contents, torch.stack([block.T @ block for block in blocks]).sum(0)
        return self._kept_squares[1]

    def schedule(self, delta: float | None = None) -> Schedule:
        """The forward process, with another delta of the noise where it is given: samplers take a smaller one."""
        options = self.config.noise_options if delta is None else {**self.config.noise_options, "delta": delta}
        return make_schedule(self.config.noise_schedule, **options)

    def set_embeddings(self, table: Tensor) -> None:
        """Takes over a (V, D) table."""
        wanted = [self.config.vocab_size, self.config.embedding_size]
        if list(table.shape) != wanted:
            raise ValueError(f"embeddings must have shape {wanted} as the model's config says, got {list(table.shape)}")
        with torch.no_grad():
            self.embeddings.weight.copy_(table)

    def compile_layers(self) -> None:
        """torch.compile of every transformer layer by itself: one compilation serves all of a kind."""
        for module in self.modules():
            if isinstance(module, Layer):
                module.compile()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def _projection(self) -> nn.Module:
        config = self.config
        same = config.embedding_size == config.hidden_size
        return nn.Identity() if same else nn.Linear(config.embedding_size, config.hidden_size)

    def _layers(self, count: int, *, source: bool = False) -> nn.ModuleList:
        config = self.config
        return nn.ModuleList(
            Layer(
                config.hidden_size, config.num_attention_heads, config.intermediate_size, config.dropout,
                norm_first=config.norm_first, source=source,
            )
            for _ in range(count)
        )  # fmt: skip


def sinusoids(t: Tensor, width: int) -> Tensor:
    """(B, width) float32: sines and cosines of 1000 t, as transformers count positions."""
    steps = torch.arange(width // 2, device=t.device, dtype=torch.float32)
    angles = 1000 * t.float()[:, None] * torch.exp(-math.log(10_000) * 2 / width * steps)
    return torch.cat((angles.sin(), angles.cos()), 1)


def _views(length: int, places: Places | None) -> tuple[Callable[[Tensor], Tensor], ...]:
    """How tensors of all rows, of every position and of every sample join what the layers take."""
    if places is None:
        return (lambda x: x), (lambda x: x[:length]), (lambda x: x[:, None])
    position, sample = places.rows % length, places.rows // length
    return places.pack, (lambda x: x[position]), (lambda x: x[sample])


def _check_length(name: str, tensor: Tensor, most: int) -> None:
    if tensor.dim() < 2 or tensor.shape[1] > most:
        raise ValueError(f"{name} must have at most {most} positions as the model does, got {list(tensor.shape)}")


AutoConfig.register(SmoothieConfig.model_type, SmoothieConfig, exist_ok=True)
AutoModel.register(SmoothieConfig, SmoothieModel, exist_ok=True)
