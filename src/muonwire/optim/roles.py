"""Roles: what a parameter is, judged by the class of its module and the names on the path to it.

The rules are a positive list: "hidden" is a matrix that is known to map hidden features. What no rule knows is "unknown", and
routing asks the user. Classes beyond torch's are known by their names, so that no other library need be installed.
"""

import re
from collections.abc import Iterator

from torch import Tensor, nn

from muonwire.stages.layout import MatrixLayout

# Modules whose last linear layer is the model's output, when they lie outside numbered layers.
HEAD_NAMES = re.compile(
    r"((?!.*(attn|attention|multi|pos|point)).*_)?(head|logits|classifier|score|scorer|unembed(ding)?)|"
    r"embed_out|qa_outputs|seq_relationship|fc_out|last_linear|vocab_proj(ector)?"
)
# Linear layers that are the output under names which hidden layers have too: not where they are square.
OUTPUT_NAMES = re.compile(r"heads|output(_layer|_projection)?|ff_out|final_(layer|linear)")
# Those of a model that compares two kinds of input, such as CLIP.
PROJECTION_NAMES = re.compile(r"(visual|vision|text|audio)_projection")
# Blocks that gather features, which some models call a head.
POOLING_CLASSES = re.compile(r"Attention|Pool")
# The last linear layer of convolutional networks, which only the convolutions before it mark as a head.
CONVOLUTIONAL_HEAD_NAMES = ("fc", "linear", "out")
# Learned vectors that a module holds as bare parameters: class, mask, query and register tokens, positions, biases by distance.
EMBEDDING_NAMES = re.compile(
    r"(_tokens?|(^|_)emb(ed(ding)?s?)?|(^|_)(pos|positions?|latents(_\dd)?|latent_query|prompts?)|bias_table|^w[tp]e|"
    r"emb(ed(ding)?s?)?_table|(^|_)rel_pos_\w)$"
)
EMBEDDING_CLASSES = re.compile(r"Embed(ding)?s?$")
NORM_CLASSES = re.compile(r"norm(\dd)?$", re.IGNORECASE)
# Linear layers that read the input's patches.
INPUT_NAMES = re.compile(r"(.*_)?patch_embed(der|ding)?s?(_proj|_projection)?|.*embed_tokens")
# Mamba's and RWKV's parameters of the recurrence, an entry for each state and not a map between them; Griffin's diagonal blocks.
STATE_SPACE_NAMES = re.compile(r"^(A_logs?|dt_bias|time_\w+|recurrent_\w+|input_gate_weight)$")
ROUTER_NAMES = ("gate", "router", "wg")
ROUTERS = re.compile(r"(Router|(Top_?K|MoE\w*)Gate)$", re.IGNORECASE)
EXPERTS = re.compile(r"(^|_)experts$")
# Stacks of experts that are stored with their inputs first but have no attribute ``is_transposed``.
TRANSPOSED_EXPERTS = ("Llama4TextExperts",)
# Attention's inputs as a stack of matrices: query, key and value, perhaps with the output; Mamba's, by heads or directions.
ATTENTION_STACKS = re.compile(r"(w_?)?qkvo?(_w|_weight|_proj)?")
MAMBA_STACKS = re.compile(r"(x|dt)_projs?_weight")
# Bare matrices of known classes, inputs first: Gemma 3's projection from vision to text.
BARE_MATRICES = ("mm_input_projection_weight",)
# What wrappers add to a name: torch.compile, DistributedDataParallel, FSDP, activation checkpointing, peft.
WRAPPERS = re.compile(
    r"_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|original_module|modules_to_save|default"
)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Owner = tuple[str, str, nn.Module]


def is_linear(module: nn.Module) -> bool:
    """Whether a module's weight is the matrix of a linear map: torch's, transformers' Conv1D, or any class named Linear."""
    return isinstance(module, nn.Linear) or type(module).__name__.endswith(("Linear", "Conv1D"))


def owners_of(model: nn.Module) -> dict[Tensor, list[Owner]]:
    """Each parameter, with the name of every module that holds it, its name there, and the module."""
    owners: dict[Tensor, list[Owner]] = {}
    for module_name, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            owners.setdefault(param, []).append((module_name, name, module))
    return owners


