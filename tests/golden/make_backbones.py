"""Makes dinov3.safetensors, dinov3_gated.safetensors and siglip2.safetensors.

Needs torch 2.13.0 and transformers 5.24.0, neither of which the tests need:

    python tests/golden/make_backbones.py

Weights are random, under the names that `save_pretrained` writes. That of SigLIP 2 is the file of
a whole model, text tower included, as google/siglip2-base-patch16-256 has it.
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.numpy import load_file, save_file

WIDTH = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
VISION = WIDTH | dict(patch_size=8)
SIZES = {"": (40, 40), "_small": (24, 24), "_rect": (24, 56)}
SIGLIP = VISION | dict(image_size=40)
DINOV3 = {
    "dinov3": dict(num_register_tokens=4),
    # no bias of queries and values, as the network of 7 billion parameters
    "dinov3_gated": dict(num_register_tokens=1, use_gated_mlp=True, qkv_bias=False),
}


def randomise(model):
    """Values at which nothing is silent: no norm, scale or bias is at 1 or 0.

    What enters the first block is small enough for the epsilon of its norm to show.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.normal_(generator=generator)
            if "layer_scale" in name:
                x.mul_(0.1).add_(0.5)
            elif "norm" in name and name.endswith("weight"):
                x.mul_(0.1).add_(1)
            elif name.endswith("weight") and "position" not in name:
                x.mul_(x[0].numel() ** -0.5)
            else:
                x.mul_(0.5 if x.ndim > 1 else 0.1)  # tokens and positions, or a bias
            if ".embeddings." in f".{name}":
                x.mul_(0.05)
    return model.eval()


def write(name, model, config, vision, norm, leading, **more):
    """The file of a model whose part ``vision`` ends with the LayerNorm ``norm``."""
    generator, found = torch.Generator().manual_seed(1), {}
    for suffix, size in SIZES.items():
        image = torch.randn(1, 3, *size, generator=generator)
        with torch.no_grad():
            plain = vision(image, **more).last_hidden_state
            weight, bias = norm.weight, norm.bias
            norm.weight = norm.bias = None
            bare = vision(image, **more).last_hidden_state
            norm.weight, norm.bias = weight, bias
        found |= {
            f"io.image{suffix}": image,
            f"io.last_hidden_state{suffix}": plain,
            f"io.patch_tokens{suffix}": plain[:, leading:],
            f"io.patch_tokens_no_affine{suffix}": bare[:, leading:],
        }
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        state = load_file(Path(folder) / "model.safetensors")
    tensors = {f"state.{key}": value for key, value in state.items()}
    tensors |= {key: value.contiguous().numpy() for key, value in found.items()}
    path = Path(__file__).with_name(f"{name}.safetensors")
    save_file(tensors, path, metadata={"config": json.dumps(config)})
    print(path.name, path.stat().st_size, "bytes")


def main():
    for name, sizes in DINOV3.items():
        sizes = VISION | sizes
        biases = {k: sizes.get("qkv_bias", True) for k in ("query_bias", "value_bias")}
        arguments = {key: value for key, value in sizes.items() if key != "qkv_bias"}
        activation = "silu" if sizes.get("use_gated_mlp") else "gelu"
        config = transformers.DINOv3ViTConfig(**arguments, **biases, hidden_act=activation)
        model = randomise(transformers.DINOv3ViTModel(config))
        write(name, model, sizes, model, model.norm, 1 + sizes["num_register_tokens"])
    text = WIDTH | dict(hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    text |= dict(vocab_size=8, max_position_embeddings=4, projection_size=32)
    config = transformers.SiglipConfig(text_config=text, vision_config=SIGLIP)
    model = randomise(transformers.SiglipModel(config))
    vision = model.vision_model
    write("siglip2", model, SIGLIP, vision, vision.post_layernorm, 0, interpolate_pos_encoding=True)


if __name__ == "__main__":
    main()
