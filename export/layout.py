"""A folder of built graphs that others open: optimum's layout, with what diffusers or OpenVINO GenAI read beside them.

```
model_index.json              which class makes what of which folder
scheduler/scheduler_config.json
tokenizer/                    as transformers saves it; openvino_tokenizer.xml and .bin for OpenVINO GenAI
<network>/config.json         as diffusers and transformers save it
<network>/model.onnx          its weights beside it; or openvino_model.xml and .bin
```
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from engines.contract import NETWORKS, NetworkName
from engines.errors import EngineError, InputError, reason
from engines.select import ONNX
from export.quiet import quiet

__all__ = ["KINDS", "Kind", "graph_path", "write_layout"]

LOG = logging.getLogger("smooth_rt")
Kind = Literal["onnx", "openvino"]
KINDS: dict[str, Kind] = {**dict.fromkeys(ONNX, "onnx"), "openvino": "openvino"}  # by backend
GENAI_SCHEDULERS = (
    "DDIMScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler",
)  # fmt: skip
_GRAPHS: dict[Kind, str] = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}


def graph_path(folder: Path, kind: Kind, network: NetworkName) -> Path:
    """Where the graph of `network` lies in a layout of `kind` at `folder`."""
    return folder / network / _GRAPHS[kind]


def write_layout(
    folder: Path,
    kind: Kind,
    configs: Mapping[NetworkName, Mapping[str, Any]],
    tokenizer_folder: Path,
    scheduler_config: Mapping[str, Any],
) -> None:
    """Write all but the graphs themselves, which lie or will lie at `graph_path`.

    An "onnx" folder is opened by diffusers' `OnnxStableDiffusionPipeline.from_pretrained(folder)`, an "openvino" one by
    `openvino_genai.Text2ImagePipeline(folder, "CPU")`. Without the package openvino-tokenizers the latter lacks its
    tokenizer, and a warning on "smooth_rt" says so.

    Args:
        folder: is created; files of the same names are replaced.
        kind: what the graphs are.
        configs: each network's, as diffusers and transformers save it; the VAE's for both its networks.
        tokenizer_folder: a CLIPTokenizer as transformers saves it, vocab.json and merges.txt included.
        scheduler_config: of any diffusers scheduler, with `clip_sample` off: GenAI refuses it. Where the reader does
            not have its class, DDIMScheduler is written, which is what the pipeline samples with.

    Raises:
        InputError: a network has no config, or `tokenizer_folder` is missing.
        EngineError: the tokenizer cannot be converted.
        OSError: the files cannot be written.
    """
    missing = [name for name in NETWORKS if name not in configs]
    if missing:
        raise InputError(f"{folder}: no config of {', '.join(missing)}; give one for each of {', '.join(NETWORKS)}")
    if not tokenizer_folder.is_dir():
        raise InputError(f"{tokenizer_folder}: no such folder; save the tokenizer there first")
    name = scheduler_config.get("_class_name")
    scheduler = {**scheduler_config, "_class_name": name if _has_scheduler(kind, name) else "DDIMScheduler"}
    _write_json(folder / "model_index.json", _index(kind, str(scheduler["_class_name"])))
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for name in NETWORKS:
        _write_json(folder / name / "config.json", configs[name])
    target = folder / "tokenizer"
    if target.resolve() != tokenizer_folder.resolve():
        shutil.copytree(tokenizer_folder, target, dirs_exist_ok=True)
    if kind == "openvino":
        _convert_tokenizer(target)


def _has_scheduler(kind: Kind, name: Any) -> bool:
    """Check that the reader of a layout has a scheduler class: GenAI has few, diffusers those of its version."""
    if not isinstance(name, str):
        return False
    if kind == "openvino":
        return name in GENAI_SCHEDULERS
    import diffusers

    return hasattr(diffusers.schedulers, name)


def _index(kind: Kind, scheduler: str) -> dict[str, Any]:
    """The parts by folder. diffusers opens each by the class that is named; GenAI only checks the names."""
    index: dict[str, Any] = {
        "_diffusers_version": metadata.version("diffusers"),
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if kind == "onnx":
        index["_class_name"] = "OnnxStableDiffusionPipeline"
        return index | {name: ["diffusers", "OnnxRuntimeModel"] for name in NETWORKS}
    return {
        **index,
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _convert_tokenizer(folder: Path) -> None:
    """Write the tokenizer at `folder` as an OpenVINO graph beside its files."""
    import openvino
    from transformers import CLIPTokenizer

    try:
        from openvino_tokenizers import convert_tokenizer
    except ImportError as error:
        LOG.debug(
            "tokenizer: written without OpenVINO's graph of it (%s), which openvino_genai alone reads; for that run "
            "`pip install 'smooth-rt[genai]'` and build again",
            reason(error),
        )
        return
    try:
        with quiet():
            tokenizer = CLIPTokenizer.from_pretrained(folder)
            # GenAI copies the ids as they are into the network's input, so they must be of its dtype.
            graph = convert_tokenizer(tokenizer, tokenizer_output_type=openvino.Type.i32)
            _cut(graph, tokenizer.model_max_length)
    except Exception as error:
        raise EngineError(f"{folder}: openvino-tokenizers cannot convert it ({reason(error)}); leave it out") from error
    openvino.save_model(graph, str(folder / "openvino_tokenizer.xml"), compress_to_fp16=False)


def _cut(graph: Any, tokens: int) -> None:
    """Let each row of the graph's outputs be its first `tokens - 1` ids and its last, the end of the text.

    The graph's own truncation would not do: GenAI lifts it where it opens the graph, and the end of a long prompt would
    be missing from the network's input.
    """
    from openvino import opset13 as ops

    for result in graph.get_results():
        ids = result.input_value(0)
        names = ids.get_names()
        ids.get_tensor().set_names(set())
        text = ops.slice(ops.slice(ids, [0], [-1], [1], [1]), [0], [tokens - 1], [1], [1])
        cut = ops.concat([text, ops.slice(ids, [-1], [2**31 - 1], [1], [1])], 1)
        cut.output(0).get_tensor().set_names(names)
        result.input(0).replace_source_output(cut.output(0))
    graph.validate_nodes_and_infer_types()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
