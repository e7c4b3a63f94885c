"""peft's adapters for a tiny GPT-2, and what peft computes with them: run by a Python with peft.

    python tests/peft_reference.py fixtures tests/fixtures/peft    # writes the fixtures
    python tests/peft_reference.py logits ADAPTER OUT.npy          # logits with an adapter

The fixtures are in the repository, so that the tests need neither peft nor torch. The model is
that of oracle.random_weights(HPARAMS, seed=1, scale=0.2).
"""

import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import oracle

HPARAMS = SimpleNamespace(n_vocab=257, n_ctx=24, n_embd=16, n_head=2, n_layer=2)
TOKENS = np.random.default_rng(5).integers(0, 257, [2, 24])
PLACES = [0, 7, 23]

# Each adapter's configuration; what is not here is peft's default.
CASES = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]},
    "patterns": {
        "r": 4, "lora_alpha": 6, "target_modules": "all-linear",
        "rank_pattern": {"h.0.attn.c_attn": 2, r".*\.1\.mlp\.c_fc": 3, "attn.c_proj": 5},
        "alpha_pattern": {"mlp.c_proj": 3, "c_attn": 9},
    },
    "rslora_projections": {
        "r": 4, "lora_alpha": 8, "target_modules": ["c_proj"], "use_rslora": True,
    },
    "bias": {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn", "c_fc"], "bias": "lora_only"},
    "all_biases": {"r": 2, "lora_alpha": 4, "target_modules": ["mlp.c_proj"], "bias": "all"},
    "lora_bias": {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "lora_bias": True},
    "module": {
        "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "modules_to_save": ["ln_f", "ln_1"],
    },
    "positions": {"r": 2, "lora_alpha": 4, "target_modules": ["wpe", "c_attn"]},
    "bfloat16": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]},
    "dora": {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "use_dora": True},
    "embedding": {"r": 2, "lora_alpha": 4, "target_modules": ["wte", "c_attn"]},
    "trained_head": {
        "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "modules_to_save": ["lm_head"],
    },
}  # fmt: skip


def base_model():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=257, n_positions=24, n_embd=16, n_head=2, n_layer=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    network = GPT2LMHeadModel(config).eval()
    ends = {"g": "weight", "w": "weight", "b": "bias"}
    state = {}
    for name, value in oracle.random_weights(HPARAMS, seed=1, scale=0.2).items():
        parts = name.removeprefix("model/").split("/")
        if parts[0].startswith("h"):
            parts[:1] = ["h", parts[0][1:]]
        parts = (
            [*parts, "weight"] if parts[-1] in ("wte", "wpe") else [*parts[:-1], ends[parts[-1]]]
        )
        value = value[0] if name.endswith("/w") else value
        state[".".join(["transformer", *parts])] = torch.from_numpy(value)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    lacking, unknown = network.load_state_dict(state, strict=False)
    assert not unknown
    assert not [name for name in lacking if "attn.bias" not in name]
    return network


def logits(network):
    """Those after some of the tokens: [2, len(PLACES), n_vocab]."""
    import torch

    with torch.no_grad():
        return network(torch.from_numpy(TOKENS)).logits.float().numpy()[:, PLACES]


def write_case(name, options, folder):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    network = get_peft_model(base_model(), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    rng = np.random.default_rng(2)
    for parameter in network.parameters():
        if parameter.requires_grad:
            drawn = 0.2 * rng.standard_normal(parameter.shape).astype(np.float32)
            parameter.data += torch.from_numpy(drawn)
    if name == "bfloat16":
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        network.save_pretrained(folder)
        network.float()
    else:
        network.save_pretrained(folder)
    np.save(os.path.join(folder, "logits.npy"), logits(network))
    os.remove(os.path.join(folder, "README.md"))


def write_training(folder):
    """Gradients of an adapter that has moved from its start, and ten steps of Adam from there."""
    import torch
    from peft import PeftModel

    os.makedirs(folder)

    def started():
        source = os.path.join(folder, "start")
        return PeftModel.from_pretrained(base_model(), source, is_trainable=True).train()

    options = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"]}
    write_case("start", options, os.path.join(folder, "start"))
    tokens = torch.from_numpy(TOKENS)
    found = {}

    def named(network):
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                yield name.replace(".default", ""), parameter

    network = started()
    network(tokens, labels=tokens).loss.backward()
    found |= {f"gradient/{name}": p.grad.numpy() for name, p in named(network)}
    network = started()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = network(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found |= {f"after/{name}": p.detach().numpy() for name, p in named(network)}
    np.savez_compressed(os.path.join(folder, "training.npz"), losses=np.array(losses), **found)


def main():
    command, *arguments = sys.argv[1:]
    if command == "fixtures":
        (folder,) = arguments
        shutil.rmtree(folder, ignore_errors=True)
        for name, options in CASES.items():
            write_case(name, options, os.path.join(folder, name))
        write_training(os.path.join(folder, "training"))
    elif command == "logits":
        from peft import PeftModel

        adapter, out = arguments
        network = PeftModel.from_pretrained(base_model(), adapter).eval()
        np.save(out, logits(network))
    else:
        raise SystemExit(f"unknown: {command}")


if __name__ == "__main__":
    main()
