"""Runs vLLM on one job; needs vLLM and this project's wheel, and nothing else of this repository.

    python tests/vllm/engine.py JOB.json RESULT.json

Job: `model`, a folder; `options` of vLLM's LLM; `prompts`, token ids; `new_tokens`; `rounds`, for each of which all
prompts are one batch: {"prompt_logprobs": true or false}. Result: `blocks` and `block_size` of the key/value cache as
vLLM states them, and for each round and prompt the tokens, their logprobs, the prompt's, and how many of its tokens
were found in the prefix cache. Instead of rounds, {"error": text} if vLLM raised.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that an error is raised here
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Load the model and continue the prompts greedily."""
    from vllm import LLM

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 4, "block_size": 32}
    llm = LLM(job["model"], **(options | job.get("options", {})))
    cache = llm.llm_engine.vllm_config.cache_config
    rounds = [one_round(llm, job["prompts"], job["new_tokens"], each) for each in job.get("rounds", [{}])]
    return {"blocks": cache.num_gpu_blocks, "block_size": cache.block_size, "rounds": rounds}


def one_round(llm: Any, prompts: list[list[int]], new_tokens: int, options: dict[str, bool]) -> list[dict[str, Any]]:
    """One batch of all prompts."""
    from vllm import SamplingParams

    wanted = 0 if options.get("prompt_logprobs") else None
    sampling = SamplingParams(
        temperature=0, max_tokens=new_tokens, logprobs=0, prompt_logprobs=wanted, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    results = []
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens, of_prompt = output.outputs[0].token_ids, (output.prompt_logprobs or [])[1:]
        of_tokens = output.outputs[0].logprobs
        results.append(
            {
                "tokens": list(tokens),
                "logprobs": [by_id[token].logprob for token, by_id in zip(tokens, of_tokens, strict=True)],
                "prompt_logprobs": [by_id[token].logprob for token, by_id in zip(prompt[1:], of_prompt, strict=False)],
                "cached_tokens": output.num_cached_tokens,
            }
        )
    return results


if __name__ == "__main__":
    try:
        result = run(json.loads(Path(sys.argv[1]).read_text()))
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    Path(sys.argv[2]).write_text(json.dumps(result))
