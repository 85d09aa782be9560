"""A decoder that no family knows, pruned and proven: python examples/new_model.py"""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import vla_pruner as vp

torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
model = Qwen3ForCausalLM(config).eval()
embeds = torch.randn(1, 80, 64)  # BOS, 64 visual tokens, 15 words

hidden = {}
for mode in ("drop", "mask"):
    where = vp.models.Decoder("model.layers", visual=slice(1, 65))
    with vp.prune(model, "fastv", keep=0.25, adapter=where, mode=mode), torch.no_grad():
        hidden[mode] = model(inputs_embeds=embeds).logits[:, -1]
difference = (hidden["drop"] - hidden["mask"]).abs().max()
print(f"dropping against hiding: {difference:.1e}")
assert difference < 1e-5
