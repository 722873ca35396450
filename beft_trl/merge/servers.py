"""Which biases of a merged checkpoint each server reads. Most pass over the others without a word."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..layout import BiasSite, output_projection
from ..weight_files import MergeError


@dataclass(frozen=True)
class Server:
    """A server of Transformers checkpoints.

    Attributes:
        version: that the table was read or run in, as its maker counts.
        reads: by `model_type`, the attention biases that a switch of the configuration gives it, as letters of
            query, key, value and output.
        run: the model types that were run against Transformers; the others were read in the server's source.
        instead: what to do about an architecture whose biases it does not read.
    """

    version: str
    reads: dict[str, str]
    run: tuple[str, ...] = ()
    instead: str = field(default="Serve it as a LoRA of rank 1: beft export.")


LLAMA_CPP = "llama.cpp"
SERVERS = {
    # vllm/model_executor/models/
    "vllm": Server(
        "0.32 and 0.33",
        {"llama": "qkvo", "qwen2": "qkv", "qwen3": "qkv", "gemma": "", "gemma2": "qkvo", "gemma3_text": "qkvo"},
        run=("llama", "gemma3_text"),
    ),
    # python/sglang/srt/models/
    "sglang": Server(
        "0.5.23",
        {
            "llama": "qkvo",
            "qwen2": "qkv",
            "qwen3": "qkvo",
            "gemma": "",
            "gemma2": "qkvo",
            "gemma3_text": "qkvo",
            "granite": "",
        },
    ),  # fmt: skip
    # The tables of tensors in src/ and convert_hf_to_gguf.py, which stops at a tensor that it does not know.
    LLAMA_CPP: Server(
        "as in llama-cpp-python 0.3.36", {"llama": "qkvo", "qwen2": "qkv", "qwen3": "qkv"}, run=("llama",)
    ),
    # Its own importer permutes the weights of rotary queries and keys, and not their biases.
    "ollama": Server(
        "its importer of safetensors",
        {},
        instead="Give it a GGUF by llama.cpp's own converter: --for llama.cpp --gguf.",
    ),
    # mlx_lm/models/
    "mlx": Server("mlx-lm 0.32", {"llama": "qkvo", "qwen2": "qkv"}, run=("llama",), instead="Take another server."),
}
TRANSFORMERS = "transformers"  # which reads all biases
NAMES = (TRANSFORMERS, *SERVERS)
_LETTERS = {"query": "q", "key": "k", "value": "v"}


def not_read(
    server: str,
    model_type: str,
    skeleton: Any,
    sites: list[BiasSite],
    created: dict[str, Tensor],
    changed: dict[str, Tensor],
    switched: bool,
) -> set[str]:
    """The paths of the zero biases that a server does not read, and that are better left out.

    Biases that an architecture always has are read by every server that knows it. Those that a switch of the
    configuration gives it, in the base already or by the merge, need a line in the server's table.

    Args:
        server (`str`): one of `NAMES`.
        model_type (`str`): of the merged model's configuration.
        skeleton, sites: the base model without weights, and its bias sites.
        created (`dict[str, Tensor]`): the biases that the merge gives it, by module path.
        changed (`dict[str, Tensor]`): what is added to biases that the base has.
        switched (`bool`): whether a switch that is off by default gives it any of them.

    Raises:
        MergeError: if it would pass over a bias that is not zero, or nobody has looked whether it does.
    """
    if server not in NAMES:
        raise MergeError(f"{server!r} is no server that is known here: give one of {', '.join(NAMES)}.")
    if server == TRANSFORMERS:
        return set()
    known = SERVERS[server]
    reads = known.reads.get(model_type)
    if reads is None:
        if not switched:
            return set()
        raise MergeError(
            f"Whether {server} reads the attention biases of {model_type} is not known, and a server that does not "
            f"passes over them without a word. {known.instead}"
        )
    letters: dict[str, set[str]] = {}
    for site in sites:
        letters.setdefault(site.module, set()).add(_LETTERS[site.term])
        parent = site.module.rpartition(".")[0]
        found = output_projection(skeleton.get_submodule(parent))
        if found is not None:
            letters[f"{parent}.{found[0]}"] = {"o"}
    written = {**changed, **created}
    unread = {path for path in written if not letters.get(path, {"?"}) <= set(reads)}
    lost = sorted(path for path in unread if written[path].any())
    if lost:
        raise MergeError(
            f"{server} ({known.version}) passes over {lost[0]}.bias of {model_type} without a word: it would answer "
            f"as the base does. {known.instead}"
        )
    return unread & created.keys()
