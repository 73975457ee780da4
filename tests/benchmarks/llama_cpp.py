"""Whether llama.cpp computes a model of this architecture: tiny random models as GGUF files, run by llama.cpp itself.

    pip install gguf xllamacpp
    python -m tests.benchmarks.llama_cpp

Prints for each model the largest difference of a log-probability from a plain formulation of the model, and the median
relative difference as in checkpoint/loaders.py, or the error with which llama.cpp refuses the file. Everything is fp32.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hunyuan_pretrain.checkpoint.weight_map import to_hf
from hunyuan_pretrain.config.derived import rope_base
from hunyuan_pretrain.config.schema import ModelConfig
from hunyuan_pretrain.data.tokenizer import SPECIAL_TOKENS, byte_letters
from tests.helpers.tiny_export import ALPHA, random_tensors, reference_logits, tiny_model

PLAIN = {"cla_share_factor": 1, "moe_router_topk": 2}
MODELS: dict[str, dict[str, Any]] = {
    "top-2": PLAIN,
    "top-2, routed experts of another width": PLAIN | {"moe_ffn_hidden_size": 16},
    "top-1": PLAIN | {"moe_router_topk": 1},
    "CLA": PLAIN | {"cla_share_factor": 2},
    "no QK norm": PLAIN | {"qk_layernorm": False},
}
TOKENS = [258, *b"hello world, this is a test of llama"]
LENGTHS = (4, 8, 16, 24, len(TOKENS))


def model_of(name: str) -> ModelConfig:
    # ggml wants heads of at least 32
    return tiny_model(num_layers=4, hidden_size=64, kv_channels=32, ffn_hidden_size=32, **MODELS[name])


def write(model: ModelConfig, path: Path) -> None:
    """The model as llama.cpp's architecture hunyuan-moe, with the tiny tokenizer."""
    import gguf

    out = gguf.GGUFWriter(str(path), "hunyuan-moe")
    out.add_vocab_size(model.padded_vocab_size)
    out.add_context_length(4096)
    out.add_embedding_length(model.hidden_size)
    out.add_block_count(model.num_layers)
    out.add_head_count(model.num_attention_heads)
    out.add_head_count_kv(model.num_query_groups)
    out.add_key_length(model.head_dim)
    out.add_value_length(model.head_dim)
    out.add_rope_dimension_count(model.head_dim)
    out.add_rope_freq_base(rope_base(model.rotary_base, ALPHA, model.head_dim))
    out.add_layer_norm_rms_eps(model.layernorm_epsilon)
    out.add_feed_forward_length(model.expert_ffn_size)
    out.add_expert_feed_forward_length(model.expert_ffn_size)
    out.add_expert_shared_feed_forward_length(model.ffn_hidden_size)
    out.add_expert_count(model.num_moe_experts)
    out.add_expert_used_count(model.moe_router_topk)
    out.add_expert_shared_count(1)
    letters = byte_letters()
    names = [*(letters[byte] for byte in range(256)), "he", *SPECIAL_TOKENS]
    padding = [f"[PAD{number}]" for number in range(len(names), model.padded_vocab_size)]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("hunyuan")
    out.add_token_list(names + padding)
    kinds = gguf.TokenType
    out.add_token_types([kinds.NORMAL] * 257 + [kinds.CONTROL] * len(SPECIAL_TOKENS) + [kinds.UNUSED] * len(padding))
    out.add_token_merges(["h e"])
    map_of_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.HUNYUAN_MOE, model.num_layers)
    experts: dict[str, list[np.ndarray]] = {}
    for name, tensor in to_hf(model, random_tensors(model)):
        values = tensor.float().contiguous().numpy()
        parts = name.split(".")
        if "experts" in parts:  # the experts of a layer are one tensor
            experts.setdefault(f"blk.{parts[2]}.ffn_{parts[-2].removesuffix('_proj')}_exps.weight", []).append(values)
        else:
            out.add_tensor(map_of_names.get_name(name, try_suffixes=(".weight",)), values)
    for name, values_of in experts.items():
        out.add_tensor(name, np.stack(values_of))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def differences(name: str, path: Path) -> tuple[float, float]:
    """Largest difference of a log-probability, and median relative difference, over the lengths. Raises RuntimeError if
    llama.cpp refuses the file."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.fit_params = 256, 1, False, False
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    model = model_of(name)
    expected_SV = reference_logits(model, random_tensors(model))(torch.tensor([TOKENS]))[0].log_softmax(-1).double()
    largest, relative = 0.0, []
    for length in LENGTHS:
        # the log-probabilities are those before the bias, which only chooses a token that is a whole character
        request = {"n_predict": 1, "n_probs": model.padded_vocab_size, "cache_prompt": False, "temperature": 0.0}
        answer = server.handle_completions(request | {"prompt": TOKENS[:length], "logit_bias": [[ord("h"), 1000.0]]})
        found = {each["id"]: each["logprob"] for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
        actual = torch.tensor([found[token] for token in range(model.padded_vocab_size)], dtype=torch.float64)
        expected, difference = expected_SV[length - 1], actual - expected_SV[length - 1]
        largest = max(largest, difference.abs().max().item())
        relative.append(
            (difference - difference.mean()).pow(2).mean().sqrt().item() / expected.std(correction=0).item()
        )
    return largest, float(np.median(relative))


def main(arguments: list[str]) -> int:
    if arguments:
        name, path = arguments
        try:
            largest, relative = differences(name, Path(path))
        except RuntimeError as error:
            print(f"{name}: llama.cpp refuses it: {error}")
        else:
            print(f"{name}: log-probabilities differ by at most {largest:.2g}, relative {relative:.2g}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(MODELS):
            path = Path(folder) / f"{number}.gguf"
            write(model_of(name), path)
            # in a process of its own: llama.cpp may end it
            command = [sys.executable, "-m", "tests.benchmarks.llama_cpp", name, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            why = [line for line in done.stderr.splitlines() if "error" in line][:1]
            print(done.stdout.strip() or f"{name}: status {done.returncode}", *why, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
