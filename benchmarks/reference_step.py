"""A training step of krasserm/perceiver-io's byte language model, for `benchmarks.gpu_check --reference FOLDER`.

Both packages are called `perceiver`: this file runs as a script in a process of its own, with FOLDER on the path, and imports
nothing of this project. It prints one JSON object.
"""

import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from perceiver.model.text.clm import CausalLanguageModel, CausalLanguageModelConfig


def main() -> None:
    settings = json.loads(sys.argv[1])
    device, cuda = torch.device(settings["device"]), settings["device"].startswith("cuda")
    layers = 1 if settings["tiny"] else 8
    config = CausalLanguageModelConfig(
        vocab_size=262, max_seq_len=4096, num_latents=512, num_channels=512, num_heads=8, num_self_attention_layers=layers,
        cross_attention_dropout=0.5,
    )  # fmt: skip
    model = CausalLanguageModel(config).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    ids = torch.randint(6, 262, (settings["batch"], 4097), device=device)
    times = []
    for _ in range(1 if settings["tiny"] else 7):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings["precision"] == "bf16"):
            logits = model(ids[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, -logits.shape[1] :].flatten())
        loss.backward()
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    print(json.dumps({"step_ms": 1e3 * statistics.median(times[2:] or times), "peak_bytes": peak, "loss": float(loss)}))


if __name__ == "__main__":
    main()
