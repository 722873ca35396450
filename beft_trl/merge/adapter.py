"""Folds an adapter into a plain Transformers checkpoint, file by file, without loading the model."""

import copy
import os
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from ..layout import find_bias_sites
from ..weight_files import AGAIN, AdapterContent, MergeError, first_line, let_others_read, read_adapter, read_json
from .base import check_fit, find_base, load_model, read_config, refuse_other_shapes, skeleton_in
from .checkpoint_files import CheckpointFiles, xxh3
from .gguf import convert_model, find_converter
from .output import (
    TOKENIZER_FILES,
    MergeReport,
    check_output,
    copy_files,
    files_to_copy,
    whole_or_nothing,
    write_card,
    write_config,
)
from .placement import has_switched_biases, place
from .servers import LLAMA_CPP, TRANSFORMERS, not_read
from .verify import (
    compare_logits,
    dtypes_of,
    largest_difference,
    logits_of,
    make_prompt,
    refuse_difference,
    with_adapter,
)


GGUF_FILE = "model.gguf"


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    output_projection: bool = False,
    verify: bool = True,
    link: bool = False,
    server: str = TRANSFORMERS,
    gguf: bool = False,
    llama_cpp: str | Path | None = None,
) -> MergeReport:
    """Writes a Transformers checkpoint that has the adapter's deltas in its biases and needs neither PEFT nor this
    package.

    A native bias takes the delta, summed in fp32; a bias-free model whose configuration has a switch for biases gets
    it turned on, and zeros for the others; else the value bias becomes `W_o b_v`, the bias of the output projection
    (exact, since attention probabilities sum to one), or a Mistral without sliding window becomes a Llama.

    Files are read from the folders of adapter and base only: a link or an index that leads out of them is refused.
    Those of a hub cache, which lead to its own blobs, are not.

    Args:
        adapter (`str` or `Path`): folder of the adapter, this package's or plain PEFT's.
        output (`str` or `Path`): folder to write, new or empty, and not in the base.
        base (`str` or `Path`, *optional*): folder of the base model, or its name on the hub; by default the one that
            the adapter names. Its weights in 16, 32 or 64 bits, in safetensors files.
        output_projection (`bool`, *optional*, defaults to `False`): turn a value bias into an output-projection bias
            if the value has a bias of its own, too.
        verify (`bool`, *optional*, defaults to `True`): run base plus adapter and the merged model on one prompt and
            compare their logits.
        link (`bool`, *optional*, defaults to `False`): hard-link the shards that do not change, instead of copying
            them.
        server (`str`, *optional*, defaults to `"transformers"`): that is to serve it, see [`servers.SERVERS`]. Zeros
            that it does not read are left out, and biases that it would pass over are refused.
        gguf (`bool`, *optional*, defaults to `False`): add a GGUF of the merged model, which needs
            `server="llama.cpp"`. Its matrices have the checkpoint's dtype.
        llama_cpp (`str` or `Path`, *optional*): folder of llama.cpp's source, whose converter writes the GGUF.
            Default: that of the environment variable `LLAMA_CPP`.

    Returns:
        `MergeReport`: what was changed, by what rule, and how far the logits are.

    Raises:
        MergeError: if adapter, tokenizer and base do not fit or are damaged, the model has no place for the bias,
            the logits differ, or there is no converter for a GGUF. The output folder is then as it was.
        OSError: if a file cannot be read or written.
    """
    adapter, output = Path(adapter), Path(output)
    check_output(output)
    if gguf and server != LLAMA_CPP:
        raise MergeError(f"A GGUF is for llama.cpp, and this merge is for {server}: give --for {LLAMA_CPP}.")
    converter = find_converter(llama_cpp) if gguf else None
    content = read_adapter(adapter)
    base_folder = find_base(base or content.base_model)
    if Path(os.path.realpath(output)).is_relative_to(base_folder.resolve()):
        raise MergeError(f"The output folder {output} is in the base, {base_folder}: give a folder outside of it.")
    config = read_config(base_folder)
    if getattr(config, "quantization_config", None):
        raise MergeError(
            f"{base_folder} holds quantised weights. A merge goes into the original full-precision weights: give the "
            "model that they were quantised from as base."
        )
    skeleton = skeleton_in(config, base_folder)
    checkpoint = CheckpointFiles(base_folder, skeleton)
    files = files_to_copy(base_folder, adapter)
    report = MergeReport(str(output))
    if content.saved_whole:
        if output_projection:
            raise MergeError(
                f"{adapter} holds modules that were trained whole ({min(content.saved_whole)} first), and those are "
                "merged with the model's own biases. Merge without output_projection."
            )
        with whole_or_nothing(output) as partial:
            copy_files(files, partial)
            _merge_task_model(content, adapter, base_folder, partial, report)
            write_card(partial, adapter, base_folder, report)
        return report
    sites = find_bias_sites(skeleton)
    check_fit(content.deltas, skeleton, adapter)
    plan = place(content.deltas, config, skeleton, sites, checkpoint, output_projection)

    switched = bool(plan.create) or has_switched_biases(config)
    left_out = not_read(server, plan.config.model_type, skeleton, sites, plan.create, plan.add, switched)
    create = {path: values for path, values in plan.create.items() if path not in left_out}
    report.rule = plan.rule
    with whole_or_nothing(output) as partial:
        copy_files(files, partial)
        checkpoint.check_embedding()
        _check_tokenizer(partial, plan.config, len(skeleton.get_input_embeddings().weight), adapter)
        loaded_in = config.dtype if isinstance(config.dtype, torch.dtype) else None
        written = checkpoint.copy_with(plan.add, create, partial, link, loaded_in)
        report.changed, report.added, report.base_hashes, dtypes = written
        if verify:
            compare_logits(content, adapter, base_folder, config, partial, plan.config, report, dtypes, left_out)
        write_card(partial, adapter, base_folder, report)
        write_config(plan.config, base_folder, partial)
        if converter is not None:
            outtype = "f32" if loaded_in in (None, torch.float32) else "auto"
            convert_model(converter, partial, partial / GGUF_FILE, outtype)
            report.gguf = str(output / GGUF_FILE)
    return report


