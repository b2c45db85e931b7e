"""A state dict in parts and their index, as transformers' ``save_pretrained`` writes them."""

import json

import numpy as np
from safetensors.numpy import save_file


def write_parts(folder, tensors, count=2, **changes):
    """Writes the tensors in turn into so many parts.

    Args:
      changes: of the index: another value of a field, or None to leave it out.

    Returns:
      The path of the index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {tensor: names[i % count] for i, tensor in enumerate(tensors)}
    for name in names:
        part = {x: np.array(tensors[x], order="C") for x in tensors if weight_map[x] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    total = {
        "total_parameters": sum(x.size for x in tensors.values()),
        "total_size": sum(x.nbytes for x in tensors.values()),
    }
    content = {"metadata": total, "weight_map": weight_map} | changes
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return index