class Roles:
    """The roles of one model's parameters.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._outputs = set(self._output_embeddings())
        self._heads = self._outputs | {name for name in self._modules if self._is_named_head(name)}
        if not self._heads:
            self._heads = set(self._shaped_like_an_embedding())

    def of(self, owner: Owner, param: Tensor) -> tuple[str, MatrixLayout]:
        """The role of a parameter under one of its names, and how it would be seen as matrices."""
        module_name, name, module = owner
        if type(module).__name__ == "ParametrizationList":
            # A parametrized weight is stored below its module: module.parametrizations.weight.original.
            module_name, _, attribute = module_name.removesuffix(".").partition("parametrizations.")
            module_name = module_name.removesuffix(".")
            owning = self._modules[module_name]
            role, layout = self.of((module_name, attribute, owning), param)
            # Several originals, as weight normalization has, are no matrix by themselves.
            several = name != "original" and role in ("hidden", "unknown")
            return ("reparametrized" if several else role), layout
        kind = type(module).__name__
        batch = MatrixLayout(kind="batch" if param.ndim > 2 else "matrix")
        if isinstance(module, EMBEDDINGS) or EMBEDDING_CLASSES.search(kind) or EMBEDDING_NAMES.search(name):
            return "embedding", batch
        if NORM_CLASSES.search(kind) or (param.ndim < 2 and "norm" in kind.lower()):
            return "norm", MatrixLayout()
        if re.search(r"bias(es|_\w)?$", name):
            return "bias", batch
        if self._is_head(module_name):
            return "head", self._matrix(module, param)
        if isinstance(module, CONVOLUTIONS + TRANSPOSED):
            return self._convolution(module, param)
        if _is_vector(param, batch):
            return "vector", MatrixLayout()
        if is_linear(module):
            return self._linear(module_name, name, module, param)
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            return "recurrent", MatrixLayout()
        if isinstance(module, nn.MultiheadAttention):
            return "hidden", MatrixLayout(parts=3 if name == "in_proj_weight" else 1)
        return self._bare(module_name, name, module, param), self._stack(module, name, batch)

    def _linear(
        self, module_name: str, name: str, module: nn.Module, param: Tensor
    ) -> tuple[str, MatrixLayout]:
        layout = self._matrix(module, param)
        if self._is_router(module_name, module):
            return "router", layout
        path = _parts(module_name)
        if any(INPUT_NAMES.fullmatch(part) for part in path) and not self._in_layers(module_name):
            return "embedding", layout
        known = name == "weight" and param.ndim == 2
        stated = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if known and None not in stated and not layout.transposed and stated != tuple(param.shape):
            # A class of its own may store the inputs first; a shape that is neither is in doubt.
            known, layout = stated == tuple(param.shape[::-1]), MatrixLayout(transposed=True)
        return ("hidden" if known else "unknown"), layout

    def _bare(self, module_name: str, name: str, module: nn.Module, param: Tensor) -> str:
        """The role of a parameter that no layer of torch holds."""
        if name == "weight" and EMBEDDING_NAMES.search(_last(module_name)):
            return "embedding"
        if name == "weight" and HEAD_NAMES.fullmatch(_last(module_name)) and not self._in_layers(module_name):
            return "head"
        if STATE_SPACE_NAMES.search(name) or (name == "D" and "mamba" in type(module).__name__.lower()):
            return "state space"
        if name in BARE_MATRICES and param.ndim == 2:
            return "hidden"
        if param.ndim > 2 and len(param) == 1:
            return "embedding"  # one entry for all examples of a batch, such as queries
        if self._is_router(module_name, module):
            return "router"
        stacked = param.ndim == 3 and (
            type(module).__name__.endswith("Experts")
            or any(EXPERTS.search(part) for part in (*module_name.split("."), name))
            or (ATTENTION_STACKS.fullmatch(name) is not None and len(param) in (3, 4))
            or MAMBA_STACKS.fullmatch(name) is not None
        )
        return "hidden" if stacked else "unknown"

    def _stack(self, module: nn.Module, name: str, batch: MatrixLayout) -> MatrixLayout:
        """How a bare matrix or stack is seen: inputs first where it is known so, experts' gate and up each a matrix of its own."""
        if name in BARE_MATRICES:
            return MatrixLayout(transposed=True)
        if batch.kind != "batch" or not type(module).__name__.endswith("Experts"):
            return batch
        transposed = (
            bool(getattr(module, "is_transposed", False)) or type(module).__name__ in TRANSPOSED_EXPERTS
        )
        fused = name == "gate_up_proj"
        turns = fused and not getattr(module, "is_concatenated", True)
        return MatrixLayout(
            kind="batch", transposed=transposed, parts=2 if fused else 1, interleaved=int(turns)
        )

    def _matrix(self, module: nn.Module, param: Tensor) -> MatrixLayout:
        """The layout of a linear layer's weight: (out, in), but (in, out) in transformers' Conv1D."""
        if isinstance(module, CONVOLUTIONS + TRANSPOSED) and param.ndim > 2:
            return MatrixLayout(kind="conv", transposed=isinstance(module, TRANSPOSED))
        return MatrixLayout(transposed=type(module).__name__.endswith("Conv1D") and param.ndim == 2)

    def _convolution(self, module: nn.Module, param: Tensor) -> tuple[str, MatrixLayout]:
        layout = self._matrix(module, param)
        assert isinstance(module, CONVOLUTIONS + TRANSPOSED)
        if param.ndim < 2:
            return "vector", layout
        if isinstance(module, TRANSPOSED):
            return "transposed", layout
        if module.groups > 1:
            return "grouped", layout
        return ("vector" if _is_vector(param, layout) else "hidden"), layout

    def _is_router(self, module_name: str, module: nn.Module) -> bool:
        if ROUTERS.search(type(module).__name__):
            return True
        for ancestor in (module_name, *_ancestors(module_name)):
            if ancestor and ROUTERS.search(type(self._modules[ancestor]).__name__):
                return True
        path = _parts(module_name)
        beside = self._modules[_parent(module_name)]
        return bool(path) and (
            path[-1] == "router"
            or (
                path[-1] in ROUTER_NAMES
                and any("expert" in child for child, _ in beside.named_children() if child != path[-1])
            )
        )

    def _output_embeddings(self) -> Iterator[str]:
        names = {module: name for name, module in self._modules.items()}
        for module in self._modules.values():
            get = getattr(module, "get_output_embeddings", None)
            if not callable(get):
                continue
            try:
                head = get()
            except (NotImplementedError, AttributeError):
                continue  # transformers' base models have the method without a head behind it
            if isinstance(head, nn.Module) and head in names and not _holds_embeddings(head):
                yield names[head]

    def _is_named_head(self, name: str) -> bool:
        """Whether a layer is the last one of a module that is named as a head, or the end of a convolutional network."""
        module = self._modules[name]
        if not (is_linear(module) or isinstance(module, CONVOLUTIONS)):
            return False
        for whole in (*reversed(_ancestors(name)), name):
            if (
                self._in_layers(whole)
                or not HEAD_NAMES.fullmatch(_last(whole))
                or self._last_layer(whole) != name
            ):
                continue
            if whole == name:
                return True
            # Where the output is known, a square layer in what is called a head is the transform before it, as in ModernBERT.
            transform = bool(self._outputs) and _is_square(module)
            if not transform and not POOLING_CLASSES.search(type(self._modules[whole]).__name__):
                return True
        if self._in_layers(name):
            return False
        if OUTPUT_NAMES.fullmatch(_last(name)):
            return not _is_square(module)
        if PROJECTION_NAMES.fullmatch(_last(name)):
            return hasattr(self._modules[_parent(name)], "logit_scale")
        return (
            _last(name) in CONVOLUTIONAL_HEAD_NAMES
            and self._last_layer("") == name
            and isinstance(self._first_layer(_parent(name)), CONVOLUTIONS)
        )

    def _shaped_like_an_embedding(self) -> Iterator[str]:
        """The last linear layer outside numbered layers that maps an embedding's width back to its number of tokens."""
        shapes = {tuple(m.weight.shape) for m in self._modules.values() if isinstance(m, EMBEDDINGS)}
        alike = [
            name
            for name, module in self._modules.items()
            if isinstance(module, nn.Linear)
            and tuple(module.weight.shape) in shapes
            and module.out_features > module.in_features
            and not self._in_layers(name)
        ]
        yield from alike[-1:]

    def _is_head(self, module_name: str) -> bool:
        return any(name in self._heads for name in (module_name, *_ancestors(module_name)))

    def _in_layers(self, name: str) -> bool:
        """Whether a module lies within numbered layers: an entry of a list, or of a sequence of several of one class."""
        for whole in (name, *_ancestors(name)):
            if _last(whole).isdigit():
                within = self._modules[_parent(whole)]
                kinds = [type(child) for child in within.children()]
                repeated = kinds.count(type(self._modules[whole])) > 1
                if isinstance(within, nn.ModuleList | nn.ModuleDict) or (
                    repeated and not is_linear(self._modules[whole])
                ):
                    return True
        return False

    def _layers_of(self, name: str) -> list[str]:
        inside = (n for n in self._modules if n == name or n.startswith(f"{name}." if name else ""))
        return [n for n in inside if next(self._modules[n].parameters(recurse=False), None) is not None]

    def _last_layer(self, name: str) -> str | None:
        """The last linear layer or convolution within a module."""
        found = [
            n
            for n in self._layers_of(name)
            if is_linear(self._modules[n]) or isinstance(self._modules[n], CONVOLUTIONS)
        ]
        # A layer that is named as the output is the last one, in whatever order the layers were defined.
        outputs = [n for n in found if _last(n) in ("out_proj", "proj_out")]
        return next(reversed(outputs or found), None)

    def _first_layer(self, name: str) -> nn.Module | None:
        found = self._layers_of(name)
        return self._modules[found[0]] if found else None


def _parts(name: str) -> list[str]:
    return [part for part in name.split(".") if not WRAPPERS.fullmatch(part)]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _ancestors(name: str) -> list[str]:
    """The names of the modules around one, the nearest first; the model's own is empty."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)] if name else []


def _holds_embeddings(module: nn.Module) -> bool:
    return any(isinstance(m, EMBEDDINGS) for m in module.modules())


def _is_square(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim > 1 and weight.shape[0] == weight.shape[1]


def _is_vector(param: Tensor, layout: MatrixLayout) -> bool:
    """Whether it is a vector, or matrices of one row or one column."""
    if param.ndim < 2 or sum(size > 1 for size in param.shape) < 2:
        return True
    if layout.kind == "matrix" and param.ndim != 2:
        return False
    return min(layout.shapes(tuple(param.shape))[0][-2:]) == 1