def _check_tokenizer(partial: Path, config: PreTrainedConfig, rows: int, adapter: Path) -> None:
    """Refuses a tokenizer with tokens beyond the `rows` of the merged model's embedding, and one that does not load.

    It is in `partial`, the merged model's folder, and came from `adapter` or, if that has none, from the base.
    """
    if not any(path for pattern in TOKENIZER_FILES for path in partial.glob(pattern)):
        return
    own = any(path.is_file() for pattern in TOKENIZER_FILES for path in adapter.glob(pattern))
    try:
        vocabulary = AutoTokenizer.from_pretrained(partial, config=config, trust_remote_code=False).get_vocab()
    except Exception as error:  # tokenizers raises nothing more special
        settings = partial / "tokenizer_config.json"
        if not own or (settings.is_file() and "auto_map" in read_json(settings, AGAIN)):
            return  # the base's own, which a merge does not make worse, or one that needs code of its own
        raise MergeError(
            f"The tokenizer in {adapter} does not load ({first_line(error)}). Repair it, or remove its files: the "
            "base has one."
        ) from error
    beyond = sorted((index, token) for token, index in vocabulary.items() if index >= rows)
    if beyond:
        raise MergeError(
            f"The tokenizer in {adapter if own else 'the base'} has {len(beyond)} tokens ({beyond[0][1]!r} first) "
            f"beyond the {rows} rows of the base's embedding. Give a base whose embedding was resized and trained for "
            "them, or take them out of the tokenizer."
        )


def _merge_task_model(content: AdapterContent, adapter: Path, base: Path, partial: Path, report: MergeReport) -> None:
    """Merges an adapter with a task's head, in memory: the encoders that have one are small."""
    config = read_config(adapter if os.path.lexists(adapter / CONFIG_NAME) else base)
    merged, loading = load_model(base, config, "AutoModel", dtype=config.dtype or "auto")
    state = merged.state_dict()
    unknown = content.saved_whole.keys() - state.keys()
    if unknown:
        raise MergeError(
            f"{adapter} holds {min(unknown)}, which {type(merged).__name__} does not have. Put the configuration of "
            f"the task model, which names its class, next to the adapter: model.config.save_pretrained('{adapter}')."
        )
    for name, values in content.saved_whole.items():
        if values.shape != state[name].shape:
            raise MergeError(
                f"{name} has the shape {tuple(values.shape)} in {adapter}, and {tuple(state[name].shape)} in "
                f"{type(merged).__name__}. Give the configuration and the base that it was trained with."
            )
    before = {name: state[name].clone() for name in content.saved_whole}
    untrained = loading["missing_keys"] - content.saved_whole.keys()
    if untrained:
        raise MergeError(
            f"{min(untrained)} of {type(merged).__name__} is neither in {base} nor in {adapter}, so it would be "
            "random. Give the base that the adapter was trained on."
        )
    refuse_other_shapes(loading, base, merged)
    check_fit(content.deltas, merged, adapter)
    _check_tokenizer(partial, config, len(merged.get_input_embeddings().weight), adapter)
    bias_free = [path for path in content.deltas if merged.get_submodule(path).bias is None]
    if bias_free:
        raise MergeError(
            f"{type(merged).__name__} has no bias where this adapter needs one ({bias_free[0]} first). Keep the "
            "adapter: PEFT applies it as it is."
        )
    prompt = make_prompt(partial, config)
    expected = logits_of(with_adapter(copy.deepcopy(merged), adapter, content), prompt, base)
    with torch.no_grad():
        for path, delta in content.deltas.items():
            merged.get_submodule(path).bias.add_(delta)
    merged.load_state_dict(content.saved_whole, strict=False)
    merged.save_pretrained(partial)
    for file in partial.glob("*.safetensors"):
        let_others_read(file, like=partial / CONFIG_NAME)
    report.rule = "The deltas are added to the model's own biases, and the head that was trained is put in."
    report.added = sorted(loading["missing_keys"])
    moved = {name for name, values in content.saved_whole.items() if not torch.equal(values, before[name])}
    report.changed = sorted({f"{path}.bias" for path in content.deltas} | moved - loading["missing_keys"])
    report.base_hashes = {file.name: xxh3(file) for file in sorted(base.glob("*.safetensors"))}
    again, _ = load_model(partial, read_config(partial), "AutoModel")
    report.difference = largest_difference(logits_of(again, prompt, partial), expected, base)
    refuse_difference(report.difference, dtypes_of(merged))
