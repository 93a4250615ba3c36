"""Generation of krasserm/perceiver-io 0.6.0, the version on PyPI, for `benchmarks.generation --reference FOLDER`.

Both packages are called `perceiver`: this file runs as a script in a process of its own, with FOLDER on the path, and imports
nothing of this project. It prints one JSON object.
"""

import json
import resource
import sys
import time

import torch
from perceiver.model.text.clm import CausalLanguageModel, CausalLanguageModelConfig


@torch.no_grad()
def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    model = CausalLanguageModel(CausalLanguageModelConfig(**settings["model"])).eval()
    prompt = torch.randint(6, settings["model"]["vocab_size"], (settings["batch"], settings["prompt"]))
    seconds = {}
    for tokens in (1, 1, 1 + settings["tokens"]):  # the first one is the warm-up
        start = time.perf_counter()
        model.generate(tokens, prompt)
        seconds[tokens] = time.perf_counter() - start
    step = (seconds[1 + settings["tokens"]] - seconds[1]) / settings["tokens"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"prefill_ms": 1e3 * seconds[1], "step_ms": 1e3 * step, "peak_MiB": peak}))


if __name__ == "__main__":
    main()
